"""Pages that sessions keep in the prefix cache: kept before all else, and given up for whoever needs them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pdserve.components.page_allocator import PageAllocator, PageStateError
from pdserve.components.prefix_cache import PrefixCache, PrefixMatch
from pdserve.decode.session_pins import SessionPins
from pdserve.tests.present import at_present

NUM_PAGES = 12
PAGE_SIZE = 4


class Fixture:
    def __init__(self) -> None:
        self.allocator = PageAllocator(NUM_PAGES)
        self.cache = PrefixCache(self.allocator, PAGE_SIZE)
        self.pins = SessionPins(self.cache, max_pages=6)

    def cached(self, *tokens: int) -> PrefixMatch:
        """Pages that hold each of these numbers as a page of tokens are in the cache."""
        token_ids = [token for token in tokens for _ in range(PAGE_SIZE)]
        pages = self.allocator.allocate_private("owner", len(tokens))
        assert pages is not None
        match = self.cache.insert(token_ids, pages, "owner").match
        self.allocator.free_private("owner")
        return match

    def num_cached(self, *tokens: int) -> int:
        return len(self.cache.match([token for token in tokens for _ in range(PAGE_SIZE)]).pages)


@pytest.fixture
def fixture() -> Iterator[Fixture]:
    fixture = Fixture()
    yield fixture
    fixture.pins.check()
    fixture.cache.check()


def test_pinned_pages_outlive_those_used_later(fixture: Fixture) -> None:
    fixture.pins.hold("a", fixture.cached(1, 2), 60.0)
    fixture.cached(3, 4)
    assert fixture.cache.evict(NUM_PAGES) == 2
    assert fixture.num_cached(1, 2) == 2
    assert fixture.num_cached(3, 4) == 0
    assert (fixture.cache.num_pinned, fixture.cache.num_evictable) == (2, 2)
    assert fixture.pins.close("a")
    assert not fixture.pins.close("a")
    assert fixture.cache.evict(NUM_PAGES) == 2
    assert fixture.cache.num_pinned == 0


def test_the_next_turn_takes_the_place_of_the_one_before(fixture: Fixture) -> None:
    fixture.pins.hold("a", fixture.cached(1, 2), 60.0)
    fixture.pins.hold("a", fixture.cached(1, 2, 3), 60.0)
    assert (len(fixture.pins), fixture.cache.num_pinned) == (1, 3)
    fixture.pins.hold("a", fixture.cached(1, 7), 60.0)  # a branch
    assert fixture.cache.num_pinned == 2
    assert fixture.cache.evict(NUM_PAGES) == 2


def test_sessions_share_a_prefix_which_stays_until_the_last_lets_go(fixture: Fixture) -> None:
    fixture.pins.hold("a", fixture.cached(1, 2), 60.0)
    fixture.pins.hold("b", fixture.cached(1, 3), 60.0)
    assert fixture.cache.num_pinned == 3
    fixture.pins.close("a")
    assert fixture.cache.num_pinned == 2
    fixture.cache.evict(NUM_PAGES)
    assert (fixture.num_cached(1, 3), fixture.num_cached(1, 2)) == (2, 1)


def test_over_the_bound_the_oldest_go(fixture: Fixture) -> None:
    fixture.pins.hold("a", fixture.cached(1, 2, 3), 60.0)
    fixture.pins.hold("b", fixture.cached(4, 5), 60.0)
    fixture.pins.touch("a")
    fixture.pins.hold("c", fixture.cached(6, 7), 60.0)
    assert [name in fixture.pins for name in "abc"] == [True, False, True]
    fixture.pins.close("a")
    fixture.pins.close("c")
    fixture.cache.evict(NUM_PAGES)
    fixture.pins.hold("d", fixture.cached(*range(20, 27)), 60.0)
    assert "d" not in fixture.pins, "it alone is over the bound"


def test_who_is_idle_for_too_long_is_let_go(fixture: Fixture) -> None:
    fixture.pins.hold("a", fixture.cached(1), 10.0)
    fixture.pins.hold("b", fixture.cached(2), 20.0)
    assert at_present(fixture.pins.deadline) is None
    fixture.pins.poll(100.0)
    assert fixture.pins.deadline == 110.0
    fixture.pins.poll(109.9)
    fixture.pins.touch("a")
    fixture.pins.poll(110.0)  # its turn runs: from now on again
    assert "a" in fixture.pins
    fixture.pins.poll(120.0)
    assert len(fixture.pins) == 0


def test_a_lock_holds_without_the_pin_and_a_pin_without_the_lock(fixture: Fixture) -> None:
    match = fixture.cached(1, 2)
    fixture.cache.lock(match)
    fixture.pins.hold("a", match, 60.0)
    assert fixture.cache.num_evictable == 0
    fixture.pins.close("a")
    assert fixture.cache.evict(NUM_PAGES) == 0
    fixture.pins.hold("a", match, 60.0)
    fixture.cache.unlock(match)
    assert fixture.cache.evict(NUM_PAGES) == 0
    fixture.pins.clear()
    assert fixture.cache.evict(NUM_PAGES) == 2
    with pytest.raises(PageStateError):
        fixture.cache.pin(match)


def test_a_pin_survives_a_split_inside_it(fixture: Fixture) -> None:
    fixture.pins.hold("a", fixture.cached(1, 2, 3), 60.0)
    assert fixture.num_cached(1, 9) == 1  # splits the node
    assert fixture.cache.num_pinned == 3
    fixture.pins.close("a")
    assert fixture.cache.num_pinned == 0
    with pytest.raises(PageStateError, match="unpin without pin"):
        fixture.cache.unpin(fixture.cache.match([1] * PAGE_SIZE))
