"""Checks what must hold between the parts: no page without an owner, no request in two places.

Each part checks itself (``violations``); here they are compared with one another. Used by the schedulers when
they are idle and by every test at its end. All violations are collected, since the first is seldom the cause.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping

from ..messages.peer import RoomId
from ..runtime.errors import BrokenInvariantError
from .page_allocator import PageAllocator
from .prefix_cache import PrefixCache

# A check looks at every page, which takes milliseconds: not between two requests that follow one another.
IDLE_FOR_S = 1.0


class IdleCheck:
    """When an idle node checks itself: once per idle period, when it has lasted a while."""

    def __init__(self) -> None:
        self._due_at = math.inf  # busy, or checked already
        self._was_idle = True

    @property
    def deadline(self) -> float:
        """Infinity: nothing is to be checked."""
        return self._due_at

    def is_due(self, now: float, *, idle: bool) -> bool:
        """To be asked at every turn of the loop; true once per idle period."""
        if idle and not self._was_idle:
            self._due_at = now + IDLE_FOR_S
        elif not idle:
            self._due_at = math.inf
        self._was_idle = idle
        if now < self._due_at:
            return False
        self._due_at = math.inf
        return True


class InvariantViolation(BrokenInvariantError):  # noqa: N818, it is a finding
    """What does not hold, one sentence each in `violations`. Ends the process: it is a bug of ours."""

    def __init__(self, violations: Iterable[str]) -> None:
        self.violations = list(violations)
        super().__init__("; ".join(self.violations))


def check_pages(
    allocator: PageAllocator,
    caches: Collection[PrefixCache],
    *,
    owners: Collection[Hashable],
    open_rooms: Collection[RoomId] = (),
) -> None:
    """Raise InvariantViolation unless every page is in one state with one owner that is alive. At any time.

    `owners` may hold private pages (they may also have none yet), `open_rooms` are the rooms that the
    hand-off knows, failed ones in quarantine included.
    """
    _raise_if(_page_violations(allocator, caches, owners, open_rooms))


def check_requests(states: Mapping[str, Collection[Hashable]]) -> None:
    """Raise InvariantViolation unless every request is in one state. `states`: name → the requests in it."""
    _raise_if(_request_violations(states))


def check_idle(
    allocator: PageAllocator,
    caches: Collection[PrefixCache],
    *,
    states: Mapping[str, Collection[Hashable]],
    open_rooms: Collection[RoomId] = (),
) -> None:
    """Raise InvariantViolation unless an idle node holds nothing but its cache: free + cached == total.

    `open_rooms` may name rooms that wait in quarantine for a peer that cannot be reached; their pages are all
    that may be missing. No request is in any state, nothing is exposed, private or locked.
    """
    counts = allocator.counts()
    found = _page_violations(allocator, caches, (), open_rooms)
    for state, requests in states.items():
        found += [f"idle, yet {request!r} is in {state}" for request in requests]
    found += [f"idle, yet {room} is exposed" for room in allocator.exposed_rooms()]
    found += [
        f"idle, yet a prefix cache has {cache.num_locked} locked pages"
        for cache in caches
        if cache.num_locked
    ]
    num_cached = sum(cache.num_pages for cache in caches)
    if counts.free + num_cached + counts.quarantined != counts.total:
        found.append(
            f"idle, yet free + cached is {counts.free} + {num_cached} of {counts.total} pages: {counts}"
        )
    _raise_if(found)


def _page_violations(
    allocator: PageAllocator,
    caches: Collection[PrefixCache],
    owners: Collection[Hashable],
    open_rooms: Collection[RoomId],
) -> list[str]:
    found = allocator.violations()
    cached: set[int] = set()
    num_cached = 0
    for cache in caches:
        found += cache.violations()
        num_cached += cache.num_pages
        cached.update(cache.pages())
    if num_cached != len(cached):
        found.append("two prefix caches hold the same page")
    shared = set(allocator.shared_pages())
    found += [f"page {page} is in a prefix cache, but not shared" for page in sorted(cached - shared)]
    found += [f"page {page} is shared, but nobody reads it" for page in sorted(shared - cached)]
    for owner in allocator.private_owners():
        if owner not in owners:
            num_pages = len(allocator.private_pages(owner))
            found.append(f"{num_pages} pages are private to {owner!r}, which is no request here")
    for room in (*allocator.exposed_rooms(), *allocator.quarantined_rooms()):
        if room not in open_rooms:
            found.append(f"{len(allocator.room_pages(room))} pages are held for {room}, which is not open")
    return found


def _request_violations(states: Mapping[str, Collection[Hashable]]) -> list[str]:
    found: list[str] = []
    state_of: dict[Hashable, str] = {}
    for state, requests in states.items():
        for request in requests:
            if request in state_of:
                found.append(f"{request!r} is in {state} and also in {state_of[request]}")
            state_of[request] = state
    return found


def _raise_if(found: list[str]) -> None:
    if found:
        raise InvariantViolation(found)
