"""LastChunk: when a tail is worth one forward more, and how long it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.prefill.last_chunk import LastChunk

PAGE_SIZE = 16
KIB_PER_TOKEN = 128


def measured(step_ms: float, token_ms: float, wire_ms: float) -> LastChunk:
    """What a forward costs, a token in it, and a token's KV on the wire."""
    last_chunk = LastChunk(PAGE_SIZE, KIB_PER_TOKEN * 1024)
    last_chunk.measured_forward(1, (step_ms + token_ms) / 1000)
    for _ in range(50):
        last_chunk.measured_forward(2048, (step_ms + 2048 * token_ms) / 1000)
        last_chunk.measured_wire(100 * KIB_PER_TOKEN * 1024, 100 * wire_ms / 1000)
    return last_chunk


def test_nothing_is_cut_before_anything_was_measured() -> None:
    last_chunk = LastChunk(PAGE_SIZE, 1024)
    assert last_chunk.tail(0, 2048) == 0
    last_chunk.measured_forward(2048, 1.0)
    assert last_chunk.tail(0, 2048) == 0, "the wire is not known"


def test_a_slow_wire_behind_a_quick_model_gets_a_tail() -> None:
    """8 B parameters on an H100, 12.5 GB/s: a forward 5 ms, a token 0.05 ms, its KV 0.01 ms."""
    last_chunk = measured(5.0, 0.05, 0.01)
    tail = last_chunk.tail(6144, 8192)  # 20 ms of wire without one
    # (2048 - T) * 0.01 <= 5 + T * 0.05, so T is 258 or more, and what is before it whole pages.
    assert 250 <= tail <= 250 + 2 * PAGE_SIZE
    assert (8192 - tail) % PAGE_SIZE == 0
    assert last_chunk.tail(8192 - tail, 8192) == 0, "the tail itself is not cut again"


@pytest.mark.parametrize(
    ("costs", "start", "end"),
    [
        ((40.0, 1.6, 0.0105), 512, 1024),  # small-llama on one core: 5 ms of wire, a forward costs 40 ms
        ((5.0, 0.05, 0.01), 8092, 8192),  # a short last chunk already
        ((5.0, 0.05, 0.01), 0, 2048),  # the forward more would be 5 % of this prompt's prefill
        ((5.0, 0.05, 0.001), 6144, 8192),  # a wire of 125 GB/s
    ],
    ids=["slow forward", "short", "short prompt", "fast wire"],
)
def test_nothing_is_cut_where_the_forward_costs_more_than_it_saves(
    costs: tuple[float, float, float], start: int, end: int
) -> None:
    assert measured(*costs).tail(start, end) == 0


@given(
    st.floats(0.01, 50), st.floats(0.001, 5), st.floats(0.0001, 5), st.integers(0, 200), st.integers(1, 4096)
)
def test_a_tail_is_a_part_and_saves_what_it_must(
    step_ms: float, token_ms: float, wire_ms: float, start_page: int, num_tokens: int
) -> None:
    start = start_page * PAGE_SIZE
    end = start + num_tokens
    tail = measured(step_ms, token_ms, wire_ms).tail(start, end)
    assert 0 <= tail < num_tokens
    if tail:
        assert (end - tail) % PAGE_SIZE == 0
        assert (num_tokens - tail) * wire_ms >= 1.9 * step_ms
