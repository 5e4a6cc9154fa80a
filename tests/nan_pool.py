"""Pools whose unwritten slots hold NaN, and rows over them, for tests of attention."""

from __future__ import annotations

import random

import torch

from pdserve.engine.kv_pool import KVPool
from pdserve.kernels.paged_attention import AttentionRow, grouping_key
from pdserve.messages.kv_layout import KVLayout

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
NUM_PAGES = 260
NUM_LAYERS = 3
LAYER = 1


def nan_pool(
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str,
    padded: bool,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> KVPool:
    """Of NUM_PAGES pages, all of them NaN."""
    dense = KVLayout(
        num_kv_heads=num_kv_heads, num_layers=NUM_LAYERS, page_size=page_size, head_dim=head_dim, dtype=dtype
    )
    # A stride that is no multiple of anything but the item.
    stride = dense.page_bytes + 3 * (4 if dtype == "float32" else 2) if padded else 0
    layout = KVLayout(
        num_kv_heads=num_kv_heads,
        num_layers=NUM_LAYERS,
        page_size=page_size,
        head_dim=head_dim,
        dtype=dtype,
        page_stride_bytes=stride,
    )
    pool = KVPool(layout, NUM_PAGES, device)
    pool.poison(range(NUM_PAGES))
    return pool


def rows_over(pool: KVPool, spans: list[tuple[int, int]]) -> list[AttentionRow]:
    """Rows of (start, num_tokens) on pages of their own, in random order; what they may read is written."""
    page_size = pool.layout.page_size
    free = list(range(NUM_PAGES))
    random.Random(0).shuffle(free)
    rows = []
    for start, num_tokens in spans:
        count = pool.layout.pages_for(start + num_tokens)
        pages, free = free[:count], free[count:]
        for position in range(start + num_tokens):
            slot = pool.layer(LAYER)[pages[position // page_size], :, :, position % page_size]
            slot.copy_(torch.randn(slot.shape))
        rows.append(AttentionRow(start, num_tokens, pages))
    return sorted(rows, key=lambda row: grouping_key(row.num_tokens, pool.layout.pages_for(row.end)))


SPANS = {
    "one-token": [(0, 1)],
    "whole-prompt": [(0, 33)],
    "chunk-after-half-a-page": [(13, 20)],
    "decode-alone": [(40, 1)],
    "decode-alike": [(16, 1), (17, 1), (31, 1), (30, 1)],
    "decode-padded-tables": [(161, 1), (160, 1), (175, 1), (199, 1), (150, 1)],
    "mixed": [(0, 5), (63, 1), (7, 1), (21, 9), (0, 1), (64, 1), (47, 2)],
}
