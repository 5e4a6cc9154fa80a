"""The process groups that trainers send weights over, by name.

Its methods are jobs: they block, and belong to the jobs' thread alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from ..messages.weights import FromGroup, JoinUpdateGroup
from ..runtime.errors import StartupError
from .staged import StagedFile, num_bytes_of, staged_tensors


class Group(Protocol):
    """`pdserve.engine.update_group.UpdateGroup` is one."""

    def receive(self, buffers: Sequence[Tensor], timeout_s: float) -> None: ...


class UpdateGroups:
    def __init__(self, join: Callable[[JoinUpdateGroup], Group], available_bytes: Callable[[], int]) -> None:
        """`join` raises StartupError when the group does not come together."""
        self._join = join
        self._available_bytes = available_bytes
        self._groups: dict[str, Group] = {}

    def join(self, message: JoinUpdateGroup) -> None:
        """Raises StartupError."""
        if message.group_name in self._groups:
            raise StartupError(f"group {message.group_name!r} is there already: destroy it first")
        self._groups[message.group_name] = self._join(message)

    def leave(self, name: str) -> None:
        """Raises StartupError."""
        if self._groups.pop(name, None) is None:
            raise StartupError(f"there is no group {name!r}")

    def receive(self, source: FromGroup) -> StagedFile:
        """What the trainer broadcasts next, as a safetensors file. Whether the model has such tensors is seen
        when it is loaded: to refuse it here would leave the trainer in its broadcast. Raises StartupError."""
        group = self._groups.get(source.group_name)
        if group is None:
            raise StartupError(
                f"there is no group {source.group_name!r}: init_weights_update_group comes first"
            )
        deadline = time.monotonic() + source.timeout_s
        with staged_tensors(source.tensors, self._available_bytes()) as (file, data):
            sizes = [num_bytes_of(spec) for spec in source.tensors]
            for buffer in [data] if source.is_one_bucket else data.split_with_sizes(sizes):
                group.receive([buffer], max(0.001, deadline - time.monotonic()))
        return file
