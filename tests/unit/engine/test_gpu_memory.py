"""Memory of a GPU, over a stand-in for CUDA's runtime whose memory is the host's. No GPU is used here."""

from __future__ import annotations

import base64
import ctypes
import uuid
from types import SimpleNamespace

import pytest
import torch

from pdserve.docs.examples.gpu_bucket import GpuBucket
from pdserve.engine.gpu_memory import cuda_runtime, read_gpu_memory
from pdserve.messages.weights import CUDA_HANDLE_BYTES, FromGpuMemory, TensorSpec
from pdserve.runtime.errors import StartupError

OK, FAILED = 0, 1
UUIDS = [uuid.UUID(int=index) for index in (5, 6)]


class Handle:
    def __init__(self, content: bytes = b"") -> None:
        self._buffer = ctypes.create_string_buffer(content, CUDA_HANDLE_BYTES)

    def getPtr(self) -> int:  # noqa: N802 (its name in cuda.bindings)
        return ctypes.addressof(self._buffer)

    @property
    def content(self) -> bytes:
        return self._buffer.raw


class FakeCuda:
    """Functions return (status, value), as those of `cuda.bindings.runtime` do."""

    cudaError_t = SimpleNamespace(cudaSuccess=OK)  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDeviceToHost="to host", cudaMemcpyDefault="any")  # noqa: N815
    cudaIpcMemLazyEnablePeerAccess = 1  # noqa: N815
    cudaIpcMemHandle_t = Handle  # noqa: N815

    def __init__(self) -> None:
        self.device = 0
        self.allocations: dict[int, ctypes.Array[ctypes.c_char]] = {}  # by address
        self.num_open = 0

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:  # noqa: N802
        return OK, b"invalid argument"

    def cudaGetDeviceCount(self) -> tuple[int, int]:  # noqa: N802
        return OK, len(UUIDS)

    def cudaGetDeviceProperties(self, index: int) -> tuple[int, SimpleNamespace]:  # noqa: N802
        return OK, SimpleNamespace(uuid=SimpleNamespace(bytes=UUIDS[index].bytes))

    def cudaGetDevice(self) -> tuple[int, int]:  # noqa: N802
        return OK, self.device

    def cudaSetDevice(self, index: int) -> tuple[int]:  # noqa: N802
        self.device = index
        return (OK,)

    def cudaDeviceSynchronize(self) -> tuple[int]:  # noqa: N802
        return (OK,)

    def cudaMalloc(self, num_bytes: int) -> tuple[int, int]:  # noqa: N802
        memory = ctypes.create_string_buffer(num_bytes)
        self.allocations[ctypes.addressof(memory)] = memory
        return OK, ctypes.addressof(memory)

    def cudaFree(self, start: int) -> tuple[int]:  # noqa: N802
        del self.allocations[start]
        return (OK,)

    def cudaIpcGetMemHandle(self, start: int) -> tuple[int, Handle]:  # noqa: N802
        return OK, Handle(f"{self.device} {start}".encode())

    def cudaIpcOpenMemHandle(self, handle: Handle, flags: int) -> tuple[int, int | None]:  # noqa: N802
        device, start = map(int, handle.content.rstrip(b"\0").split())
        if device != self.device or start not in self.allocations:
            return FAILED, None
        self.num_open += 1
        return OK, start

    def cudaIpcCloseMemHandle(self, start: int) -> tuple[int]:  # noqa: N802
        self.num_open -= 1
        return (OK,)

    def cudaMemcpy(self, target: int, source: int, num_bytes: int, kind: str) -> tuple[int]:  # noqa: N802
        if kind == "to host":
            within = [start for start in self.allocations if start <= source]
            start = max(within)
            if source + num_bytes > start + len(self.allocations[start]):
                return (FAILED,)
        ctypes.memmove(target, source, num_bytes)
        return (OK,)


def source_of(bucket: GpuBucket, offset: int = 0) -> FromGpuMemory:
    gpu, fields = bucket.memory["gpu"], bucket.memory
    tensors = zip(fields["names"], fields["dtypes"], fields["shapes"], strict=True)
    return FromGpuMemory(
        device_uuid=gpu["device_uuid"],
        handle=base64.b64decode(gpu["handle"]),
        offset=offset,
        tensors=tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in tensors),
    )


def test_every_node_reads_what_a_trainer_put_there() -> None:
    cuda = FakeCuda()
    cuda.cudaSetDevice(1)
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
    with GpuBucket(tensors, cuda) as bucket:
        assert bucket.memory["names"] == ["a", "b"]
        assert bucket.memory["shapes"] == [[3, 2], [2]]
        for device_uuid in (str(UUIDS[1]), f"GPU-{UUIDS[1]}"):
            cuda.cudaSetDevice(0)
            bucket.memory["gpu"]["device_uuid"] = device_uuid
            target = torch.zeros(28, dtype=torch.uint8)
            read_gpu_memory(source_of(bucket), target, lambda: cuda)
            assert torch.equal(target[:24].view(torch.float32).view(3, 2), tensors["a"])
            assert torch.equal(target[24:].view(torch.bfloat16), tensors["b"])
        tail = torch.zeros(4, dtype=torch.uint8)
        read_gpu_memory(source_of(bucket, offset=24), tail, lambda: cuda)
        assert torch.equal(tail.view(torch.bfloat16), tensors["b"])
    assert (cuda.num_open, cuda.allocations) == (0, {})


def test_what_cannot_be_read_is_told_and_nothing_stays_open() -> None:
    cuda = FakeCuda()
    target = torch.zeros(16, dtype=torch.uint8)
    with GpuBucket({"a": torch.zeros(4)}, cuda) as bucket:
        with pytest.raises(StartupError, match="cudaMemcpy: invalid argument"):
            read_gpu_memory(source_of(bucket, offset=1), target, lambda: cuda)
        assert cuda.num_open == 0
        source = source_of(bucket)
        bucket.memory["gpu"]["device_uuid"] = "GPU-other"
        with pytest.raises(StartupError, match=f"does not see the GPU other, but {UUIDS[0]}, {UUIDS[1]}"):
            read_gpu_memory(source_of(bucket), target, lambda: cuda)
    with pytest.raises(StartupError, match="cudaIpcOpenMemHandle: invalid argument"):
        read_gpu_memory(source, target, lambda: cuda)


def test_a_node_without_the_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(StartupError, match="pip install cuda-bindings"):
        cuda_runtime()
