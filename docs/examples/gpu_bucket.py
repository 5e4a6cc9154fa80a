"""Tensors in memory of a GPU that nodes of this host can read: a trainer there sends nothing at all.

with GpuBucket(named_tensors) as bucket:
    engine.update_weights_from_gpu(bucket.memory, weight_version="step-7")
"""

from __future__ import annotations

import base64
import ctypes
import uuid
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pdserve.engine.gpu_memory import cuda_call, cuda_runtime
from pdserve.messages.weights import CUDA_HANDLE_BYTES


class GpuBucket:
    """Holds a copy of them on the current GPU, in an allocation of its own: what torch's allocator hands out
    is part of a larger one, and may be of a kind that has no handle."""

    def __init__(self, named_tensors: Mapping[str, Tensor], cuda: Any = None) -> None:  # noqa: ANN401
        """`cuda`: `cuda.bindings.runtime`. Raises StartupError."""
        self._cuda = cuda = cuda or cuda_runtime()
        tensors = {name: tensor.contiguous() for name, tensor in named_tensors.items()}
        self._start = cuda_call(cuda, cuda.cudaMalloc, sum(tensor.nbytes for tensor in tensors.values()))
        offset = 0
        for tensor in tensors.values():
            place, kind = int(self._start) + offset, cuda.cudaMemcpyKind.cudaMemcpyDefault
            cuda_call(cuda, cuda.cudaMemcpy, place, tensor.data_ptr(), tensor.nbytes, kind)
            offset += tensor.nbytes
        cuda_call(cuda, cuda.cudaDeviceSynchronize)
        handle = cuda_call(cuda, cuda.cudaIpcGetMemHandle, self._start)
        properties = cuda_call(cuda, cuda.cudaGetDeviceProperties, cuda_call(cuda, cuda.cudaGetDevice))
        self.memory: dict[str, Any] = {
            "gpu": {
                "device_uuid": str(uuid.UUID(bytes=bytes(properties.uuid.bytes))),
                "handle": base64.b64encode(ctypes.string_at(handle.getPtr(), CUDA_HANDLE_BYTES)).decode(),
            },
            "names": list(tensors),
            "dtypes": [str(tensor.dtype) for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
        }

    def close(self) -> None:
        """Nobody reads it any more: the update is answered."""
        cuda_call(self._cuda, self._cuda.cudaFree, self._start)

    def __enter__(self) -> GpuBucket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
