"""A node's load, put together from the values that its parts report.

Pairing, ``/v1/loads``, the cluster page and the metrics all read the one NodeLoad made here, so they cannot
disagree. The totals of tokens since start are counted here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..messages.node import NodeLoad, PeerTraffic
from .page_allocator import PageCounts


class LoadInquirer:
    """Counts tokens since start, and builds NodeLoads."""

    def __init__(self, *, page_size: int, max_running_requests: int) -> None:
        self._page_size = page_size
        self._max_running_requests = max_running_requests
        self._num_prompt_tokens_computed = 0
        self._num_prompt_tokens_received = 0
        self._num_cached_prompt_tokens = 0
        self._num_generated_tokens = 0

    def count_prompt(self, *, num_computed: int = 0, num_received: int = 0, num_cached: int = 0) -> None:
        """Prompt tokens that this node's forwards computed, that came from prefill, that its cache spared.

        Kept output ids that a new attempt computes again count as prompt tokens.
        """
        self._num_prompt_tokens_computed += num_computed
        self._num_prompt_tokens_received += num_received
        self._num_cached_prompt_tokens += num_cached

    def count_generated(self, num_tokens: int) -> None:
        """Output tokens sampled by this node; a first token counts where prefill sampled it."""
        self._num_generated_tokens += num_tokens

    def load(
        self,
        *,
        pages: PageCounts,
        num_locked_pages: int = 0,
        num_evictable_pages: int = 0,
        num_pinned_pages: int = 0,
        num_running_reqs: int,
        num_waiting_reqs: int,
        num_queued_tokens: int = 0,
        peers: Mapping[str, PeerTraffic] | None = None,
    ) -> NodeLoad:
        """The load right now.

        `num_locked_pages`, `num_evictable_pages` and `num_pinned_pages` are the prefix cache's. Evictable
        pages count as free: they are there for whoever asks. Private pages are what requests on this node
        have reserved.
        """
        num_free = pages.free + num_evictable_pages
        return NodeLoad(
            num_running_reqs=num_running_reqs,
            num_waiting_reqs=num_waiting_reqs,
            num_queued_tokens=num_queued_tokens,
            num_used_pages=pages.total - num_free,
            num_free_pages=num_free,
            num_total_pages=pages.total,
            page_size=self._page_size,
            num_locked_pages=num_locked_pages,
            num_pinned_pages=num_pinned_pages,
            num_reserved_pages=pages.private,
            num_exposed_pages=pages.exposed,
            num_quarantined_pages=pages.quarantined,
            max_running_requests=self._max_running_requests,
            num_prompt_tokens_computed=self._num_prompt_tokens_computed,
            num_prompt_tokens_received=self._num_prompt_tokens_received,
            num_cached_prompt_tokens=self._num_cached_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            peers=dict(peers or {}),
        )
