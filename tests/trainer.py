"""A trainer's rank 0, as SGLang's own clients make it: torch's process group with a store of its own.

Run as a process it is told by lines on its standard input what to send: ``tensors`` or ``bucket``.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore, distributed_c10d, rendezvous

MATRIX = torch.arange(6, dtype=torch.float32).view(2, 3)
ROW = torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16)
_TIMEOUT = timedelta(seconds=60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


class Trainer:
    """Blocks until all have joined. Close it to break the group."""

    def __init__(self, name: str, port: int, world_size: int) -> None:
        url = f"tcp://127.0.0.1:{port}"
        store: TCPStore
        store, _, _ = next(rendezvous(url, 0, world_size, timeout=_TIMEOUT))
        store.set_timeout(_TIMEOUT)
        keys = distributed_c10d.PrefixStore(name, store)
        make: Any = distributed_c10d._new_process_group_helper
        self._group, _ = make(world_size, 0, [], "gloo", keys, group_name=name, timeout=_TIMEOUT)
        distributed_c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(world_size)}

    def send(self, tensors: Sequence[Tensor], *, is_one_bucket: bool = False) -> None:
        if is_one_bucket:
            tensors = [torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])]
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0, group=self._group)

    def close(self) -> None:
        torch.distributed.destroy_process_group(self._group)


def main(port: int) -> None:
    torch.set_num_threads(1)
    trainer = Trainer("g", port, 2)
    for command in sys.stdin:
        trainer.send([MATRIX, ROW], is_one_bucket=command.strip() == "bucket")


if __name__ == "__main__":
    main(int(sys.argv[1]))
