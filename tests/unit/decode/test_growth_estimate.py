"""GrowthEstimate: high at first, lower while all goes well, right again after a retraction."""

from __future__ import annotations

import pytest

from pdserve.decode.growth_estimate import GrowthEstimate


def test_it_sinks_to_its_minimum_and_no_further() -> None:
    growth = GrowthEstimate()
    assert growth.share == pytest.approx(0.7)
    growth.step()
    assert 0.69 < growth.share < 0.7
    for _ in range(700):
        growth.step()
    assert growth.share == pytest.approx(0.098)


def test_a_retraction_raises_it_to_what_was_used_and_some_steps_more() -> None:
    growth = GrowthEstimate()
    for _ in range(700):
        growth.step()
    growth.retracted(num_output_tokens=100, max_tokens=400, num_sequences=3)
    assert growth.share == pytest.approx(160 / 400)


def test_a_retraction_never_lowers_it_nor_lifts_it_above_one() -> None:
    growth = GrowthEstimate()
    growth.retracted(num_output_tokens=0, max_tokens=10_000, num_sequences=1)
    assert growth.share == pytest.approx(0.7)
    growth.retracted(num_output_tokens=10, max_tokens=10, num_sequences=1)
    assert growth.share == 1.0
    growth.retracted(num_output_tokens=0, max_tokens=0, num_sequences=0)
    assert growth.share == 1.0


def test_a_conservative_one_counts_all_growth_for_ever() -> None:
    growth = GrowthEstimate(11.0)
    for _ in range(700):
        assert growth.share == 1.0
        growth.step()


def test_it_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="above 0"):
        GrowthEstimate(0.0)
