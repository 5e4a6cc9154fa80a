"""How long the handling of each kind of message holds a node's loop: nothing else happens there meanwhile."""

from __future__ import annotations

import statistics
from collections import deque
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


class LoopTimes:
    """Percentiles are of the last 256 of a kind, the longest is of all."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}

    def handled(self, message: msgspec.Struct, duration_s: float) -> None:
        self.add(str(message.__struct_config__.tag), duration_s)

    def add(self, kind: str, duration_s: float) -> None:
        times = self._kinds.setdefault(kind, _Kind())
        times.count += 1
        times.longest_s = max(times.longest_s, duration_s)
        times.recent_s.append(duration_s)

    def summary(self) -> dict[str, LoopTime]:
        return {kind: _summary(times) for kind, times in self._kinds.items()}


def _summary(times: _Kind) -> LoopTime:
    recent = sorted(times.recent_s)
    return LoopTime(
        count=times.count,
        last_s=times.recent_s[-1],
        p50_s=statistics.median_low(recent),
        p99_s=recent[(99 * len(recent) - 1) // 100],
        max_s=times.longest_s,
    )
