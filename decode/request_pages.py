"""The pages of requests on a decode node: reserved, adopted from a hand-off, forked, grown, given back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..components.page_allocator import PageAllocator
from ..messages.peer import RoomId
from .sequence import DecodeRequest, Sequence


@dataclass(frozen=True, slots=True)
class PageNeed:
    """The most pages that a request can ever hold: for its prompt, and by what each choice may grow."""

    prompt: int
    growth: tuple[int, ...]  # one per choice

    @property
    def total(self) -> int:
        return self.prompt + sum(self.growth)


class RequestPages:
    """Promises growth at admission and keeps the promise: what is promised is never more than what is free.

    `copy_page(source, destination)` copies a page's KV. `poison`, where given, fills pages with NaN when they
    are reserved: a test's way to see that every page a forward reads was really written.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        page_size: int,
        copy_page: Callable[[int, int], None],
        poison: Callable[[list[int]], None] | None = None,
    ) -> None:
        self._allocator = allocator
        self._page_size = page_size
        self._copy_page = copy_page
        self._poison = poison
        self._num_promised = 0

    @property
    def num_available(self) -> int:
        """Pages that are neither taken nor promised."""
        return self._allocator.num_free - self._num_promised

    def need(self, request: DecodeRequest) -> PageNeed:
        """Choices share the prompt's whole pages; each but the first needs a copy of the partial one.

        The last token's KV is never written, so it needs no room.
        """
        num_prefill = request.num_prefill_tokens
        num_final = max(
            num_prefill, len(request.message.prompt_ids) + request.message.sampling.max_tokens - 1
        )
        prompt_pages = -(-num_prefill // self._page_size)
        final_pages = -(-num_final // self._page_size)
        first = final_pages - prompt_pages
        further = final_pages - num_prefill // self._page_size
        return PageNeed(prompt_pages, (first, *(further for _ in request.sequences[1:])))

    def expose(self, request: DecodeRequest, room: RoomId) -> list[int]:
        """Reserve the prompt's pages for a prefill node to write. The caller knows that they fit."""
        need = self.need(request)
        pages = self._allocator.reserve_exposed(room, need.prompt)
        return self._reserved(request, need, pages)

    def allocate_prompt(self, request: DecodeRequest) -> None:
        """Reserve the prompt's pages for this node's own prefill."""
        need = self.need(request)
        first = request.sequences[0]
        first.pages = self._reserved(
            request, need, self._allocator.allocate_private(first.owner, need.prompt)
        )

    def _reserved(self, request: DecodeRequest, need: PageNeed, pages: list[int] | None) -> list[int]:
        if pages is None:
            raise RuntimeError(f"{need.prompt} pages were admitted, but {self._allocator.num_free} are free")
        for sequence, growth in zip(request.sequences, need.growth, strict=True):
            sequence.growth = growth
            self._num_promised += growth
        if self._poison is not None:
            self._poison(pages)
        return pages

    def adopt(self, request: DecodeRequest, room: RoomId) -> None:
        """Every write is in place: the pages are the first live choice's own."""
        first = request.live_sequences[0]
        first.pages = self._allocator.exposed_to_private(room, first.owner)

    def fork(self, request: DecodeRequest) -> None:
        """Give every live choice the prompt's pages: whole ones are shared, the partial one is copied.

        Copied at once: no forward touches these pages yet, and the source may be freed before the next.
        """
        first, *others = request.live_sequences
        num_whole, num_in_partial = divmod(request.num_prefill_tokens, self._page_size)
        whole = first.pages[:num_whole]
        if not others:
            return
        self._allocator.share(whole, first.owner)
        first.shared_pages = list(whole)
        for other in others:
            self._allocator.add_reader(whole)
            other.pages = list(whole)
            other.shared_pages = list(whole)
            if num_in_partial:
                self._grow(other)
                self._copy_page(first.pages[num_whole], other.pages[num_whole])

    def make_room(self, sequence: Sequence) -> None:
        """The KV of the sequence's last token is about to be written: have a page for it."""
        if (len(sequence.token_ids) - 1) // self._page_size == len(sequence.pages):
            self._grow(sequence)

    def _grow(self, sequence: Sequence) -> None:
        near = sequence.pages[-1] if sequence.pages else None
        pages = self._allocator.allocate_private(sequence.owner, 1, near=near)
        if pages is None or sequence.growth == 0:
            raise RuntimeError(
                f"choice {sequence.choice} of {sequence.key} grows beyond what it was promised"
            )
        sequence.growth -= 1
        self._num_promised -= 1
        sequence.pages += pages
        if self._poison is not None:
            self._poison(pages)

    def take_back_promise(self, sequence: Sequence) -> None:
        """It will not grow any more."""
        self._num_promised -= sequence.growth
        sequence.growth = 0

    def free(self, sequence: Sequence) -> None:
        """Give back all that a sequence holds; no forward may write into it any more."""
        self.take_back_promise(sequence)
        if sequence.shared_pages:
            self._allocator.drop_reader(sequence.shared_pages)
        self._allocator.free_private(sequence.owner)
        sequence.pages = []
        sequence.shared_pages = []

    def check_promises(self, requests: list[DecodeRequest]) -> None:
        """Raises RuntimeError unless the promises add up."""
        promised = sum(sequence.growth for request in requests for sequence in request.sequences)
        if promised != self._num_promised or self.num_available < 0:
            raise RuntimeError(f"{self._num_promised} pages promised, requests say {promised}")
