"""Every byte of every page of every decode rank is written once, by a rank that holds what belongs there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.messages.kv_layout import KVLayout, heads_divide, kv_heads_of_rank
from pdserve.transfer.copy_plan import plan_runs
from pdserve.transfer.head_slices import plan_head_slices

SIZES = (1, 2, 3, 4, 6, 8)


def sizes_for(num_kv_heads: int) -> list[int]:
    return [size for size in SIZES if heads_divide(num_kv_heads, size)]


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, int, int]:
    """KV heads, ranks of prefill, ranks of decode."""
    num_kv_heads = draw(st.sampled_from((1, 2, 4, 6, 8)))
    sizes = st.sampled_from(sizes_for(num_kv_heads))
    return num_kv_heads, draw(sizes), draw(sizes)


def pools(
    layout: KVLayout, tp_size: int, num_pages: int, content: np.ndarray | None = None
) -> list[np.ndarray]:
    """Each rank's pool as int32; with `content` ``[num_pages, heads, rest]``, each rank its heads of it."""
    made = []
    for rank in range(tp_size):
        heads = kv_heads_of_rank(layout.num_kv_heads, tp_size, rank)
        rest = layout.head_bytes // 4
        pool = np.full((num_pages, len(heads), rest), -1, dtype=np.int32)
        if content is not None:
            pool[:] = content[:, heads.start : heads.stop]
        assert pool.nbytes == num_pages * layout.of_rank(tp_size).stride_bytes
        made.append(pool)
    return made


@given(splits(), st.data())
def test_every_head_of_every_layer_arrives_once(split: tuple[int, int, int], data: st.DataObject) -> None:
    num_kv_heads, source_tp, dest_tp = split
    layout = KVLayout(num_kv_heads=num_kv_heads, num_layers=2, page_size=1, head_dim=2, dtype="float32")
    pages = st.permutations(range(6))
    source_pages = data.draw(pages)[:4]
    dest_pages = data.draw(pages)[:4]
    content = np.arange(6 * num_kv_heads * layout.head_bytes // 4, dtype=np.int32).reshape(
        6, num_kv_heads, -1
    )
    source = pools(layout, source_tp, 6, content)
    dest = pools(layout, dest_tp, 6)
    num_writes = [np.zeros_like(pool) for pool in dest]
    for heads in plan_head_slices(layout, source_tp, dest_tp):
        for run in plan_runs(source_pages, dest_pages, heads):
            at, to, num = run.source // 4, run.dest // 4, run.num_bytes // 4
            dest[heads.dest_rank].reshape(-1)[to : to + num] = source[heads.source_rank].reshape(-1)[
                at : at + num
            ]
            num_writes[heads.dest_rank].reshape(-1)[to : to + num] += 1
    expected = np.full_like(content, -1)
    expected[list(dest_pages)] = content[list(source_pages)]
    for rank, (pool, counts) in enumerate(zip(dest, num_writes, strict=True)):
        held = kv_heads_of_rank(num_kv_heads, dest_tp, rank)
        assert np.array_equal(pool, expected[:, held.start : held.stop])
        assert np.all(counts[list(dest_pages)] == 1)
        assert counts.sum() == counts[list(dest_pages)].sum()


@given(splits())
def test_one_slice_a_pair_and_no_more_pairs_than_needed(split: tuple[int, int, int]) -> None:
    num_kv_heads, source_tp, dest_tp = split
    layout = KVLayout(num_kv_heads=num_kv_heads, num_layers=1, page_size=1, head_dim=2, dtype="float32")
    pairs = [(heads.source_rank, heads.dest_rank) for heads in plan_head_slices(layout, source_tp, dest_tp)]
    assert len(set(pairs)) == len(pairs)
    assert {dest for _, dest in pairs} == set(range(dest_tp))
    if source_tp == dest_tp:
        assert pairs == [(rank, rank) for rank in range(source_tp)]
    # Copies of a head share the work: no rank writes more decode ranks than its share, rounded up.
    busiest = max(sum(source == rank for source, _ in pairs) for rank in range(source_tp))
    assert busiest <= -(-max(dest_tp, num_kv_heads) // min(source_tp, num_kv_heads))


def test_one_rank_on_each_side_moves_whole_pages() -> None:
    layout = KVLayout(num_kv_heads=4, num_layers=2, page_size=16, head_dim=8, dtype="bfloat16")
    (heads,) = plan_head_slices(layout, 1, 1)
    assert heads.is_whole_page
    assert len(plan_runs([3, 4, 5], [8, 9, 10], heads)) == 1


@pytest.mark.parametrize(
    ("tp_size", "expected"),
    [
        (1, [[0, 1, 2, 3]]),
        (2, [[0, 1], [2, 3]]),
        (4, [[0], [1], [2], [3]]),
        (8, [[0], [0], [1], [1], [2], [2], [3], [3]]),
    ],
)
def test_heads_of_each_rank(tp_size: int, expected: list[list[int]]) -> None:
    assert [list(kv_heads_of_rank(4, tp_size, rank)) for rank in range(tp_size)] == expected


def test_what_does_not_divide() -> None:
    assert not heads_divide(4, 3)
    assert not heads_divide(2, 3)
    assert heads_divide(2, 6)
