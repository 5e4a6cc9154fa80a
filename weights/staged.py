"""A safetensors file in memory that other processes of this host can open."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..messages.weights import TENSOR_DTYPES, TensorSpec
from ..runtime.errors import StartupError


def safetensors_header(specs: Sequence[TensorSpec]) -> tuple[bytes, int]:
    """What a safetensors file of these tensors, one behind the other, begins with; how many bytes follow."""
    header, end = {}, 0
    for spec in specs:
        start, end = end, end + num_bytes_of(spec)
        header[spec.name] = {
            "dtype": TENSOR_DTYPES[spec.dtype][0],
            "shape": spec.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def require_room(num_bytes: int, available_bytes: int) -> None:
    """Raises OSError. Prepared weights are held beside the file."""
    if available_bytes < 2 * num_bytes:
        raise OSError(
            f"this host has {available_bytes >> 20} MiB left for an update of {num_bytes >> 20} MiB"
        )


class StagedFile:
    """Gone with its last user, even when this process is killed: it is in no folder."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("pdserve-weights")
        self.num_bytes = 0

    @property
    def path(self) -> Path:
        """For this process, and for others of its user while it is open here."""
        return Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def append(self, data: bytes | memoryview) -> None:
        """Raises OSError when the memory of the host is out."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self.num_bytes += len(data)

    def lay_out(self, specs: Sequence[TensorSpec]) -> Tensor:
        """Make it the file of these tensors. Their values are to be written into what is returned: bytes, one
        tensor behind the other, ``[num_bytes]`` uint8, which take memory as they are written. Raises OSError.
        """
        header, end = safetensors_header(specs)
        self.append(header)
        offset, self.num_bytes = self.num_bytes, self.num_bytes + end
        os.ftruncate(self._descriptor, self.num_bytes)
        if end == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(mmap.mmap(self._descriptor, self.num_bytes), dtype=torch.uint8)[offset:]

    def close(self) -> None:
        os.close(self._descriptor)


@contextmanager
def staged_tensors(specs: Sequence[TensorSpec], available_bytes: int) -> Iterator[tuple[StagedFile, Tensor]]:
    """A `staged_file` of these tensors, and the bytes to be filled in, see `StagedFile.lay_out`."""
    with staged_file() as file:
        require_room(sum(num_bytes_of(spec) for spec in specs), available_bytes)
        yield file, file.lay_out(specs)


def num_bytes_of(spec: TensorSpec) -> int:
    return TENSOR_DTYPES[spec.dtype][1] * math.prod(spec.shape)


@contextmanager
def staged_file() -> Iterator[StagedFile]:
    """A new one, to be filled in the body and to be closed by whoever gets it; by this when the body fails.

    Raises StartupError when it does not fit.
    """
    file = StagedFile()
    try:
        yield file
    except OSError as error:
        file.close()
        raise StartupError(f"the update does not fit: {error}") from error
    except BaseException:
        file.close()
        raise
