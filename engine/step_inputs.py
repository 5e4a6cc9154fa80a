"""How the numbers of a step reach the device: packed in one array of the host, by one copy."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .device import DeviceRuntime
from .tensor_tree import map_tensors, tensors_of

T = TypeVar("T")

_ALIGNMENT = 8  # bytes: of the widest number, so that each part can be seen as its own dtype


def staged(step: T, runtime: DeviceRuntime) -> T:
    """`step` with its tensors on the device; the copy is not waited for. What is computed on the host is
    `step` itself."""
    if runtime.is_host:
        return step
    starts: list[int] = []
    total = 0
    tensors = tensors_of(step)
    for tensor in tensors:
        starts.append(total)
        total += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    packed = np.zeros(total, dtype=np.uint8)
    for tensor, start in zip(tensors, starts, strict=True):
        packed[start : start + tensor.nbytes] = tensor.contiguous().view(torch.uint8).flatten().numpy()
    on_device = runtime.stage(packed)
    parts = iter(starts)

    def part(tensor: Tensor) -> Tensor:
        start = next(parts)
        return on_device[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    return map_tensors(step, part)
