"""The simulated device as the engine meets it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdserve.engine.device import HostBytes, Readback

from .device import DEVICE, to_device, to_host


class SimulatedRuntime:
    """`num_staged`: copies to the device; `num_read_back`: times that results were asked for."""

    device = DEVICE
    is_host = False
    dtypes = frozenset({"float32", "bfloat16", "float16"})

    def __init__(self) -> None:
        self.num_staged = 0
        self.num_read_back = 0

    def stage(self, packed: HostBytes) -> Tensor:
        self.num_staged += 1
        there = to_device(torch.from_numpy(packed))
        packed.fill(0xFF)  # whoever sees the host's array as the device's reads this
        return there

    def read_back(self, tensors: Sequence[Tensor]) -> Readback:
        self.num_read_back += 1
        return _Snapshot([to_host(tensor).clone() for tensor in tensors])


class _Snapshot:
    """What was computed until `read_back`; what comes after it is not in it."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors

    def take(self) -> list[Tensor]:
        return self._tensors
