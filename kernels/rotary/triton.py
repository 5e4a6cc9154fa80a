"""A program a token and block of heads, both halves in registers, so nothing is copied aside."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch

_HEADS = 8  # of one program


def rotary_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`cos` and `sin` are contiguous. Raises ValueError for a last axis of `x` that is strided."""
    if x.stride(-1) != 1:
        raise ValueError(f"rotary_: the last axis of x has a stride of {x.stride(-1)}")
    num_tokens, num_heads, head_dim = x.shape
    half = head_dim // 2
    lanes = triton.next_power_of_2(half)
    launch(
        _rotary,
        (num_tokens, triton.cdiv(num_heads, _HEADS)),
        x,
        cos,
        sin,
        x.stride(0),
        x.stride(1),
        NUM_HEADS=num_heads,
        HALF=half,
        HEADS=_HEADS,
        LANES=lanes,
        num_warps=max(1, _HEADS * lanes // 256),
    )


@triton.jit
def _rotary(
    x,
    cos,
    sin,
    x_token,
    x_head,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    lanes = tl.arange(0, LANES)
    in_half = lanes < HALF
    cosines = tl.load(cos + token * HALF + lanes, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sines = tl.load(sin + token * HALF + lanes, mask=in_half, other=0.0).to(tl.float32)[None, :]
    at = x + token * x_token + heads[:, None] * x_head + lanes[None, :]
    mask = (heads[:, None] < NUM_HEADS) & in_half[None, :]
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (first * cosines - second * sines).to(x.dtype.element_ty), mask=mask)
    tl.store(at + HALF, (second * cosines + first * sines).to(x.dtype.element_ty), mask=mask)
