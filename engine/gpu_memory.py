"""Reads memory of a GPU that another process of this host holds and gave a handle of (CUDA IPC).

Not torch's own sharing of tensors: that counts one reader for each handle, and all nodes of a host read this.
"""

from __future__ import annotations

import ctypes
import importlib
import uuid
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..messages.weights import CUDA_HANDLE_BYTES, FromGpuMemory
from ..runtime.errors import StartupError


def cuda_runtime() -> Any:  # noqa: ANN401 (a module without types)
    """`cuda.bindings.runtime`. Raises StartupError."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise StartupError(
            "memory of GPUs is read with the package cuda-bindings, which this node has not: "
            f"pip install cuda-bindings ({error})"
        ) from error


def read_gpu_memory(
    source: FromGpuMemory, target: Tensor, load_runtime: Callable[[], Any] = cuda_runtime
) -> None:
    """Fill `target`, ``[num_bytes]`` uint8 on the host, with what stands there from `source.offset` on.

    Blocks. Whoever holds the memory has finished writing to it. Raises StartupError.
    """
    cuda = load_runtime()
    cuda_call(cuda, cuda.cudaSetDevice, _device(cuda, source.device_uuid))
    handle = cuda.cudaIpcMemHandle_t()
    ctypes.memmove(handle.getPtr(), source.handle, CUDA_HANDLE_BYTES)
    start = cuda_call(cuda, cuda.cudaIpcOpenMemHandle, handle, cuda.cudaIpcMemLazyEnablePeerAccess)
    try:
        to_host = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        cuda_call(
            cuda, cuda.cudaMemcpy, target.data_ptr(), int(start) + source.offset, target.numel(), to_host
        )
    finally:
        cuda_call(cuda, cuda.cudaIpcCloseMemHandle, start)


def _device(cuda: Any, device_uuid: str) -> int:  # noqa: ANN401
    """Index of this GPU among those that this process sees."""
    wanted = device_uuid.removeprefix("GPU-").lower()
    seen = []
    for index in range(cuda_call(cuda, cuda.cudaGetDeviceCount)):
        properties = cuda_call(cuda, cuda.cudaGetDeviceProperties, index)
        seen.append(str(uuid.UUID(bytes=bytes(properties.uuid.bytes))))
        if seen[-1] == wanted:
            return index
    raise StartupError(f"this node does not see the GPU {wanted}, but {', '.join(seen) or 'none'}")


def cuda_call(cuda: Any, function: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401
    """What a function of the runtime returns beside its status. Raises StartupError."""
    status, *values = function(*arguments)
    if status != cuda.cudaError_t.cudaSuccess:
        _, text = cuda.cudaGetErrorString(status)
        raise StartupError(f"{function.__name__}: {text.decode()}")
    return values[0] if values else None
