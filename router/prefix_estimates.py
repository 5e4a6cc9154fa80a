"""What nodes probably have in their prefix caches of a request, and what they are about to have."""

from __future__ import annotations

from .attempts import RequestRecord
from .ledger import Attempt
from .prefix_index import DEFAULT_MAX_PAGES, PrefixIndex
from .registry import NodeRecord, NodeRegistry


class PrefixEstimates:
    def __init__(self, nodes: NodeRegistry) -> None:
        self._nodes = nodes
        self._index = PrefixIndex()

    def num_cached(self, node: NodeRecord, record: RequestRecord) -> int:
        """Prompt tokens that the node need not be sent or compute, as far as is known here."""
        page_size = node.load.page_size
        if not page_size:
            return 0
        num_pages = self._index.num_cached_pages(node.incarnation, record.page_hashes(page_size))
        return record.num_usable_cached(page_size * num_pages)

    def prompt_sent(self, attempt: Attempt, record: RequestRecord) -> None:
        """Both nodes are about to hold the prompt."""
        for incarnation in {attempt.pair.prefill, attempt.pair.decode}:
            node = self._nodes.get(incarnation)
            if node is not None and node.load.page_size:
                self._record(node, record.page_hashes(node.load.page_size))

    def answer_ended(self, attempt: Attempt, record: RequestRecord, choice: int) -> None:
        """The decode node keeps what it generated, for the next turn."""
        node = self._nodes.get(attempt.pair.decode)
        if node is not None and node.load.page_size:
            self._record(node, record.answer_hashes(choice, node.load.page_size))

    def _record(self, node: NodeRecord, hashes: list[int]) -> None:
        self._index.record(node.incarnation, hashes, node.load.num_total_pages or DEFAULT_MAX_PAGES)

    def forget(self, incarnation: str) -> None:
        """The node is gone, or its cache was dropped."""
        self._index.forget(incarnation)

    def clear(self) -> None:
        self._index.clear()
