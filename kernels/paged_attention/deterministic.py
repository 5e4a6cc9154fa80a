"""Blocks of 128 positions in ascending order, with a running softmax, so that a query's bits depend on
nothing but its own position, its keys and its values.

    m' = max(m, max s),  c = exp(m − m'),  p = exp(s − m'),  l' = c·l + Σ p,  o' = c·o + p·V,  out = o / l

A block that a query does not look into leaves m, l and o as they are, bit for bit (c = 1, p = 0), so queries
of different positions share calls; a block's products are added in an order that does not depend on how much
of it is masked. The queries that share a KV head are rows of a matrix, in tiles of the heights of
``linear/row_tiled``. Source of the running softmax: Milakov and Gimelshein, "Online normalizer calculation
for softmax", 2018.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear import cover
from ..row_sum import row_sum
from .plan import AttentionPlan, DecodeGroup, PrefillRow

BLOCK = 128

# Decode rows in one call, descending: powers of two, so that these too can be tested at start-up.
ROWS = (64, 32, 16, 8, 4, 2, 1)


def paged_attention(
    q: Tensor,
    layer: Tensor,
    plan: AttentionPlan,
    scale: float,
    heights: tuple[int, ...],
    rows: tuple[int, ...] = ROWS,
) -> Tensor:
    """`heights` as for `row_tiled_linear`; `rows` descend: the decode rows that one call may hold."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    by_head = layer.permute(1, 2, 0, 3, 4)  # [Hkv, 2, num_pages, page_size, D]
    for group in plan.groups:
        tokens = slice(group.first_token, group.first_token + group.num_rows)
        _decode(q[tokens] * scale, by_head, group, heights, rows, out[tokens])
    for row in plan.prefills:
        tokens = slice(row.first_token, row.first_token + row.num_tokens)
        out[tokens] = _prefill(q[tokens] * scale, by_head, row, heights)
    return out


def attend(q: Tensor, keys: Tensor, values: Tensor, ends: Tensor, heights: tuple[int, ...]) -> Tensor:
    """Rows of B matrices against whole blocks of positions.

    ``q [B, M, D]``, scaled; ``keys, values [B, S, D]``, S a multiple of BLOCK, finite everywhere; a row looks
    at positions below its entry of ``ends``, ``[B, 1]`` or ``[1, M]`` int64. → ``[B, M, D]``.
    """
    num_rows = q.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for start, height in cover(num_rows, heights):
        rows = slice(start, start + height)
        tile, tile_ends = q[:, rows], ends if ends.shape[1] == 1 else ends[:, rows]
        if start + height > num_rows:
            padding = start + height - num_rows
            tile = F.pad(tile, (0, 0, 0, padding))
            if tile_ends.shape[1] > 1:
                tile_ends = F.pad(tile_ends, (0, padding), value=1)
        out[:, rows] = _tile(tile.contiguous(), keys, values, tile_ends)[:, : num_rows - start]
    return out


def _tile(q: Tensor, keys: Tensor, values: Tensor, ends: Tensor) -> Tensor:
    first_end, last_end = int(ends.min()), int(ends.max())
    best = q.new_full((*q.shape[:2], 1), float("-inf"))
    total = torch.zeros_like(best)
    mixed = torch.zeros_like(q)
    for start in range(0, last_end, BLOCK):
        block = slice(start, start + BLOCK)
        scores = torch.bmm(q, keys[:, block].transpose(1, 2))
        if first_end < block.stop:
            positions = torch.arange(start, block.stop, device=q.device)
            scores.masked_fill_(positions >= ends[:, :, None], float("-inf"))
        previous, best = best, torch.maximum(best, scores.amax(dim=-1, keepdim=True))
        weights = scores.sub_(best).exp_()
        kept = previous.sub_(best).exp_()
        total.mul_(kept).add_(row_sum(weights)[..., None])
        mixed.mul_(kept).add_(torch.bmm(weights, values[:, block]))
    return mixed.div_(total)


def _decode(
    q: Tensor,
    by_head: Tensor,
    group: DecodeGroup,
    heights: tuple[int, ...],
    counts: tuple[int, ...],
    out: Tensor,
) -> None:
    num_kv_heads, head_dim = by_head.shape[0], by_head.shape[-1]
    pages_per_row = group.pages.numel() // group.num_rows
    slots_per_row = pages_per_row * by_head.shape[3]
    start = 0
    while start < group.num_rows:
        count = next(count for count in counts if count <= group.num_rows - start)
        rows = slice(start, start + count)
        pages = group.pages[start * pages_per_row : (start + count) * pages_per_row]
        unwritten = group.unwritten
        if unwritten is not None:
            unwritten = unwritten - start * slots_per_row
            unwritten = unwritten[(unwritten >= 0) & (unwritten < count * slots_per_row)]
        ends = group.ends[rows]
        keys, values = _positions(by_head, pages, count, unwritten, int(ends.max()))
        by_matrix = q[rows].view(count, num_kv_heads, -1, head_dim).transpose(0, 1).flatten(0, 1)
        mixed = attend(by_matrix, keys, values, ends.repeat(num_kv_heads)[:, None], heights)
        out[rows] = mixed.view(num_kv_heads, count, -1, head_dim).transpose(0, 1).reshape(q[rows].shape)
        start += count


def _prefill(q: Tensor, by_head: Tensor, row: PrefillRow, heights: tuple[int, ...]) -> Tensor:
    num_kv_heads, head_dim = by_head.shape[0], by_head.shape[-1]
    keys, values = _positions(by_head, row.pages, 1, None, row.end)
    by_group = q.view(row.num_tokens, num_kv_heads, -1, head_dim).transpose(0, 1)
    ends = torch.arange(row.start + 1, row.end + 1, device=q.device).repeat_interleave(by_group.shape[2])
    mixed = attend(by_group.flatten(1, 2), keys, values, ends[None], heights)
    return mixed.view(num_kv_heads, row.num_tokens, -1, head_dim).transpose(0, 1).reshape(q.shape)


def _positions(
    by_head: Tensor, pages: Tensor, num_rows: int, unwritten: Tensor | None, end: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of the pages of some rows, ``[Hkv · num_rows, S, D]`` each: S is `end` in whole blocks,
    and what nobody wrote is 0, because a weight of 0 times NaN is NaN.

    ``by_head [Hkv, 2, num_pages, page_size, D]``. `unwritten` None: one row, written up to `end`.
    """
    num_kv_heads, head_dim = by_head.shape[0], by_head.shape[-1]
    # Both at once: of keys or values alone, which lie scattered, torch would first copy those of every page.
    slots = by_head.index_select(2, pages).view(num_kv_heads, 2, -1, head_dim)
    if unwritten is None:
        slots = slots[:, :, :end]
    else:
        slots.index_fill_(2, unwritten, 0)
    by_row = slots.view(num_kv_heads, 2, num_rows, -1, head_dim).transpose(0, 1)
    num_slots = -(-end // BLOCK) * BLOCK
    if by_row.shape[3] < num_slots:
        by_row = F.pad(by_row, (0, 0, 0, num_slots - by_row.shape[3]))
    keys, values = by_row[:, :, :, :num_slots].reshape(2, -1, num_slots, head_dim).contiguous()
    return keys, values
