"""Whether computing stands still, and for how long deadlines must move along with that."""

from __future__ import annotations

from typing import Literal, TypeAlias

PauseMode: TypeAlias = Literal["abort", "retract", "in_place"]


class PauseGate:
    """While paused, who asks `stood_still_s` at each turn and moves all deadlines by it lets none run out."""

    def __init__(self) -> None:
        self._mode: PauseMode | None = None
        self._counted_until = 0.0

    @property
    def is_paused(self) -> bool:
        return self._mode is not None

    @property
    def mode(self) -> str:
        """Empty when it is not paused."""
        return self._mode or ""

    def pause(self, mode: PauseMode, now: float) -> None:
        """A second pause in another mode goes on from the first."""
        if self._mode is None:
            self._counted_until = now
        self._mode = mode

    def resume(self) -> bool:
        """False when it was not paused. What stood still until now must have been asked for before."""
        was_paused = self.is_paused
        self._mode = None
        return was_paused

    def stood_still_s(self, now: float) -> float:
        """Seconds since the last time that this was asked, or since the pause; 0 when not paused."""
        if self._mode is None:
            return 0.0
        passed_s = now - self._counted_until
        self._counted_until = now
        return passed_s
