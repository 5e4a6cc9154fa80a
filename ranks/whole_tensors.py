"""Whole tensors of weights that several ranks hold parts of: one safetensors file in memory.

Rank 0 lays it out and names it to the others; every rank writes there what it answers for, where it belongs.
So each byte is copied once, and no tensor travels over a pipe. Of one rank the tensors are what it holds.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ..engine.model_weights import Weights, tensor_shapes
from ..engine.named_weights import answered_parts, named_parts
from ..engine.tensor_parallel import Shard
from ..engine.weight_file import require_memory
from ..messages.weights import TENSOR_DTYPES, TensorSpec
from ..models.config import ModelConfig
from ..runtime.errors import StartupError
from ..weights.staged import StagedFile
from .group import RankCall, alongside

Shapes: TypeAlias = dict[str, tuple[int, ...]]

_DTYPES = {code: getattr(torch, name) for name, (code, _) in TENSOR_DTYPES.items()}


class FurtherRanks(Protocol):
    """Of the replica, see RankGroup."""

    def fill_tensors(self, file: Path) -> RankCall: ...


def gather_tensors(
    weights: Weights,
    config: ModelConfig,
    shard: Shard,
    others: FurtherRanks | None,
    available_bytes: Callable[[], int],
    *,
    spare_bytes: int = 0,
    head: tuple[str, int] | None = None,
) -> Callable[[], Mapping[str, Tensor]]:
    """A job that returns the tensors by name, of `weights` on this rank and of what serves now on the others;
    `config` is the whole model's. `head`: of one tensor alone, and of its rows so many at least, where it has
    them.

    For rank 0's loop; the further ranks begin at once. The job raises StartupError, also when the tensors and
    `spare_bytes` (or as much as they take) beside them do not fit into the host's memory. The memory goes
    with the tensors.
    """
    try:
        require_memory(weights)
        shapes = tensor_shapes(config)
        if head is not None:
            shapes = _head(shapes, *head)
        if others is None or not any(shard.part(name, shape, config) for name, shape in shapes.items()):
            return lambda: _own(weights, config, shard, shapes)
        file = _lay_out(shapes, weights.dtype, spare_bytes, available_bytes())
    except StartupError as error:
        return _refusal(error)
    filled = others.fill_tensors(file.path)

    def job() -> Mapping[str, Tensor]:
        try:
            alongside(filled, lambda: write_parts(file.path, weights, config, shard))
            return mapped_tensors(file.path)
        finally:
            file.close()

    return job


def write_parts(file: Path, weights: Weights, config: ModelConfig, shard: Shard) -> None:
    """Write what this rank answers for of the tensors that the file was laid out for. Raises StartupError."""
    require_memory(weights)
    parts = answered_parts(weights, config, shard)
    for name, target in mapped_tensors(file).items():
        if (named := parts.get(name)) is None:
            continue
        rows, *columns = named.part or (slice(None),)
        start = rows.start or 0
        num_rows = min(named.data.shape[0], target.shape[0] - start)  # the file may have the first rows alone
        if num_rows > 0:
            target[(slice(start, start + num_rows), *columns)].copy_(named.data[:num_rows])


def mapped_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name: what is written to them is written to it. They stay when the
    file is closed. Raises StartupError."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        try:
            content = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        raise StartupError(f"the whole tensors in {file} cannot be opened: {error}") from error
    start = 8 + int.from_bytes(content[:8], "little")
    data = torch.frombuffer(content, dtype=torch.uint8)
    tensors = {}
    for name, entry in json.loads(content[8:start]).items():
        first, end = entry["data_offsets"]
        values = data[start + first : start + end].view(_DTYPES[entry["dtype"]])
        tensors[name] = values.view(entry["shape"])
    return tensors


def _head(shapes: Shapes, name: str, max_rows: int) -> Shapes:
    if name not in shapes:
        raise StartupError(f"the model has no tensor {name!r}")
    num_rows, *columns = shapes[name]
    return {name: (min(num_rows, max_rows), *columns)}


def _own(weights: Weights, config: ModelConfig, shard: Shard, names: Iterable[str]) -> dict[str, Tensor]:
    parts = named_parts(weights, config, shard)
    return {name: parts[name].data for name in names}


def _lay_out(shapes: Shapes, dtype: torch.dtype, spare_bytes: int, available_bytes: int) -> StagedFile:
    num_bytes = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    spare_bytes = min(spare_bytes, num_bytes)
    if available_bytes < num_bytes + spare_bytes:
        beside = f" and {_mib(spare_bytes)} MiB beside it" if spare_bytes else ""
        raise StartupError(
            f"the ranks hold parts of the tensors, and to put them together takes {_mib(num_bytes)} MiB"
            f"{beside}: this host has {available_bytes >> 20} MiB left"
        )
    file = StagedFile()
    try:
        name_of_type = str(dtype).removeprefix("torch.")
        file.lay_out([TensorSpec(name, name_of_type, shape) for name, shape in shapes.items()])
    except OSError as error:
        file.close()
        raise StartupError(f"the whole tensors do not fit: {error}") from error
    return file


def _mib(num_bytes: int) -> int:
    return -(-num_bytes >> 20)


def _refusal(error: StartupError) -> Callable[[], Mapping[str, Tensor]]:
    def job() -> Mapping[str, Tensor]:
        raise error

    return job
