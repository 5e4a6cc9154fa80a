"""The model that a node serves, on all of its ranks: read, checked, exchanged, and given back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import assert_never

import msgspec
from torch import Tensor

from ..engine.device import DeviceRuntime
from ..engine.model_runner import ModelRunner
from ..engine.model_weights import tensor_shapes
from ..engine.named_weights import merge_checksums, part_checksums, whole_checksum
from ..engine.tensor_parallel import Shard
from ..engine.weight_file import require_memory
from ..messages.memory_region import MemoryRegion
from ..messages.peer import PeerIdentity
from ..messages.ranks import RankChecked
from ..messages.weights import MemoryTag
from ..models.paths import ModelPaths
from ..ranks.group import RankGroup, alongside
from ..ranks.memory import RankMemory, move_together
from ..ranks.whole_tensors import gather_tensors
from ..runtime.process import (
    available_memory_bytes,
    return_free_memory,
)
from ..weights.images import WeightImage
from ..weights.loaded import LoadedModel, load_replacement, updated_model
from ..weights.saved import save_model, upload_model
from ..weights.updater import LoadFolder, LoadOrder, LoadServed, LoadTensors, Prepared, Sums, TensorHead
from .memory_occupation import Announced
from .status import NodeStatus, announce


class ServedModel:
    """A WeightStore and a MemoryPort. `model` is this rank's, `identity` what peers shake hands with."""

    def __init__(
        self,
        model: LoadedModel,
        identity: PeerIdentity,
        *,
        paths: ModelPaths,
        dtype: str,
        runtime: DeviceRuntime,
        shard: Shard,
        runner: ModelRunner,
        rank_memory: RankMemory,
        ranks: RankGroup | None,
        status: NodeStatus,
    ) -> None:
        """`paths`: at the start. `rank_memory`: this rank's; `ranks`: the further ones."""
        self.model = model
        self.identity = identity
        self._paths = paths
        self._dtype = dtype
        self._runtime = runtime
        self._shard = shard
        self._runner = runner
        self._rank_memory = rank_memory
        self._ranks = ranks
        self._status = status

    @property
    def regions(self) -> tuple[MemoryRegion, ...]:
        """The pool of each rank, as it was registered last."""
        return (self._rank_memory.region, *(() if self._ranks is None else self._ranks.regions))

    # ---- the jobs that weights/updater.py asks for ----

    def load(self, order: LoadOrder) -> Callable[[], LoadedModel]:
        """Weights that can serve instead of the current ones, on every rank."""
        model = self.model
        others = None if self._ranks is None else self._ranks.load_shards(order)

        def own() -> LoadedModel:
            require_memory(model.weights)
            return self._load_share(order, model)

        return lambda: alongside(others, own)[0]

    def drop(self) -> None:
        if self._ranks is not None:
            self._ranks.drop_shards()

    def check(self) -> Callable[[], Sums]:
        model = self.model
        others = None if self._ranks is None else self._ranks.check_shards()

        def own() -> dict[str, int]:
            require_memory(model.weights)
            return part_checksums(model.weights, model.config, self._shard)

        def job() -> Sums:
            sums, answers = alongside(others, own)
            of_others = [answer.sums for answer in answers if isinstance(answer, RankChecked)]
            tensors = merge_checksums(
                [sums, *({name: int(x, 16) for name, x in other.items()} for other in of_others)]
            )
            return Sums(tensors, whole_checksum(tensors))

        return job

    def head(self, name: str, num_rows: int) -> Callable[[], TensorHead]:
        model = self.model
        gather = self._gather(head=(name, num_rows))

        def job() -> TensorHead:
            rows = gather()[name][:num_rows]
            shape = tensor_shapes(model.config)[name]
            return TensorHead(str(rows.dtype).removeprefix("torch."), shape, rows.float().tolist())

        return job

    def save(self, target: str, *, is_remote: bool, max_shard_bytes: int) -> Callable[[], None]:
        model = self.model
        gather = self._gather(spare_bytes=max_shard_bytes)  # a file's tensors are copied on their way out

        def job() -> None:
            if is_remote:
                upload_model(model, gather(), target, max_shard_bytes)
            else:
                save_model(model, gather(), Path(target), max_shard_bytes)

        return job

    def image(self) -> Callable[[], WeightImage]:
        """A job, for others to read the weights that serve now. It raises StartupError."""
        update_id, fingerprint, gather = self.identity.update_id, self.model.fingerprint, self._gather()
        return lambda: WeightImage(gather(), update_id, fingerprint)

    def served_update(self) -> str:
        """Its id, the same as long as the same weights serve."""
        return self.identity.update_id

    def _gather(
        self, *, spare_bytes: int = 0, head: tuple[str, int] | None = None
    ) -> Callable[[], Mapping[str, Tensor]]:
        return gather_tensors(
            self.model.weights,
            self.model.config,
            self._shard,
            self._ranks,
            available_memory_bytes,
            spare_bytes=spare_bytes,
            head=head,
        )

    def _load_share(self, order: LoadOrder, model: LoadedModel) -> LoadedModel:
        match order:
            case LoadFolder(path):
                paths = self._paths.with_model(path)
                return load_replacement(paths, model.config, self._dtype, self._runtime, self._shard)
            case LoadTensors(file, source, fingerprint):
                return updated_model(file, model, source, self._shard, fingerprint)
            case LoadServed():
                return model
            case _:
                assert_never(order)

    def swap(self, prepared: Prepared[LoadedModel]) -> PeerIdentity:
        """Serve with these weights from the next forward on; returns the identity to shake hands with."""
        model, weight_version = prepared.checkpoint, prepared.weight_version
        self.model = model
        self._runner.swap_weights(model.weights)
        if self._ranks is not None:
            self._ranks.swap_shards()
        self._status.renew(str(model.path), model.fingerprint, weight_version, prepared.update_id)
        self.identity = msgspec.structs.replace(
            self.identity,
            model_fingerprint=model.fingerprint,
            weight_version=weight_version,
            update_id=prepared.update_id,
        )
        return self._status.shown(self.identity)

    # ---- memory, see node/memory_occupation.py ----

    def move(self, before: frozenset[MemoryTag], after: frozenset[MemoryTag]) -> Callable[[], None]:
        return move_together(self._move, self._ranks, before, after)

    def announce(self, *, is_released: bool) -> Announced:
        self.identity = announce(self._status, self.identity, is_released=is_released)
        self._status.set_regions(self.regions)
        return Announced(self._status.shown(self.identity), self.regions)

    def _move(self, released: frozenset[MemoryTag]) -> None:
        """Nothing runs, so nobody reads the weights."""
        weights = self._rank_memory.move(released, self.model.weights)
        self.model = replace(self.model, weights=weights)
        self._runner.swap_weights(weights)
        del weights
        return_free_memory()
