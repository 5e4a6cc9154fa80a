"""Whether the engine hangs in a step: on one rank of several, because another one does not answer."""

from __future__ import annotations

from ..engine.engine_thread import Progress

MIN_S = 10.0
TIMES_EXPECTED = 10.0
LONGEST_TICK_S = 1.0  # a longer one was a hold of this very process, and says nothing of the engine


class HangWatch:
    """Counts for how long one step has run while this loop was awake: after a freeze no step looks hung."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._awake_s = 0.0
        self._last_tick = 0.0

    def hung_s(self, progress: Progress | None, now: float) -> float:
        """For how long the step in `progress` has hung; 0: it does not, or there is none."""
        if progress is None or progress is not self._progress:
            self._progress = progress
            self._awake_s = 0.0
        else:
            self._awake_s += min(now - self._last_tick, LONGEST_TICK_S)
        self._last_tick = now
        if progress is None or self._awake_s <= max(MIN_S, TIMES_EXPECTED * progress.expected_s):
            return 0.0
        return self._awake_s
