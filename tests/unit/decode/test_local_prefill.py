"""LocalPrefillPolicy: who computes a prompt, by what is missing where and by what that costs."""

from __future__ import annotations

import pytest

from pdserve.decode.local_prefill import LocalPrefillPolicy


def policy(threshold: int | None = None) -> LocalPrefillPolicy:
    return LocalPrefillPolicy(threshold=threshold, chunk_tokens=64, page_size=16, page_bytes=16_000)


def is_local(
    rule: LocalPrefillPolicy, num_missing: int, *, num_cached: int = 512, num_ahead: int = 0, running: int = 0
) -> bool:
    return rule.is_local(
        num_tokens=num_cached + num_missing,
        num_cached=num_cached,
        num_ahead_on_prefill=num_ahead or num_missing,
        num_running=running,
    )


@pytest.mark.parametrize(
    ("threshold", "num_missing", "expected"), [(0, 1, False), (32, 32, True), (32, 33, False)]
)
def test_a_threshold_decides_alone(threshold: int, num_missing: int, expected: bool) -> None:
    rule = policy(threshold)
    assert is_local(rule, num_missing) is expected
    assert is_local(rule, num_missing, num_cached=0, num_ahead=100_000) is expected


def test_what_decode_holds_nothing_of_goes_to_prefill() -> None:
    assert not is_local(policy(), 1, num_cached=0, num_ahead=100_000)


def test_what_fits_beside_one_step_is_computed_here() -> None:
    assert is_local(policy(), 64, running=50)
    assert not is_local(policy(), 65, running=50)


def test_unmeasured_sides_are_taken_to_be_equally_fast() -> None:
    assert is_local(policy(), 100, num_ahead=101)
    assert not is_local(policy(), 100, num_ahead=100)


def test_every_running_stream_waits_with_it() -> None:
    assert is_local(policy(), 100, num_ahead=301, running=2)
    assert not is_local(policy(), 100, num_ahead=300, running=2)


def test_the_wire_counts() -> None:
    rule = policy()
    rule.measured_prefill(1000, 1.0)
    assert not is_local(rule, 160)
    rule.measured_wire(16_000, 0.001)  # a page takes a millisecond
    assert is_local(rule, 160)
    assert is_local(rule, 160, num_ahead=155), "0.155 s and 10 pages against 0.160 s"
    assert not is_local(rule, 160, num_ahead=149)


def test_the_faster_side_gets_more() -> None:
    rule = policy()
    rule.measured_prefill(1000, 1.0)
    rule.measured_local(1000, 4.0)
    assert not is_local(rule, 100, num_ahead=399)
    assert is_local(rule, 100, num_ahead=401)
    for _ in range(50):
        rule.measured_local(1000, 2.0)
    assert is_local(rule, 100, num_ahead=205)


def test_a_chunk_lengthens_a_step_by_half() -> None:
    rule = LocalPrefillPolicy(threshold=None, chunk_tokens=None, page_size=16, page_bytes=16_000)
    assert rule.chunk_tokens == 16, "a page, before anything was measured"
    rule.measured_step(0.040)
    rule.measured_prefill(1000, 0.25)
    assert rule.chunk_tokens == 80
    rule.measured_local(1000, 0.5)
    assert rule.chunk_tokens == 40, "what this node needs counts more"
    for _ in range(50):
        rule.measured_step(0.001)
    assert rule.chunk_tokens == 16
    for _ in range(50):
        rule.measured_step(5.0)
    assert rule.chunk_tokens == 256
    assert policy().chunk_tokens == 64


def test_what_took_no_time_or_moved_nothing_says_nothing() -> None:
    rule = policy()
    rule.measured_local(0, 1.0)
    rule.measured_prefill(5, 0.0)
    assert is_local(rule, 100, num_ahead=101)
    assert not is_local(rule, 100, num_ahead=100)
