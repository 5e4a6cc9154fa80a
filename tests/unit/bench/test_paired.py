from __future__ import annotations

import pytest

from pdserve.bench.paired import blocks, median_ratios, ratios, turns


def test_the_order_flips_from_round_to_round() -> None:
    assert turns(2, 3) == [(0, 0), (0, 1), (1, 1), (1, 0), (2, 0), (2, 1)]
    assert turns(1, 2) == [(0, 0), (1, 0)]


@pytest.mark.parametrize(("num_requests", "num_rounds"), [(10, 1), (10, 3), (7, 7), (8, 4)])
def test_blocks_cover_every_request_once(num_requests: int, num_rounds: int) -> None:
    cut = blocks(num_requests, num_rounds)
    assert [index for block in cut for index in block] == list(range(num_requests))
    sizes = [len(block) for block in cut]
    assert len(sizes) == num_rounds
    assert max(sizes) - min(sizes) <= 1


def test_ratios_take_numbers_only() -> None:
    ours = {"a": 3.0, "b": 1, "c": "text", "d": True, "e": None, "f": 2.0, "g": 1.0}
    base = {"a": 2.0, "b": 4, "c": "text", "d": True, "e": 1.0, "f": 0.0}
    assert ratios(ours, base) == {"a": 1.5, "b": 0.25}


def test_median_over_rounds_is_not_moved_by_one_bad_round() -> None:
    ours = [{"x": 1.0}, {"x": 100.0}, {"x": 1.2, "y": 2.0}]
    base = [{"x": 1.0}, {"x": 1.0}, {"x": 1.0, "y": 1.0}]
    assert median_ratios(ours, base) == {"x": 1.2, "y": 2.0}
