from __future__ import annotations

from pdserve.router.prefix_index import PrefixIndex, page_hashes


def test_only_full_pages_are_hashed() -> None:
    assert len(page_hashes([1, 2, 3], 4)) == 0
    assert len(page_hashes([1, 2, 3, 4], 4)) == 1
    assert len(page_hashes(list(range(11)), 4)) == 2


def test_a_hash_covers_everything_before_it() -> None:
    same_page = [5, 6, 7, 8]
    assert page_hashes([1, 2, 3, 4, *same_page], 4)[1] != page_hashes([4, 3, 2, 1, *same_page], 4)[1]
    assert page_hashes([1, 2, 3, 4, *same_page], 4) == page_hashes((1, 2, 3, 4, *same_page, 9), 4)


def test_a_hash_is_of_one_salt() -> None:
    hashes = {salt: page_hashes(range(8), 4, salt=salt) for salt in ("", "a", "b")}
    assert len({page for pages in hashes.values() for page in pages}) == 6
    assert page_hashes(range(12), 4, known=hashes["a"], salt="a") == page_hashes(range(12), 4, salt="a")
    assert page_hashes(range(12), 4, salt="a")[:2] == hashes["a"]


def test_the_leading_pages_that_match_are_counted() -> None:
    index = PrefixIndex()
    index.record("p", page_hashes(range(12), 4))
    assert index.num_cached_pages("p", page_hashes(range(12), 4)) == 3
    assert index.num_cached_pages("p", page_hashes([*range(8), 99, 99, 99, 99], 4)) == 2
    assert index.num_cached_pages("p", page_hashes([99, *range(1, 12)], 4)) == 0
    assert index.num_cached_pages("other", page_hashes(range(12), 4)) == 0


def test_tails_are_dropped_before_what_they_need() -> None:
    index = PrefixIndex()
    index.record("p", page_hashes(range(16), 4), max_pages=2)
    assert index.num_cached_pages("p", page_hashes(range(16), 4)) == 2


def test_the_least_recently_sent_prompt_is_dropped_first() -> None:
    index = PrefixIndex()
    old, kept, new = (page_hashes(range(start, start + 8), 4) for start in (0, 100, 200))
    index.record("p", old, max_pages=4)
    index.record("p", kept, max_pages=4)
    index.record("p", kept, max_pages=4)
    index.record("p", new, max_pages=4)
    assert [index.num_cached_pages("p", hashes) for hashes in (old, kept, new)] == [0, 2, 2]


def test_a_node_and_all_nodes_are_forgotten() -> None:
    index = PrefixIndex()
    hashes = page_hashes(range(4), 4)
    index.record("p", hashes)
    index.record("q", hashes)
    index.forget("p")
    assert (index.num_cached_pages("p", hashes), index.num_cached_pages("q", hashes)) == (0, 1)
    index.clear()
    assert index.num_cached_pages("q", hashes) == 0
