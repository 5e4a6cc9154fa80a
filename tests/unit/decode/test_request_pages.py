"""RequestPages: what a request may need, what is promised, forked, grown and given back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdserve.components.invariant_checker import check_pages
from pdserve.components.page_allocator import PageAllocator
from pdserve.components.page_need import PageNeed
from pdserve.components.prefix_cache import PrefixCache
from pdserve.decode.request_pages import RequestPages
from pdserve.decode.sequence import DecodeRequest, Sequence
from pdserve.decode.session_pins import SessionPins
from pdserve.messages.peer import RoomId

if TYPE_CHECKING:
    from .conftest import Requests

PAGE_SIZE = 4
ROOM = RoomId("decode", 1)


class Fixture:
    def __init__(self, num_pages: int = 32, *, keeps_prefixes: bool = True) -> None:
        self.copies: list[tuple[int, int]] = []
        self.poisoned: list[int] = []
        self.allocator = PageAllocator(num_pages)
        self.cache = PrefixCache(self.allocator, PAGE_SIZE)
        self.pins = SessionPins(self.cache, max_pages=self.allocator.num_pages)
        self.pages = RequestPages(
            self.allocator,
            self.cache,
            lambda source, destination: self.copies.append((source, destination)),
            self.poisoned.extend,
            pins=self.pins,
            keeps_prefixes=keeps_prefixes,
        )

    def hand_over(self, request: DecodeRequest, room: RoomId = ROOM) -> None:
        self.pages.expose(request, room)
        self.run(request, room)

    def run(self, request: DecodeRequest, room: RoomId = ROOM) -> None:
        """Every write is in place."""
        self.pages.adopt(request, room)
        self.pages.fork(request)

    def end(self, *sequences: Sequence, of: DecodeRequest) -> None:
        for sequence in sequences or of.sequences:
            sequence.is_finished = True
            self.pages.free(of, sequence, num_computed=len(sequence.token_ids) - 1)

    def grow(self, request: DecodeRequest, num_tokens: int) -> None:
        """Each live choice samples and then computes this many tokens."""
        for sequence in request.live_sequences:
            for _ in range(num_tokens):
                sequence.token_ids.append(7)
                assert self.pages.make_room(sequence)
                assert len(sequence.pages) * PAGE_SIZE >= len(sequence.token_ids)

    def check(self, *requests: DecodeRequest) -> None:
        sequences = [sequence for request in requests for sequence in request.sequences]
        self.pages.check_promises(list(requests))
        check_pages(
            self.allocator,
            [self.cache],
            owners=[sequence.owner for sequence in sequences],
            open_rooms=[ROOM],
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


@pytest.mark.parametrize(("was_retracted", "num_promised"), [(False, 1), (True, 3)])
def test_what_is_promised_is_not_available(make: Requests, was_retracted: bool, num_promised: int) -> None:
    fixture = Fixture(num_pages=8)
    request = make(num_tokens=8, max_tokens=13, was_retracted=was_retracted)
    fixture.pages.expose(request, ROOM)
    assert (fixture.allocator.num_free, fixture.pages.num_available) == (6, 6 - num_promised)
    fixture.check(request)
    fixture.pages.free(request, request.sequences[0])
    assert fixture.pages.num_available == 6
    fixture.check(request)


@pytest.mark.parametrize(
    ("was_retracted", "share", "demand"),
    [(False, 0.1, 2 + 1), (False, 0.5, 2 + 2), (False, 1.0, 2 + 3), (True, 0.1, 2 + 3)],
)
def test_admission_counts_a_share_of_the_growth(
    make: Requests, was_retracted: bool, share: float, demand: int
) -> None:
    """Of one who was retracted, all of it."""
    fixture = Fixture()
    request = make(num_tokens=8, max_tokens=13, was_retracted=was_retracted)
    assert fixture.pages.demand(request, share) == demand
    available = fixture.pages.num_available
    fixture.hand_over(request)
    expected = fixture.pages.num_expected([request], share)
    assert available - (fixture.pages.num_available - expected) == demand


def test_nobody_is_expected_to_use_the_whole_context(make: Requests) -> None:
    fixture = Fixture(num_pages=4000)
    assert fixture.pages.demand(make(num_tokens=8, max_tokens=12_000), 0.5) == 2 + 4096 // PAGE_SIZE // 2


def test_what_was_not_admitted_raises(make: Requests) -> None:
    with pytest.raises(RuntimeError, match="admitted"):
        Fixture(num_pages=2).pages.expose(make(num_tokens=12), ROOM)


def test_growth_beyond_the_promise_raises(make: Requests) -> None:
    fixture = Fixture()
    request = make(num_tokens=8, max_tokens=2)
    fixture.hand_over(request)
    fixture.grow(request, 4)
    with pytest.raises(RuntimeError, match="beyond what it may need"):
        fixture.grow(request, 1)


def test_growth_that_was_not_promised_may_have_to_wait(make: Requests) -> None:
    fixture = Fixture(num_pages=4)
    request = make(num_tokens=8, max_tokens=13)
    fixture.hand_over(request)
    fixture.grow(request, 4)
    fixture.allocator.allocate_private("another", 1)
    sequence = request.sequences[0]
    sequence.token_ids.append(7)
    assert not fixture.pages.make_room(sequence)
    fixture.allocator.free_private("another")
    assert fixture.pages.make_room(sequence)
    fixture.check(request)


@pytest.mark.parametrize("keeps_prefixes", [True, False])
def test_a_fork_shares_whole_pages_and_copies_the_partial_one(make: Requests, keeps_prefixes: bool) -> None:
    fixture = Fixture(keeps_prefixes=keeps_prefixes)
    request = make(num_tokens=10, max_tokens=9, choices=(0, 1, 2))
    fixture.hand_over(request)
    first, second, third = request.sequences
    assert first.pages[:2] == second.pages[:2] == third.pages[:2]
    assert len({first.pages[2], second.pages[2], third.pages[2]}) == 3
    assert fixture.copies == [(first.pages[2], second.pages[2]), (first.pages[2], third.pages[2])]
    assert fixture.cache.num_locked == 2
    fixture.check(request)
    fixture.end(first, third, of=request)
    fixture.check(request)
    assert fixture.allocator.num_free == 32 - 3
    assert fixture.cache.num_locked == 2, "the second one reads them"
    fixture.end(second, of=request)
    assert fixture.pages.num_available == 32
    assert fixture.allocator.num_free == (30 if keeps_prefixes else 32)


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
    fixture.end(request.sequences[0], of=request)
    fixture.run(request)
    assert request.sequences[0].pages == []
    assert fixture.copies == []
    fixture.grow(request, 4)
    fixture.check(request)
    fixture.end(request.sequences[1], of=request)
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
        fixture.end(of=request)
    assert fixture.pages.num_available == 32
    fixture.check(request)


def test_promises_that_do_not_add_up_are_found(make: Requests) -> None:
    fixture = Fixture()
    request = make(num_tokens=8, max_tokens=13)
    fixture.pages.expose(request, ROOM)
    request.sequences[0].promised += 1
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
        was_retracted=True,
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
    fixture.end(of=request)
    fixture.check(request)
    assert fixture.pages.num_available == 64
    assert fixture.cache.reset()
    assert fixture.allocator.num_free == 64


# ---- the prefix cache -------------------------------------------------------------------------------


def follow_up(make: Requests, request: DecodeRequest, num_new: int) -> DecodeRequest:
    """The next turn: all tokens of the one before, then new ones."""
    tokens = (*request.sequences[0].token_ids, *range(500, 500 + num_new))
    return make("next", prompt_ids=tokens)


def test_a_follow_up_takes_only_what_is_missing(make: Requests) -> None:
    fixture = Fixture()
    first = make(num_tokens=10, max_tokens=20)
    fixture.hand_over(first)
    fixture.grow(first, 7)  # 17 tokens, of which the last is not computed
    fixture.end(of=first)
    assert fixture.cache.num_pages == 4
    second = follow_up(make, first, 6)  # 23 tokens
    assert fixture.pages.demand(second, 0.0) == 6  # two pages, and four that are locked then
    dest_pages = fixture.pages.expose(second, RoomId("decode", 2))
    assert second.num_cached == 16
    assert dest_pages[:4] == fixture.cache.match(second.work.token_ids).pages
    assert fixture.allocator.room_pages(RoomId("decode", 2)) == dest_pages[4:]
    assert len(dest_pages) == 6
    assert fixture.poisoned[-2:] == dest_pages[4:], "what is cached is left alone"
    fixture.run(second, RoomId("decode", 2))
    assert second.sequences[0].pages == dest_pages
    fixture.check(first, second)
    fixture.end(of=second)
    assert fixture.cache.num_locked == 0
    assert fixture.pages.num_available == 32


def test_one_token_at_least_is_left_to_compute(make: Requests) -> None:
    fixture = Fixture()
    first = make(num_tokens=8)
    fixture.hand_over(first)
    fixture.end(of=first)
    assert fixture.pages.match(make("again", num_tokens=8)).num_tokens == 4


def test_prompt_logprobs_need_what_is_behind_the_first_one_asked_for(make: Requests) -> None:
    fixture = Fixture()
    first = make(num_tokens=20)
    fixture.hand_over(first)
    fixture.end(of=first)

    def num_matched(**options: Any) -> int:  # noqa: ANN401
        return fixture.pages.match(make(num_tokens=20, num_prompt_logprobs=0, **options)).num_tokens

    assert num_matched() == 0
    assert num_matched(prompt_logprobs_start=9) == 8
    assert num_matched(prompt_logprobs_start=8) == 4
    assert num_matched(output_ids=(1,)) == 20, "they were given with the first attempt"


def test_a_hand_off_that_failed_leaves_nothing_in_the_cache(make: Requests) -> None:
    fixture = Fixture()
    request = make(num_tokens=10)
    fixture.pages.expose(request, ROOM)
    fixture.allocator.quarantine(ROOM)
    fixture.end(of=request)
    assert (fixture.cache.num_pages, fixture.cache.num_locked) == (0, 0)
    fixture.check(request)


def test_equal_prompts_at_the_same_time_end_up_in_the_same_pages(make: Requests) -> None:
    fixture = Fixture()
    one, other = make("one", num_tokens=9), make("other", num_tokens=9)
    room = RoomId("decode", 2)
    fixture.pages.expose(one, ROOM)
    fixture.pages.expose(other, room)
    fixture.run(one)
    fixture.run(other, room)
    assert one.sequences[0].pages[:2] == other.sequences[0].pages[:2]
    assert fixture.allocator.num_free == 32 - 4
    fixture.check(one, other)
    fixture.end(of=one)
    fixture.end(of=other)
    assert fixture.pages.num_available == 32


def test_cached_pages_make_room_least_recently_used_first(make: Requests) -> None:
    fixture = Fixture(num_pages=8)
    for name, first_token in (("old", 1), ("new", 100)):
        request = make(name, prompt_ids=tuple(range(first_token, first_token + 12)))
        fixture.hand_over(request)
        fixture.end(of=request)
    assert (fixture.cache.num_pages, fixture.pages.num_available) == (6, 8)
    third = make("third", prompt_ids=tuple(range(200, 220)), max_tokens=1)
    fixture.hand_over(third)
    assert fixture.cache.match(range(1, 13)).num_tokens == 0
    assert fixture.cache.match(range(100, 112)).num_tokens == 12
    fixture.check(third)


def test_with_the_cache_off_nothing_is_kept_or_matched(make: Requests) -> None:
    fixture = Fixture(keeps_prefixes=False)
    one, other = make("one", num_tokens=9, choices=(0, 1)), make("other", num_tokens=9, choices=(0, 1))
    fixture.hand_over(one)
    room = RoomId("decode", 2)
    assert fixture.pages.match(other).num_tokens == 0
    fixture.pages.expose(other, room)
    fixture.run(other, room)
    assert one.sequences[0].pages[0] != other.sequences[0].pages[0]
    fixture.end(of=one)
    fixture.check(other)
    fixture.end(of=other)
    assert fixture.allocator.num_free == 32
