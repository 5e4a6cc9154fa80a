"""How one flag's values are spelled."""

from __future__ import annotations

import pytest

from pdserve.runtime.flag import near_miss, read_count


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("4096", 4096),
        ("-1", -1),
        ("32k", 32_000),
        ("32K", 32_768),
        ("1.5k", 1_500),
        ("1m", 1_000_000),
        ("1M", 1 << 20),
        ("2g", 2_000_000_000),
        ("1G", 1 << 30),
        ("0.0005k", 0),
    ],
)
def test_a_number_of_tokens_may_have_a_suffix(text: str, number: int) -> None:
    assert read_count(text) == number


@pytest.mark.parametrize("text", ["", "k", "32kb", "1.5K", "1.5", "1e3", "32 k", "٣k", "-2k", "9" * 30])
def test_what_is_no_number_of_tokens_is_told_how_to_write_one(text: str) -> None:
    with pytest.raises(ValueError, match="32K"):
        read_count(text)


def test_a_near_miss_is_named() -> None:
    known = ["--max-model-len", "--page-size"]
    assert near_miss("--max-modellen", known) == "; did you mean --max-model-len?"
    assert near_miss("--speculative-config", known) == ""
