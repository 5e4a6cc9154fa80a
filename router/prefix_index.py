"""An estimate of which pages each node's prefix cache holds, from what was sent to it and what came back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

DEFAULT_MAX_PAGES = 65_536


def page_hashes(
    token_ids: Sequence[int], page_size: int, known: Sequence[int] = (), salt: str = ""
) -> list[int]:
    """One hash per full page, of everything up to its end: equal hashes mean equal prefixes of equal salts.

    ``known``: those of the first pages, where they were computed before.
    """
    hashes = list(known)
    chained = hashes[-1] if hashes else hash(salt)
    for end in range((len(hashes) + 1) * page_size, len(token_ids) + 1, page_size):
        chained = hash((chained, *token_ids[end - page_size : end]))
        hashes.append(chained)
    return hashes


class PrefixIndex:
    """Per node, the page hashes it was sent, least recently used dropped first.

    It is a hint: a node may have evicted a page, or never computed it. A wrong hint costs a less good pair.
    """

    def __init__(self) -> None:
        self._pages: dict[str, OrderedDict[int, None]] = {}

    def num_cached_pages(self, incarnation: str, hashes: Sequence[int]) -> int:
        """Leading pages that the node probably holds."""
        pages = self._pages.get(incarnation)
        if not pages:
            return 0
        for count, page in enumerate(hashes):
            if page not in pages:
                return count
        return len(hashes)

    def record(self, incarnation: str, hashes: Sequence[int], max_pages: int = DEFAULT_MAX_PAGES) -> None:
        """The node was sent this prompt, or has ended this answer. ``max_pages``: what its pool can hold."""
        pages = self._pages.setdefault(incarnation, OrderedDict())
        for page in reversed(hashes):  # the root ends up most recent: tails are dropped before what they need
            pages[page] = None
            pages.move_to_end(page)
        while len(pages) > max_pages:
            pages.popitem(last=False)

    def forget(self, incarnation: str) -> None:
        """The node is gone, or its cache was dropped."""
        self._pages.pop(incarnation, None)

    def clear(self) -> None:
        self._pages.clear()
