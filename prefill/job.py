"""One room's work on the prefill node."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field

from ..components.prefix_cache import PrefixMatch
from ..components.prompt_job import PromptJob
from ..messages.peer import PrefillRequest, RoomId
from ..messages.timeline import Span


class JobState(enum.Enum):
    WAITING = "waiting"  # for all pages of its prompt
    COMPUTING = "computing"  # chunks run; finished pages are on the wire
    SENDING = "sending"  # the first token has left; the last pages are on the wire


@dataclass(slots=True)
class PrefillJob:
    """What the prefill scheduler knows of one open room."""

    message: PrefillRequest
    prompt: PromptJob
    state: JobState = JobState.WAITING
    state_since_s: float = 0.0
    match: PrefixMatch | None = None  # locked from COMPUTING on
    num_digested: int = 0  # pages of which the digests that were asked for are made, or being made
    submitted_s: deque[float] = field(default_factory=deque)  # when each of its forwards was
    is_over: bool = False  # the room has ended; a forward may still write into its pages
    spans: list[Span] = field(default_factory=list)  # so far
    reached_s: float = 0.0  # where they end: its arrival, or the end of its last forward

    @property
    def room(self) -> RoomId:
        return self.message.room

    @property
    def num_unscheduled(self) -> int:
        """Tokens that a next forward may compute."""
        is_open = self.state is JobState.COMPUTING and not self.is_over
        return self.prompt.num_unscheduled if is_open else 0

    def enter(self, state: JobState, now: float) -> None:
        self.state = state
        self.state_since_s = now
