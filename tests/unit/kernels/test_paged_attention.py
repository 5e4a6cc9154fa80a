"""paged_attention and store_kv against their references, on pools whose unwritten slots hold NaN."""

from __future__ import annotations

import math

import pytest
import torch

from pdserve.kernels.linear import HEIGHTS
from pdserve.kernels.paged_attention import (
    AttentionRow,
    deterministic_paged_attention,
    grouping_key,
    paged_attention,
    plan_attention,
)
from pdserve.kernels.paged_attention import reference as attention_reference
from pdserve.kernels.store_kv import reference as store_reference
from pdserve.kernels.store_kv import store_kv_
from pdserve.tests.kernel_device import virtual
from pdserve.tests.nan_pool import LAYER, NUM_PAGES, SPANS, TOLERANCE, nan_pool, rows_over


@pytest.mark.parametrize("padded", [False, True], ids=["dense", "padded-stride"])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS.keys())
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "page_size", "dtype"),
    [
        (6, 2, 16, 16, "float32"),
        (5, 1, 24, 4, "float32"),
        (3, 3, 18, 7, "float32"),
        (4, 2, 32, 16, "bfloat16"),
        (7, 7, 20, 8, "float16"),
    ],
)
def test_paged_attention(
    spans: list[tuple[int, int]],
    padded: bool,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: str,
) -> None:
    pool = nan_pool(page_size, num_kv_heads, head_dim, dtype, padded)
    rows = rows_over(pool, spans)
    num_tokens = sum(row.num_tokens for row in rows)
    # Queries are part of a wider tensor, as in the model.
    fused = torch.randn(num_tokens, num_heads + 2, head_dim).to(pool.data.dtype)
    q, layer, scale = fused[:, :num_heads], pool.layer(LAYER), head_dim**-0.5
    before = layer.clone()
    plan = plan_attention(rows, page_size, q.dtype)
    results = [paged_attention(q, layer, plan, scale)]
    if dtype == "float32":
        results += [
            deterministic_paged_attention(q, layer, plan, scale, heights) for heights in (HEIGHTS, (16,))
        ]
    expected = attention_reference.paged_attention(q, layer, rows, scale)
    for actual in results:
        torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(layer, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "page_size"), [(6, 2, 16, 16), (5, 1, 24, 4), (3, 3, 18, 7)]
)
def test_a_query_has_the_same_bits_in_any_company(
    num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, num_threads: int
) -> None:
    """The queries of one sequence of 300 in one chunk, in others, each alone, and among other sequences. With
    one height, so it holds on machines too where not all heights agree."""
    torch.set_num_threads(num_threads)
    pool = nan_pool(page_size, num_kv_heads, head_dim, "float32", padded=False)
    layer, scale = pool.layer(LAYER), head_dim**-0.5
    *others, row = sorted(
        rows_over(pool, [(0, 300), (40, 1), (130, 1), (131, 1), (3, 8)]), key=lambda row: row.num_tokens
    )
    q = torch.randn(300, num_heads, head_dim)

    def attended(spans: list[tuple[int, int]], company: list[AttentionRow]) -> torch.Tensor:
        mine = [AttentionRow(start, count, row.pages) for start, count in spans]
        rows = sorted([*mine, *company], key=lambda r: grouping_key(r.num_tokens, -(-r.end // page_size)))
        queries = [q[r.start : r.end] for r in rows]  # the others' are someone's: it does not matter whose
        out = deterministic_paged_attention(
            torch.cat(queries), layer, plan_attention(rows, page_size, q.dtype), scale, (16,), (8, 4, 2, 1)
        )
        firsts = [sum(r.num_tokens for r in rows[:i]) for i in range(len(rows))]
        mine_out = {
            r.start: out[first : first + r.num_tokens]
            for r, first in zip(rows, firsts, strict=True)
            if r in mine
        }
        return torch.cat([mine_out[start] for start, _ in spans])

    whole = attended([(0, 300)], [])
    assert whole.isfinite().all()
    for boundary in (1, 2, 63, 127, 128, 129, 256, 299):
        halves = [(0, boundary), (boundary, 300 - boundary)]
        assert torch.equal(attended(halves, []), whole)
        assert torch.equal(attended(halves, others), whole)
    each = [(position, 1) for position in range(0, 300, 7)]
    assert torch.equal(attended(each, []), whole[::7])
    for count in range(1, 34, 8 if num_threads > 1 else 1):
        assert torch.equal(attended(each[:count], others), whole[: 7 * count : 7])


@pytest.mark.parametrize("is_deterministic", [False, True], ids=["eager", "deterministic"])
@pytest.mark.parametrize("spans", [[(40, 1)], [(40, 1), (70, 1)], [(12, 40)]], ids=["one", "two", "prefill"])
def test_no_page_is_read_but_those_of_the_rows(spans: list[tuple[int, int]], is_deterministic: bool) -> None:
    """The pool is larger than any memory: whoever copies all of it fails."""
    page_size, num_kv_heads, head_dim, num_layers = 16, 2, 16, 2
    shape = (num_kv_heads, num_layers, 2, page_size, head_dim)
    num_pages = 2**30
    data = virtual(num_pages * math.prod(shape), torch.float32).view(num_pages, *shape)
    tables = [range(number * 2**28, number * 2**28 + 8) for number in range(len(spans))]
    for table in tables:
        data[table.start : table.stop] = torch.randn(8, *shape)
    rows = [AttentionRow(*span, table) for span, table in zip(spans, tables, strict=True)]
    q, layer = torch.randn(sum(row.num_tokens for row in rows), 4, head_dim), data[:, :, 1]
    plan = plan_attention(rows, page_size, q.dtype)
    if is_deterministic:
        actual = deterministic_paged_attention(q, layer, plan, 0.25, HEIGHTS)
    else:
        actual = paged_attention(q, layer, plan, 0.25)
    expected = attention_reference.paged_attention(q, layer, rows, 0.25)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_alike_tables_make_one_group() -> None:
    rows = [AttentionRow(end - 1, 1, range(64)) for end in (129, 145, 160)]  # 9, 10 and 10 pages of 16
    plan = plan_attention(rows, 16, torch.float32)
    assert [group.num_rows for group in plan.groups] == [3]


def test_padding_wastes_less_than_a_quarter_and_never_pads_a_single_page() -> None:
    for num_pages in range(1, 1000):
        _, padded = grouping_key(1, num_pages)
        assert num_pages <= padded < 1.25 * num_pages
        assert padded == num_pages or num_pages >= 2


@pytest.mark.parametrize("padded", [False, True], ids=["dense", "padded-stride"])
@pytest.mark.parametrize(("num_tokens", "num_kv_heads", "head_dim"), [(1, 1, 2), (5, 3, 18), (40, 2, 64)])
def test_store_kv(num_tokens: int, num_kv_heads: int, head_dim: int, padded: bool) -> None:
    page_size = 5
    pool = nan_pool(page_size, num_kv_heads, head_dim, "float32", padded)
    expected = nan_pool(page_size, num_kv_heads, head_dim, "float32", padded)
    fused = torch.randn(num_tokens, 4 * num_kv_heads, head_dim)
    kv = fused[:, 2 * num_kv_heads :].view(num_tokens, 2, num_kv_heads, head_dim)
    slots = torch.randperm(NUM_PAGES * page_size)[:num_tokens]
    page, offset = slots // page_size, slots % page_size
    store_kv_(pool.layer(LAYER), kv, page, offset)
    store_reference.store_kv_(expected.layer(LAYER), kv, page, offset)
    torch.testing.assert_close(pool.data, expected.data, rtol=0, atol=0, equal_nan=True)
    assert int(pool.data.isfinite().sum()) == kv.numel()
