"""Gathers the pages a row looks at, then torch's flash attention.

The query heads that share a KV head are laid along the query axis (decode) or see it through a stride of 0
(prefill), so keys and values are never repeated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import AttentionPlan, DecodeGroup, PrefillRow


def paged_attention(q: Tensor, layer: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    by_head = layer.permute(1, 2, 0, 3, 4)  # [Hkv, 2, num_pages, page_size, D]
    for group in plan.groups:
        tokens = slice(group.first_token, group.first_token + group.num_rows)
        out[tokens] = _decode(q[tokens], by_head, group, scale)
    for row in plan.prefills:
        tokens = slice(row.first_token, row.first_token + row.num_tokens)
        out[tokens] = _prefill(q[tokens], by_head, row, scale)
    return out


def _decode(q: Tensor, by_head: Tensor, group: DecodeGroup, scale: float) -> Tensor:
    num_kv_heads, head_dim = by_head.shape[0], by_head.shape[-1]
    slots = by_head.index_select(2, group.pages).view(num_kv_heads, 2, -1, head_dim)
    if group.unwritten is not None:
        slots.index_fill_(2, group.unwritten, 0)
    kv = slots.view(num_kv_heads, 2, group.num_rows, -1, head_dim)[:, :, :, : group.num_slots]
    by_group = q.view(group.num_rows, num_kv_heads, -1, head_dim).transpose(0, 1)
    out = F.scaled_dot_product_attention(by_group, kv[:, 0], kv[:, 1], attn_mask=group.bias, scale=scale)
    return out.transpose(0, 1).reshape(q.shape)


def _prefill(q: Tensor, by_head: Tensor, row: PrefillRow, scale: float) -> Tensor:
    num_kv_heads, head_dim = by_head.shape[0], by_head.shape[-1]
    slots = by_head.index_select(2, row.pages).view(num_kv_heads, 2, 1, -1, head_dim)
    by_group = q.view(row.num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    kv = slots[:, :, :, : row.end].expand(-1, -1, by_group.shape[1], -1, -1)
    out = F.scaled_dot_product_attention(
        by_group, kv[:, 0], kv[:, 1], attn_mask=row.bias, is_causal=row.bias is None, scale=scale
    )
    return out.permute(2, 0, 1, 3).reshape(q.shape)
