"""How fast writes to one peer really are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..messages.node import PeerTraffic

RECENT_S = 5.0  # of time with writes outstanding: older bytes count for less and less


@dataclass(slots=True)
class WireMeter:
    """Counts the bytes in place at a peer, and the time during which writes to it were outstanding.

    Waiting for another peer's turn is such time: it is the rate that a hand-off sees. While the peer takes
    nothing, the rate falls.
    """

    _num_bytes: int = 0
    _busy_s: float = 0.0
    _recent_bytes: float = 0.0
    _recent_busy_s: float = 0.0
    _num_outstanding: int = 0
    _counted_until: float = 0.0

    def submitted(self, now: float) -> None:
        self._count_until(now)
        self._num_outstanding += 1

    def ended(self, num_bytes: int, now: float) -> None:
        """One write has ended with `num_bytes` in place: none, when it failed or was cancelled."""
        self._count_until(now)
        self._num_outstanding -= 1
        self._num_bytes += num_bytes
        self._recent_bytes += num_bytes

    def traffic(self, now: float) -> PeerTraffic:
        self._count_until(now)
        speed = self._recent_bytes / self._recent_busy_s if self._recent_busy_s > 0 else 0.0
        return PeerTraffic(num_bytes=self._num_bytes, busy_s=self._busy_s, bytes_per_s=speed)

    def _count_until(self, now: float) -> None:
        if self._num_outstanding:
            busy_s = now - self._counted_until
            kept = math.exp(-busy_s / RECENT_S)
            self._busy_s += busy_s
            self._recent_busy_s = self._recent_busy_s * kept + busy_s
            self._recent_bytes *= kept
        self._counted_until = now
