"""A process group over which a trainer's rank 0 broadcasts tensors to nodes.

The wire is that of torch.distributed, joined as trainers join it (`init_custom_process_group` of SGLang,
verl, slime and OpenRLHF): a TCP store at rank 0's address, keys behind the group's name, a full mesh of gloo
or a communicator of NCCL. Only the group itself is made here: torch's global state, one default group of a
process, is left alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch._C._distributed_c10d import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

from ..messages.weights import GroupBackend, JoinUpdateGroup
from ..runtime.errors import StartupError
from ..runtime.process import address_toward


class _Work(Protocol):
    def wait(self, timeout: timedelta = ...) -> bool: ...


class _Group(Protocol):
    def broadcast(self, tensors: list[Tensor], options: BroadcastOptions, /) -> _Work: ...


class UpdateGroup:
    """This node's membership. Everything blocks, until a peer answers, dies, or the time is over.

    Over NCCL tensors arrive on the first GPU that this process sees and are copied from there. Nodes of one
    host need a GPU each (`CUDA_VISIBLE_DEVICES`), another one than the trainer's: NCCL asks for that.
    """

    def __init__(
        self,
        *,
        name: str,
        host: str,
        port: int,
        rank: int,
        world_size: int,
        timeout_s: float,
        backend: GroupBackend = "gloo",
    ) -> None:
        """Blocks until every rank has joined; NCCL's ranks meet at the first broadcast. Raises StartupError
        when they have not in time, or when this node has no such backend."""
        if backend == "nccl":
            _require_nccl()
        timeout = timedelta(seconds=timeout_s)
        self._device = torch.device("cpu" if backend == "gloo" else "cuda")
        try:
            # Kept: the mesh's addresses are read from it, and rank 0 may go on to use it.
            self._store = TCPStore(host, port, world_size, False, timeout)
            # As torch's `_new_process_group_helper` nests them.
            keys = PrefixStore(f"{self._device}/", PrefixStore(f"{name}/", PrefixStore(name, self._store)))
            make = _gloo if backend == "gloo" else _nccl
            self._group: _Group | None = make(keys, rank, world_size, host, timeout)
        except (RuntimeError, ValueError, OSError) as error:  # torch's own are RuntimeErrors
            raise StartupError(
                f"group {name!r} of {world_size} ranks at {host}:{port} was not joined within "
                f"{timeout_s:.0f} s: {_first_line(error)}"
            ) from error
        self.name = name

    def receive(self, buffers: Sequence[Tensor], timeout_s: float) -> None:
        """Fill each buffer (uint8, on the host) with what rank 0 broadcasts next, in order. Raises
        StartupError when a rank is dead or late; the group cannot be used after that."""
        if self._group is None:
            raise StartupError(
                f"group {self.name!r} broke in an earlier update: destroy it and make it again"
            )
        options = BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=timeout_s)
        try:
            for buffer in buffers:
                if self._device.type == "cpu":
                    self._group.broadcast([buffer], options).wait()
                else:
                    arrived = torch.empty_like(buffer, device=self._device)
                    self._group.broadcast([arrived], options).wait(options.timeout)
                    buffer.copy_(arrived)
        except RuntimeError as error:
            self._group = None
            raise StartupError(
                f"group {self.name!r} broke while tensors were received: {_first_line(error)}"
            ) from error


def join_update_group(message: JoinUpdateGroup) -> UpdateGroup:
    """Raises StartupError."""
    return UpdateGroup(
        name=message.group_name,
        backend=message.backend,
        host=message.master_address,
        port=message.master_port,
        rank=message.rank,
        world_size=message.world_size,
        timeout_s=message.timeout_s,
    )


def _require_nccl() -> None:
    if not hasattr(c10d, "ProcessGroupNCCL"):
        raise StartupError("backend nccl needs a torch that is built with NCCL: use gloo")
    if not torch.cuda.is_available():
        raise StartupError("backend nccl needs a GPU, and this node sees none: use gloo")


def _gloo(keys: PrefixStore, rank: int, world_size: int, host: str, timeout: timedelta) -> _Group:
    gloo: Any = ProcessGroupGloo  # torch's own stubs leave out what is used here
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address_toward(host))]
    options._timeout = timeout
    group: _Group = gloo(keys, rank, world_size, options)
    return group


def _nccl(keys: PrefixStore, rank: int, world_size: int, _host: str, timeout: timedelta) -> _Group:
    # A broadcast that fails or is late is then an error of `wait`. By default torch's watchdog ends the whole
    # process, and its monitor does when the watchdog hangs. Both are read when the group is made.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
    nccl: Any = c10d.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timeout
    group: _Group = nccl(keys, rank, world_size, options)
    return group


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300]
