"""A request on the decode node, and each of its choices."""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field
from typing import assert_never

from ..components.output_streamer import StreamKey
from ..components.prefix_cache import PrefixMatch, num_reusable_tokens
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
    """One attempt of one request: the choices that it carries, and what it waits for."""

    key: StreamKey
    message: GenerateRequest
    arrived_s: float
    deadline_s: float
    sequences: list[Sequence]
    state: RequestState = RequestState.WAITING
    state_since_s: float = 0.0
    match: PrefixMatch | None = None  # WAITING: the longest cached prefix of its prompt,
    match_generation: int = -1  # at this state of the cache
    num_cached: int = 0  # leading tokens that the prefix cache held when it was admitted
    room: RoomId | None = None  # HANDOFF
    verified_pages: tuple[int, ...] = ()  # HANDOFF: whose digests prefill sends along
    num_prefilled: int = 0  # LOCAL_PREFILL: prompt tokens computed, or in a forward
    prompt_hidden_states: list[bytes] = field(default_factory=list)  # LOCAL_PREFILL: of each chunk
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)  # LOCAL_PREFILL
    has_decoded: bool = False  # its first step after the hand-off is done
    reached_s: float = 0.0  # where the spans of its timeline end so far
    has_first_token: bool = False

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens whose KV must be here before decoding: prompt and kept output."""
        return len(self.message.prompt_ids) + len(self.message.output_ids)

    @property
    def prefill_ids(self) -> tuple[int, ...]:
        """These tokens."""
        return (*self.message.prompt_ids, *self.message.output_ids)

    @property
    def reusable_tokens(self) -> int:
        """How many of them, from the first on, may come from the prefix cache."""
        message = self.message
        return num_reusable_tokens(
            self.num_prefill_tokens, message.sampling, has_output=bool(message.output_ids)
        )

    def num_computed(self, sequence: Sequence) -> int:
        """Leading tokens of a choice whose KV is in its pages, once no forward writes into them."""
        match self.state:
            case RequestState.WAITING | RequestState.HANDOFF:
                return 0
            case RequestState.LOCAL_PREFILL:
                return self.num_prefilled if sequence is self.sequences[0] else 0
            case RequestState.RUNNING:
                return len(sequence.token_ids) - 1
            case _:
                assert_never(self.state)

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
