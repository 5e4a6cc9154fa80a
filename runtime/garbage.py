"""The garbage collector looks at everything when nobody waits for it.

A full collection looks at every object there is. With one request of 16,384 choices in flight that is 150 ms,
in which no other stream gets its tokens, and it finds nothing: what is freed is freed by its count, and the
few cycles of a request die young, in the collections of what is new, which take milliseconds and stay.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

INTERVAL_S = 2.0
LONGEST_S = 600.0  # without a moment of rest, after which a pause is better than what may have gathered
_NEVER = (1 << 31) - 1


def only_young() -> None:
    """From now on the collector looks by itself at what is new alone, and never at what lives already."""
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _NEVER)


class FullCollections:
    """When they are due: there may be something to find, and nothing is in flight, or has been for long."""

    def __init__(self, now: float, num_young: int) -> None:
        """`num_young`: collections of what is new, so far. Each may leave something that a full one finds."""
        self._rested_at = now
        self._num_young = num_young

    def due(self, now: float, num_young: int, *, is_idle: bool) -> bool:
        if not is_idle and now - self._rested_at < LONGEST_S:
            return False
        self._rested_at = now
        is_due = num_young != self._num_young
        self._num_young = num_young
        return is_due


async def collect_when_idle(is_idle: Callable[[], bool]) -> None:
    """Looks every two seconds, for ever."""
    full = FullCollections(time.monotonic(), _num_young())
    while True:
        await asyncio.sleep(INTERVAL_S)
        if full.due(time.monotonic(), _num_young(), is_idle=is_idle()):
            gc.collect()


def _num_young() -> int:
    return sum(int(generation["collections"]) for generation in gc.get_stats()[:2])
