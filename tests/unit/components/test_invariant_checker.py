"""The invariant checker: silent on a healthy node, and each breach between the parts is found and named."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from pdserve.components.invariant_checker import (
    IDLE_FOR_S,
    IdleCheck,
    InvariantViolation,
    check_idle,
    check_pages,
    check_requests,
)
from pdserve.components.page_allocator import PageAllocator
from pdserve.components.prefix_cache import PrefixCache, PrefixMatch
from pdserve.messages.peer import RoomId

EXPOSED = RoomId("decode-1", 1)
FAILED = RoomId("decode-1", 2)
IDLE: dict[str, list[str]] = {"waiting": [], "running": []}


@dataclass
class Node:
    """A node with one request running on a cached prefix, one room open and one failed."""

    allocator: PageAllocator
    cache: PrefixCache
    match: PrefixMatch

    def check_pages(self, **changes: object) -> None:
        known: dict[str, object] = {"owners": {"running"}, "open_rooms": {EXPOSED, FAILED}}
        check_pages(self.allocator, [self.cache], **(known | changes))  # type: ignore[arg-type]

    def drain(self) -> None:
        """What an orderly end of all work does."""
        self.cache.unlock(self.match)
        self.allocator.free_private("running")
        self.allocator.release_room(EXPOSED)
        self.allocator.release_room(FAILED)


@pytest.fixture
def node() -> Node:
    allocator = PageAllocator(32)
    cache = PrefixCache(allocator, page_size=2)
    pages = allocator.allocate_private("done", 4)
    assert pages is not None
    match = cache.insert(range(8), pages, "done").match
    cache.lock(match)
    allocator.allocate_private("running", 3)
    allocator.reserve_exposed(EXPOSED, 2)
    allocator.reserve_exposed(FAILED, 5)
    allocator.quarantine(FAILED)
    return Node(allocator, cache, match)


def test_a_healthy_node_passes_at_work_and_idle(node: Node) -> None:
    node.check_pages()
    node.check_pages(owners={"running", "has no pages yet"})
    node.drain()
    check_pages(node.allocator, [node.cache], owners=())
    check_idle(node.allocator, [node.cache], states=IDLE)


def test_pages_of_a_request_that_is_gone(node: Node) -> None:
    with pytest.raises(
        InvariantViolation, match="3 pages are private to 'running', which is no request here"
    ):
        node.check_pages(owners=())


@pytest.mark.parametrize(("open_rooms", "lost"), [({EXPOSED}, FAILED), ({FAILED}, EXPOSED)])
def test_pages_of_a_room_that_is_closed(node: Node, open_rooms: set[RoomId], lost: RoomId) -> None:
    with pytest.raises(InvariantViolation, match="which is not open") as caught:
        node.check_pages(open_rooms=open_rooms)
    assert len(caught.value.violations) == 1
    assert str(lost) in caught.value.violations[0]


def test_shared_pages_that_nobody_reads(node: Node) -> None:
    pages = node.allocator.allocate_private("running", 1)
    assert pages is not None
    node.allocator.share(pages, "running")
    with pytest.raises(InvariantViolation, match=f"page {pages[0]} is shared, but nobody reads it"):
        node.check_pages()


def test_the_parts_own_checks_are_included(node: Node) -> None:
    node.allocator._readers.pop(node.match.pages[0])
    node.cache._num_locked = 9
    with pytest.raises(InvariantViolation) as caught:
        node.check_pages()
    text = str(caught.value)
    assert "page 0 is in no state" in text
    assert "num_locked is 9" in text
    assert "page 0 is in a prefix cache, but not shared" in text
    assert len(caught.value.violations) >= 3


def test_two_caches_with_one_page(node: Node) -> None:
    other = PrefixCache(node.allocator, page_size=2)
    other.insert([50, 51], [node.match.pages[0]], "nobody")
    with pytest.raises(InvariantViolation, match="two prefix caches hold the same page"):
        check_pages(node.allocator, [node.cache, other], owners={"running"}, open_rooms=[EXPOSED, FAILED])


def test_a_request_in_two_states() -> None:
    check_requests({"waiting": ["a"], "running": ["b"], "transferring": []})
    with pytest.raises(InvariantViolation, match="'a' is in running and also in waiting"):
        check_requests({"waiting": ["a", "b"], "running": ["a"]})
    with pytest.raises(InvariantViolation, match="'a' is in waiting and also in waiting"):
        check_requests({"waiting": ["a", "a"]})


def test_idle_finds_each_thing_that_was_left_behind(node: Node) -> None:
    with pytest.raises(InvariantViolation) as caught:
        check_idle(
            node.allocator,
            [node.cache],
            states={"waiting": ["w"], "running": []},
            open_rooms=[EXPOSED, FAILED],
        )
    text = str(caught.value)
    for expected in (
        "'w' is in waiting",
        "which is no request here",
        "is exposed",
        "has 4 locked pages",
        "free + cached is 18 + 4 of 32",
    ):
        assert expected in text


def test_idle_with_a_peer_out_of_reach(node: Node) -> None:
    node.cache.unlock(node.match)
    node.allocator.free_private("running")
    node.allocator.release_room(EXPOSED)
    check_idle(node.allocator, [node.cache], states=IDLE, open_rooms=[FAILED])
    with pytest.raises(InvariantViolation, match="not open"):
        check_idle(node.allocator, [node.cache], states=IDLE)


def test_an_idle_period_is_checked_once_when_it_has_lasted() -> None:
    check = IdleCheck()
    assert not check.is_due(0.0, idle=True)  # nothing has happened yet
    assert not check.is_due(1.0, idle=False)
    assert not check.is_due(2.0, idle=True)
    assert check.deadline == 2.0 + IDLE_FOR_S
    assert not check.is_due(2.5, idle=False)  # a request came in between
    assert check.deadline == math.inf
    assert not check.is_due(3.0, idle=True)
    assert check.is_due(3.0 + IDLE_FOR_S, idle=True)
    assert not check.is_due(9.0, idle=True)
