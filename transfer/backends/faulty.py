"""A backend for tests: wraps another one and makes a share of its writes go wrong.

It keeps the contract of every backend, at its limits: a write that is reported as failed may still land, but
for no longer than `settle_s`; one that is not reported yet may land at any time, in part, or twice. Only
`corrupt` breaks the contract, as broken hardware would.

All decisions are made where the loop calls in; a thread of its own does nothing but wake the loop in time.
"""

from __future__ import annotations

import enum
import heapq
import itertools
import logging
import os
import random
import select
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import assert_never

from ...messages.memory_region import MemoryRegion
from ...runtime.completions import Completions
from ...runtime.errors import StartupError
from ..copy_plan import Run
from .base import TransferBackend, WriteResult, WriteState, bounds_error

logger = logging.getLogger(__name__)

LATE_S = 1.0  # a `late` write is sent so long after its failure at most
HELD_S = 0.25  # a timer that fires this late: the process was frozen, and what is late must not be sent now
CORRUPT_BYTES = 64  # at the start of a `corrupt` write
REASON = "the faulty backend made this write fail"


class Fault(enum.Enum):
    FAIL = "fail"  # nothing is sent
    LATE = "late"  # reported as failed at once; the bytes land within `settle_s`
    HALF = "half"  # the first half lands, then it fails
    DELAY = "delay"  # sent after `delay_s`; as it counts as started, it cannot be cancelled
    DUPLICATE = "duplicate"  # sent twice before it is reported as done
    CORRUPT = "corrupt"  # reported as done; the first bytes are other ones


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Which share of the writes goes wrong in which way. The shares add up to 1 at most."""

    shares: tuple[tuple[Fault, float], ...]
    seed: int = 0
    delay_s: float = 10.0

    @classmethod
    def parse(cls, text: str) -> FaultPlan:
        """From ``fail=0.05,late=0.1,seed=7,delay_s=3``. Raises StartupError."""
        shares: list[tuple[Fault, float]] = []
        seed, delay_s = 0, 10.0
        for item in text.split(","):
            name, _, value = item.strip().partition("=")
            try:
                if name == "seed":
                    seed = int(value)
                elif name == "delay_s":
                    delay_s = float(value)
                else:
                    shares.append((Fault(name), float(value)))
            except ValueError:
                known = ", ".join(fault.value for fault in Fault)
                raise StartupError(
                    f"--faulty {text}: {item!r} is no share of writes such as fail=0.05 ({known}), seed=N or "
                    "delay_s=X"
                ) from None
        if not all(0 <= share <= 1 for _, share in shares) or sum(share for _, share in shares) > 1:
            raise StartupError(f"--faulty {text}: shares are 0 to 1, and 1 in all at most")
        return cls(tuple(shares), seed, delay_s)


@dataclass(slots=True)
class _Write:
    """One write of the caller, and the sends of the wrapped backend that it is made of."""

    handle: int
    region: MemoryRegion
    run: Run
    fault: Fault | None
    num_sends_left: int = 1
    send: int | None = None  # its handle in the wrapped backend, while one is in flight
    has_landed: bool = False
    is_reported: bool = False


class FaultyBackend:
    """See TransferBackend. First contacts and `close` are those of the wrapped backend."""

    def __init__(self, inner: TransferBackend, plan: FaultPlan) -> None:
        self.inner = inner
        self.name = inner.name  # peers compare it, and need not know
        self.transport = inner.transport
        self.settle_s = inner.settle_s + (LATE_S if any(f is Fault.LATE for f, _ in plan.shares) else 0.0)
        self._plan = plan
        self._random = random.Random(plan.seed)
        self._pool_bytes = 0
        self._memory = memoryview(b"")  # the pool, and behind it what `corrupt` sends from
        self._writes: dict[int, _Write] = {}  # not reported yet, or reported and still landing; by handle
        self._write_of_send: dict[int, _Write] = {}
        self._contacts: dict[int, int] = {}  # send -> the caller's handle
        self._leaving: dict[str, MemoryRegion] = {}  # peers to let go of when the last late write has landed
        self._send_handles = itertools.count(1)
        self._results = Completions[WriteResult]()
        self._alarm = _Alarm()
        self._readable = select.epoll()
        for fd in (inner.fileno(), self._results.fileno(), self._alarm.fileno()):
            self._readable.register(fd, select.EPOLLIN)
        logger.warning("writes go wrong on purpose: %s", plan)

    @property
    def num_outstanding(self) -> int:
        return len(self._contacts) + sum(not write.is_reported for write in self._writes.values())

    def allocate(self, num_bytes: int) -> memoryview:
        self._pool_bytes = num_bytes
        self._memory = self.inner.allocate(num_bytes + CORRUPT_BYTES)
        return self._memory[:num_bytes]

    def register(self) -> MemoryRegion:
        return self.inner.register()

    def release(self) -> None:
        self.inner.release()

    def first_contact(self, handle: int, region: MemoryRegion) -> None:
        self._leaving.pop(region.session, None)
        send = next(self._send_handles)
        self._contacts[send] = handle
        self.inner.first_contact(send, region)

    def submit(self, handle: int, region: MemoryRegion, run: Run) -> None:
        reason = bounds_error(run, region, self._pool_bytes)
        if reason:
            self._results.push(WriteResult(handle, WriteState.FAILED, reason))
            return
        fault = self._draw()
        write = self._writes[handle] = _Write(handle, region, run, fault)
        if fault is not None:
            logger.info("write %d of %d bytes: %s", handle, run.num_bytes, fault.value)
        match fault:
            case None:
                self._send(write, run)
            case Fault.FAIL:
                self._report(write, WriteState.FAILED, REASON)
            case Fault.LATE:
                self._alarm.set(write.handle, self._random.uniform(0.0, LATE_S))
                self._report(write, WriteState.FAILED, REASON)
            case Fault.HALF:
                self._send(write, Run(run.source, run.dest, max(1, run.num_bytes // 2)))
            case Fault.DELAY:
                self._alarm.set(write.handle, self._plan.delay_s)
            case Fault.DUPLICATE | Fault.CORRUPT:
                write.num_sends_left = 2
                self._send(write, run)
            case _:
                assert_never(fault)

    def cancel(self, handles: Iterable[int]) -> None:
        writes = [write for handle in handles if (write := self._writes.get(handle)) is not None]
        self.inner.cancel([write.send for write in writes if write.send is not None and _may_cancel(write)])

    def disconnect(self, region: MemoryRegion) -> None:
        if any(write.region.session == region.session for write in self._writes.values()):
            self._leaving[region.session] = region
        else:
            self.inner.disconnect(region)

    def poll(self) -> list[WriteResult]:
        for handle, late_s in self._alarm.due():
            write = self._writes[handle]
            logger.info(
                "write %d, %s, is due since %.1f s", handle, write.fault and write.fault.value, late_s
            )
            if write.is_reported and late_s > HELD_S:
                self._forget(write)  # reported as failed, and this process was frozen since
            else:
                self._send(write, write.run)
        for result in self.inner.poll():
            if (contact := self._contacts.pop(result.handle, None)) is not None:
                self._results.push(WriteResult(contact, result.state, result.reason))
            else:
                self._on_send_ended(self._write_of_send.pop(result.handle), result)
        return self._results.drain()

    def fileno(self) -> int:
        return self._readable.fileno()

    def stuck_s(self, now: float) -> float:
        return self.inner.stuck_s(now)

    def close(self) -> None:
        self._alarm.close()
        self.inner.close()
        self._readable.close()
        self._results.close()

    # ---- what becomes of a write --------------------------------------------------------------------

    def _draw(self) -> Fault | None:
        drawn = self._random.random()
        for fault, share in self._plan.shares:
            drawn -= share
            if drawn < 0:
                return fault
        return None

    def _send(self, write: _Write, run: Run) -> None:
        write.num_sends_left -= 1
        write.send = next(self._send_handles)
        self._write_of_send[write.send] = write
        self.inner.submit(write.send, write.region, run)

    def _on_send_ended(self, write: _Write, result: WriteResult) -> None:
        write.send = None
        write.has_landed |= result.state is WriteState.DONE
        if write.is_reported:
            self._forget(write)
        elif result.state is not WriteState.DONE:
            self._report(write, result.state, result.reason)
        elif write.fault is Fault.HALF:
            self._report(write, WriteState.FAILED, REASON)
        elif write.num_sends_left:
            is_corrupt = write.fault is Fault.CORRUPT
            self._send(write, self._other_bytes(write.run) if is_corrupt else write.run)
        else:
            self._report(write, WriteState.DONE)

    def _other_bytes(self, run: Run) -> Run:
        """Into the place of the run's first bytes, what they are not."""
        num_bytes = min(CORRUPT_BYTES, run.num_bytes)
        right = bytes(self._memory[run.source : run.source + num_bytes])
        self._memory[self._pool_bytes : self._pool_bytes + num_bytes] = bytes(byte ^ 0x5A for byte in right)
        return Run(self._pool_bytes, run.dest, num_bytes)

    def _report(self, write: _Write, state: WriteState, reason: str = "") -> None:
        write.is_reported = True
        self._results.push(WriteResult(write.handle, state, reason))
        if write.fault is not Fault.LATE:  # which stays here until it has landed
            self._forget(write)

    def _forget(self, write: _Write) -> None:
        """Nothing of it is under way any more."""
        del self._writes[write.handle]
        region = self._leaving.get(write.region.session)
        if region is not None and not any(w.region.session == region.session for w in self._writes.values()):
            del self._leaving[region.session]
            self.inner.disconnect(region)


