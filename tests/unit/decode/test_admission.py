"""choose_admitted: oldest first, overtaking by who fits, and its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdserve.decode.admission import Capacity, choose_admitted
from pdserve.decode.sequence import DecodeRequest

if TYPE_CHECKING:
    from .conftest import Requests

OVERTAKING_S = 5.0


def needs(request: DecodeRequest) -> int:
    """In these tests a request's prompt is as long as it needs pages."""
    return len(request.work.prompt_ids)


def admitted(
    waiting: list[DecodeRequest], pages: int, sequences: int = 100, now: float = 0.0, most_pages: int = 100
) -> list[str]:
    chosen = choose_in_turn(waiting, pages, sequences, now, most_pages)
    return [request.message.request_id for request in chosen]


def choose_in_turn(
    waiting: list[DecodeRequest], pages: int, sequences: int, now: float, most_pages: int = 100
) -> list[DecodeRequest]:
    """Admits each one before the next is asked for, as the scheduler does."""
    chosen: list[DecodeRequest] = []

    def capacity() -> Capacity:
        return Capacity(
            pages - sum(map(needs, chosen)),
            sequences - sum(len(request.sequences) for request in chosen),
            most_pages,
        )

    for request in choose_admitted(waiting, capacity, needs, now, OVERTAKING_S):
        chosen.append(request)
    return chosen


def test_what_one_takes_beyond_its_need_is_seen(make: Requests) -> None:
    """It may have locked cached pages that the next one counted on."""
    left = iter([Capacity(6, 9, 9), Capacity(2, 9, 9), Capacity(0, 9, 9)])
    waiting = [make("a", num_tokens=3), make("b", num_tokens=3), make("c", num_tokens=2)]
    chosen = choose_admitted(waiting, lambda: next(left), needs, now=0.0, overtaking_s=OVERTAKING_S)
    assert [request.message.request_id for request in chosen] == ["a", "c"]


def test_oldest_first_as_far_as_the_pages_go(make: Requests) -> None:
    waiting = [make(name, num_tokens=3) for name in "abc"]
    assert admitted(waiting, pages=9) == ["a", "b", "c"]
    assert admitted(waiting, pages=8) == ["a", "b"]
    assert admitted(waiting, pages=2) == []


def test_places_are_counted_by_choice(make: Requests) -> None:
    waiting = [make("a", choices=(0, 1)), make("b", choices=(0, 1, 2)), make("c")]
    assert admitted(waiting, pages=100, sequences=4) == ["a", "c"]


@pytest.mark.parametrize(
    ("age_s", "expected"), [(0.0, ["small"]), (OVERTAKING_S, ["small"]), (OVERTAKING_S + 0.1, [])]
)
def test_overtaking_ends_after_a_while(make: Requests, age_s: float, expected: list[str]) -> None:
    waiting = [make("big", num_tokens=9), make("small", num_tokens=1)]
    assert admitted(waiting, pages=4, now=age_s) == expected


def test_nobody_waits_for_one_who_could_not_fit_at_all(make: Requests) -> None:
    waiting = [make("big", num_tokens=9), make("small", num_tokens=1)]
    now = OVERTAKING_S + 1
    assert admitted(waiting, pages=4, now=now, most_pages=9) == []
    assert admitted(waiting, pages=4, now=now, most_pages=8) == ["small"]


def test_who_is_older_than_the_one_waited_for_goes_first(make: Requests) -> None:
    waiting = [make("first", num_tokens=2), make("big", num_tokens=9), make("last", num_tokens=1)]
    assert admitted(waiting, pages=4, now=OVERTAKING_S + 1) == ["first"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3), st.floats(0.0, 10.0)), max_size=8),
    pages=st.integers(0, 20),
    sequences=st.integers(0, 6),
)
def test_never_more_than_there_is(
    make: Requests, sizes: list[tuple[int, int, float]], pages: int, sequences: int
) -> None:
    waiting = [
        make(str(index), num_tokens=need, choices=tuple(range(num_choices)), arrived_s=arrived_s)
        for index, (need, num_choices, arrived_s) in enumerate(sizes)
    ]
    chosen = choose_in_turn(waiting, pages, sequences, now=10.0)
    assert sum(needs(request) for request in chosen) <= pages
    assert sum(len(request.sequences) for request in chosen) <= sequences
    left = [request for request in waiting if request not in chosen]
    if left and not chosen:
        assert needs(waiting[0]) > pages or len(waiting[0].sequences) > sequences
