from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.messages.kv_layout import KVLayout
from pdserve.transfer.copy_plan import MAX_RUN_BYTES, Run, plan_runs
from pdserve.transfer.head_slices import HeadSlice, plan_head_slices

DENSE = KVLayout(num_kv_heads=1, num_layers=1, page_size=1, head_dim=2, dtype="float16")
PAGE = DENSE.page_bytes
PADDED = msgspec.structs.replace(DENSE, page_stride_bytes=PAGE + 24)


def whole(layout: KVLayout) -> HeadSlice:
    """One rank on each side."""
    (heads,) = plan_head_slices(layout, 1, 1)
    return heads


@st.composite
def page_pairs(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two lists of distinct pages with long and short stretches that agree."""
    pages = st.lists(st.integers(0, 40), unique=True, max_size=25)
    source, dest = draw(pages), draw(pages)
    for pages_of_one in (source, dest):
        if draw(st.booleans()):
            pages_of_one.sort()
    length = min(len(source), len(dest))
    return source[:length], dest[:length]


@given(page_pairs(), st.sampled_from([DENSE, PADDED]), st.integers(1, 6))
def test_runs_move_what_copying_page_by_page_moves(
    pairs: tuple[list[int], list[int]], layout: KVLayout, max_pages: int
) -> None:
    source_pages, dest_pages = pairs
    pool = np.random.default_rng(0).integers(0, 255, 41 * layout.stride_bytes, dtype=np.uint8)
    expected, moved = np.zeros_like(pool), np.zeros_like(pool)
    for source, dest in zip(source_pages, dest_pages, strict=True):
        at, to = source * layout.stride_bytes, dest * layout.stride_bytes
        expected[to : to + layout.page_bytes] = pool[at : at + layout.page_bytes]
    runs = plan_runs(source_pages, dest_pages, whole(layout), max_pages * layout.page_bytes)
    for run in runs:
        moved[run.dest : run.dest + run.num_bytes] = pool[run.source : run.source + run.num_bytes]
    assert np.array_equal(moved, expected)
    assert sum(run.num_bytes for run in runs) == len(source_pages) * layout.page_bytes
    assert all(run.num_bytes <= max_pages * layout.page_bytes for run in runs)


@given(page_pairs())
def test_runs_are_as_few_as_can_be(pairs: tuple[list[int], list[int]]) -> None:
    source, dest = np.array(pairs[0], dtype=int), np.array(pairs[1], dtype=int)
    num_breaks = int(((np.diff(source) != 1) | (np.diff(dest) != 1)).sum())
    assert len(plan_runs(*pairs, whole(DENSE))) == (num_breaks + 1 if len(source) else 0)


def test_neighbours_on_one_side_only_are_not_merged() -> None:
    assert plan_runs([3, 4, 5], [7, 9, 8], whole(DENSE)) == [
        Run(3 * PAGE, 7 * PAGE, PAGE),
        Run(4 * PAGE, 9 * PAGE, PAGE),
        Run(5 * PAGE, 8 * PAGE, PAGE),
    ]


def test_padding_is_never_part_of_a_run() -> None:
    stride = PADDED.stride_bytes
    assert plan_runs([0, 1], [4, 5], whole(PADDED)) == [
        Run(0, 4 * stride, PAGE),
        Run(stride, 5 * stride, PAGE),
    ]


def test_a_long_run_is_cut_at_whole_pages() -> None:
    runs = plan_runs(range(5), range(10, 15), whole(DENSE), max_run_bytes=2 * PAGE + 1)
    assert runs == [
        Run(0, 10 * PAGE, 2 * PAGE),
        Run(2 * PAGE, 12 * PAGE, 2 * PAGE),
        Run(4 * PAGE, 14 * PAGE, PAGE),
    ]


def test_one_page_longer_than_the_cap_travels_whole() -> None:
    assert plan_runs([1], [2], whole(DENSE), max_run_bytes=1) == [Run(PAGE, 2 * PAGE, PAGE)]


def test_offsets_beyond_four_gibibytes() -> None:
    layout = KVLayout(num_kv_heads=8, num_layers=36, page_size=64, head_dim=128, dtype="bfloat16")
    (run,) = plan_runs([100_000], [200_000], whole(layout))
    assert run == Run(100_000 * layout.page_bytes, 200_000 * layout.page_bytes, layout.page_bytes)
    assert run.dest > 1 << 40
    assert layout.page_bytes < MAX_RUN_BYTES


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 source pages for 1 destination"):
        plan_runs([1, 2], [3], whole(DENSE))
