"""Keys and values are read from their pages, by kernels; lengths and page tables are read on the device, so a
launch depends on a step's sizes only.

A decode row is read by several programs for each KV head, each of which takes an equal part of the positions;
then their parts are merged:

    out = Σ 2^(lse_i − m) · part_i  /  Σ 2^(lse_i − m),   lse_i = log2 Σ 2^score,   m = max lse_i

The query heads that share a KV head are the rows of one matrix. A prefill row is computed by tiles of queries
of one head, each of which reads the positions up to its last query.
Source: Dao et al., "Flash-Decoding for long-context inference", 2023; Dao, "FlashAttention-2", 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import INTERPRETED, launch
from .plan import AttentionRow

# Decode is split until there are so many programs: two for each multiprocessor of an H100.
_ENOUGH_PROGRAMS = 264
_MOST_SPLITS = 32
_DECODE_BLOCK = 64  # positions read at once


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """The rows of a step, for all layers. All tensors are int32, contiguous, on the device of the queries."""

    tables: Tensor  # [num_slots, max_pages]: the pages of each sequence; those after its end are never read
    decodes: Tensor  # [num_decodes, 3]: slot, token of the flat batch, end (at least 1)
    prefills: Tensor  # [num_prefills, 4]: slot, first token of the flat batch, number of tokens, start
    longest_prefill: int  # tokens
    num_splits: int  # of a decode row, a power of two


def plan_paged_attention(
    rows: Sequence[AttentionRow], page_size: int, num_kv_heads: int, device: torch.device
) -> PagedPlan:
    """The plan for rows that stand in this order in the flat batch, each with a table slot of its own."""
    tables = np.zeros((len(rows), max((-(-row.end // page_size) for row in rows), default=1)), dtype=np.int32)
    decodes: list[tuple[int, int, int]] = []
    prefills: list[tuple[int, int, int, int]] = []
    first_token = 0
    for slot, row in enumerate(rows):
        num_pages = -(-row.end // page_size)
        tables[slot, :num_pages] = row.pages[:num_pages]
        if row.num_tokens == 1:
            decodes.append((slot, first_token, row.end))
        else:
            prefills.append((slot, first_token, row.num_tokens, row.start))
        first_token += row.num_tokens
    return PagedPlan(
        tables=torch.from_numpy(tables).to(device),
        decodes=torch.tensor(decodes, dtype=torch.int32, device=device),
        prefills=torch.tensor(prefills, dtype=torch.int32, device=device),
        longest_prefill=max((num_tokens for _, _, num_tokens, _ in prefills), default=0),
        num_splits=splits_of(len(decodes), num_kv_heads),
    )


def splits_of(num_decodes: int, num_kv_heads: int) -> int:
    """Programs that share the positions of a decode row: a constant of so many rows, whatever their
    lengths."""
    wanted = triton.cdiv(_ENOUGH_PROGRAMS, max(1, num_decodes * num_kv_heads))
    return int(min(_MOST_SPLITS, triton.next_power_of_2(wanted)))


def paged_attention(q: Tensor, layer: Tensor, plan: PagedPlan, scale: float) -> Tensor:
    """Raises ValueError for last axes that are strided."""
    if q.stride(-1) != 1 or layer.stride(-1) != 1:
        raise ValueError(
            f"paged_attention: the last axes have strides of {q.stride(-1)} and {layer.stride(-1)}"
        )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scale_log2 = scale * math.log2(math.e)  # scores are of base 2, whose exponential is one instruction
    if plan.decodes.shape[0]:
        _attend_decodes(q, layer, plan, scale_log2, out)
    if plan.prefills.shape[0]:
        _attend_prefills(q, layer, plan, scale_log2, out)
    return out


def _attend_decodes(q: Tensor, layer: Tensor, plan: PagedPlan, scale_log2: float, out: Tensor) -> None:
    num_rows, num_splits = plan.decodes.shape[0], plan.num_splits
    _, num_heads, head_dim = q.shape
    num_kv_heads, page_size = layer.shape[1], layer.shape[3]
    group, lanes = num_heads // num_kv_heads, max(16, triton.next_power_of_2(head_dim))
    lse = torch.empty((num_rows, num_heads, num_splits), dtype=torch.float32, device=q.device)
    parts = out if num_splits == 1 else torch.empty((*lse.shape, head_dim), dtype=lse.dtype, device=q.device)
    launch(
        _decode,
        (num_rows, num_kv_heads, num_splits),
        q,
        layer,
        plan.tables,
        plan.decodes,
        parts,
        lse,
        scale_log2,
        q.stride(0),
        q.stride(1),
        *layer.stride()[:4],
        plan.tables.stride(0),
        NUM_SPLITS=num_splits,
        GROUP=group,
        GROUP_ROWS=max(16, triton.next_power_of_2(group)),  # what a tensor core takes at least
        HEAD_DIM=head_dim,
        LANES=lanes,
        PAGE_SIZE=page_size,
        BLOCK=_DECODE_BLOCK,
        WIDE=INTERPRETED,
        num_warps=4,
        num_stages=3,
    )
    if num_splits > 1:
        launch(
            _merge,
            (num_rows, num_heads),
            parts,
            lse,
            plan.decodes,
            out,
            NUM_SPLITS=num_splits,
            HEAD_DIM=head_dim,
            LANES=lanes,
            num_warps=4,
        )


def _attend_prefills(q: Tensor, layer: Tensor, plan: PagedPlan, scale_log2: float, out: Tensor) -> None:
    _, num_heads, head_dim = q.shape
    num_kv_heads, page_size = layer.shape[1], layer.shape[3]
    lanes = max(16, triton.next_power_of_2(head_dim))
    tile, block, num_warps, num_stages = _prefill_shape(lanes, q.dtype)
    launch(
        _prefill,
        (triton.cdiv(plan.longest_prefill, tile), num_heads, plan.prefills.shape[0]),
        q,
        layer,
        plan.tables,
        plan.prefills,
        out,
        scale_log2,
        q.stride(0),
        q.stride(1),
        *layer.stride()[:4],
        plan.tables.stride(0),
        NUM_HEADS=num_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        LANES=lanes,
        PAGE_SIZE=page_size,
        TILE=tile,
        BLOCK=block,
        WIDE=INTERPRETED,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _prefill_shape(lanes: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Queries of a tile, positions of a block, warps, stages: what compiles for sm_90 without spills."""
    if dtype == torch.float32:  # no tensor core: for comparisons
        return 32, 32, 4, 1
    return (128, 64, 8, 3) if lanes <= 128 else (64, 32, 8, 2)


