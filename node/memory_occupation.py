"""Gives the memory of weights and KV cache back to the host while nobody needs the node, and takes it again.

A node whose memory is released has no model to pair with: peers refuse it, routers send it nothing. It waits
to be idle first, and for every peer to have drained what could still be written. What takes long are jobs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..engine.job import AnyJob, Job
from ..messages.memory_region import MemoryRegion
from ..messages.peer import PeerIdentity
from ..messages.weights import MEMORY_TAGS, MemoryReply, MemoryTag, ReleaseMemory, ResumeMemory
from ..runtime.errors import PdserveError


@dataclass(frozen=True, slots=True)
class Announced:
    """Who the node is from now on, and where peers find its memory, rank by rank."""

    identity: PeerIdentity
    regions: tuple[MemoryRegion, ...]


class MemoryPort(Protocol):
    """The memory of a node, on all its ranks."""

    def move(self, before: frozenset[MemoryTag], after: frozenset[MemoryTag]) -> Callable[[], None]:
        """A job: what was released `before` and what is so `after`. Nothing runs, and no peer can write any
        more. It raises StartupError when a rank cannot, and then all of them are as they were."""

    def announce(self, *, is_released: bool) -> Announced:
        """Who the node is from now on. One whose memory is back is a new incarnation."""


@dataclass(frozen=True, slots=True)
class Done:
    """A reply to send, and who the node is now, where that has changed."""

    link: bytes | None = None
    reply: MemoryReply | None = None
    announced: Announced | None = None


@dataclass(frozen=True, slots=True)
class _Pending:
    link: bytes
    message: ReleaseMemory
    deadline: float


class MemoryOccupation:
    """One call at a time; another one meanwhile is refused."""

    def __init__(self, port: MemoryPort, start_job: Callable[[AnyJob[Done]], None]) -> None:
        self._port = port
        self._start_job = start_job
        self._pending: _Pending | None = None  # waits for the node to be idle
        self._is_moving = False  # in a job
        self._released: frozenset[MemoryTag] = frozenset()

    @property
    def takes_work(self) -> bool:
        return self._pending is None and not self._is_moving and not self._released

    @property
    def is_released(self) -> bool:
        """Or on the way there or back."""
        return self._is_moving or bool(self._released)

    @property
    def deadline(self) -> float:
        """When `poll` has something to do by time alone; infinity: never."""
        return math.inf if self._pending is None else self._pending.deadline

    def release(self, link: bytes, message: ReleaseMemory, now: float) -> Done:
        """The answer comes from `poll` or with a job, or now when it is a no."""
        tags = frozenset(message.tags)
        if refusal := self._busy():
            return self._no(link, message, refusal)
        if again := tags & self._released:
            return self._no(link, message, f"released already: {', '.join(_listed(again))}")
        self._pending = _Pending(link, message, now + message.timeout_s)
        return Done()

    def resume(self, link: bytes, message: ResumeMemory) -> Done:
        """The answer comes with a job, or now when it is a no or there is nothing to do."""
        tags = frozenset(message.tags)
        if refusal := self._busy():
            return self._no(link, message, refusal)
        if message.if_released:
            tags &= self._released
        if missing := tags - self._released:
            return self._no(link, message, f"not released: {', '.join(_listed(missing))}")
        if not tags:
            return Done(link, self._reply(message, success=True, text="nothing of it was released"))
        self._move(link, message, self._released - tags)
        return Done()

    def poll(self, now: float, *, idle: bool) -> Done:
        """`idle`: nothing runs here, no room is open or in quarantine, so no peer writes."""
        pending = self._pending
        if pending is None or (not idle and now < pending.deadline):
            return Done()
        self._pending = None
        if not idle:
            return self._no(pending.link, pending.message, "the node was not idle in time")
        tags = frozenset(pending.message.tags)
        announced = self._port.announce(is_released=True)
        self._move(pending.link, pending.message, self._released | tags)
        return Done(announced=announced)

    def _move(
        self, link: bytes, message: ReleaseMemory | ResumeMemory, released: frozenset[MemoryTag]
    ) -> None:
        """`released`: what is so afterwards."""
        run = self._port.move(self._released, released)
        self._is_moving = True
        self._start_job(Job("memory", run, lambda error: self._moved(link, message, released, error)))

    def _moved(
        self,
        link: bytes,
        message: ReleaseMemory | ResumeMemory,
        released: frozenset[MemoryTag],
        error: PdserveError | None,
    ) -> Done:
        self._is_moving = False
        before = self._released
        if error is None:
            self._released = released
        text = ", ".join(_listed(before ^ self._released)) if error is None else str(error)
        reply = self._reply(message, success=error is None, text=text, resumed=before - self._released)
        return Done(link, reply, None if self._released else self._port.announce(is_released=False))

    def _busy(self) -> str:
        in_progress = self._pending is not None or self._is_moving
        return "another release or resume is in progress" if in_progress else ""

    def _no(self, link: bytes, message: ReleaseMemory | ResumeMemory, why: str) -> Done:
        return Done(link, self._reply(message, success=False, text=why))

    def _reply(
        self,
        message: ReleaseMemory | ResumeMemory,
        *,
        success: bool,
        text: str,
        resumed: frozenset[MemoryTag] = frozenset(),
    ) -> MemoryReply:
        return MemoryReply(
            call_id=message.call_id,
            success=success,
            message=text,
            resumed=_listed(resumed),
            released=_listed(self._released),
        )


def _listed(tags: frozenset[MemoryTag]) -> tuple[MemoryTag, ...]:
    return tuple(tag for tag in MEMORY_TAGS if tag in tags)
