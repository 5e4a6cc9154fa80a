"""The mover of another rank of this replica, as rank 0's loop sees it.

The engine and the pool are in the rank's own process. What rank 0 asks for travels down the rank's pipe and
what came of it travels back, by the handles that rank 0 chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from ...messages.memory_region import MemoryRegion
from ...messages.ranks import CancelRuns, LeaveRegion, MeetRegion, WriteRun, WritesEnded
from ..copy_plan import Run
from .base import WriteResult, WriteState


class RankMover:
    """See Mover."""

    def __init__(self, send: Callable[[msgspec.Struct], None]) -> None:
        self._send = send
        self._results: list[WriteResult] = []
        self._meeting: dict[int, float | None] = {}  # handle of a first contact -> since when; None: just now

    def first_contact(self, handle: int, region: MemoryRegion) -> None:
        self._meeting[handle] = None
        self._send(MeetRegion(handle=handle, region=region))

    def submit(self, handle: int, region: MemoryRegion, run: Run) -> None:
        """The KV that `run` carries is in the rank's pool already: rank 0 has the forward's result, which it
        cannot have before every rank has given its part of the last layer's attention."""
        message = WriteRun(
            handle=handle, region=region, source=run.source, dest=run.dest, num_bytes=run.num_bytes
        )
        self._send(message)

    def cancel(self, handles: Iterable[int]) -> None:
        self._send(CancelRuns(handles=tuple(handles)))

    def disconnect(self, region: MemoryRegion) -> None:
        self._send(LeaveRegion(region=region))

    def take(self, message: WritesEnded) -> None:
        """What the rank reported."""
        for end in message.ends:
            self._meeting.pop(end.handle, None)
            self._results.append(WriteResult(end.handle, WriteState(end.state), end.reason))

    def poll(self) -> list[WriteResult]:
        results, self._results = self._results, []
        return results

    def stuck_s(self, now: float) -> float:
        """How long the rank's oldest first contact has lasted, as far as this loop has looked."""
        for handle, since in self._meeting.items():
            if since is None:
                self._meeting[handle] = now
        return max((now - since for since in self._meeting.values() if since is not None), default=0.0)
