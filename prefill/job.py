"""One room's work on the prefill node."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field

from ..components.prefix_cache import PrefixMatch, num_reusable_tokens
from ..messages.peer import PrefillRequest, RoomId
from ..messages.sampling import TokenLogprob
from ..messages.timeline import Span


class JobState(enum.Enum):
    WAITING = "waiting"  # for all pages of its prompt
    COMPUTING = "computing"  # chunks run; finished pages are on the wire
    SENDING = "sending"  # the first token has left; the last pages are on the wire


@dataclass(slots=True)
class PrefillJob:
    """What the prefill scheduler knows of one open room.

    Token positions, in order:
    [0, num_cached)                 held by the prefix cache, locked by this job
    [num_cached, num_computed)      KV is in our pool
    [num_computed, num_scheduled)   in a forward that runs or waits on the engine thread
    [num_scheduled, num_tokens)     to do
    """

    message: PrefillRequest
    token_ids: tuple[int, ...]  # prompt and kept output
    state: JobState = JobState.WAITING
    state_since_s: float = 0.0
    match: PrefixMatch | None = None  # locked from COMPUTING on
    pages: list[int] = field(default_factory=list)  # one per page of token_ids, cached ones first
    num_cached: int = 0
    num_computed: int = 0
    num_scheduled: int = 0
    num_digested: int = 0  # pages of which the digests that were asked for are made, or being made
    num_forwards: int = 0  # on the engine thread right now
    submitted_s: deque[float] = field(default_factory=deque)  # when each of those was
    is_over: bool = False  # the room has ended; a forward may still write into its pages
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    prompt_hidden_states: list[bytes] = field(default_factory=list)  # of each chunk
    spans: list[Span] = field(default_factory=list)  # so far
    reached_s: float = 0.0  # where they end: its arrival, or the end of its last forward

    @property
    def room(self) -> RoomId:
        return self.message.room

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_unscheduled(self) -> int:
        """Tokens that a next forward may compute."""
        is_open = self.state is JobState.COMPUTING and not self.is_over
        return self.num_tokens - self.num_scheduled if is_open else 0

    @property
    def reusable_tokens(self) -> int:
        """How many leading tokens may come from the prefix cache."""
        message = self.message
        return num_reusable_tokens(self.num_tokens, message.sampling, has_output=bool(message.output_ids))

    def enter(self, state: JobState, now: float) -> None:
        self.state = state
        self.state_since_s = now
