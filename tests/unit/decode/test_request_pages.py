"""RequestPages: what a request may need, what is promised, forked, grown and given back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdserve.components.invariant_checker import check_pages
from pdserve.components.page_allocator import PageAllocator
from pdserve.decode.request_pages import PageNeed, RequestPages
from pdserve.decode.sequence import DecodeRequest
from pdserve.messages.peer import RoomId

if TYPE_CHECKING:
    from .conftest import Requests

PAGE_SIZE = 4
ROOM = RoomId("decode", 1)


class Fixture:
    def __init__(self, num_pages: int = 32) -> None:
        self.copies: list[tuple[int, int]] = []
        self.poisoned: list[int] = []
        self.allocator = PageAllocator(num_pages)
        self.pages = RequestPages(
            self.allocator,
            PAGE_SIZE,
            lambda source, destination: self.copies.append((source, destination)),
            self.poisoned.extend,
        )

    def hand_over(self, request: DecodeRequest, room: RoomId = ROOM) -> None:
        self.pages.expose(request, room)
        self.pages.adopt(request, room)
        self.pages.fork(request)

    def grow(self, request: DecodeRequest, num_tokens: int) -> None:
        """Each live choice samples and then computes this many tokens."""
        for sequence in request.live_sequences:
            for _ in range(num_tokens):
                sequence.token_ids.append(7)
                self.pages.make_room(sequence)
                assert len(sequence.pages) * PAGE_SIZE >= len(sequence.token_ids)

    def check(self, *requests: DecodeRequest) -> None:
        sequences = [sequence for request in requests for sequence in request.sequences]
        self.pages.check_promises(list(requests))
        check_pages(
            self.allocator,
            [],
            owners=[sequence.owner for sequence in sequences],
            open_rooms=[ROOM],
            forked_pages={page for sequence in sequences for page in sequence.shared_pages},
        )


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "num_choices", "need"),
    [
        (8, 1, 1, PageNeed(2, (0,))),  # its only output token's KV is never written
        (8, 2, 1, PageNeed(2, (1,))),
        (8, 5, 1, PageNeed(2, (1,))),
        (8, 6, 1, PageNeed(2, (2,))),
        (9, 4, 1, PageNeed(3, (0,))),
        (9, 5, 1, PageNeed(3, (1,))),
        (9, 4, 3, PageNeed(3, (0, 1, 1))),  # each further choice copies the partial page
        (8, 5, 3, PageNeed(2, (1, 1, 1))),
        (8, 1, 2, PageNeed(2, (0, 0))),
        (1, 1, 1, PageNeed(1, (0,))),
    ],
)
def test_need(make: Requests, num_tokens: int, max_tokens: int, num_choices: int, need: PageNeed) -> None:
    request = make(num_tokens=num_tokens, max_tokens=max_tokens, choices=tuple(range(num_choices)))
    assert Fixture().pages.need(request) == need


def test_kept_output_counts_against_max_tokens(make: Requests) -> None:
    pages = Fixture().pages
    assert pages.need(make(num_tokens=8, output_ids=(1, 2, 3), max_tokens=10)) == PageNeed(3, (2,))
    assert pages.need(make(num_tokens=8, max_tokens=10)).total == 5


def test_what_is_promised_is_not_available(make: Requests) -> None:
    fixture = Fixture(num_pages=8)
    request = make(num_tokens=8, max_tokens=13)
    fixture.pages.expose(request, ROOM)
    assert (fixture.allocator.num_free, fixture.pages.num_available) == (6, 3)
    fixture.check(request)
    fixture.pages.take_back_promise(request.sequences[0])
    assert fixture.pages.num_available == 6
    fixture.check(request)


def test_what_was_not_admitted_raises(make: Requests) -> None:
    with pytest.raises(RuntimeError, match="admitted"):
        Fixture(num_pages=2).pages.expose(make(num_tokens=12), ROOM)


def test_growth_beyond_the_promise_raises(make: Requests) -> None:
    fixture = Fixture()
    request = make(num_tokens=8, max_tokens=2)
    fixture.hand_over(request)
    fixture.grow(request, 4)
    with pytest.raises(RuntimeError, match="promised"):
        fixture.grow(request, 1)


def test_a_fork_shares_whole_pages_and_copies_the_partial_one(make: Requests) -> None:
    fixture = Fixture()
    request = make(num_tokens=10, max_tokens=9, choices=(0, 1, 2))
    fixture.hand_over(request)
    first, second, third = request.sequences
    assert first.pages[:2] == second.pages[:2] == third.pages[:2]
    assert len({first.pages[2], second.pages[2], third.pages[2]}) == 3
    assert fixture.copies == [(first.pages[2], second.pages[2]), (first.pages[2], third.pages[2])]
    assert [fixture.allocator.num_readers(page) for page in first.pages[:2]] == [3, 3]
    fixture.check(request)
    fixture.pages.free(first)
    fixture.pages.free(third)
    fixture.check(request)
    assert fixture.allocator.num_free == 32 - 3
    fixture.pages.free(second)
    assert fixture.pages.num_available == fixture.allocator.num_free == 32


def test_a_fork_of_whole_pages_copies_nothing(make: Requests) -> None:
    fixture = Fixture()
    request = make(num_tokens=8, choices=(0, 1))
    fixture.hand_over(request)
    assert fixture.copies == []
    assert request.sequences[0].pages == request.sequences[1].pages
    fixture.grow(request, 1)
    assert request.sequences[0].pages[2] != request.sequences[1].pages[2]
    fixture.check(request)


def test_one_live_choice_shares_nothing(make: Requests) -> None:
    fixture = Fixture()
    request = make(num_tokens=10, choices=(0, 1), max_tokens=4)
    fixture.pages.expose(request, ROOM)
    request.sequences[0].is_finished = True
    fixture.pages.take_back_promise(request.sequences[0])
    fixture.pages.adopt(request, ROOM)
    fixture.pages.fork(request)
    assert request.sequences[0].pages == []
    assert request.sequences[1].shared_pages == []
    fixture.grow(request, 4)
    fixture.check(request)
    fixture.pages.free(request.sequences[1])
    assert fixture.pages.num_available == 32


def test_reserved_and_grown_pages_are_poisoned(make: Requests) -> None:
    fixture = Fixture()
    request = make(num_tokens=10, max_tokens=9)
    fixture.pages.allocate_prompt(request)
    assert fixture.poisoned == request.sequences[0].pages
    fixture.grow(request, 4)
    assert fixture.poisoned == request.sequences[0].pages


def test_freeing_twice_is_harmless(make: Requests) -> None:
    fixture = Fixture()
    request = make(num_tokens=10)
    fixture.hand_over(request)
    for _ in range(2):
        fixture.pages.free(request.sequences[0])
    assert fixture.pages.num_available == 32


def test_promises_that_do_not_add_up_are_found(make: Requests) -> None:
    fixture = Fixture()
    request = make(num_tokens=8, max_tokens=13)
    fixture.pages.expose(request, ROOM)
    request.sequences[0].growth += 1
    with pytest.raises(RuntimeError, match="promised"):
        fixture.pages.check_promises([request])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_tokens=st.integers(1, 20),
    num_kept=st.integers(0, 3),
    max_tokens=st.integers(4, 14),
    num_choices=st.integers(1, 4),
    is_local=st.booleans(),
)
def test_the_need_is_exactly_what_the_longest_answers_take(
    make: Requests, num_tokens: int, num_kept: int, max_tokens: int, num_choices: int, is_local: bool
) -> None:
    fixture = Fixture(num_pages=64)
    request = make(
        num_tokens=num_tokens,
        output_ids=tuple(range(num_kept)),
        max_tokens=max_tokens,
        choices=tuple(range(num_choices)),
    )
    need = fixture.pages.need(request)
    if is_local:
        fixture.pages.allocate_prompt(request)
        fixture.pages.fork(request)
    else:
        fixture.hand_over(request)
    assert fixture.pages.num_available == 64 - need.total
    fixture.grow(request, max_tokens - num_kept - 1)
    fixture.check(request)
    assert fixture.allocator.num_free == 64 - need.total
    for sequence in request.sequences:
        sequence.is_finished = True
        fixture.pages.free(sequence)
    assert fixture.pages.num_available == fixture.allocator.num_free == 64
