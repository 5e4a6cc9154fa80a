"""A request on the decode node, and each of its choices."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from ..components.output_streamer import StreamKey
from ..components.prefix_cache import PrefixMatch
from ..messages.node import GenerateRequest
from ..messages.work import Work


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one attempt. The KV of every token but the last is in `pages` while it runs."""

    key: StreamKey
    choice: int
    # Prompt, kept output, and what this attempt sampled. An array while it runs: a step may read all of it.
    token_ids: list[int] | array[int]
    num_prompt_tokens: int  # of the prompt alone
    pages: list[int] = field(default_factory=list)  # those of `prefix`, then its own
    prefix: PrefixMatch | None = None  # locked in the prefix cache from admission to the end
    growth: int = 0  # pages that it may still come to need
    promised: int = 0  # of these, pages that are kept free for it
    in_forward: bool = False  # a forward on the engine thread writes into its pages
    is_finished: bool = False

    @property
    def owner(self) -> tuple[StreamKey, int]:
        """Names its private pages."""
        return (self.key, self.choice)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(slots=True, eq=False)
class DecodeRequest:
    """One attempt of one request, with the choices that it carries. Which stage has it says what it waits
    for: `waiting.py`, `handoffs.py` or `running.py`."""

    key: StreamKey
    message: GenerateRequest
    work: Work  # the message's, without the choices that were cancelled while it waited
    arrived_s: float
    deadline_s: float
    sequences: list[Sequence]
    number: int = 0  # in order of arrival
    since_s: float = 0.0  # when its stage got it
    num_cached: int = 0  # leading tokens that the prefix cache held when it was admitted
    match: PrefixMatch | None = None  # before that: the longest cached prefix of its prompt,
    match_generation: int = -1  # at this state of the cache
    reached_s: float = 0.0  # where the spans of its timeline end so far
    has_first_token: bool = False
    has_decoded: bool = False  # its first step after the prompt is done

    @classmethod
    def of(
        cls, key: StreamKey, message: GenerateRequest, *, number: int, now: float, reached_s: float
    ) -> DecodeRequest:
        return cls(
            key=key,
            number=number,
            message=message,
            work=message.work,
            arrived_s=now,
            deadline_s=now + message.deadline_s,
            sequences=[
                Sequence(
                    key=key,
                    choice=choice,
                    token_ids=list(message.work.token_ids),
                    num_prompt_tokens=len(message.work.prompt_ids),
                )
                for choice in message.work.choices
            ],
            since_s=now,
            reached_s=reached_s,
        )

    @property
    def live_sequences(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if not sequence.is_finished]
