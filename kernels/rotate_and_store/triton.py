"""A program a token and block of heads, whichever they are; all in float32 until it is written."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch

_HEADS = 8  # of one program


def rotate_and_store_(
    heads: Tensor,
    layer: Tensor,
    cos: Tensor,
    sin: Tensor,
    page: Tensor,
    offset: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> None:
    """`cos` and `sin` are contiguous, `page` and `offset` may be int32 too. Raises ValueError for last axes
    that are strided."""
    if heads.stride(-1) != 1 or layer.stride(-1) != 1:
        raise ValueError(
            f"rotate_and_store_: the last axes have strides of {heads.stride(-1)} and {layer.stride(-1)}"
        )
    num_tokens, num_all, head_dim = heads.shape
    num_kv_heads = layer.shape[1]
    half = head_dim // 2
    lanes = triton.next_power_of_2(half)
    launch(
        _rotate_and_store,
        (num_tokens, triton.cdiv(num_all, _HEADS)),
        heads,
        layer,
        cos,
        sin,
        page,
        offset,
        heads if q_norm is None else q_norm,  # any pointer, where it is not read
        heads if k_norm is None else k_norm,
        eps,
        heads.stride(0),
        heads.stride(1),
        *layer.stride()[:4],
        NUM_HEADS=num_all - 2 * num_kv_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=half,
        HEADS=_HEADS,
        LANES=lanes,
        HAS_NORMS=q_norm is not None,
        num_warps=max(1, _HEADS * lanes // 256),
    )


@triton.jit
def _rotate_and_store(
    heads,
    layer,
    cos,
    sin,
    page,
    offset,
    q_norm,
    k_norm,
    eps,
    heads_token,
    heads_head,
    layer_page,
    layer_head,
    layer_kv,
    layer_slot,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
    HAS_NORMS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS))[:, None]
    lanes = tl.arange(0, LANES)[None, :]
    is_query, is_value = head < NUM_HEADS, head >= NUM_HEADS + NUM_KV_HEADS
    in_half = lanes < HALF
    mask = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & in_half
    at = heads + token * heads_token + head * heads_head + lanes
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    scaled, scaled_too = first, second
    if HAS_NORMS:
        squares = tl.sum(first * first + second * second, 1, keep_dims=True)
        root = tl.sqrt(squares / (2 * HALF) + eps)
        of_q = tl.load(q_norm + lanes, mask=in_half, other=0.0).to(tl.float32)
        of_k = tl.load(k_norm + lanes, mask=in_half, other=0.0).to(tl.float32)
        scaled = first / root * tl.where(is_query, of_q, of_k)
        of_q = tl.load(q_norm + HALF + lanes, mask=in_half, other=0.0).to(tl.float32)
        of_k = tl.load(k_norm + HALF + lanes, mask=in_half, other=0.0).to(tl.float32)
        scaled_too = second / root * tl.where(is_query, of_q, of_k)
    cosines = tl.load(cos + token * HALF + lanes, mask=in_half, other=0.0).to(tl.float32)
    sines = tl.load(sin + token * HALF + lanes, mask=in_half, other=0.0).to(tl.float32)
    first = tl.where(is_value, first, scaled * cosines - scaled_too * sines).to(heads.dtype.element_ty)
    second = tl.where(is_value, second, scaled_too * cosines + scaled * sines).to(heads.dtype.element_ty)

    tl.store(at, first, mask=mask & is_query)
    tl.store(at + HALF, second, mask=mask & is_query)
    kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
    slot = tl.load(page + token).to(tl.int64) * layer_page + tl.load(offset + token).to(tl.int64) * layer_slot
    target = layer + slot + kv_head * layer_head + is_value.to(tl.int64) * layer_kv + lanes
    tl.store(target, first, mask=mask & (head >= NUM_HEADS))
    tl.store(target + HALF, second, mask=mask & (head >= NUM_HEADS))
