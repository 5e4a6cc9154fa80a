"""PageAllocator: transitions against a model that keeps one word a page, and the preference for long runs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import combinations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdserve.components.page_allocator import PageAllocator, PageStateError, runs_of
from pdserve.messages.peer import RoomId


def room(counter: int) -> RoomId:
    return RoomId("decode-1", counter)


def with_free(num_pages: int, free: set[int]) -> PageAllocator:
    """An allocator whose free pages are exactly `free`; the others are private to "rest"."""
    allocator = PageAllocator(num_pages)
    allocator.allocate_private("rest", num_pages)
    allocator.free_private("rest", sorted(free))
    return allocator


@pytest.fixture
def pages() -> Iterator[PageAllocator]:
    """An allocator of 16 pages, checked when the test is over."""
    allocator = PageAllocator(16)
    yield allocator
    allocator.check()


# ---- life cycles ------------------------------------------------------------------------------------


def test_a_handoff_that_ends_well(pages: PageAllocator) -> None:
    assert pages.reserve_exposed(room(1), 3) == [0, 1, 2]
    assert pages.exposed_rooms() == [room(1)]
    assert pages.room_pages(room(1)) == [0, 1, 2]
    assert pages.exposed_to_private(room(1), "request") == [0, 1, 2]
    assert pages.exposed_rooms() == []
    assert pages.private_pages("request") == [0, 1, 2]
    assert pages.free_private("request") == [0, 1, 2]
    assert pages.num_free == 16


def test_a_handoff_that_fails_is_quarantined_until_released(pages: PageAllocator) -> None:
    reserved = pages.reserve_exposed(room(1), 5)
    assert pages.quarantine(room(1)) == reserved
    assert pages.quarantined_rooms() == [room(1)]
    assert pages.num_free == 11
    assert pages.reserve_exposed(room(2), 12) is None
    assert pages.release_room(room(1)) == reserved
    assert pages.num_free == 16


def test_a_room_that_nobody_wrote_to_is_released_at_once(pages: PageAllocator) -> None:
    pages.reserve_exposed(room(1), 5)
    assert pages.release_room(room(1)) == [0, 1, 2, 3, 4]


def test_shared_pages_are_free_with_their_last_reader(pages: PageAllocator) -> None:
    held = pages.allocate_private("a", 3)
    assert held is not None
    pages.share(held[:2], "a")
    assert pages.private_pages("a") == [2]
    pages.add_reader([0])
    assert (pages.num_readers(0), pages.num_readers(1), pages.num_readers(2)) == (2, 1, 0)
    assert pages.drop_reader([0, 1]) == [1]
    assert pages.drop_reader([0]) == [0]
    assert pages.shared_pages() == []


def test_counts_name_every_state(pages: PageAllocator) -> None:
    pages.reserve_exposed(room(1), 1)
    pages.reserve_exposed(room(2), 2)
    pages.quarantine(room(2))
    held = pages.allocate_private("a", 7)
    assert held is not None
    pages.share(held[:3], "a")
    counts = pages.counts()
    assert (counts.free, counts.exposed, counts.quarantined, counts.private, counts.shared) == (6, 1, 2, 4, 3)
    assert counts.total == 16


def test_too_few_free_pages_take_nothing(pages: PageAllocator) -> None:
    assert pages.reserve_exposed(room(1), 17) is None
    assert pages.allocate_private("a", 17) is None
    assert pages.exposed_rooms() == []
    assert pages.private_owners() == []
    assert pages.allocate_private("a", 0) == []
    assert pages.private_owners() == []
    assert pages.free_private("a") == []


# ---- what is refused --------------------------------------------------------------------------------


def test_wrong_transitions_raise_and_change_nothing(pages: PageAllocator) -> None:
    pages.reserve_exposed(room(1), 2)  # pages 0 and 1
    pages.allocate_private("a", 2)  # pages 2 and 3
    pages.allocate_private("b", 2)  # pages 4 and 5
    pages.share([5], "b")
    before = pages.counts()
    refused: list[Callable[[], object]] = [
        lambda: pages.reserve_exposed(room(1), 1),
        lambda: pages.exposed_to_private(room(9), "a"),
        lambda: pages.quarantine(room(9)),
        lambda: pages.release_room(room(9)),
        lambda: pages.free_private("a", [2, 4]),
        lambda: pages.free_private("a", [2, 2]),
        lambda: pages.free_private("a", [0]),
        lambda: pages.free_private("nobody", [6]),
        lambda: pages.free_private("b", [5]),
        lambda: pages.share([2, 4], "a"),
        lambda: pages.share([2, 2], "a"),
        lambda: pages.add_reader([2]),
        lambda: pages.add_reader([5, 5]),
        lambda: pages.drop_reader([5, 6]),
        lambda: pages.drop_reader([99]),
    ]
    for call in refused:
        with pytest.raises(PageStateError):
            call()
        assert pages.counts() == before
        pages.check()


def test_a_quarantined_room_is_not_exposed_any_more(pages: PageAllocator) -> None:
    pages.reserve_exposed(room(1), 2)
    pages.quarantine(room(1))
    refused: list[Callable[[], object]] = [
        lambda: pages.quarantine(room(1)),
        lambda: pages.exposed_to_private(room(1), "a"),
        lambda: pages.reserve_exposed(room(1), 1),
    ]
    for call in refused:
        with pytest.raises(PageStateError):
            call()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_pages"):
        PageAllocator(0)
    with pytest.raises(ValueError, match="at least one page"):
        PageAllocator(4).reserve_exposed(room(1), 0)
    with pytest.raises(ValueError, match="-1 pages"):
        PageAllocator(4).allocate_private("a", -1)


def test_messages_say_where_a_page_is(pages: PageAllocator) -> None:
    pages.reserve_exposed(room(1), 1)
    pages.reserve_exposed(room(2), 1)
    pages.quarantine(room(2))
    pages.allocate_private("a", 2)
    pages.share([3], "a")
    assert "exposed to" in pages.describe(0)
    assert "quarantined for" in pages.describe(1)
    assert pages.describe(2) == "private to 'a'"
    assert pages.describe(3) == "shared by 1 readers"
    assert pages.describe(4) == "free"
    assert pages.describe(16) == "outside [0, 16)"
    with pytest.raises(PageStateError, match="page 3 is shared by 1 readers, not private to 'a'"):
        pages.free_private("a", [3])


# ---- runs -------------------------------------------------------------------------------------------


def test_the_smallest_run_that_fits_is_taken() -> None:
    free = {0, 1, 2, 3, 4, 6, 7, 8, 10, 11}
    for n, expected in [(1, [10]), (2, [10, 11]), (3, [6, 7, 8]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4])]:
        allocator = with_free(12, free)
        assert allocator.reserve_exposed(room(1), n) == expected
        allocator.check()


def test_without_a_run_that_fits_the_fewest_are_taken() -> None:
    allocator = with_free(12, {0, 1, 2, 3, 4, 6, 7, 8, 10, 11})
    assert allocator.reserve_exposed(room(1), 7) == [0, 1, 2, 3, 4, 10, 11]
    allocator.check()


def test_every_choice_of_free_pages_gives_the_fewest_runs() -> None:
    """Exhaustive over 7 pages: no set of free pages of that size has fewer runs than what is taken."""
    for size in range(1, 8):
        for free in combinations(range(7), size):
            for n in range(1, size + 1):
                allocator = with_free(7, set(free))
                taken = allocator.allocate_private("a", n)
                assert taken is not None
                assert set(taken) <= set(free)
                fewest = min(len(runs_of(chosen)) for chosen in combinations(free, n))
                assert len(runs_of(taken)) == fewest, (free, n, taken)
                allocator.check()


def test_growth_goes_on_behind_the_last_page() -> None:
    allocator = with_free(12, {2, 5, 6, 7, 8, 11})
    assert allocator.allocate_private("a", 1, near=4) == [5]
    assert allocator.allocate_private("a", 1, near=5) == [6]
    assert allocator.allocate_private("a", 1, near=8) == [2]
    assert allocator.allocate_private("a", 3, near=6) == [7, 8, 11]
    assert allocator.allocate_private("a", 1, near=11) is None
    allocator.check()


def test_growth_does_not_enter_a_free_run_in_its_middle() -> None:
    allocator = with_free(8, {2, 3, 4, 6})
    assert allocator.allocate_private("a", 1, near=2) == [6]
    allocator.check()


def test_released_pages_merge_with_both_neighbours(pages: PageAllocator) -> None:
    for name in "abc":
        pages.allocate_private(name, 4)
    pages.free_private("a")
    pages.free_private("c")
    pages.free_private("b")
    assert pages.reserve_exposed(room(1), 16) == list(range(16))


def test_runs_of() -> None:
    assert runs_of([]) == []
    assert runs_of([5]) == [(5, 1)]
    assert runs_of([3, 9, 1, 2, 8, 5]) == [(1, 3), (5, 1), (8, 2)]


# ---- against a model --------------------------------------------------------------------------------

OWNERS = ("a", "b", "c")


class AllocatorMachine(RuleBasedStateMachine):
    """Random transitions on a small pool; the model is one word for each page."""

    @initialize(num_pages=st.integers(1, 20))
    def start(self, num_pages: int) -> None:
        self.allocator = PageAllocator(num_pages)
        self.model: list[tuple[str, object]] = [("free", None)] * num_pages
        self.next_room = 0

    def held(self, state: str, key: object) -> list[int]:
        return [page for page, word in enumerate(self.model) if word == (state, key)]

    def keys(self, state: str) -> list[object]:
        return list(dict.fromkeys(key for word, key in self.model if word == state))

    def move(self, pages: list[int], come_from: tuple[str, object], to: tuple[str, object]) -> None:
        assert len(set(pages)) == len(pages)
        for page in pages:
            assert self.model[page] == come_from
            self.model[page] = to

    @rule(n=st.integers(1, 8))
    def reserve(self, n: int) -> None:
        self.next_room += 1
        pages = self.allocator.reserve_exposed(room(self.next_room), n)
        num_free = len(self.held("free", None))
        assert (pages is None) == (n > num_free)
        if pages is not None:
            assert len(pages) == n
            self.move(pages, ("free", None), ("exposed", room(self.next_room)))

    @rule(owner=st.sampled_from(OWNERS), n=st.integers(0, 8), near=st.none() | st.integers(-1, 21))
    def allocate(self, owner: str, n: int, near: int | None) -> None:
        pages = self.allocator.allocate_private(owner, n, near)
        assert (pages is None) == (n > len(self.held("free", None)))
        if pages is not None:
            assert len(pages) == n
            self.move(pages, ("free", None), ("private", owner))

    @precondition(lambda self: self.keys("exposed"))
    @rule(data=st.data(), owner=st.sampled_from(OWNERS))
    def hand_off_done(self, data: st.DataObject, owner: str) -> None:
        done = data.draw(st.sampled_from(self.keys("exposed")))
        assert isinstance(done, RoomId)
        expected = self.held("exposed", done)
        pages = self.allocator.exposed_to_private(done, owner)
        assert sorted(pages) == expected
        self.move(pages, ("exposed", done), ("private", owner))

    @precondition(lambda self: self.keys("exposed"))
    @rule(data=st.data())
    def room_fails(self, data: st.DataObject) -> None:
        failed = data.draw(st.sampled_from(self.keys("exposed")))
        assert isinstance(failed, RoomId)
        pages = self.allocator.quarantine(failed)
        assert sorted(pages) == self.held("exposed", failed)
        self.move(pages, ("exposed", failed), ("quarantined", failed))

    @precondition(lambda self: self.keys("exposed") + self.keys("quarantined"))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        words = [word for word in dict.fromkeys(self.model) if word[0] in ("exposed", "quarantined")]
        word = data.draw(st.sampled_from(words))
        assert isinstance(word[1], RoomId)
        pages = self.allocator.release_room(word[1])
        assert sorted(pages) == self.held(*word)
        self.move(pages, word, ("free", None))

    @rule(data=st.data(), owner=st.sampled_from(OWNERS))
    def free_some(self, data: st.DataObject, owner: str) -> None:
        held = self.held("private", owner)
        chosen = data.draw(st.none() | st.lists(st.sampled_from(held), unique=True) if held else st.none())
        freed = self.allocator.free_private(owner, chosen)
        assert sorted(freed) == sorted(held if chosen is None else chosen)
        self.move(freed, ("private", owner), ("free", None))

    @precondition(lambda self: self.keys("private"))
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(self.keys("private")))
        chosen = data.draw(st.lists(st.sampled_from(self.held("private", owner)), unique=True))
        self.allocator.share(chosen, owner)
        self.move(chosen, ("private", owner), ("shared", 1))

    @precondition(lambda self: self.keys("shared"))
    @rule(data=st.data(), step=st.sampled_from([1, -1]))
    def change_readers(self, data: st.DataObject, step: int) -> None:
        shared = [page for page, (word, _) in enumerate(self.model) if word == "shared"]
        chosen = data.draw(st.lists(st.sampled_from(shared), unique=True))
        freed = []
        for page in chosen:
            readers = self.model[page][1]
            assert isinstance(readers, int)
            self.model[page] = ("shared", readers + step) if readers + step else ("free", None)
            freed += [page] if readers + step == 0 else []
        if step == 1:
            self.allocator.add_reader(chosen)
        else:
            assert self.allocator.drop_reader(chosen) == freed

    @rule(data=st.data(), owner=st.sampled_from(OWNERS))
    def take_what_is_not_ours(self, data: st.DataObject, owner: str) -> None:
        page = data.draw(st.integers(0, len(self.model) - 1))
        if self.model[page] != ("private", owner):
            with pytest.raises(PageStateError):
                self.allocator.free_private(owner, [page])
        if self.model[page][0] != "shared":
            with pytest.raises(PageStateError):
                self.allocator.drop_reader([page])

    @invariant()
    def agrees(self) -> None:
        self.allocator.check()
        counts = self.allocator.counts()
        words = [word for word, _ in self.model]
        assert counts.free == self.allocator.num_free == words.count("free")
        assert counts.exposed == words.count("exposed")
        assert counts.private == words.count("private")
        assert counts.shared == words.count("shared")
        assert counts.quarantined == words.count("quarantined")
        for page, (word, key) in enumerate(self.model):
            assert self.allocator.num_readers(page) == (key if word == "shared" else 0)


AllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAllocatorMachine = AllocatorMachine.TestCase


# ---- check() finds what is broken -------------------------------------------------------------------


def test_check_lists_every_violation() -> None:
    allocator = PageAllocator(8)
    allocator.allocate_private("a", 2)
    allocator.allocate_private("b", 2)
    allocator.reserve_exposed(room(1), 1)
    allocator._private["a"] = {0: None, 2: None}  # page 1 is lost, page 2 has two owners
    allocator._private["c"] = {}
    allocator._exposed[room(1)] = [8]
    allocator._readers[7] = 0
    found = allocator.violations()
    for expected in (
        "page 2 is private to 'b' and also private to 'a'",
        "page 1 is in no state",
        "page 4 is in no state",
        "no page is private to 'c', yet the owner is kept",
        "page 8 is exposed to",
        "page 7 is shared and also free",
        "shared page 7 has 0 readers",
    ):
        assert any(expected in line for line in found), (expected, found)
    with pytest.raises(PageStateError, match="page 1 is in no state"):
        allocator.check()


def test_check_finds_broken_runs() -> None:
    allocator = PageAllocator(8)
    free = allocator._free
    free._remove(0, 8)
    free._insert(0, 4)
    free._insert(4, 4)
    assert any("touch" in line for line in allocator.violations())
    free._by_length.pop()
    free._start_before.clear()
    free.num_pages = 5
    found = "; ".join(allocator.violations())
    assert "by length differ" in found
    assert "by end differ" in found
    assert "num_free is 5" in found


# ---- size -------------------------------------------------------------------------------------------


def test_a_large_fragmented_pool() -> None:
    """100,000 pages in 50,000 runs, then requests that grow one page at a time and go."""
    allocator = PageAllocator(100_000)
    rng = random.Random(1)
    allocator.allocate_private("rest", 100_000)
    allocator.free_private("rest", list(range(0, 100_000, 2)))
    for step in range(2_000):
        assert allocator.allocate_private(("request", step), 1, near=rng.randrange(100_000)) is not None
        if step % 2:
            allocator.free_private(("request", step - 1))
    assert allocator.num_free == 49_000
    allocator.check()
