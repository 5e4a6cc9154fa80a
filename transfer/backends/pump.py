"""The thread that carries writes to an engine which moves bytes by itself, and asks it how they went.

Two facts shape it. An engine may hold a lock of its own for a minute while it meets a frozen peer: so
writes are submitted by the pump, never by the loop; each first contact has a thread of its own; and while
one is inside the engine the pump submits nothing but goes on checking what is in flight. And engines offer
no descriptor to sleep on: so the pump asks again after CHECK_INTERVAL_S, but only while a write is in
flight.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from ...messages.memory_region import MemoryRegion
from ...runtime.completions import Completions
from ...runtime.containment import Containment, nobody_waits
from ..copy_plan import MAX_RUN_BYTES, Run
from .base import FairQueue, Write, WriteResult, WriteState

CHECK_INTERVAL_S = 0.0003
# A write that is pending for this long is on its way to a peer that is frozen or out of reach, or so long
# that a later answer is nothing beside it: it is asked for less often.
STALLED_AFTER_S = 1.0
STALLED_CHECK_INTERVAL_S = 0.02
MAX_BYTES_IN_FLIGHT = 2 * MAX_RUN_BYTES  # toward one peer: the next run is queued in the engine, no more


class RefusedError(Exception):
    """The engine did not take a write: nothing was sent. The message says why."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a transfer ended in the engine."""

    state: WriteState
    reason: str = ""


class PumpedEngine(Protocol):
    """What the pump asks of an engine. A transfer is a number that the engine's side chooses."""

    def meet(self, region: MemoryRegion) -> int:
        """Starts the 8-byte write of a first contact. May take as long as the engine does. RefusedError."""

    def start(self, write: Write) -> int:
        """Starts a write to a peer that was met, which takes microseconds. RefusedError."""

    def check(self, transfer: int) -> Ended | None:
        """None while it is under way. Not asked again once it has ended."""

    def let_go(self, region: MemoryRegion) -> None:
        """Drops what is held for a peer."""


@dataclass(frozen=True, slots=True)
class _InFlight:
    handle: int
    started: float
    write: Write | None  # None: a first contact


@dataclass(frozen=True, slots=True)
class _Refused:
    reason: str


