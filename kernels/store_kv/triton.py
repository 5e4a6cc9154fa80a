"""A program a token and KV head: a key and a value are copied side by side."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch


def store_kv_(layer: Tensor, kv: Tensor, page: Tensor, offset: Tensor) -> None:
    """`page` and `offset` may be int32 too. Raises ValueError for last axes that are strided."""
    if layer.stride(-1) != 1 or kv.stride(-1) != 1:
        raise ValueError(f"store_kv_: the last axes have strides of {layer.stride(-1)} and {kv.stride(-1)}")
    num_tokens, _, num_kv_heads, head_dim = kv.shape
    launch(
        _store_kv,
        (num_tokens, num_kv_heads),
        layer,
        kv,
        page,
        offset,
        *layer.stride()[:4],
        *kv.stride()[:3],
        HEAD_DIM=head_dim,
        LANES=triton.next_power_of_2(head_dim),
        num_warps=1,
    )


@triton.jit
def _store_kv(
    layer,
    kv,
    page,
    offset,
    layer_page,
    layer_head,
    layer_kv,
    layer_slot,
    kv_token,
    kv_kv,
    kv_head,
    HEAD_DIM: tl.constexpr,
    LANES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    k_or_v = tl.arange(0, 2)[:, None]
    lanes = tl.arange(0, LANES)[None, :]
    mask = lanes < HEAD_DIM
    copied = tl.load(kv + token * kv_token + k_or_v * kv_kv + head * kv_head + lanes, mask=mask, other=0.0)
    slot = tl.load(page + token).to(tl.int64) * layer_page + tl.load(offset + token).to(tl.int64) * layer_slot
    tl.store(layer + slot + head * layer_head + k_or_v * layer_kv + lanes, copied, mask=mask)
