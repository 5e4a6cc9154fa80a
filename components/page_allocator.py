"""Owns the state of every KV page: who may touch it, and who gave it away.

    state              who may write  how a page gets there                how it leaves
    free               nobody         from every other state               reserve_exposed, allocate_private
    exposed(room)      one peer       reserve_exposed                      exposed_to_private, quarantine,
                                                                           release_room
    private(owner)     our kernels    allocate_private, exposed_to_private share, free_private
    shared(readers)    nobody         share                                drop_reader by the last reader
    quarantined(room)  late writes    quarantine                           release_room, once it is drained

A page is in exactly one state with one owner; every transition checks where the page comes from and raises
PageStateError before anything changes. Pages are plain indices into the KV pool, [0, num_pages).

Free pages are kept as maximal runs, because neighbours travel as one write: an allocation takes the
smallest run that holds it whole, else as few runs as possible.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..messages.peer import RoomId
from ..runtime.errors import BrokenInvariantError


class PageStateError(BrokenInvariantError):
    """A page was not in the state that a transition requires. Always a bug of ours, never a client's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCounts:
    """Pages by state; ``free + exposed + private + shared + quarantined == total``."""

    free: int
    exposed: int
    private: int
    shared: int
    quarantined: int
    total: int


class PageAllocator:
    """The states of ``num_pages`` pages. O(pages touched · log runs) per transition; holds no tensors.

    An *owner* of private pages is any hashable key, usually (request id, attempt, choice). A *room* is
    exposed or quarantined as a whole.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self._free = _FreeRuns()
        self._free.add([(0, num_pages)])
        self._exposed: dict[RoomId, list[int]] = {}
        self._quarantined: dict[RoomId, list[int]] = {}
        self._private: dict[Hashable, dict[int, None]] = {}  # owner -> its pages, oldest first
        self._readers: dict[int, int] = {}  # shared page -> number of readers, at least 1

    # ---- what there is ------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        return self._free.num_pages

    def counts(self) -> PageCounts:
        return PageCounts(
            free=self._free.num_pages,
            exposed=sum(map(len, self._exposed.values())),
            private=sum(map(len, self._private.values())),
            shared=len(self._readers),
            quarantined=sum(map(len, self._quarantined.values())),
            total=self.num_pages,
        )

    def private_pages(self, owner: Hashable) -> list[int]:
        """The owner's private pages in the order in which it got them; empty if it has none."""
        return list(self._private.get(owner, ()))

    def room_pages(self, room: RoomId) -> list[int]:
        """The pages of an exposed or quarantined room, in the order of its destination list."""
        return list(self._exposed.get(room) or self._quarantined.get(room) or ())

    def private_owners(self) -> list[Hashable]:
        return list(self._private)

    def exposed_rooms(self) -> list[RoomId]:
        return list(self._exposed)

    def quarantined_rooms(self) -> list[RoomId]:
        return list(self._quarantined)

    def shared_pages(self) -> list[int]:
        return list(self._readers)

    def num_readers(self, page: int) -> int:
        """Readers of a shared page; 0 if it is not shared."""
        return self._readers.get(page, 0)

    # ---- rooms --------------------------------------------------------------------------------------

    def reserve_exposed(self, room: RoomId, n: int) -> list[int] | None:
        """Free → exposed(room): `n` ≥ 1 pages that a peer may write. None if fewer are free.

        Returns the pages in writing order: one contiguous run if any run is long enough, else the fewest.
        """
        if n < 1:
            raise ValueError(f"a room needs at least one page, got {n}")
        if room in self._exposed or room in self._quarantined:
            raise PageStateError(f"{room} has pages already")
        if n > self.num_free:
            return None
        pages = self._free.take(n)
        self._exposed[room] = pages
        return list(pages)

    def exposed_to_private(self, room: RoomId, owner: Hashable) -> list[int]:
        """Exposed(room) → private(owner): every write is in place, now our kernels may extend them."""
        pages = self._pop_exposed(room)
        self._private.setdefault(owner, {}).update(dict.fromkeys(pages))
        return pages

    def quarantine(self, room: RoomId) -> list[int]:
        """Exposed(room) → quarantined(room): the room failed, late writes may still land."""
        pages = self._pop_exposed(room)
        self._quarantined[room] = pages
        return list(pages)

    def release_room(self, room: RoomId) -> list[int]:
        """Exposed or quarantined → free. The caller vouches that no write can reach these pages any more."""
        held_in = self._quarantined if room in self._quarantined else self._exposed
        if room not in held_in:
            raise PageStateError(f"{room} is neither exposed nor quarantined")
        pages = held_in.pop(room)
        self._free.add(runs_of(pages))
        return pages

    # ---- private pages ------------------------------------------------------------------------------

    def allocate_private(self, owner: Hashable, n: int, near: int | None = None) -> list[int] | None:
        """Free → private(owner): `n` pages, or None (and nothing taken) if fewer are free.

        With `near`, the owner's last page so far, its successors are taken first if they are free, so a
        sequence that grows page by page stays one run. `n` 0 returns an empty list.
        """
        if n < 0:
            raise ValueError(f"cannot allocate {n} pages")
        if n > self.num_free:
            return None
        pages = self._free.take_from(near + 1, n) if near is not None else []
        pages += self._free.take(n - len(pages))
        if pages:
            self._private.setdefault(owner, {}).update(dict.fromkeys(pages))
        return pages

    def free_private(self, owner: Hashable, pages: Sequence[int] | None = None) -> list[int]:
        """Private(owner) → free: these pages, or all that the owner has (it may have none)."""
        freed = self.private_pages(owner) if pages is None else list(pages)
        self._remove_private(owner, freed)
        self._free.add(runs_of(freed))
        return freed

    # ---- shared pages -------------------------------------------------------------------------------

    def share(self, pages: Sequence[int], owner: Hashable) -> None:
        """Private(owner) → shared, with one reader. Nobody writes these pages from here on."""
        self._remove_private(owner, pages)
        self._readers.update(dict.fromkeys(pages, 1))

    def add_reader(self, pages: Sequence[int]) -> None:
        """One reader more for each of these shared pages."""
        self._check_shared(pages)
        for page in pages:
            self._readers[page] += 1

    def drop_reader(self, pages: Sequence[int]) -> list[int]:
        """One reader fewer for each of these shared pages; returns those that had no other: free now."""
        self._check_shared(pages)
        freed = []
        for page in pages:
            self._readers[page] -= 1
            if self._readers[page] == 0:
                del self._readers[page]
                freed.append(page)
        self._free.add(runs_of(freed))
        return freed

    # ---- checks -------------------------------------------------------------------------------------

    def describe(self, page: int) -> str:
        """The page's state in words, for messages. Slow: looks through every owner."""
        for room, pages in self._exposed.items():
            if page in pages:
                return f"exposed to {room}"
        for room, pages in self._quarantined.items():
            if page in pages:
                return f"quarantined for {room}"
        for owner, owned in self._private.items():
            if page in owned:
                return f"private to {owner!r}"
        if page in self._readers:
            return f"shared by {self._readers[page]} readers"
        return "free" if 0 <= page < self.num_pages else f"outside [0, {self.num_pages})"

    def violations(self) -> list[str]:
        """What is wrong: a page in no state or in two, an owner without pages, free runs that do not merge.

        O(num_pages); for idle times and tests.
        """
        found = self._free.violations()
        states: list[tuple[str, Iterable[int]]] = [("free", self._free.pages())]
        states += [(f"exposed to {room}", pages) for room, pages in self._exposed.items()]
        states += [(f"quarantined for {room}", pages) for room, pages in self._quarantined.items()]
        states += [(f"private to {owner!r}", pages) for owner, pages in self._private.items()]
        states.append(("shared", self._readers))

        state_of: list[str | None] = [None] * self.num_pages
        for state, pages in states:
            num_held = 0
            for page in pages:
                num_held += 1
                if not 0 <= page < self.num_pages:
                    found.append(f"page {page} is {state} but the pool has {self.num_pages} pages")
                elif state_of[page] is not None:
                    found.append(f"page {page} is {state} and also {state_of[page]}")
                else:
                    state_of[page] = state
            if num_held == 0 and state not in ("free", "shared"):
                found.append(f"no page is {state}, yet the owner is kept")
        found += [f"page {page} is in no state" for page, state in enumerate(state_of) if state is None]
        found += [f"shared page {page} has {n} readers" for page, n in self._readers.items() if n < 1]
        return found

    def check(self) -> None:
        """Raise PageStateError, listing every violation, unless each page is in one state with one owner."""
        if found := self.violations():
            raise PageStateError("; ".join(found))

    # ---- helpers ------------------------------------------------------------------------------------

    def _pop_exposed(self, room: RoomId) -> list[int]:
        if room not in self._exposed:
            raise PageStateError(f"{room} is not exposed")
        return self._exposed.pop(room)

    def _remove_private(self, owner: Hashable, pages: Sequence[int]) -> None:
        owned = self._private.get(owner, {})
        self._check_distinct(pages)
        for page in pages:
            if page not in owned:
                raise PageStateError(f"page {page} is {self.describe(page)}, not private to {owner!r}")
        for page in pages:
            del owned[page]
        if not owned:
            self._private.pop(owner, None)

    def _check_shared(self, pages: Sequence[int]) -> None:
        self._check_distinct(pages)
        for page in pages:
            if page not in self._readers:
                raise PageStateError(f"page {page} is {self.describe(page)}, not shared")

    @staticmethod
    def _check_distinct(pages: Sequence[int]) -> None:
        if len(set(pages)) != len(pages):
            raise PageStateError(f"a page is named twice in {list(pages)}")


