"""What every transfer backend offers, and the queue that its writes wait in.

The loop names each write by a handle, submits it, sleeps on the backend's file descriptor among its other
ones, and collects results by `poll`. No call blocks: the moving is done on the backend's own thread.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ...messages.memory_region import MemoryRegion
from ..copy_plan import Run

SCRATCH_BYTES = 8  # written by the first contact; behind the pool, where no page lies
PAGE_ALIGNMENT = 4096


class WriteState(enum.Enum):
    """How a write ended. There is no other end, and none of them is reached by a timeout."""

    DONE = "done"  # the bytes are in place
    FAILED = "failed"  # nothing further will be sent; what was sent may land for `settle_s` longer
    CANCELLED = "cancelled"  # nothing was ever sent


@dataclass(frozen=True, slots=True)
class WriteResult:
    handle: int
    state: WriteState
    reason: str = ""  # of a failure, one that a person can act on


class Mover(Protocol):
    """Moves bytes one-sided from one pool of this node into a peer's registered memory.

    Handles are chosen by the caller, unique while the backend lives; each gets exactly one result.
    Writes to one peer start in the order of submission; peers take turns.
    """

    def first_contact(self, handle: int, region: MemoryRegion) -> None:
        """Meets a peer by an 8-byte write to its scratch bytes.

        Only to be called right after the peer has answered on the control link: meeting a frozen peer can
        hold the engine for a minute.
        """

    def submit(self, handle: int, region: MemoryRegion, run: Run) -> None:
        """Queues a write to a peer that was met. A run outside of either pool fails, and nothing is sent."""

    def cancel(self, handles: Iterable[int]) -> None:
        """Drops those of `handles` that were not started. The others end as they would have, and handles
        that were never submitted here are ignored: another rank's mover has them."""

    def disconnect(self, region: MemoryRegion) -> None:
        """Lets go of what is held for a peer; no write to it may be outstanding."""

    def poll(self) -> list[WriteResult]:
        """Every result since the last call, each once."""

    def stuck_s(self, now: float) -> float:
        """For how long the engine has been inside one call that should take milliseconds; 0: it is well."""


class TransferBackend(Mover, Protocol):
    """A mover in this process, with the pool that it moves from and that peers write into.

    `poll` makes `fileno` unreadable until the next result.
    """

    @property
    def name(self) -> str: ...

    @property
    def transport(self) -> str:
        """What is really in use: ``shm``, ``tcp`` or ``rdma``."""

    @property
    def settle_s(self) -> float:
        """How much longer the bytes of a failed write may land."""

    @property
    def num_outstanding(self) -> int:
        """Writes and first contacts without a result so far."""

    def allocate(self, num_bytes: int) -> memoryview:
        """Zeroed, page-aligned memory for the pool, once. It stays mapped while anything refers to it."""

    def register(self) -> MemoryRegion:
        """Makes the allocated memory writable for peers. Both sides do: RDMA needs the source registered."""

    def release(self) -> None:
        """Withdraws the memory and gives its pages back to the host; its addresses stay. No write is under
        way, from here or to here. `register` makes it usable again, zeroed."""

    def fileno(self) -> int:
        """Readable while `poll` has results."""

    def close(self) -> None:
        """Stops moving bytes and withdraws the registered memory. Unfinished writes get no result."""


def bounds_error(run: Run, region: MemoryRegion, source_bytes: int) -> str:
    """Why `run` must not be sent; empty when it may be. The scratch bytes are no part of the pool."""
    dest_bytes = region.scratch_address - region.address
    if run.num_bytes <= 0:
        return f"a run of {run.num_bytes} bytes"
    if run.source < 0 or run.source + run.num_bytes > source_bytes:
        return f"source bytes [{run.source}, {run.source + run.num_bytes}) lie outside of {source_bytes}"
    if run.dest < 0 or run.dest + run.num_bytes > dest_bytes:
        return f"destination bytes [{run.dest}, {run.dest + run.num_bytes}) lie outside of {dest_bytes}"
    return ""


def page_aligned(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_ALIGNMENT) * PAGE_ALIGNMENT


@dataclass(frozen=True, slots=True)
class Write:
    handle: int
    region: MemoryRegion
    run: Run


class FairQueue:
    """Queued writes: in order within a peer, peers in turn, a bounded number of bytes in flight to each.

    The bound keeps one long hand-off from filling the wire before another peer's, or a cancel, comes to
    word; what is still queued can be cancelled at no cost. Not thread-safe.
    """

    def __init__(self, max_bytes_per_peer: int) -> None:
        self._max_bytes_per_peer = max_bytes_per_peer
        self._queued: dict[str, dict[int, Write]] = {}  # session -> handle -> write; the first key is next
        self._session_of: dict[int, str] = {}  # queued handles only
        self._bytes_in_flight: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._session_of)

    def put(self, write: Write) -> None:
        session = write.region.session
        self._queued.setdefault(session, {})[write.handle] = write
        self._session_of[write.handle] = session

    def cancel(self, handle: int) -> bool:
        """True when `handle` was queued, and is no more."""
        session = self._session_of.pop(handle, None)
        if session is None:
            return False
        self._remove(session, handle)
        return True

    def take(self) -> Write | None:
        """The next write that may start, now in flight; None when none may."""
        for session, writes in self._queued.items():
            in_flight = self._bytes_in_flight.get(session, 0)
            handle, write = next(iter(writes.items()))
            if in_flight == 0 or in_flight + write.run.num_bytes <= self._max_bytes_per_peer:
                self._bytes_in_flight[session] = in_flight + write.run.num_bytes
                del self._session_of[handle]
                remaining = self._queued.pop(session)
                del remaining[handle]
                if remaining:
                    self._queued[session] = remaining  # at the end: the next peer's turn
                return write
        return None

    def finished(self, write: Write) -> None:
        """A write that was taken has ended."""
        session = write.region.session
        left = self._bytes_in_flight[session] - write.run.num_bytes
        if left:
            self._bytes_in_flight[session] = left
        else:
            del self._bytes_in_flight[session]

    def _remove(self, session: str, handle: int) -> None:
        writes = self._queued[session]
        del writes[handle]
        if not writes:
            del self._queued[session]