def _may_cancel(write: _Write) -> bool:
    """A write that has landed, wholly or in part, is not one of which nothing was sent."""
    return not write.has_landed and write.fault not in (Fault.LATE, Fault.DELAY)


class _Alarm:
    """Timers with a descriptor that is readable once one is due."""

    def __init__(self) -> None:
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake = threading.Condition()
        # What follows is guarded by `_wake`.
        self._timers: list[tuple[float, int]] = []  # a heap of (when, handle)
        self._closing = False
        self._thread = threading.Thread(target=self._ring, name="faulty-alarm", daemon=True)
        self._thread.start()

    def set(self, handle: int, after_s: float) -> None:
        with self._wake:
            heapq.heappush(self._timers, (time.monotonic() + after_s, handle))
            self._wake.notify()

    def due(self) -> list[tuple[int, float]]:
        """Handle, and by how many seconds it is late, of every timer that is over; each once."""
        now = time.monotonic()
        due: list[tuple[int, float]] = []
        with self._wake:
            while self._timers and self._timers[0][0] <= now:
                when, handle = heapq.heappop(self._timers)
                due.append((handle, now - when))
            if due:
                os.eventfd_write(self._event, 1)  # so that reading does not fail where nobody has rung yet
                os.eventfd_read(self._event)
                self._wake.notify()
        return due

    def fileno(self) -> int:
        return self._event

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        os.close(self._event)

    def _ring(self) -> None:
        with self._wake:
            while not self._closing:
                if not self._timers:
                    self._wake.wait()
                    continue
                wait_s = self._timers[0][0] - time.monotonic()
                if wait_s > 0:
                    self._wake.wait(wait_s)
                else:
                    os.eventfd_write(self._event, 1)
                    self._wake.wait()  # until it is taken
