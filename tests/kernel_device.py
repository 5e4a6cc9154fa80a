"""Where Triton's kernels run in this process: on the host, interpreted, or on a GPU (`scripts/gpu_suite`)."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from pdserve.kernels.launch import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
needs_device = [] if INTERPRETED else [pytest.mark.gpu]

_MAP_NORESERVE = 0x4000  # the kernel promises no memory for what is never touched
_WRAP = 1 << 31
NUM_FAR_BLOCKS = 6


def far_apart(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Zeros, ``[NUM_FAR_BLOCKS, *shape]`` on `DEVICE`: a stride of 2³⁰ elements and more,
    which 32 bits hold, so that the last block begins beyond 2³².

    On the host, memory stays virtual until it is written. An offset that wraps at 32 bits hits another block
    or what lies before the first.
    """
    dense = torch.empty(shape, device="meta")
    block = _WRAP // 2 + 4 * dense.numel()
    num_elements = _WRAP + NUM_FAR_BLOCKS * block
    if INTERPRETED:
        memory = virtual(num_elements, dtype)
    else:
        memory = torch.zeros(num_elements, dtype=dtype, device=DEVICE)
    return memory.as_strided((NUM_FAR_BLOCKS, *shape), (block, *dense.stride()), storage_offset=_WRAP)


def virtual(num_elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros of the host that take no memory until they are written, ``[num_elements]``."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, num_elements * dtype.itemsize, flags=flags), dtype=dtype)
