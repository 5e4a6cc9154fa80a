from __future__ import annotations

import pytest

from pdserve.messages.timeline import Span, covered_s, moved, span_between, unaccounted_s


@pytest.mark.parametrize(
    ("spans", "covered"),
    [
        ([], 0.0),
        ([(0.0, 4.0)], 4.0),
        ([(-5.0, 100.0)], 10.0),
        ([(1.0, 2.0), (2.0, 3.0)], 4.0),  # overlapping time counts once
        ([(5.0, 1.0), (1.0, 8.0)], 8.0),  # one inside of the other
        ([(12.0, 1.0), (-3.0, 1.0)], 0.0),
    ],
)
def test_what_is_covered(spans: list[tuple[float, float]], covered: float) -> None:
    named = [Span("queue", start, duration) for start, duration in spans]
    assert covered_s(named, 0.0, 10.0) == pytest.approx(covered)


def test_what_runs_beside_the_way_to_the_first_token_accounts_for_nothing() -> None:
    spans = [Span("queue", 0.0, 1.0), Span("handoff", 0.0, 9.0), Span("prefill_chunk", 1.5, 8.5)]
    assert unaccounted_s(spans, 0.0, 10.0) == pytest.approx(0.5)


def test_a_message_takes_no_negative_time() -> None:
    assert span_between("to_decode", 5.0, 4.9) == Span("to_decode", 5.0, 0.0)
    assert moved([Span("wire", 5.0, 1.0, 8)], -2.0) == (Span("wire", 3.0, 1.0, 8),)
