"""Which conversations' pages a decode node keeps before all others, until they are closed or idle too long.

A session pins the pages of the turn of it that ended last. Pinned pages are evicted last and not never: a
request that needs pages takes them from the session used longest ago, so sessions block nobody.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from ..components.prefix_cache import PrefixCache, PrefixMatch
from ..runtime.errors import BrokenInvariantError


@dataclass(slots=True)
class _Pin:
    match: PrefixMatch
    idle_timeout_s: float
    idle_until: float | None = None  # None: from the next turn of the loop on


class SessionPins:
    """`max_pages`: that all sessions together may pin."""

    def __init__(self, cache: PrefixCache, *, max_pages: int) -> None:
        self._cache = cache
        self._max_pages = max_pages
        self._pins: OrderedDict[str, _Pin] = OrderedDict()  # by session id, least recently used first

    def __len__(self) -> int:
        return len(self._pins)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._pins

    def hold(self, session_id: str, match: PrefixMatch, idle_timeout_s: float) -> None:
        """Pin these pages in place of those that the session pinned before. Over the bound, the sessions that
        were used longest ago pin none any more, in the end not even this one."""
        self._cache.pin(match)
        self.close(session_id)
        self._pins[session_id] = _Pin(match, idle_timeout_s)
        while self._cache.num_pinned > self._max_pages:
            self.release_oldest()

    def touch(self, session_id: str) -> None:
        """A turn of this session begins."""
        if (pin := self._pins.get(session_id)) is not None:
            pin.idle_until = None
            self._pins.move_to_end(session_id)

    def close(self, session_id: str) -> bool:
        """False: it pins nothing here."""
        pin = self._pins.pop(session_id, None)
        if pin is None:
            return False
        self._cache.unpin(pin.match)
        return True

    def release_oldest(self) -> bool:
        """Others need pages: the session used longest ago pins none any more. False: there is none."""
        return bool(self._pins) and self.close(next(iter(self._pins)))

    def clear(self) -> None:
        while self.release_oldest():
            pass

    def poll(self, now: float) -> None:
        """Let go of what was idle for too long."""
        for session_id, pin in list(self._pins.items()):
            if pin.idle_until is None:
                pin.idle_until = now + pin.idle_timeout_s
            elif now >= pin.idle_until:
                self.close(session_id)

    @property
    def deadline(self) -> float | None:
        """When `poll` has something to do by time alone."""
        return min(
            (pin.idle_until for pin in self._pins.values() if pin.idle_until is not None), default=None
        )

    def check(self) -> None:
        """Raises RuntimeError unless what is pinned in the cache is what sessions pin, within the bound."""
        pages = {page for pin in self._pins.values() for page in pin.match.pages}
        if not len(pages) == self._cache.num_pinned <= self._max_pages:
            raise BrokenInvariantError(
                f"sessions pin {len(pages)} pages of at most {self._max_pages}, the cache says "
                f"{self._cache.num_pinned}"
            )
