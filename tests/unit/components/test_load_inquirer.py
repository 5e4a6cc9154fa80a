"""LoadInquirer: the arithmetic of pages, and totals that only grow."""

from __future__ import annotations

from pdserve.components.load_inquirer import LoadInquirer
from pdserve.components.page_allocator import PageAllocator, PageCounts
from pdserve.components.prefix_cache import PrefixCache
from pdserve.messages.node import NodeLoad
from pdserve.messages.peer import RoomId

EMPTY = PageCounts(free=8, exposed=0, private=0, shared=0, quarantined=0, total=8)


def test_every_field_is_set() -> None:
    inquirer = LoadInquirer(page_size=16, max_running_requests=64)
    inquirer.count_prompt(num_computed=100, num_cached=24)
    inquirer.count_prompt(num_computed=3)
    inquirer.count_prompt(num_computed=2, num_cached=0)
    inquirer.count_prompt(num_cached=4)
    inquirer.count_generated(2)
    inquirer.count_generated(1)
    pages = PageCounts(free=10, exposed=1, private=2, shared=20, quarantined=3, total=36)
    load = inquirer.load(
        pages=pages,
        num_locked_pages=4,
        num_evictable_pages=16,
        num_running_reqs=5,
        num_waiting_reqs=6,
        num_queued_tokens=700,
    )
    assert load == NodeLoad(
        num_running_reqs=5,
        num_waiting_reqs=6,
        num_queued_tokens=700,
        num_used_pages=10,
        num_free_pages=26,
        num_total_pages=36,
        page_size=16,
        num_locked_pages=4,
        num_reserved_pages=2,
        num_exposed_pages=1,
        num_quarantined_pages=3,
        max_running_requests=64,
        num_prompt_tokens_computed=105,
        num_cached_prompt_tokens=28,
        num_generated_tokens=3,
    )


def test_an_idle_node_uses_nothing() -> None:
    inquirer = LoadInquirer(page_size=16, max_running_requests=64)
    load = inquirer.load(pages=EMPTY, num_running_reqs=0, num_waiting_reqs=0)
    assert load == NodeLoad(num_free_pages=8, num_total_pages=8, page_size=16, max_running_requests=64)


def test_used_pages_are_those_that_requests_hold() -> None:
    """Over real parts: locked, private, exposed and quarantined pages are used; cached ones are not."""
    allocator = PageAllocator(20)
    cache = PrefixCache(allocator, page_size=1)
    pages = allocator.allocate_private("done", 5)
    assert pages is not None
    cache.insert([1, 2, 3, 4, 5], pages, "done")
    cache.lock(cache.match([1, 2]))
    allocator.allocate_private("running", 3)
    for counter in (1, 2):
        allocator.reserve_exposed(RoomId("d", counter), 2)
    allocator.quarantine(RoomId("d", 2))
    load = LoadInquirer(page_size=1, max_running_requests=1).load(
        pages=allocator.counts(),
        num_locked_pages=cache.num_locked,
        num_evictable_pages=cache.num_evictable,
        num_running_reqs=1,
        num_waiting_reqs=0,
    )
    assert load.num_used_pages == 2 + 3 + 2 + 2
    assert load.num_free_pages == 20 - load.num_used_pages
    cache.check()
    allocator.check()
