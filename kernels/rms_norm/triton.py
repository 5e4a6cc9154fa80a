"""A program a row: sums the squares block by block, then reads the row again (from cache) and scales it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch

_LARGEST_BLOCK = 4096


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` may have any strides but in its last axis. Raises ValueError for a last axis that is strided."""
    if x.stride(-1) != 1:
        raise ValueError(f"rms_norm: the last axis of x has a stride of {x.stride(-1)}")
    length = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # [outer, inner, D]: the heads of a fused projection have two strides.
    rows = x if x.dim() == 3 else x.reshape(-1, 1, length)
    num_rows, inner = rows.shape[0] * rows.shape[1], rows.shape[1]
    block = min(triton.next_power_of_2(length), _LARGEST_BLOCK)
    launch(
        _rms_norm,
        (num_rows,),
        rows,
        weight,
        out,
        eps,
        inner,
        rows.stride(0),
        rows.stride(1),
        LENGTH=length,
        BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
    )
    return out


@triton.jit(do_not_specialize=["inner"])
def _rms_norm(x, weight, out, eps, inner, x_outer, x_inner, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row // inner * x_outer + row % inner * x_inner
    out += row * LENGTH
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, LENGTH, BLOCK):
        at = start + lanes
        values = tl.load(x + at, mask=at < LENGTH, other=0.0).to(tl.float32)
        squares += values * values
    root = tl.sqrt(tl.sum(squares, 0) / LENGTH + eps)
    for start in range(0, LENGTH, BLOCK):
        at = start + lanes
        values = tl.load(x + at, mask=at < LENGTH, other=0.0).to(tl.float32)
        weights = tl.load(weight + at, mask=at < LENGTH, other=0.0).to(tl.float32)
        tl.store(out + at, (values / root * weights).to(out.dtype.element_ty), mask=at < LENGTH)
