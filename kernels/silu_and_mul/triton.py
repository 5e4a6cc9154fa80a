"""A program a token and block of the intermediate size."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch

_BLOCK = 1024


def silu_and_mul(x: Tensor) -> Tensor:
    """Raises ValueError for a last axis that is strided."""
    if x.stride(-1) != 1:
        raise ValueError(f"silu_and_mul: the last axis of x has a stride of {x.stride(-1)}")
    num_tokens, size = x.shape[0], x.shape[1] // 2
    out = torch.empty((num_tokens, size), dtype=x.dtype, device=x.device)
    grid = (num_tokens, triton.cdiv(size, _BLOCK))
    launch(_silu_and_mul, grid, x, out, x.stride(0), SIZE=size, BLOCK=_BLOCK, num_warps=4)
    return out


@triton.jit
def _silu_and_mul(x, out, x_token, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x += token * x_token
    gate = tl.load(x + at, mask=at < SIZE, other=0.0).to(tl.float32)
    up = tl.load(x + SIZE + at, mask=at < SIZE, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + token * SIZE + at, gated.to(out.dtype.element_ty), mask=at < SIZE)
