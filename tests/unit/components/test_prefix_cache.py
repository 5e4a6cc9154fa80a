"""PrefixCache: against a model that keeps one entry a page, exactly, eviction order included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdserve.components.page_allocator import PageAllocator, PageStateError
from pdserve.components.prefix_cache import InsertResult, PrefixCache, PrefixMatch


@dataclass
class Setup:
    """A cache of pages of 4 tokens over a pool of 32 pages."""

    allocator: PageAllocator
    cache: PrefixCache
    num_requests: int = 0

    def insert(self, tokens: list[int], namespace: str = "") -> InsertResult:
        """What a finished request does: insert what it computed, free what is left to it."""
        self.num_requests += 1
        owner = f"request-{self.num_requests}"
        pages = self.allocator.allocate_private(owner, -(-len(tokens) // 4))
        assert pages is not None
        result = self.cache.insert(tokens, pages, owner, namespace)
        self.allocator.free_private(owner)
        return result

    def check(self) -> None:
        self.allocator.check()
        self.cache.check()


@pytest.fixture
def radix() -> Iterator[Setup]:
    allocator = PageAllocator(32)
    setup = Setup(allocator, PrefixCache(allocator, page_size=4))
    yield setup
    setup.check()


def tokens_from(start: int, num_tokens: int) -> list[int]:
    return list(range(start, start + num_tokens))


# ---- match and insert -------------------------------------------------------------------------------


def test_an_empty_cache_matches_nothing(radix: Setup) -> None:
    match = radix.cache.match(tokens_from(0, 12))
    assert (match.pages, match.num_tokens) == ([], 0)
    radix.cache.lock(match)
    radix.cache.unlock(match)
    assert radix.cache.evict(5) == 0


def test_only_whole_pages_are_kept(radix: Setup) -> None:
    result = radix.insert(tokens_from(0, 11))
    assert result.num_new_pages == 2
    assert result.match.num_tokens == 8
    assert radix.cache.num_pages == 2
    assert radix.allocator.num_free == 30
    assert radix.insert([7, 7, 7]).num_new_pages == 0


@pytest.mark.parametrize("max_tokens", [*range(-1, 14), None])
def test_match_respects_the_limit(radix: Setup, max_tokens: int | None) -> None:
    pages = radix.insert(tokens_from(0, 12)).match.pages
    match = radix.cache.match(tokens_from(0, 12), max_tokens)
    num_whole = 3 if max_tokens is None else min(3, max(0, max_tokens) // 4)
    assert match.pages == pages[:num_whole]
    assert match.num_tokens == 4 * num_whole


def test_one_token_is_left_to_compute(radix: Setup) -> None:
    prompt = tokens_from(0, 8)
    radix.insert(prompt)
    assert radix.cache.match(prompt, max_tokens=len(prompt) - 1).num_tokens == 4


@pytest.mark.parametrize("num_common", range(13))
def test_prefixes_part_at_page_boundaries(radix: Setup, num_common: int) -> None:
    first = radix.insert(tokens_from(0, 12)).match.pages
    second = tokens_from(0, num_common) + tokens_from(100, 12 - num_common)
    result = radix.insert(second)
    assert result.num_new_pages == 3 - num_common // 4
    assert result.match.pages[: num_common // 4] == first[: num_common // 4]
    assert radix.cache.match(second).pages == result.match.pages
    assert radix.cache.match(tokens_from(0, 12)).pages == first


def test_the_slower_request_keeps_its_duplicates(radix: Setup) -> None:
    theirs = radix.insert(tokens_from(0, 8)).match.pages
    ours = radix.allocator.allocate_private("slow", 4)
    assert ours is not None
    result = radix.cache.insert(tokens_from(0, 13), ours, "slow")
    assert result.duplicate_pages == ours[:2]
    assert result.num_new_pages == 1
    assert result.match.pages == [*theirs, ours[2]]
    assert radix.allocator.private_pages("slow") == [ours[0], ours[1], ours[3]]
    assert radix.allocator.free_private("slow", result.duplicate_pages) == ours[:2]
    assert radix.allocator.free_private("slow") == [ours[3]]


def test_inserting_behind_a_match_reuses_its_pages(radix: Setup) -> None:
    radix.insert(tokens_from(0, 8))
    match = radix.cache.match(tokens_from(0, 16))
    radix.cache.lock(match)
    fresh = radix.allocator.allocate_private("next turn", 2)
    assert fresh is not None
    result = radix.cache.insert(tokens_from(0, 16), match.pages + fresh, "next turn")
    assert (result.num_new_pages, result.duplicate_pages) == (2, [])
    radix.cache.unlock(match)
    assert radix.cache.num_evictable == 4


def test_namespaces_share_nothing(radix: Setup) -> None:
    old = radix.insert(tokens_from(0, 8), namespace="weights-1").match.pages
    assert radix.cache.match(tokens_from(0, 8), namespace="weights-2").pages == []
    new = radix.insert(tokens_from(0, 8), namespace="weights-2").match.pages
    assert not set(old) & set(new)
    assert radix.cache.match(tokens_from(0, 8), namespace="weights-1").pages == old
    assert radix.cache.evict(4) == 4
    assert radix.cache.match(tokens_from(0, 8), namespace="weights-1").pages == []


def test_refused_insertions_change_nothing(radix: Setup) -> None:
    cached = radix.insert(tokens_from(0, 4)).match.pages
    held = radix.allocator.allocate_private("a", 2)
    assert held is not None
    for pages, owner in [
        (held, "b"),  # another's
        ([held[0], held[0]], "a"),  # one page twice
        ([held[0], cached[0]], "a"),  # cached under other tokens
        ([held[0], 31], "a"),  # free
    ]:
        with pytest.raises(PageStateError):
            radix.cache.insert(tokens_from(50, 8), pages, owner)
        radix.check()
        assert radix.cache.num_pages == 1
    with pytest.raises(ValueError, match="2 whole pages"):
        radix.cache.insert(tokens_from(50, 8), held[:1], "a")
    radix.allocator.free_private("a")


def test_forked_pages_get_the_tree_as_one_more_reader(radix: Setup) -> None:
    pages = radix.allocator.allocate_private("choice 0", 2)
    assert pages is not None
    radix.allocator.share(pages, "choice 0")
    radix.allocator.add_reader(pages)  # choice 1
    radix.cache.insert(tokens_from(0, 8), pages, "choice 0")
    assert [radix.allocator.num_readers(page) for page in pages] == [3, 3]
    assert radix.allocator.drop_reader(pages) == []
    assert radix.cache.evict(2) == 0  # choice 1 still reads them
    assert radix.cache.num_pages == 0
    assert radix.allocator.drop_reader(pages) == pages


# ---- locks and eviction -----------------------------------------------------------------------------


def test_locked_pages_are_never_evicted(radix: Setup) -> None:
    radix.insert(tokens_from(0, 12))
    match = radix.cache.match(tokens_from(0, 8))
    radix.cache.lock(match)
    assert (radix.cache.num_locked, radix.cache.num_evictable) == (2, 1)
    assert radix.cache.evict(99) == 1
    assert radix.cache.match(tokens_from(0, 12)).pages == match.pages
    radix.cache.unlock(match)
    assert radix.cache.evict(99) == 2


def test_locks_count(radix: Setup) -> None:
    match = radix.insert(tokens_from(0, 8)).match
    radix.cache.lock(match)
    radix.cache.lock(match)
    radix.cache.unlock(match)
    assert radix.cache.num_locked == 2
    radix.cache.unlock(match)
    assert radix.cache.num_locked == 0
    with pytest.raises(PageStateError, match="unlock without lock"):
        radix.cache.unlock(match)


def test_a_lock_survives_the_split_of_its_node(radix: Setup) -> None:
    match = radix.insert(tokens_from(0, 16)).match
    radix.cache.lock(match)
    upper = radix.cache.match(tokens_from(0, 8))
    radix.cache.lock(upper)
    assert radix.cache.num_locked == 4
    radix.cache.unlock(match)
    assert radix.cache.num_locked == 2
    assert radix.cache.evict(4) == 2
    radix.cache.unlock(upper)
    assert radix.cache.num_locked == 0


def test_a_match_that_was_evicted_cannot_be_locked(radix: Setup) -> None:
    radix.insert(tokens_from(0, 12))
    trimmed = radix.cache.match(tokens_from(0, 12))
    assert radix.cache.evict(1) == 1
    with pytest.raises(PageStateError, match="match again"):
        radix.cache.lock(trimmed)
    gone = radix.cache.match(tokens_from(0, 8))
    assert radix.cache.evict(2) == 2
    with pytest.raises(PageStateError, match="match again"):
        radix.cache.lock(gone)
    dropped = radix.insert(tokens_from(0, 8)).match
    assert radix.cache.reset()
    with pytest.raises(PageStateError, match="match again"):
        radix.cache.lock(dropped)


def test_the_least_recently_used_tail_goes_first(radix: Setup) -> None:
    a, b, c = tokens_from(0, 8), tokens_from(100, 8), tokens_from(200, 8)
    for tokens in (a, b, c):
        radix.insert(tokens)
    radix.cache.match(a)
    assert radix.cache.evict(1) == 1
    assert [radix.cache.match(tokens).num_tokens for tokens in (a, b, c)] == [8, 4, 8]
    assert radix.cache.evict(3) == 3  # now the order is a, b, c
    assert [radix.cache.match(tokens).num_tokens for tokens in (a, b, c)] == [0, 0, 8]


def test_a_shared_beginning_outlives_its_branches(radix: Setup) -> None:
    radix.insert(tokens_from(0, 4) + tokens_from(100, 4))
    radix.insert(tokens_from(0, 4) + tokens_from(200, 4))
    assert radix.cache.evict(2) == 2
    assert radix.cache.match(tokens_from(0, 4)).num_tokens == 4
    assert radix.cache.evict(2) == 1


def test_reset_waits_for_locks(radix: Setup) -> None:
    match = radix.insert(tokens_from(0, 8)).match
    radix.cache.lock(match)
    assert not radix.cache.reset()
    assert radix.cache.num_pages == 2
    radix.cache.unlock(match)
    assert radix.cache.reset()
    assert radix.allocator.num_free == 32
    assert radix.insert(tokens_from(0, 8)).num_new_pages == 2


def test_many_accesses_do_not_grow_the_eviction_heap(radix: Setup) -> None:
    for start in (0, 100):
        radix.insert(tokens_from(start, 8))
    for _ in range(500):
        match = radix.cache.match(tokens_from(0, 8))
        radix.cache.lock(match)
        radix.cache.unlock(match)
    assert len(radix.cache._candidates) <= 2
    assert radix.cache.evict(2) == 2
    assert radix.cache.match(tokens_from(0, 8)).num_tokens == 8


def test_bad_page_size() -> None:
    with pytest.raises(ValueError, match="page_size"):
        PrefixCache(PageAllocator(4), 0)


@pytest.mark.parametrize("order", list(product(range(4), repeat=3)))
def test_every_order_of_three_insertions(order: tuple[int, int, int]) -> None:
    """Exhaustive over four prompts that part at different pages: each stays findable, no page is lost."""
    prompts = [[1, 1, 1], [1, 1, 2], [1, 2, 2], [1]]
    allocator = PageAllocator(9)
    cache = PrefixCache(allocator, page_size=1)
    for index in order:
        pages = allocator.allocate_private("request", 3)
        assert pages is not None
        cache.insert(prompts[index], pages, "request")
        allocator.free_private("request")
        cache.check()
        allocator.check()
    distinct = {tuple(prompts[index][:end]) for index in order for end in range(1, 4)}
    assert cache.num_pages == len(distinct)
    for index in order:
        assert cache.match(prompts[index]).num_tokens == len(prompts[index])
    assert cache.evict(9) == len(distinct)
    assert allocator.num_free == 9
    cache.check()
    allocator.check()


# ---- against a model --------------------------------------------------------------------------------


@dataclass
class Entry:
    """One cached page in the model, known by the whole prefix that it ends."""

    page: int
    last_access: int
    num_locks: int = 0


PAGE_SIZE = 2
NAMESPACES = ("", "other")
TOKENS = st.lists(st.integers(0, 1), max_size=11)


class CacheMachine(RuleBasedStateMachine):
    """Random use by requests. The model evicts page by page: of the unlocked pages that no other page
    continues, the least recently used one."""

    @initialize(num_pages=st.integers(6, 24))
    def start(self, num_pages: int) -> None:
        self.allocator = PageAllocator(num_pages)
        self.cache = PrefixCache(self.allocator, PAGE_SIZE)
        self.num_pages = num_pages
        self.model: dict[tuple[str, tuple[int, ...]], Entry] = {}
        self.locked: list[tuple[str, tuple[int, ...], PrefixMatch]] = []
        self.forked: list[int] = []  # pages with one reader outside the tree
        self.now = 0

    def prefixes(self, namespace: str, tokens: list[int]) -> list[tuple[str, tuple[int, ...]]]:
        ends = range(PAGE_SIZE, len(tokens) + 1, PAGE_SIZE)
        return [(namespace, tuple(tokens[:end])) for end in ends]

    def access(self, namespace: str, tokens: list[int]) -> list[Entry]:
        """The cached prefix of these tokens, marked as used now."""
        self.now += 1
        found = []
        for key in self.prefixes(namespace, tokens):
            if (entry := self.model.get(key)) is None:
                break
            entry.last_access = self.now
            found.append(entry)
        return found

    def evict_from_model(self, num_pages: int) -> int:
        num_freed = 0
        while num_freed < num_pages:
            continued = {(namespace, tokens[:-PAGE_SIZE]) for namespace, tokens in self.model}
            leaves = [
                key for key, entry in self.model.items() if key not in continued and not entry.num_locks
            ]
            if not leaves:
                break
            oldest = min(leaves, key=lambda key: self.model[key].last_access)
            num_freed += self.model.pop(oldest).page not in self.forked
        return num_freed

    @rule(tokens=TOKENS, limit=st.none() | st.integers(0, 12), namespace=st.sampled_from(NAMESPACES))
    def match(self, tokens: list[int], limit: int | None, namespace: str) -> None:
        match = self.cache.match(tokens, limit, namespace)
        expected = self.access(namespace, tokens[:limit])
        assert match.pages == [entry.page for entry in expected]
        assert match.num_tokens == PAGE_SIZE * len(expected)

    @rule(tokens=TOKENS, namespace=st.sampled_from(NAMESPACES))
    def lock(self, tokens: list[int], namespace: str) -> None:
        match = self.cache.match(tokens, None, namespace)
        self.cache.lock(match)
        for entry in self.access(namespace, tokens):
            entry.num_locks += 1
        self.locked.append((namespace, tuple(tokens[: match.num_tokens]), match))

    @precondition(lambda self: self.locked)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.locked) - 1))
        namespace, tokens, match = self.locked.pop(at)
        self.cache.unlock(match)
        for key in self.prefixes(namespace, list(tokens)):
            self.model[key].num_locks -= 1

    @rule(tokens=TOKENS, namespace=st.sampled_from(NAMESPACES), reuse=st.booleans())
    def insert(self, tokens: list[int], namespace: str, reuse: bool) -> None:
        """A request computes a prompt, with or without the pages that are cached, and hands it over."""
        begin = self.cache.match(tokens, None, namespace).pages if reuse else []
        if reuse:
            self.access(namespace, tokens)
        own = self.allocator.allocate_private("request", -(-len(tokens) // PAGE_SIZE) - len(begin))
        if own is None:
            return
        pages = begin + own
        result = self.cache.insert(tokens, pages, "request", namespace)
        known = self.access(namespace, tokens)
        keys = self.prefixes(namespace, tokens)
        for key, page in list(zip(keys, pages, strict=False))[len(known) :]:
            self.model[key] = Entry(page, self.now)
        assert result.num_new_pages == len(keys) - len(known)
        assert result.match.pages == [self.model[key].page for key in keys]
        assert result.duplicate_pages == ([] if reuse else pages[: len(known)])
        left = self.allocator.private_pages("request")
        assert sorted(left) == sorted([*result.duplicate_pages, *pages[len(keys) :]])
        self.allocator.free_private("request")

    @rule(num_pages=st.integers(0, 8))
    def evict(self, num_pages: int) -> None:
        before = self.allocator.num_free
        expected = self.evict_from_model(num_pages)
        assert self.cache.evict(num_pages) == expected
        assert self.allocator.num_free == before + expected

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from([entry.page for entry in self.model.values()]))
        if page not in self.forked:
            self.allocator.add_reader([page])
            self.forked.append(page)

    @precondition(lambda self: self.forked)
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.forked))
        self.forked.remove(page)
        in_tree = any(entry.page == page for entry in self.model.values())
        assert self.allocator.drop_reader([page]) == ([] if in_tree else [page])

    @rule()
    def reset(self) -> None:
        is_locked = any(entry.num_locks for entry in self.model.values())
        assert self.cache.reset() == (not is_locked)
        if not is_locked:
            self.model.clear()

    @invariant()
    def agrees(self) -> None:
        self.allocator.check()
        self.cache.check()
        entries = list(self.model.values())
        assert sorted(self.cache.pages()) == sorted(entry.page for entry in entries)
        num_locked = sum(entry.num_locks > 0 for entry in entries)
        assert self.cache.num_locked == num_locked
        assert self.cache.num_evictable == len(entries) - num_locked
        for _, _, match in self.locked:
            assert all(self.allocator.num_readers(page) for page in match.pages)
        in_use = {entry.page for entry in entries} | set(self.forked)
        assert self.allocator.num_free == self.num_pages - len(in_use)


CacheMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestCacheMachine = CacheMachine.TestCase


# ---- check() finds what is broken -------------------------------------------------------------------


def test_check_lists_every_violation() -> None:
    allocator = PageAllocator(8)
    cache = PrefixCache(allocator, page_size=1)
    pages = allocator.allocate_private("a", 4)
    assert pages is not None
    leaf = cache.insert([1, 2, 3, 4], pages, "a").match.node
    upper = cache.match([1, 2]).node
    cache.check()

    allocator.drop_reader([3])
    leaf.num_locks = 1
    leaf.last_access += 10
    leaf.end = 9
    upper.tokens = (1, 2, 3)
    cache._in_tree.add(7)
    found = "; ".join(cache.violations())
    for expected in (
        "page 3 is in the tree, but free",
        "used later than its parent",
        "0 locks, fewer than below it",
        "ends at 9, its parent at 2",
        "node of pages [0, 1]: 3 tokens",
        "differ from the set of pages in the tree",
        "num_locked is 0, the tree holds 2",
    ):
        assert expected in found
    with pytest.raises(PageStateError, match="page 3 is in the tree"):
        cache.check()


def test_check_finds_a_lost_leaf_and_a_wrong_parent() -> None:
    allocator = PageAllocator(8)
    cache = PrefixCache(allocator, page_size=1)
    pages = allocator.allocate_private("a", 1)
    assert pages is not None
    leaf = cache.insert([1], pages, "a").match.node
    cache._candidates.clear()
    assert any("eviction cannot find" in line for line in cache.violations())
    leaf.tokens = (2,)
    assert any("its parent does not know it" in line for line in cache.violations())
    leaf.parent = None
    assert any("has no parent" in line for line in cache.violations())


# ---- what a scheduler reads before it locks ---------------------------------------------------------


def test_unlocked_pages_of_a_match(radix: Setup) -> None:
    radix.insert(tokens_from(0, 12))
    part = radix.cache.match(tokens_from(0, 8))
    whole = radix.cache.match(tokens_from(0, 12))
    assert (radix.cache.num_unlocked(part), radix.cache.num_unlocked(whole)) == (2, 3)
    radix.cache.lock(part)
    assert (radix.cache.num_unlocked(part), radix.cache.num_unlocked(whole)) == (0, 1)
    assert radix.cache.num_evictable == 1
    radix.cache.unlock(part)


def test_the_generation_changes_with_every_page_that_joins_or_leaves(radix: Setup) -> None:
    seen = [radix.cache.generation]

    def changed() -> bool:
        seen.append(radix.cache.generation)
        return seen[-1] != seen[-2]

    radix.insert(tokens_from(0, 12))
    assert changed()
    radix.cache.match(tokens_from(0, 8))
    radix.insert(tokens_from(0, 12))
    assert not changed()
    radix.cache.evict(1)
    assert changed()
    radix.cache.reset()
    assert changed()
