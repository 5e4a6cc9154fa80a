"""A request on the decode node, and each of its choices."""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field

from ..components.output_streamer import StreamKey
from ..messages.node import GenerateRequest
from ..messages.peer import RoomId
from ..messages.sampling import TokenLogprob


class RequestState(enum.Enum):
    WAITING = "waiting"  # for pages, and for places in the batch
    HANDOFF = "handoff"  # its pages are exposed to a prefill node
    LOCAL_PREFILL = "local_prefill"  # this node computes the prompt itself
    RUNNING = "running"


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one attempt. The KV of every token but the last is in `pages` while it runs."""

    key: StreamKey
    choice: int
    # Prompt, kept output, and what this attempt sampled. An array while it runs: a step may read all of it.
    token_ids: list[int] | array[int]
    num_prompt_tokens: int  # of the prompt alone
    pages: list[int] = field(default_factory=list)
    shared_pages: list[int] = field(default_factory=list)  # those of `pages` that other choices read too
    growth: int = 0  # pages that are promised to it and not allocated yet
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
    """One attempt of one request: the choices that it carries, and what it waits for."""

    key: StreamKey
    message: GenerateRequest
    arrived_s: float
    deadline_s: float
    sequences: list[Sequence]
    state: RequestState = RequestState.WAITING
    state_since_s: float = 0.0
    room: RoomId | None = None  # HANDOFF
    num_prefilled: int = 0  # LOCAL_PREFILL: prompt tokens computed, or in a forward
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)  # LOCAL_PREFILL
    has_decoded: bool = False  # its first step after the hand-off is done
    reached_s: float = 0.0  # where the spans of its timeline end so far
    has_first_token: bool = False

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens whose KV must be here before decoding: prompt and kept output."""
        return len(self.message.prompt_ids) + len(self.message.output_ids)

    @property
    def choices(self) -> tuple[int, ...]:
        """Those that are asked for; without the ones that were cancelled while it waited."""
        return tuple(sequence.choice for sequence in self.sequences)

    @property
    def live_sequences(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if not sequence.is_finished]

    def enter(self, state: RequestState, now: float) -> None:
        self.state = state
        self.state_since_s = now