class WritePump:
    """The moving half of a TransferBackend: everything that concerns writes. Its methods mean what theirs
    do."""

    def __init__(self, name: str, engine: PumpedEngine) -> None:
        self._name = name
        self._engine = engine
        self._completions = Completions[WriteResult]()
        self._containment = Containment()  # of the pump and the contacts
        self._in_flight: dict[int, _InFlight] = {}  # transfer -> , oldest first; the pump's own
        self._wake = threading.Condition()
        # What follows is guarded by `_wake`.
        self._queue = FairQueue(MAX_BYTES_IN_FLIGHT)
        self._met: list[tuple[int, _InFlight]] = []  # first contacts on their way to `_in_flight`
        self._leaving: list[MemoryRegion] = []
        self._outstanding: set[int] = set()
        self._contacts_since: dict[int, float] = {}  # handle -> when its thread entered the engine
        self._submitting_since: float | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"{name}-pump", daemon=True)
        self._thread.start()

    @property
    def num_outstanding(self) -> int:
        with self._wake:
            return len(self._outstanding)

    def first_contact(self, handle: int, region: MemoryRegion) -> None:
        with self._wake:
            self._outstanding.add(handle)
            self._contacts_since[handle] = time.monotonic()
        name = f"{self._name}-contact-{handle}"
        threading.Thread(target=self._meet, args=(handle, region), name=name, daemon=True).start()

    def submit(self, handle: int, region: MemoryRegion, run: Run) -> None:
        """The run lies inside both pools."""
        with self._wake:
            self._outstanding.add(handle)
            self._queue.put(Write(handle, region, run))
            self._wake.notify_all()

    def refuse(self, handle: int, reason: str) -> None:
        """Ends a write that is not submitted."""
        self._completions.push(WriteResult(handle, WriteState.FAILED, reason))

    def cancel(self, handles: Iterable[int]) -> None:
        with self._wake:
            cancelled = [handle for handle in handles if self._queue.cancel(handle)]
            self._outstanding.difference_update(cancelled)
        for handle in cancelled:
            self._completions.push(WriteResult(handle, WriteState.CANCELLED, "cancelled"))

    def disconnect(self, region: MemoryRegion) -> None:
        with self._wake:
            self._leaving.append(region)
            self._wake.notify_all()

    def poll(self) -> list[WriteResult]:
        return self._completions.drain()

    def fileno(self) -> int:
        return self._completions.fileno()

    def stuck_s(self, now: float) -> float:
        with self._wake:
            since = [*self._contacts_since.values()]
            if self._submitting_since is not None:
                since.append(self._submitting_since)
        return max(0.0, now - min(since)) if since else 0.0

    def close(self) -> bool:
        """Stops. False when the engine is stuck inside a call, and must not be touched any more."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
            entered_engine = bool(self._contacts_since) or self._submitting_since is not None
        if not entered_engine:  # a stuck engine must not keep the process from ending
            self._thread.join()
        self._completions.close()
        return not entered_engine

    # ---- a contact's own thread ---------------------------------------------------------------------

    def _meet(self, handle: int, region: MemoryRegion) -> None:
        with self._wake:  # what was held for the same peer goes first
            while any(leaving.session == region.session for leaving in self._leaving) and not self._closing:
                self._wake.wait()
        started = self._engine_does("a first contact", lambda: self._engine.meet(region))
        with self._wake:
            del self._contacts_since[handle]
            if isinstance(started, _Refused):
                self._outstanding.discard(handle)
            else:
                self._met.append((started, _InFlight(handle, time.monotonic(), write=None)))
            self._wake.notify_all()
        if isinstance(started, _Refused):
            self.refuse(handle, started.reason)

    def _engine_does(self, kind: str, start: Callable[[], int]) -> int | _Refused:
        """The transfer that was started. A region that the engine does not take for one is a peer's fault."""

        def transfer() -> int | _Refused:
            try:
                return start()
            except RefusedError as error:
                return _Refused(str(error))

        return self._containment.value_of(kind, transfer, _Refused)

    # ---- the pump's thread --------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait_for_work():
            while (write := self._take()) is not None:
                self._start(write)
            self._check_in_flight()

    def _wait_for_work(self) -> bool:
        """Sleeps while there is nothing to do, a moment while there is only something to check."""
        with self._wake:
            if self._in_flight and not self._closing:
                self._wake.wait(self._check_interval_s())
            while not (self._closing or self._in_flight or self._met or self._leaving or self._may_submit()):
                self._wake.wait()
            self._in_flight.update(self._met)
            self._met.clear()
            leaving = [*self._leaving]
        for region in leaving:
            with self._containment.around("a disconnect", nobody_waits):
                self._engine.let_go(region)
        with self._wake:
            del self._leaving[: len(leaving)]
            if leaving:
                self._wake.notify_all()
            return not self._closing

    def _check_interval_s(self) -> float:
        youngest = self._in_flight[next(reversed(self._in_flight))]
        is_stalled = time.monotonic() - youngest.started > STALLED_AFTER_S
        return STALLED_CHECK_INTERVAL_S if is_stalled else CHECK_INTERVAL_S

    def _may_submit(self) -> bool:
        return bool(self._queue) and not self._contacts_since

    def _take(self) -> Write | None:
        with self._wake:
            write = self._queue.take() if self._may_submit() and not self._closing else None
            self._submitting_since = None if write is None else time.monotonic()
            return write

    def _start(self, write: Write) -> None:
        in_flight = _InFlight(write.handle, time.monotonic(), write)
        started = self._engine_does("a write", lambda: self._engine.start(write))
        if isinstance(started, _Refused):
            self._end(in_flight, WriteState.FAILED, started.reason)
        else:
            self._in_flight[started] = in_flight

    def _check_in_flight(self) -> None:
        for transfer, in_flight in list(self._in_flight.items()):
            ended = self._engine.check(transfer)
            if ended is not None:
                del self._in_flight[transfer]
                self._end(in_flight, ended.state, ended.reason)

    def _end(self, ended: _InFlight, state: WriteState, reason: str = "") -> None:
        with self._wake:
            self._outstanding.discard(ended.handle)
            if ended.write is not None:
                self._queue.finished(ended.write)
        self._completions.push(WriteResult(ended.handle, state, reason))
