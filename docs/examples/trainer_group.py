"""A trainer's rank 0 in one process group with the nodes: torch's own, with a store of its own.

Made as `init_custom_process_group` of SGLang, verl, slime and OpenRLHF makes it, so their trainers work as
they are. It blocks until all have joined; `Engine.init_weights_update_group` makes the nodes join meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore, distributed_c10d, rendezvous  # type: ignore[attr-defined]

_TIMEOUT = timedelta(seconds=60)


class TrainerGroup:
    def __init__(self, name: str, port: int, world_size: int, backend: str = "gloo") -> None:
        """Listens at this port of this host. `world_size` is 1 and the number of nodes. With "nccl" the
        tensors that are sent are on this process's GPU."""
        store: TCPStore
        store, _, _ = next(rendezvous(f"tcp://127.0.0.1:{port}", 0, world_size, timeout=_TIMEOUT))
        store.set_timeout(_TIMEOUT)
        keys = distributed_c10d.PrefixStore(name, store)
        make: Any = distributed_c10d._new_process_group_helper
        self._group, _ = make(world_size, 0, [], backend, keys, group_name=name, timeout=_TIMEOUT)
        distributed_c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(world_size)}

    def send(self, tensors: Sequence[Tensor], *, is_one_bucket: bool = False) -> None:
        """Broadcasts them one by one, or as one row of bytes, SGLang's "flattened_bucket"."""
        if is_one_bucket:
            tensors = [torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])]
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0, group=self._group)

    def close(self) -> None:
        torch.distributed.destroy_process_group(self._group)
