"""Where forwards are computed: all that the engine asks of a device. No other part knows which one it is.

On the host there is nothing to wait for. On any other device work is only launched, so what brings numbers
there and results back says when it is done. `CudaRuntime` was not run on a GPU: docs/gpu.md says what stands
in for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..runtime.cpu_features import native_dtypes
from ..runtime.errors import StartupError

HostBytes: TypeAlias = NDArray[np.uint8]


class Readback(Protocol):
    """Tensors on their way to the host."""

    def take(self) -> list[Tensor]:
        """Blocks until all that was launched before is done. They are the host's then."""


class DeviceRuntime(Protocol):
    @property
    def device(self) -> torch.device: ...

    @property
    def is_host(self) -> bool:
        """Whether tensors of the host are its own: none of them has to travel."""

    @property
    def dtypes(self) -> frozenset[str]:
        """Those of float32, bfloat16 and float16 that it multiplies in hardware."""

    def stage(self, packed: HostBytes) -> Tensor:
        """``packed [n]`` on the device, ``[n]`` uint8, by one copy that is not waited for. `packed` may be
        written to again at once."""

    def read_back(self, tensors: Sequence[Tensor]) -> Readback:
        """Begins to bring them to the host."""


class HostRuntime:
    """The processor: everything is there already."""

    device = torch.device("cpu")
    is_host = True

    @property
    def dtypes(self) -> frozenset[str]:
        return native_dtypes()

    def stage(self, packed: HostBytes) -> Tensor:
        return torch.from_numpy(packed.copy())

    def read_back(self, tensors: Sequence[Tensor]) -> Readback:
        return _There(tensors)


class _There:
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors

    def take(self) -> list[Tensor]:
        return list(self._tensors)


class CudaRuntime:
    """All of it on the device's default stream, which orders it."""

    is_host = False
    dtypes = frozenset({"float32", "bfloat16", "float16"})

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)

    def stage(self, packed: HostBytes) -> Tensor:
        # torch gives a block of pinned memory to nobody else before the copies from it have run.
        return torch.from_numpy(packed).pin_memory().to(self.device, non_blocking=True)

    def read_back(self, tensors: Sequence[Tensor]) -> Readback:
        arriving = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # to pinned memory
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # a thread that waits sleeps
        done.record(torch.cuda.current_stream(self.device))
        return _Arriving(arriving, done)


class _Arriving:
    def __init__(self, tensors: list[Tensor], done: torch.cuda.Event) -> None:
        self._tensors = tensors
        self._done = done

    def take(self) -> list[Tensor]:
        self._done.synchronize()
        return self._tensors


HOST = HostRuntime()


def create_runtime(wanted: str) -> DeviceRuntime:
    """`wanted`: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``. Raises StartupError where there is no such device.

    ``auto`` is the host on every machine: all transports reach its memory.
    """
    kind, _, index = wanted.partition(":")
    if kind != "cuda":
        return HOST
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        seen = f"{count} GPUs" if count else "no GPU"
        mend = "leave it out to compute on the CPU"
        raise StartupError(f"--device {wanted}: torch {torch.__version__} sees {seen} here; {mend}")
    return CudaRuntime(int(index or 0))
