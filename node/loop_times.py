"""How long the handling of each kind of message holds a node's loop: nothing else happens there meanwhile.

In wall time, and in processor time of the loop's own thread: what is between the two it stood aside, for
other processes on the same cores or a thread with the interpreter's lock.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import msgspec

from ..messages.operation import LoopTime

TURN = "turn"  # all that a step of the loop does between two waits
_NUM_KEPT = 256


@dataclass(slots=True)
class _Kind:
    count: int = 0
    longest_s: float = 0.0
    recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_KEPT))
    recent_own_s: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_KEPT))


class LoopTimes:
    """Percentiles are of the last 256 of a kind, the longest is of all."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}

    def handling(self, message: msgspec.Struct) -> AbstractContextManager[None]:
        return self.measured(str(message.__struct_config__.tag))

    @contextmanager
    def measured(self, kind: str) -> Iterator[None]:
        """What raises is not counted."""
        started_s, own_started_s = time.monotonic(), time.thread_time()
        yield
        self.add(kind, time.monotonic() - started_s, time.thread_time() - own_started_s)

    def add(self, kind: str, duration_s: float, own_s: float) -> None:
        """`own_s`: processor time of the thread."""
        times = self._kinds.setdefault(kind, _Kind())
        times.count += 1
        times.longest_s = max(times.longest_s, duration_s)
        times.recent_s.append(duration_s)
        times.recent_own_s.append(own_s)

    def summary(self) -> dict[str, LoopTime]:
        return {kind: _summary(times) for kind, times in self._kinds.items()}


def _summary(times: _Kind) -> LoopTime:
    recent, own = sorted(times.recent_s), sorted(times.recent_own_s)
    p99 = (99 * len(recent) - 1) // 100
    return LoopTime(
        count=times.count,
        last_s=times.recent_s[-1],
        p50_s=statistics.median_low(recent),
        p99_s=recent[p99],
        own_p99_s=own[p99],
        max_s=times.longest_s,
    )
