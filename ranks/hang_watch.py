"""Whether the engine hangs in a step: on one rank of several, because another one does not answer."""

from __future__ import annotations

from ..engine.engine_thread import Progress
from ..runtime.timing import Timing

TIMES_EXPECTED = 10.0


class HangWatch:
    """Counts for how long one step has run while this loop was awake: after a freeze no step looks hung."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._progress: Progress | None = None
        self._awake_s = 0.0
        self._last_tick = 0.0

    def hung_s(self, progress: Progress | None, now: float) -> float:
        """For how long the step in `progress` has hung; 0: it does not, or there is none."""
        if progress is None or progress is not self._progress:
            self._progress = progress
            self._awake_s = 0.0
        else:
            self._awake_s += min(now - self._last_tick, self._timing.longest_tick_s)
        self._last_tick = now
        if progress is None or self._awake_s <= max(
            self._timing.hang_s, TIMES_EXPECTED * progress.expected_s
        ):
            return 0.0
        return self._awake_s
