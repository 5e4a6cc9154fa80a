"""How far another process's wall clock is ahead of ours, measured by the pings that are sent anyway.

A ping leaves at t0, the answer that tells the peer's time arrives at t1: the peer's clock was read between
them, so (peer's time − the middle) is its lead, wrong by at most half the round trip. The fastest round
trip of the latest ones counts. A lead within its own error is taken for 0: two processes of one host, or
hosts kept together by NTP or PTP, are not moved apart by the noise of a ping.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

_KEPT = 16  # pings, one a second: an NTP step is followed within as many seconds


class _Sample(NamedTuple):
    error_s: float
    lead_s: float


class PeerClock:
    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=_KEPT)

    def measured(self, sent_unix_s: float, answered_unix_s: float, peer_unix_s: float) -> None:
        """One ping: two times of our clock, and what the peer's showed in between."""
        middle = (sent_unix_s + answered_unix_s) / 2
        self._samples.append(_Sample((answered_unix_s - sent_unix_s) / 2, peer_unix_s - middle))

    @property
    def lead_s(self) -> float:
        """Add it to our time to get the peer's. 0 before the first ping, and when it is within the error."""
        best = min(self._samples, default=_Sample(0.0, 0.0))
        return best.lead_s if abs(best.lead_s) > best.error_s else 0.0


class PeerClocks:
    """One `PeerClock` a peer, and its ping that is on the way."""

    def __init__(self) -> None:
        self._clocks: dict[str, PeerClock] = {}
        self._pinged: dict[str, tuple[int, float]] = {}  # peer -> its latest ping's number, when it left

    def pinged(self, peer: str, seq: int, unix_s: float) -> None:
        self._pinged[peer] = (seq, unix_s)

    def answered(self, peer: str, seq: int, unix_s: float, peer_unix_s: float) -> None:
        """An answer to another ping than the latest, or one that tells no time, says nothing."""
        pinged_seq, pinged_unix_s = self._pinged.get(peer, (-1, 0.0))
        if seq == pinged_seq and peer_unix_s:
            self._clocks.setdefault(peer, PeerClock()).measured(pinged_unix_s, unix_s, peer_unix_s)

    def lead_s(self, peer: str) -> float:
        clock = self._clocks.get(peer)
        return 0.0 if clock is None else clock.lead_s

    def forget(self, peer: str) -> None:
        self._clocks.pop(peer, None)
        self._pinged.pop(peer, None)
