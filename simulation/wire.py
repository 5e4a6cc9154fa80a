"""One-sided writes, no better than the contract of a transfer backend allows.

A write that has started lands page by page, in any order. It may fail: nothing further is sent then, but
what was sent may land for `settle_s` longer. With `settle_s` 0 (shared memory) a write needs no help of the
receiver and stops with its sender. Otherwise bytes may wait on their way:

- for a frozen receiver, until it goes on, also when their sender was killed meanwhile;
- with a frozen sender, until that goes on; its peer has long lost it by then, and may have a new epoch;
- with a dead sender, for `settle_s` in its host's kernel.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from ..components.page_allocator import PageAllocator
from ..messages.memory_region import MemoryRegion
from ..messages.peer import RoomId
from ..transfer.backends.base import WriteResult, WriteState
from ..transfer.copy_plan import Run
from .clock import EventQueue
from .engine import WrongPage
from .network import Process
from .nodes import BACKEND
from .situations import Statistics
from .tokens import LAYOUT, PAGE_SIZE, Pool

HEARTBEAT_S = 2.0
FREEZES_S = (0.1, 0.2, 0.3, 1.0, 2.5)
DRAIN_S = 0.05  # bytes that waited for a frozen receiver land this soon after it goes on


@dataclass(slots=True)
class WireQuality:
    """How often a write is slow, fails, or is delivered twice. Rates of writes, times in seconds."""

    usual_s: float = 0.002
    slow_rate: float = 0.05
    slow_s: float = 6.0
    fail_rate: float = 0.05
    fail_but_deliver_rate: float = 0.02
    twice_rate: float = 0.05
    contact_fail_rate: float = 0.03
    freeze_rate: float = 0.0  # how often the receiver freezes while bytes of a failed write are on their way
    settle_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Memory:
    """A decode node's pool as peers reach it."""

    process: Process
    pool: Pool
    allocator: PageAllocator


@dataclass(slots=True, eq=False)
class _Write:
    handle: int
    room: RoomId
    memory: Memory | None  # None: nobody of this name is there any more
    copies: list[tuple[int, int]]  # source page, destination page
    state: WriteState | None = None
    has_started: bool = False
    started_at: float = 0.0
    landed: set[int] = field(default_factory=set)  # indices into copies
    num_sender_freezes: int = 0  # when it started


