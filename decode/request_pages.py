"""The pages of requests on a decode node: reserved, adopted from a hand-off, forked, grown, given back.

A request's pages are, in order: those of its prompt's cached prefix, locked in the prefix cache; those that a
prefill node or this node's own prefill fills; those that its output grows by. When it ends, its whole pages
join the cache, so that the next turn of a conversation needs only what is new.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable

from ..components.invariant_checker import check_idle
from ..components.page_allocator import PageAllocator, PageCounts
from ..components.page_need import PageNeed, page_need
from ..components.prefix_cache import PrefixCache, PrefixMatch
from ..messages.peer import RoomId
from ..runtime.errors import BrokenInvariantError
from .sequence import DecodeRequest, Sequence
from .session_pins import SessionPins

# Who names no max_tokens gets all that the context has left, and seldom uses it.
LONGEST_EXPECTED_TOKENS = 4096


class RequestPages:
    """Promises pages and keeps the promise: what is promised is never more than what is free or evictable.

    Each choice is promised its next page, one that was retracted before all that it can need; what else a
    choice grows by is expected, and may be missing when the time comes.

    `copy_page(source, destination)` copies a page's KV. `poison`, where given, fills pages with NaN when they
    are reserved: a test's way to see that every page a forward reads was really written. Without
    `keeps_prefixes` no prompt is matched and nothing stays in the cache: only the choices of one request
    share pages there. `pins` are sessions' pages: the last to be evicted.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        cache: PrefixCache,
        copy_page: Callable[[int, int], None],
        poison: Callable[[list[int]], None] | None = None,
        *,
        pins: SessionPins,
        keeps_prefixes: bool = True,
    ) -> None:
        self._allocator = allocator
        self._cache = cache
        self._page_size = cache.page_size
        self._copy_page = copy_page
        self._poison = poison
        self._keeps_prefixes = keeps_prefixes
        self._pins = pins
        self._num_promised = 0

    # ---- what there is ------------------------------------------------------------------------------

    @property
    def num_pages(self) -> int:
        """All that there are, free or not."""
        return self._allocator.num_pages

    @property
    def num_available(self) -> int:
        """Pages that are free or evictable, and not promised."""
        return self._allocator.num_free + self._cache.num_evictable - self._num_promised

    def counts(self) -> PageCounts:
        return self._allocator.counts()

    @property
    def num_locked(self) -> int:
        """Cached pages that requests read."""
        return self._cache.num_locked

    @property
    def num_evictable(self) -> int:
        """Cached pages that are there for whoever needs them."""
        return self._cache.num_evictable

    @property
    def num_pinned(self) -> int:
        """Cached pages that sessions keep before all others."""
        return self._cache.num_pinned

    def need(self, request: DecodeRequest) -> PageNeed:
        """The most pages that it can hold, with the choices that it still has."""
        work = request.work
        return page_need(
            num_prompt=len(work.prompt_ids),
            num_kept=len(work.output_ids),
            max_tokens=work.sampling.max_tokens,
            num_choices=len(request.sequences),
            page_size=self._page_size,
        )

    def match(self, request: DecodeRequest) -> PrefixMatch:
        """The cached prefix of a waiting request's prompt, not locked. Looked up when the cache changed."""
        if request.match is None or request.match_generation != self._cache.generation:
            limit = request.work.num_reusable_tokens if self._keeps_prefixes else 0
            request.match = self._cache.match(
                request.work.token_ids, max_tokens=limit, namespace=self._namespace(request)
            )
            request.match_generation = self._cache.generation
        return request.match

    def demand(self, request: DecodeRequest, share: float) -> int:
        """Pages of `num_available` that admitting the request takes, or counts on for its growth.

        `share`: of the growth that is possible, how much is expected.
        """
        need, match = self.need(request), self.match(request)
        growth = sum(self._expected(request, pages, share) for pages in need.growth)
        return need.prompt - len(match.pages) + self._cache.num_unlocked(match) + growth

    def num_expected(self, requests: Iterable[DecodeRequest], share: float) -> int:
        """Pages that these admitted requests are expected to grow by, beyond what they are promised."""
        return sum(
            max(0, self._expected(request, sequence.growth, share) - sequence.promised)
            for request in requests
            for sequence in request.live_sequences
        )

    def _expected(self, request: DecodeRequest, growth: int, share: float) -> int:
        if request.message.was_retracted:
            return growth
        longest = -(-LONGEST_EXPECTED_TOKENS // self._page_size)
        return math.ceil(share * min(growth, longest))

    # ---- admission ----------------------------------------------------------------------------------

    def expose(self, request: DecodeRequest, room: RoomId) -> list[int]:
        """Reserve the prompt's missing pages for a prefill node to write. The caller knows that they fit.

        Returns one page per page of the prompt: those of the cached prefix, then the exposed ones.
        """
        cached = self._lock_prefix(request)
        num_missing = self.need(request).prompt - len(cached)
        self._make_free(num_missing)
        pages = self._reserved(request, num_missing, self._allocator.reserve_exposed(room, num_missing))
        return [*cached, *pages]

    def allocate_prompt(self, request: DecodeRequest) -> None:
        """Reserve the prompt's missing pages for this node's own prefill."""
        cached = self._lock_prefix(request)
        num_missing = self.need(request).prompt - len(cached)
        first = request.sequences[0]
        self._make_free(num_missing)
        pages = self._allocator.allocate_private(first.owner, num_missing)
        first.pages = [*cached, *self._reserved(request, num_missing, pages)]

    def _lock_prefix(self, request: DecodeRequest) -> list[int]:
        match = self.match(request)
        request.match = None
        request.num_cached = match.num_tokens
        for sequence in request.sequences:
            self._cache.lock(match)
            sequence.prefix = match
        return match.pages

    def _reserved(self, request: DecodeRequest, num_pages: int, pages: list[int] | None) -> list[int]:
        if pages is None:
            raise BrokenInvariantError(
                f"{num_pages} pages were admitted, but {self._allocator.num_free} are free"
            )
        is_certain = request.message.was_retracted
        for sequence, growth in zip(request.sequences, self.need(request).growth, strict=True):
            sequence.growth = growth
            sequence.promised = growth if is_certain else min(growth, 1)
            self._num_promised += sequence.promised
        if self._poison is not None:
            self._poison(pages)
        return pages

    # ---- running ------------------------------------------------------------------------------------

    def adopt(self, request: DecodeRequest, room: RoomId) -> None:
        """Every write is in place: the pages are the first live choice's own."""
        first = request.live_sequences[0]
        cached = first.prefix.pages if first.prefix is not None else []
        first.pages = [*cached, *self._allocator.exposed_to_private(room, first.owner)]

    def fork(self, request: DecodeRequest) -> None:
        """Give every live choice the prompt's pages: whole ones are shared, the partial one is copied.

        Shared ones are the cache's from here on, so that other requests can use them too. Copied at once: no
        forward touches these pages yet, and the source may be freed before the next.
        """
        first, *others = request.live_sequences
        if not others and not self._keeps_prefixes:
            return
        num_whole, num_in_partial = divmod(request.work.num_tokens, self._page_size)
        shared = self._share(request, first, num_whole)
        for other in others:
            self._relock(other, shared)
            other.pages = list(shared.pages)
            if num_in_partial:
                if not self._grow(other):
                    raise BrokenInvariantError(
                        f"choice {other.choice} of {other.key} lacks the page it was promised"
                    )
                self._copy_page(first.pages[num_whole], other.pages[num_whole])

    def _share(self, request: DecodeRequest, first: Sequence, num_whole: int) -> PrefixMatch:
        """Hand the prompt's whole pages to the cache; where it has others for these tokens, use those."""
        inserted = self._cache.insert(
            first.token_ids[: num_whole * self._page_size], first.pages, first.owner, self._namespace(request)
        )
        self._relock(first, inserted.match)
        self._allocator.free_private(first.owner, inserted.duplicate_pages)
        first.pages[:num_whole] = inserted.match.pages
        return inserted.match

    def _relock(self, sequence: Sequence, match: PrefixMatch) -> None:
        self._cache.lock(match)
        if sequence.prefix is not None:
            self._cache.unlock(sequence.prefix)
        sequence.prefix = match

    def _namespace(self, request: DecodeRequest) -> str:
        """Choices of one request share pages also where requests do not."""
        return request.work.cache_salt if self._keeps_prefixes else repr(request.key)

    def make_room(self, sequence: Sequence) -> bool:
        """The KV of the sequence's last token is about to be written: have a page for it.

        False if none can be had now. Never for a page that was promised.
        """
        if (len(sequence.token_ids) - 1) // self._page_size < len(sequence.pages):
            return True
        return self._grow(sequence)

    def _grow(self, sequence: Sequence) -> bool:
        if sequence.growth == 0:
            raise BrokenInvariantError(
                f"choice {sequence.choice} of {sequence.key} grows beyond what it may need"
            )
        if sequence.promised:
            sequence.promised -= 1
            self._num_promised -= 1
        elif self.num_available < 1:
            return False
        near = sequence.pages[-1] if sequence.pages else None
        self._make_free(1)
        pages = self._allocator.allocate_private(sequence.owner, 1, near=near)
        if pages is None:
            raise BrokenInvariantError(f"{self._num_promised} pages are promised, more than can be had")
        sequence.growth -= 1
        sequence.pages += pages
        if self._poison is not None:
            self._poison(pages)
        return True

    def _make_free(self, num_pages: int) -> None:
        """Evict from the cache what is missing, in the end what sessions pin."""
        while (num_missing := num_pages - self._allocator.num_free) > 0:
            if self._cache.evict(num_missing) < num_missing and not self._pins.release_oldest():
                return

    # ---- the end ------------------------------------------------------------------------------------

    def free(self, request: DecodeRequest, sequence: Sequence, *, num_computed: int = 0) -> None:
        """Give back all that a sequence holds; no forward may write into it any more.

        Pages full of tokens that were computed, the first `num_computed`, stay in the cache, until others
        need them.
        """
        self._num_promised -= sequence.promised
        sequence.growth = sequence.promised = 0
        if sequence.pages and self._keeps_prefixes:
            kept = self._cache.insert(
                sequence.token_ids[:num_computed],
                sequence.pages,
                sequence.owner,
                self._namespace(request),
            ).match
            if request.message.session_id and kept.pages:
                self._pins.hold(request.message.session_id, kept, request.message.session_timeout_s)
        self._allocator.free_private(sequence.owner)
        sequence.pages = []
        if sequence.prefix is not None:
            self._cache.unlock(sequence.prefix)
            sequence.prefix = None
        if not self._keeps_prefixes:
            self._cache.evict(self._cache.num_evictable)

    def drop_cache(self) -> bool:
        """Drop every cached page, those of sessions too. False if a request reads any."""
        self._pins.clear()
        return self._cache.reset()

    def check_idle(self, open_rooms: Collection[RoomId]) -> None:
        """No request is left: raises BrokenInvariantError if anything is held but the cache, what sessions
        pin, and the pages of these rooms in quarantine."""
        check_idle(self._allocator, [self._cache], states={}, open_rooms=open_rooms)
        self.check_promises([])
        self._pins.check()

    def check_promises(self, requests: Iterable[DecodeRequest]) -> None:
        """Raises RuntimeError unless the promises add up."""
        promised = sum(sequence.promised for request in requests for sequence in request.sequences)
        if promised != self._num_promised or self.num_available < 0:
            raise BrokenInvariantError(
                f"{self._num_promised} pages promised, requests say {promised}, {self.num_available} are left"
            )
