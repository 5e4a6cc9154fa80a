"""One model on several ranks: which part of it a rank has, and how the parts come together.

Query, key and value heads and the feed-forward's columns are split; attention's and the feed-forward's output
projections are split along their inputs, so each rank has a partial sum, and one reduction behind each of the
two makes it whole. A rank is a smaller model of the same kind: the decoder sees its share of the heads.

With more ranks than KV heads each head lies on several ranks. Norms and the embedding are on every rank: to
look a row up costs nothing, to split it would cost one more reduction a step. The LM head is the largest
matrix of a decode step, so its rows are split, and rank 0, which samples, gathers the logits.
"""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, FileStore, GatherOptions, ProcessGroupGloo

from ..messages.kv_layout import heads_divide, kv_heads_of_rank
from ..models.config import ModelConfig
from ..runtime.errors import StartupError

# No collective ends by a clock of its own: whether a rank hangs is for rank 0's loop to say.
_FOREVER = timedelta(days=365)


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """A rank's place among `size` ranks."""

    rank: int
    size: int

    def config(self, config: ModelConfig) -> ModelConfig:
        """What this rank's decoder computes. Raises StartupError when the heads do not divide."""
        check_divides(config, self.size)
        return dataclasses.replace(
            config,
            num_heads=config.num_heads // self.size,
            num_kv_heads=len(kv_heads_of_rank(config.num_kv_heads, self.size, self.rank)),
            intermediate_size=config.intermediate_size // self.size,
        )

    def part(self, name: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[slice, ...] | None:
        """What this rank needs of the checkpoint's tensor `name`; None: nothing. Empty: all of it.

        A bias behind a partial sum must be added once, so rank 0 has it.
        """
        layer_name = name.rpartition(".layers.")[2]
        match layer_name.split(".")[-3:]:
            case [_, "q_proj", _]:
                return (self._rows(shape[0]),)
            case [_, "k_proj" | "v_proj", _]:
                heads = kv_heads_of_rank(config.num_kv_heads, self.size, self.rank)
                return (slice(heads.start * config.head_dim, heads.stop * config.head_dim),)
            case [_, "gate_proj" | "up_proj", _]:
                return (self._rows(shape[0]),)
            case [_, "o_proj" | "down_proj", "weight"]:
                return (slice(None), self._rows(shape[1]))
            case [_, "o_proj" | "down_proj", "bias"]:
                return () if self.rank == 0 else None
            case _:
                return (self.vocab_rows(config),) if name == "lm_head.weight" else ()

    def vocab_rows(self, config: ModelConfig) -> slice:
        """Rows of the LM head: equally many on each rank but the last ones, which may have fewer."""
        num_rows = -(-config.vocab_size // self.size)
        start = min(self.rank * num_rows, config.vocab_size)
        return slice(start, min(start + num_rows, config.vocab_size))

    def _rows(self, num_rows: int) -> slice:
        return slice(num_rows * self.rank // self.size, num_rows * (self.rank + 1) // self.size)


WHOLE = Shard(rank=0, size=1)


def check_divides(config: ModelConfig, tp_size: int) -> None:
    """Raises StartupError when this model cannot be split over so many ranks."""
    for what, number, divides in (
        ("query heads", config.num_heads, config.num_heads % tp_size == 0),
        ("KV heads", config.num_kv_heads, heads_divide(config.num_kv_heads, tp_size)),
        ("feed-forward columns", config.intermediate_size, config.intermediate_size % tp_size == 0),
    ):
        if not divides:
            raise StartupError(
                f"--tensor-parallel-size {tp_size}: the model's {number} {what} do not divide by it"
            )


class _Work(Protocol):
    def wait(self) -> bool: ...


class _Group(Protocol):
    """The part of a torch process group that is used."""

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], options: AllgatherOptions, /
    ) -> _Work: ...

    def gather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], options: GatherOptions, /
    ) -> _Work: ...


class RankCollective:
    """What the ranks of one replica do together. Every rank makes the same calls in the same order.

    Sums are made in the order of ranks, on every rank alike, in float32: the same on every rank and in every
    run, and an element's sum depends on no other row.
    """

    def __init__(self, shard: Shard, rendezvous: Path, join_s: float) -> None:
        """Blocks until every rank has joined; raises RuntimeError when one has not after `join_s`.
        `rendezvous`: a file's path that all agree on, in a folder that exists; nobody needs it afterwards.
        Ranks meet on the loopback interface: they are processes of one host."""
        self.shard = shard
        self._group = _gloo(shard, rendezvous, join_s)
        self._options = AllgatherOptions()
        self._options.timeout = timedelta(seconds=join_s)
        self._all(torch.zeros(1))  # the first to be connected may not take the file from the others
        self._options.timeout = _FOREVER

    def sum(self, part: Tensor) -> Tensor:
        """The sum of every rank's ``part [...]``, in its dtype."""
        first, *others = self._all(part)
        total = first.float()
        for other in others:
            total += other
        return total.to(part.dtype)

    def gather_columns(self, part: Tensor, num_columns: int) -> Tensor | None:
        """On rank 0 ``part [N, C]`` of every rank side by side, ``[N, num_columns]``; None on the others.

        The last ranks may have fewer columns than the first one.
        """
        widest = -(-num_columns // self.shard.size)
        padded = torch.nn.functional.pad(part, (0, widest - part.shape[1]))
        parts = [torch.empty_like(padded) for _ in range(self.shard.size)] if self.shard.rank == 0 else []
        options = GatherOptions()
        options.rootRank = 0
        options.timeout = _FOREVER
        self._group.gather([parts] if parts else [], [padded], options).wait()
        return torch.cat(parts, dim=1)[:, :num_columns] if parts else None

    def _all(self, part: Tensor) -> list[Tensor]:
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.shard.size)]
        self._group.allgather([parts], [part], self._options).wait()
        return parts


def _gloo(shard: Shard, rendezvous: Path, join_s: float) -> _Group:
    gloo: Any = ProcessGroupGloo  # torch's own stubs leave out what is used here
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=join_s)
    options._threads = 1  # one collective runs at a time
    group: _Group = gloo(FileStore(str(rendezvous), shard.size), shard.rank, shard.size, options)
    return group