def runs_of(pages: Iterable[int]) -> list[tuple[int, int]]:
    """The maximal runs (start, length) that these distinct pages form, in ascending order."""
    runs: list[tuple[int, int]] = []
    start = length = 0
    for page in sorted(pages):
        if length and page == start + length:
            length += 1
            continue
        if length:
            runs.append((start, length))
        start, length = page, 1
    if length:
        runs.append((start, length))
    return runs


class _FreeRuns:
    """Free pages as maximal runs, found by either end and by length.

    The order by length is a sorted list: with 100,000 pages an insertion moves at most a few hundred
    kilobytes of pointers, which is less than a tree in Python would cost.
    """

    def __init__(self) -> None:
        self.num_pages = 0
        self._length_at: dict[int, int] = {}  # first page of a run -> its length
        self._start_before: dict[int, int] = {}  # page after the last of a run -> its first page
        self._by_length: list[tuple[int, int]] = []  # (length, start), ascending

    def take(self, n: int) -> list[int]:
        """Remove `n` ≤ num_pages pages: the head of the smallest run that holds them all, else whole
        longest runs first (which takes the fewest) and the rest from the smallest run that holds it."""
        pages: list[int] = []
        while n:
            # The smallest run of at least n pages, the lowest one among equals; past the end: none is.
            at = bisect_left(self._by_length, (n, 0))
            length, start = self._by_length[at] if at < len(self._by_length) else self._by_length[-1]
            taken = min(n, length)
            pages += self.take_from(start, taken)
            n -= taken
        return pages

    def take_from(self, start: int, n: int) -> list[int]:
        """Remove up to `n` pages from the run that begins at `start`; none if no run begins there."""
        length = self._length_at.get(start, 0)
        taken = min(n, length)
        if not taken:
            return []
        self._remove(start, length)
        if taken < length:
            self._insert(start + taken, length - taken)
        return list(range(start, start + taken))

    def add(self, runs: Iterable[tuple[int, int]]) -> None:
        """Put back runs (start, length) of pages that were not free; each merges with its neighbours."""
        for start, length in runs:
            before = self._start_before.get(start)
            if before is not None:
                self._remove(before, start - before)
                start, length = before, length + start - before
            after = self._length_at.get(start + length)
            if after is not None:
                self._remove(start + length, after)
                length += after
            self._insert(start, length)

    def pages(self) -> Iterable[int]:
        for start, length in self._length_at.items():
            yield from range(start, start + length)

    def violations(self) -> list[str]:
        runs = sorted(self._length_at.items())
        found = [
            f"free runs at {start} and {next_start} touch or overlap"
            for (start, length), (next_start, _) in pairwise(runs)
            if start + length >= next_start
        ]
        if self._by_length != sorted((length, start) for start, length in runs):
            found.append("free runs by length differ from free runs by start")
        if self._start_before != {start + length: start for start, length in runs}:
            found.append("free runs by end differ from free runs by start")
        if self.num_pages != sum(length for _, length in runs):
            found.append(f"num_free is {self.num_pages}, the free runs hold another number")
        return found

    def _insert(self, start: int, length: int) -> None:
        self._length_at[start] = length
        self._start_before[start + length] = start
        insort(self._by_length, (length, start))
        self.num_pages += length

    def _remove(self, start: int, length: int) -> None:
        del self._length_at[start]
        del self._start_before[start + length]
        del self._by_length[bisect_left(self._by_length, (length, start))]
        self.num_pages -= length