@triton.jit
def _keys_and_values(
    layer,
    tables,
    positions,
    written,
    layer_page,
    layer_kv,
    layer_slot,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Of a block of positions: ``[BLOCK, LANES]`` each. `layer` and `tables` begin at the KV head's and the
    sequence's part."""
    lanes = tl.arange(0, LANES)
    pages = tl.load(tables + positions // PAGE_SIZE, mask=written, other=0).to(tl.int64)
    slots = layer + pages * layer_page + (positions % PAGE_SIZE) * layer_slot
    mask = written[:, None] & (lanes < HEAD_DIM)[None, :]
    keys = tl.load(slots[:, None] + lanes[None, :], mask=mask, other=0.0)
    values = tl.load(slots[:, None] + layer_kv + lanes[None, :], mask=mask, other=0.0)
    if WIDE:
        keys = keys.to(tl.float32)
        values = values.to(tl.float32)
    return keys, values


@triton.jit
def _with_block(best, total, mixed, scores, values):
    """The softmax so far (best score, sum of weights, weighted sum of values) with a block more."""
    new_best = tl.maximum(best, tl.max(scores, 1))
    weights = tl.exp2(scores - new_best[:, None])
    kept = tl.exp2(best - new_best)
    total = total * kept + tl.sum(weights, 1)
    mixed = mixed * kept[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return new_best, total, mixed


@triton.jit
def _decode(
    q,
    layer,
    tables,
    rows,
    parts,
    lse,
    scale_log2,
    q_token,
    q_head,
    layer_page,
    layer_head,
    layer_kv,
    layer_slot,
    tables_slot,
    NUM_SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    num_heads = tl.num_programs(1) * GROUP
    slot = tl.load(rows + 3 * row).to(tl.int64)
    token = tl.load(rows + 3 * row + 1).to(tl.int64)
    end = tl.load(rows + 3 * row + 2)
    length = tl.cdiv(tl.cdiv(end, NUM_SPLITS), BLOCK) * BLOCK
    first = split * length
    last = tl.minimum(end, first + length)

    in_group = tl.arange(0, GROUP_ROWS)
    lanes = tl.arange(0, LANES)
    heads = kv_head * GROUP + in_group
    is_head = in_group < GROUP
    lse_at = lse + (row * num_heads + heads) * NUM_SPLITS + split
    if first >= end:
        tl.store(lse_at, tl.full([GROUP_ROWS], float("-inf"), tl.float32), mask=is_head)
        return

    query_mask = is_head[:, None] & (lanes < HEAD_DIM)[None, :]
    queries = tl.load(
        q + token * q_token + heads[:, None] * q_head + lanes[None, :], mask=query_mask, other=0.0
    )
    if WIDE:
        queries = queries.to(tl.float32)
    best = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_ROWS], tl.float32)
    mixed = tl.zeros([GROUP_ROWS, LANES], tl.float32)
    tables += slot * tables_slot
    layer += kv_head * layer_head
    for start in range(first, last, BLOCK):
        positions = start + tl.arange(0, BLOCK)
        written = positions < last
        keys, values = _keys_and_values(
            layer,
            tables,
            positions,
            written,
            layer_page,
            layer_kv,
            layer_slot,
            HEAD_DIM,
            LANES,
            PAGE_SIZE,
            WIDE,
        )
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale_log2
        scores = tl.where(written[None, :], scores, float("-inf"))
        best, total, mixed = _with_block(best, total, mixed, scores, values)

    if NUM_SPLITS == 1:
        at = parts + (token * num_heads + heads)[:, None] * HEAD_DIM
    else:
        at = parts + ((row * num_heads + heads) * NUM_SPLITS + split)[:, None] * HEAD_DIM
    tl.store(at + lanes[None, :], (mixed / total[:, None]).to(parts.dtype.element_ty), mask=query_mask)
    tl.store(lse_at, best + tl.log2(total), mask=is_head)


@triton.jit
def _merge(parts, lse, rows, out, NUM_SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    token = tl.load(rows + 3 * row + 1).to(tl.int64)
    splits = tl.arange(0, NUM_SPLITS)
    lanes = tl.arange(0, LANES)
    first = (row * num_heads + head) * NUM_SPLITS
    sums = tl.load(lse + first + splits)
    shares = tl.exp2(sums - tl.max(sums, 0))
    # A part without positions was never written.
    mask = (sums > float("-inf"))[:, None] & (lanes < HEAD_DIM)[None, :]
    mixed = tl.load(parts + (first + splits)[:, None] * HEAD_DIM + lanes[None, :], mask=mask, other=0.0)
    merged = tl.sum(mixed * shares[:, None], 0) / tl.sum(shares, 0)
    at = out + (token * num_heads + head) * HEAD_DIM + lanes
    tl.store(at, merged.to(out.dtype.element_ty), mask=lanes < HEAD_DIM)


@triton.jit
def _prefill(
    q,
    layer,
    tables,
    rows,
    out,
    scale_log2,
    q_token,
    q_head,
    layer_page,
    layer_head,
    layer_kv,
    layer_slot,
    tables_slot,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    first_query = tl.program_id(0) * TILE
    head = tl.program_id(1).to(tl.int64)
    rows += 4 * tl.program_id(2).to(tl.int64)
    num_queries = tl.load(rows + 2)
    if first_query >= num_queries:
        return
    slot = tl.load(rows).to(tl.int64)
    start = tl.load(rows + 3)
    in_row = first_query + tl.arange(0, TILE)
    tokens = tl.load(rows + 1).to(tl.int64) + in_row
    lanes = tl.arange(0, LANES)
    query_mask = (in_row < num_queries)[:, None] & (lanes < HEAD_DIM)[None, :]
    queries = tl.load(
        q + tokens[:, None] * q_token + head * q_head + lanes[None, :], mask=query_mask, other=0.0
    )
    if WIDE:
        queries = queries.to(tl.float32)
    best = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    mixed = tl.zeros([TILE, LANES], tl.float32)
    tables += slot * tables_slot
    layer += head // GROUP * layer_head
    end = start + tl.minimum(num_queries, first_query + TILE)
    first_masked = (start + first_query) // BLOCK * BLOCK  # every query looks at all of the blocks before
    for at in range(0, end, BLOCK):
        positions = at + tl.arange(0, BLOCK)
        written = positions < end
        keys, values = _keys_and_values(
            layer,
            tables,
            positions,
            written,
            layer_page,
            layer_kv,
            layer_slot,
            HEAD_DIM,
            LANES,
            PAGE_SIZE,
            WIDE,
        )
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale_log2
        if at >= first_masked:
            looks = (positions[None, :] <= start + in_row[:, None]) & written[None, :]
            scores = tl.where(looks, scores, float("-inf"))
        best, total, mixed = _with_block(best, total, mixed, scores, values)
    attended = (mixed / total[:, None]).to(out.dtype.element_ty)
    tl.store(
        out + (tokens[:, None] * NUM_HEADS + head) * HEAD_DIM + lanes[None, :], attended, mask=query_mask
    )
