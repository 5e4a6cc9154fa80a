"""A process group over which a trainer's rank 0 broadcasts tensors to nodes.

The wire is that of torch.distributed, joined as trainers join it (`init_custom_process_group` of SGLang,
verl, slime and OpenRLHF): a TCP store at rank 0's address, keys behind the group's name, a full mesh of gloo.
Only the group itself is made here: torch's global state, one default group of a process, is left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

from torch import Tensor
from torch._C._distributed_c10d import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

from ..messages.weights import JoinUpdateGroup
from ..runtime.errors import StartupError
from ..runtime.process import address_toward


class _Work(Protocol):
    def wait(self) -> bool: ...


class _Group(Protocol):
    def broadcast(self, tensors: list[Tensor], options: BroadcastOptions, /) -> _Work: ...


class UpdateGroup:
    """This node's membership. Everything blocks, until a peer answers, dies, or the time is over."""

    def __init__(
        self, *, name: str, host: str, port: int, rank: int, world_size: int, timeout_s: float
    ) -> None:
        """Blocks until every rank has joined. Raises StartupError when they have not in time."""
        timeout = timedelta(seconds=timeout_s)
        try:
            # Kept: the mesh's addresses are read from it, and rank 0 may go on to use it.
            self._store = TCPStore(host, port, world_size, False, timeout)
            keys = PrefixStore("cpu/", PrefixStore(f"{name}/", PrefixStore(name, self._store)))
            gloo: Any = ProcessGroupGloo  # torch's own stubs leave out what is used here
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname=address_toward(host))]
            options._timeout = timeout
            self._group: _Group | None = gloo(keys, rank, world_size, options)
        except (RuntimeError, ValueError, OSError) as error:  # torch's own are RuntimeErrors
            raise StartupError(
                f"group {name!r} of {world_size} ranks at {host}:{port} was not joined within "
                f"{timeout_s:.0f} s: {_first_line(error)}"
            ) from error
        self.name = name

    def receive(self, buffers: Sequence[Tensor], timeout_s: float) -> None:
        """Fill each buffer (uint8) with what rank 0 broadcasts next, in order. Raises StartupError when a
        rank is dead or late; the group cannot be used after that."""
        if self._group is None:
            raise StartupError(
                f"group {self.name!r} broke in an earlier update: destroy it and make it again"
            )
        options = BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=timeout_s)
        try:
            for buffer in buffers:
                self._group.broadcast([buffer], options).wait()
        except RuntimeError as error:
            self._group = None
            raise StartupError(
                f"group {self.name!r} broke while tensors were received: {_first_line(error)}"
            ) from error


def join_update_group(message: JoinUpdateGroup) -> UpdateGroup:
    """Raises StartupError."""
    return UpdateGroup(
        name=message.group_name,
        host=message.master_address,
        port=message.master_port,
        rank=message.rank,
        world_size=message.world_size,
        timeout_s=message.timeout_s,
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300]
