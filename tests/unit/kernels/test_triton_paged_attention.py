"""Triton's paged attention against the reference, on pools whose unwritten slots hold NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pdserve.kernels.paged_attention import AttentionRow, eager, plan_attention
from pdserve.kernels.paged_attention import reference as attention_reference
from pdserve.kernels.paged_attention.triton import (
    PagedPlan,
    paged_attention,
    plan_paged_attention,
    splits_of,
)
from pdserve.tests.kernel_device import DEVICE, NUM_FAR_BLOCKS, far_apart, needs_device
from pdserve.tests.nan_pool import LAYER, NUM_PAGES, SPANS, TOLERANCE, nan_pool, rows_over

pytestmark = needs_device


def plan_with_slots_apart(rows: list[AttentionRow], page_size: int, num_kv_heads: int) -> PagedPlan:
    """Table slots in another order than rows, in a table with more slots and more room than they need, whose
    unused entries name a page of NaN."""
    plan = plan_paged_attention(rows, page_size, num_kv_heads, DEVICE)
    used = {page for row in rows for page in row.pages}
    nan_page = next(page for page in range(NUM_PAGES) if page not in used)
    slots = torch.randperm(len(rows) + 3)[: len(rows)].to(DEVICE, torch.int32)
    tables = torch.full((len(rows) + 3, plan.tables.shape[1] + 5), nan_page, dtype=torch.int32, device=DEVICE)
    for slot, row in zip(slots.tolist(), rows, strict=True):
        tables[slot, : len(row.pages)] = torch.tensor(row.pages, dtype=torch.int32)
    decodes, prefills = plan.decodes.clone(), plan.prefills.clone()
    for of_rows in (decodes, prefills):
        if of_rows.numel():
            of_rows[:, 0] = slots[of_rows[:, 0].long()]
    return replace(plan, tables=tables, decodes=decodes, prefills=prefills)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "page_size", "dtype", "num_splits"),
    [
        (2, 2, 64, 16, "bfloat16", 2),
        (2, 1, 24, 4, "float32", 1),
        (3, 1, 128, 1, "bfloat16", 1),
        (4, 1, 80, 7, "float16", 2),
        (5, 1, 18, 5, "float32", 4),
        (6, 1, 16, 64, "float32", 2),
        (7, 1, 64, 3, "bfloat16", 4),
        (8, 1, 20, 8, "float16", 1),
    ],
)
def test_mixed_rows(
    num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: str, num_splits: int
) -> None:
    """Prefill, behind a prefix and not, and decode; every group size up to 8, odd sizes of heads and pages, a
    padded page stride, and queries that are part of a wider tensor."""
    pool = nan_pool(page_size, num_kv_heads, head_dim, dtype, padded=True, device=DEVICE)
    rows = rows_over(pool, SPANS["mixed"])
    num_tokens = sum(row.num_tokens for row in rows)
    fused = torch.randn(num_tokens, num_heads + 2, head_dim).to(DEVICE, pool.data.dtype)
    q, layer, scale = fused[:, :num_heads], pool.layer(LAYER), head_dim**-0.5
    before = layer.clone()
    plan = replace(plan_with_slots_apart(rows, page_size, num_kv_heads), num_splits=num_splits)
    actual = paged_attention(q, layer, plan, scale)
    expected = attention_reference.paged_attention(q, layer, rows, scale)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(layer, before, rtol=0, atol=0, equal_nan=True)


def test_more_query_heads_than_a_tensor_core_takes_at_once() -> None:
    pool = nan_pool(4, 1, 2, "float32", padded=False, device=DEVICE)
    rows = rows_over(pool, [(9, 1)])
    q = torch.randn(1, 17, 2, device=DEVICE)
    plan = replace(plan_paged_attention(rows, 4, 1, DEVICE), num_splits=1)
    expected = attention_reference.paged_attention(q, pool.layer(LAYER), rows, 0.7)
    torch.testing.assert_close(
        paged_attention(q, pool.layer(LAYER), plan, 0.7), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("span", [(0, 1), (64, 1), (700, 1)])
def test_a_row_alone_is_split_into_many_parts_of_which_some_are_empty(span: tuple[int, int]) -> None:
    pool = nan_pool(4, 1, 16, "float32", padded=False, device=DEVICE)
    rows = rows_over(pool, [span])
    q = torch.randn(1, 3, 16, device=DEVICE)
    plan = plan_with_slots_apart(rows, 4, 1)
    assert plan.num_splits == 32
    expected = attention_reference.paged_attention(q, pool.layer(LAYER), rows, 0.25)
    torch.testing.assert_close(
        paged_attention(q, pool.layer(LAYER), plan, 0.25), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("spans", [[(0, 257)], [(300, 150), (64, 129), (63, 3)]])
def test_chunks_of_several_tiles(spans: list[tuple[int, int]]) -> None:
    """Against the eager version: the reference would take minutes."""
    pool = nan_pool(16, 1, 64, "bfloat16", padded=False, device=DEVICE)
    rows = rows_over(pool, spans)
    q = torch.randn(sum(row.num_tokens for row in rows), 2, 64).to(DEVICE, torch.bfloat16)
    on_host = plan_attention(rows, 16, q.dtype)
    expected = eager.paged_attention(q.cpu(), pool.layer(LAYER).cpu(), on_host, 0.125)
    actual = paged_attention(q, pool.layer(LAYER), plan_with_slots_apart(rows, 16, 1), 0.125)
    torch.testing.assert_close(actual.cpu(), expected, rtol=2e-2, atol=2e-2)


def test_offsets_beyond_32_bits() -> None:
    """Pages lie 2³⁰ elements apart, and so do the queries of tokens."""
    page_size, num_kv_heads = 4, 2
    layer = far_apart(num_kv_heads, 2, page_size, 16)
    layer.copy_(torch.randn(layer.shape))
    spans = [(17, 1), (11, 3), (20, 1)]
    rows = [AttentionRow(*span, torch.randperm(NUM_FAR_BLOCKS).tolist()) for span in spans]
    q = far_apart(4, 16)[: sum(row.num_tokens for row in rows)]
    q.copy_(torch.randn(q.shape))
    plan = replace(plan_paged_attention(rows, page_size, num_kv_heads, DEVICE), num_splits=2)
    expected = attention_reference.paged_attention(q, layer, rows, 0.25)
    torch.testing.assert_close(paged_attention(q, layer, plan, 0.25), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")  # of the interpreter's NumPy
def test_one_rows_nan_is_no_one_elses() -> None:
    """A sequence whose own keys are NaN, beside others, in both kinds of rows."""
    pool = nan_pool(4, 1, 16, "float32", padded=False, device=DEVICE)
    rows = rows_over(pool, [(9, 1), (10, 1), (3, 5), (0, 6)])
    layer = pool.layer(LAYER)
    for spoiled in (rows[0], rows[2]):
        layer[spoiled.pages[0], :, 0, 0] = float("nan")
    q = torch.randn(sum(row.num_tokens for row in rows), 2, 16, device=DEVICE)
    out = paged_attention(q, layer, replace(plan_with_slots_apart(rows, 4, 1), num_splits=2), 0.25)
    row_of = torch.repeat_interleave(torch.tensor([row.num_tokens for row in rows]))
    assert torch.equal(out.isnan().flatten(1).all(dim=1).cpu(), row_of % 2 == 0)
    assert torch.equal(out.isnan().flatten(1).any(dim=1).cpu(), row_of % 2 == 0)


def test_splits_are_powers_of_two_that_fill_a_gpu() -> None:
    assert [splits_of(rows, 8) for rows in (1, 2, 8, 32, 33, 256)] == [32, 32, 8, 2, 1, 1]
    assert splits_of(0, 8) == 32


def test_nothing_is_launched_for_no_rows() -> None:
    pool = nan_pool(4, 1, 16, "float32", padded=False, device=DEVICE)
    plan = plan_paged_attention([], 4, 1, DEVICE)
    assert paged_attention(torch.empty(0, 2, 16, device=DEVICE), pool.layer(LAYER), plan, 1.0).shape == (
        0,
        2,
        16,
    )


def test_a_strided_last_axis_is_refused() -> None:
    pool = nan_pool(4, 1, 2, "float32", padded=False, device=DEVICE)
    plan = plan_paged_attention([], 4, 1, DEVICE)
    with pytest.raises(ValueError, match=r"^paged_attention: the last axes have strides of 2 and 1$"):
        paged_attention(torch.randn(1, 2, 2).transpose(1, 2), pool.layer(LAYER), plan, 1.0)
