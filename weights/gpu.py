"""Weights that a trainer left in memory of a GPU of this host."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..messages.weights import FromGpuMemory
from .staged import StagedFile, staged_tensors


class GpuWeights:
    def __init__(
        self, read: Callable[[FromGpuMemory, Tensor], None], available_bytes: Callable[[], int]
    ) -> None:
        """`read`: see `pdserve.engine.gpu_memory.read_gpu_memory`."""
        self._read = read
        self._available_bytes = available_bytes

    def stage(self, source: FromGpuMemory) -> StagedFile:
        """A job: all of them as a safetensors file. Raises StartupError."""
        with staged_tensors(source.tensors, self._available_bytes()) as (file, data):
            self._read(source, data)
        return file
