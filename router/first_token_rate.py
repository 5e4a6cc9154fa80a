"""How many first tokens come a second while there is a backlog.

Values and ``now`` in. Only time with a backlog counts: then the rate is what the nodes can do, otherwise it
is what clients ask. So idle time makes no rate stale, and a cluster that was never busy has none.
"""

from __future__ import annotations

from collections import deque

_MIN_WINDOW_S, _MAX_WINDOW_S = 1.0, 10.0


class FirstTokenRate:
    """`horizon_s`: how far ahead waits are told, which is also how far back the rate is measured."""

    def __init__(self, *, horizon_s: float) -> None:
        self._window_s = min(_MAX_WINDOW_S, max(_MIN_WINDOW_S, horizon_s))
        self._counted_s = 0.0  # time with a backlog, all in all
        self._came_at: deque[float] = deque()  # on that clock, within the window
        self._counts = False
        self._reached: float | None = None

    def advance(self, now: float, *, counts: bool) -> None:
        """Whether there was a backlog from the call before up to now."""
        if counts and self._reached is not None:
            self._counted_s += now - self._reached
        self._reached, self._counts = now, counts

    def came(self) -> None:
        """A first token, at the time that was reached."""
        if self._counts:
            self._came_at.append(self._counted_s)

    def per_s(self, unmeasured: float) -> float:
        """`unmeasured`: the rate for that part of the window that no backlog has filled yet."""
        measured_s = min(self._window_s, self._counted_s)
        while self._came_at and self._came_at[0] < self._counted_s - self._window_s:
            self._came_at.popleft()
        return (len(self._came_at) + unmeasured * (self._window_s - measured_s)) / self._window_s

    def forget(self) -> None:
        """What was measured tells nothing of what follows."""
        self._came_at.clear()
        self._counted_s, self._counts, self._reached = 0.0, False, None
