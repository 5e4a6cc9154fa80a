"""One row, one head, one query at a time, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import AttentionRow


def paged_attention(q: Tensor, layer: Tensor, rows: Sequence[AttentionRow], scale: float) -> Tensor:
    num_kv_heads, page_size = layer.shape[1], layer.shape[3]
    heads_per_kv_head = q.shape[1] // num_kv_heads
    out = torch.empty_like(q)
    token = 0
    for row in rows:
        for position in range(row.start, row.end):
            for head in range(q.shape[1]):
                cached = [
                    layer[row.pages[p // page_size], head // heads_per_kv_head, :, p % page_size]
                    for p in range(position + 1)
                ]
                keys, values = torch.stack(cached).float().unbind(dim=1)  # [position + 1, D] each
                weights = torch.softmax(keys @ q[token, head].float() * scale, dim=0)
                out[token, head] = (weights @ values).to(q.dtype)
            token += 1
    return out