class SimulatedBackend:
    """The transfer backend of one life of a prefill node."""

    name = BACKEND
    transport = BACKEND

    def __init__(
        self,
        process: Process,
        memories: dict[str, Memory],
        events: EventQueue,
        generator: random.Random,
        quality: WireQuality,
        statistics: Statistics,
        freeze: Callable[[Process, float], None],
    ) -> None:
        self.process = process
        self.settle_s = quality.settle_s
        self.room_of_write: Callable[[int], RoomId]  # set when the node is composed
        self.source: Pool
        self._memories = memories
        self._events = events
        self._random = generator
        self._quality = quality
        self._statistics = statistics
        self._freeze = freeze  # a process, for so many seconds
        self._writes: dict[int, _Write] = {}  # without a result
        self._contacts: dict[int, float] = {}  # handle -> since when
        self._starts_at: dict[str, float] = {}  # session -> when its last write starts
        self._met: set[str] = set()
        self._results: list[WriteResult] = []

    # ---- SettlingMover ------------------------------------------------------------------------------

    @property
    def num_outstanding(self) -> int:
        return len(self._writes) + len(self._contacts)

    def first_contact(self, handle: int, region: MemoryRegion) -> None:
        self._met.add(region.session)
        self._contacts[handle] = self._events.now
        memory = self._memories.get(region.session)

        def arrive() -> None:
            if memory is None or not memory.process.is_alive:
                self._met_or_not(handle, "the peer is gone")
            elif self._random.random() < self._quality.contact_fail_rate:
                self._met_or_not(handle, "the peer could not be reached")
            elif memory.process.is_frozen:
                self._statistics.count("first contacts that hung on a frozen peer")
                self._when_it_goes_on(memory.process, arrive, lambda: self._met_or_not(handle, "it died"))
            else:
                self._met_or_not(handle, "")

        self._events.after(self._quality.usual_s * (0.5 + self._random.random()), arrive)

    def _met_or_not(self, handle: int, reason: str) -> None:
        def tell() -> None:
            del self._contacts[handle]
            if reason:
                self._statistics.count("first contacts that failed")
            self._end(WriteResult(handle, WriteState.FAILED if reason else WriteState.DONE, reason))

        self.process.do(tell)

    def submit(self, handle: int, region: MemoryRegion, run: Run) -> None:
        if region.session not in self._met:
            raise WrongPage(f"a write to {region.session}, which was not met")
        first, dest, num_pages = (n // LAYOUT.page_bytes for n in (run.source, run.dest, run.num_bytes))
        copies = [(first + index, dest + index) for index in range(num_pages)]
        memory = self._memories.get(region.session)
        write = self._writes[handle] = _Write(handle, self.room_of_write(handle), memory, copies)
        earliest = max(self._starts_at.get(region.session, 0.0), self._events.now)
        gap_s = self._quality.usual_s * 0.5 * self._random.random()
        if self._random.random() < self._quality.slow_rate:
            gap_s += self._random.random()  # a long queue: what was not started can be cancelled
        self._starts_at[region.session] = earliest + gap_s
        self._events.at(earliest + gap_s, lambda: self.process.do(lambda: self._start(write)))

    def cancel(self, handles: Iterable[int]) -> None:
        for handle in handles:
            write = self._writes.get(handle)  # None: it has ended, and its result waits to be polled
            if write is not None and not write.has_started:
                self._statistics.count("writes cancelled before they began")
                self._finish(write, WriteState.CANCELLED)

    def disconnect(self, region: MemoryRegion) -> None:
        memory = self._memories.get(region.session)
        if any(write.memory is memory for write in self._writes.values()):
            raise WrongPage(f"{region.session} is disconnected while a write to it is outstanding")
        self._met.discard(region.session)

    def poll(self) -> list[WriteResult]:
        results, self._results = self._results, []
        return results

    def fileno(self) -> int:
        return -1

    def stuck_s(self, now: float) -> float:
        return max((now - since for since in self._contacts.values()), default=0.0)

    def close(self) -> None:
        pass

    # ---- how a write goes ---------------------------------------------------------------------------

    def _start(self, write: _Write) -> None:
        if write.state is not None:
            return
        write.has_started = True
        write.started_at = self._events.now
        write.num_sender_freezes = self.process.num_freezes
        quality = self._quality
        if write.memory is None or not write.memory.process.is_alive:
            self._fail_after(quality.usual_s, write, "the peer is gone")
            return
        fate = self._random.random()
        length_s = quality.usual_s * (0.5 + self._random.random()) * len(write.copies)
        if self._random.random() < quality.slow_rate:
            length_s += self._random.random() * quality.slow_s
        if fate < quality.fail_rate + quality.fail_but_deliver_rate:
            delivers = fate < quality.fail_but_deliver_rate
            self._doom(write, length_s, delivers=delivers)
            return
        twice = self._random.random() < quality.twice_rate
        for index in range(len(write.copies)):
            arrive = partial(self._arrive, write, index, twice)
            self._events.after(length_s * self._random.random(), arrive)

    def _doom(self, write: _Write, length_s: float, *, delivers: bool) -> None:
        """It will fail after `length_s`: some pages are in place by then, some land later, some never do."""
        for index in range(len(write.copies)):
            when = self._random.random() * length_s
            if delivers or self._random.random() < 0.5:
                self._events.after(when, partial(self._arrive, write, index))
        if delivers:
            self._statistics.count("writes that failed though every byte arrived")
        self._fail_after(length_s, write, "the wire broke", delivers)

    def _fail_after(self, seconds: float, write: _Write, reason: str, delivers: bool = False) -> None:
        fail = partial(self._fail, write, reason, delivers)
        self._events.after(seconds, partial(self.process.do, fail))

    def _fail(self, write: _Write, reason: str, delivers: bool = False) -> None:
        """Reported now; what was sent may land for `settle_s` longer."""
        if not self.process.is_alive or write.state is not None:
            return
        self._statistics.count("writes that failed")
        if write.landed:
            self._statistics.count("writes of which a part had landed when they failed")
        self._finish(write, WriteState.FAILED, reason)
        self._leave_behind(write, 1.0 if delivers else 0.5, "pages landed after the failure was reported")

    def _leave_behind(self, write: _Write, share: float, situation: str) -> None:
        """The write is over for its sender; some of its pages are still on their way."""
        if self.settle_s == 0.0 or write.memory is None:
            return
        if self._random.random() < self._quality.freeze_rate:
            receiver, length_s = write.memory.process, self._random.choice(FREEZES_S)
            # Anywhere in the time in which bytes may land, and around its end.
            when = self.settle_s * self._random.choice((self._random.random(), 0.97, 0.99))
            self._events.after(when, lambda: self._freeze(receiver, length_s))
        for index, (source, _) in enumerate(write.copies):
            if index in write.landed or self._random.random() >= share:
                continue
            content = self.source.pages[source]
            is_half = self._random.random() < 0.3
            # Near the end of the time that the contract allows as often as anywhere else in it.
            share_of_time = self._random.random() if self._random.random() < 0.7 else 0.999
            self._events.after(
                share_of_time * self.settle_s,
                partial(self._arrive_late, write, index, content, is_half, situation),
            )

    def _arrive_late(
        self, write: _Write, index: int, content: tuple[int | None, ...], is_half: bool, situation: str
    ) -> None:
        assert write.memory is not None
        receiver = write.memory.process
        if receiver.is_frozen:

            def arrive() -> None:
                self._statistics.count("pages landed after their receiver was frozen and went on")
                self._arrive_late(write, index, content, is_half, situation)

            self._when_it_goes_on(receiver, arrive, lambda: None)
        elif receiver.is_alive:
            self._statistics.count(situation)
            self._land(write, index, content, is_half)

    def _arrive(self, write: _Write, index: int, twice: bool = False) -> None:
        """A page of a write whose end was not reported comes to its destination, if nothing is in its way."""
        if write.state is not None or index in write.landed:
            return
        assert write.memory is not None
        receiver = write.memory.process
        if not self.process.is_alive:
            return  # its host's kernel has what is left of it: see `die`
        if not receiver.is_alive:
            self._fail_after(self._random.random(), write, "reset by peer")
        elif receiver.is_frozen and self.settle_s:

            def arrive() -> None:
                self._statistics.count("pages landed after their receiver was frozen and went on")
                self._arrive(write, index)

            self._when_it_goes_on(receiver, arrive, lambda: self._arrive(write, index))
        elif self.process.is_frozen and (self.settle_s == 0.0 or self._random.random() < 0.7):
            self.process.do(lambda: self._arrive(write, index))
        else:
            if self.process.num_freezes > write.num_sender_freezes:
                self._statistics.count("pages landed after their sender was frozen and went on")
            self._land(write, index, self.source.pages[write.copies[index][0]])
            write.landed.add(index)
            if twice and not self.process.is_frozen:
                self._statistics.count("pages written twice")
                self._land(write, index, self.source.pages[write.copies[index][0]])
            if len(write.landed) == len(write.copies):
                if self._events.now - write.started_at > HEARTBEAT_S:
                    self._statistics.count("writes slower than a heartbeat")
                self.process.do(lambda: self._finish(write, WriteState.DONE))

    def _land(
        self, write: _Write, index: int, content: tuple[int | None, ...], is_half: bool = False
    ) -> None:
        assert write.memory is not None
        memory, page = write.memory, write.copies[index][1]
        if page not in memory.allocator.room_pages(write.room):
            raise WrongPage(
                f"a write of {write.room} lands on page {page} of {memory.process.name}, "
                f"which is {memory.allocator.describe(page)}"
            )
        self._events.note(f"page {page} of {memory.process.name} is written by {write.room}")
        if write.room in memory.allocator.quarantined_rooms():
            self._statistics.count("pages landed in quarantine")
        if is_half:
            self._statistics.count("pages written half")
            content = (*content[: PAGE_SIZE // 2], *memory.pool.pages[page][PAGE_SIZE // 2 :])
        memory.pool.pages[page] = content

    def _finish(self, write: _Write, state: WriteState, reason: str = "") -> None:
        if write.state is None:
            write.state = state
            del self._writes[write.handle]
            self._end(WriteResult(write.handle, state, reason))

    def _end(self, result: WriteResult) -> None:
        self._results.append(result)
        self.process.wake()

    def _when_it_goes_on(
        self, frozen: Process, then: Callable[[], None], if_it_died: Callable[[], None]
    ) -> None:
        """What its kernel holds for it comes to it soon after it goes on."""
        froze = frozen.num_freezes

        def look() -> None:
            if not frozen.is_alive:
                if_it_died()
            elif frozen.is_frozen:
                self._when_it_goes_on(frozen, then, if_it_died)
            else:
                then()

        def go_on() -> None:
            assert frozen.num_freezes == froze
            self._events.after(self._random.random() * DRAIN_S, look)

        frozen.when_over(go_on)

    def die(self) -> None:
        """Its process was killed: what its host's kernel has may still land, and no end is reported."""
        for write in list(self._writes.values()):
            if write.has_started:
                self._leave_behind(write, 0.5, "pages landed after their sender had died")
        self._writes.clear()
