"""A rank's memory: away and back, bit for bit, or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pdserve.engine.model_weights import Weights, load_weights
from pdserve.engine.named_weights import part_checksums
from pdserve.engine.tensor_parallel import Shard
from pdserve.engine.weight_file import has_memory, save_weights
from pdserve.messages.memory_region import MemoryRegion
from pdserve.messages.ranks import RankDone
from pdserve.messages.weights import MemoryTag
from pdserve.models.config import ModelConfig
from pdserve.ranks import memory as rank_memory
from pdserve.ranks.group import RankCall
from pdserve.ranks.memory import RankMemory, move_together
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.errors import StartupError
from pdserve.transfer.backends.shm import ShmBackend

CONFIG = ModelConfig.from_dir(SHIPPED_MODEL)
SHARD = Shard(1, 2)
ALL: frozenset[MemoryTag] = frozenset({"weights", "kv_cache", "graphs"})
NONE: frozenset[MemoryTag] = frozenset()


class Backend(ShmBackend):
    """Registers its memory under another session each time, as NIXL does, unless it refuses."""

    refuses = False
    num_registered = 0

    def register(self) -> MemoryRegion:
        if self.refuses:
            raise StartupError("the limit of locked memory")
        self.num_registered += 1
        return MemoryRegion(
            session=f"s{self.num_registered}", address=0, num_bytes=8192, scratch_address=4096
        )


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend()
    backend.allocate(4096)[:] = b"\1" * 4096
    yield backend
    backend.close()


@pytest.fixture
def memory(backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RankMemory:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return RankMemory(backend, backend.register())


def load() -> Weights:
    return load_weights(SHIPPED_MODEL, CONFIG, torch.float32, torch.device("cpu"), SHARD)


def sums(weights: Weights) -> dict[str, int]:
    return part_checksums(weights, CONFIG, SHARD)


def test_everything_goes_and_comes_back_twice(memory: RankMemory) -> None:
    weights = load()
    expected = sums(weights)
    for number in (2, 3):
        away = memory.move(ALL, weights)
        assert not has_memory(away)
        assert not list(Path(tempfile.gettempdir()).iterdir()), "the file has no name"
        assert memory.move(ALL, away) is away, "it is so already"
        half = memory.move(frozenset({"weights"}), away)
        assert memory.region.session == f"s{number}"
        assert not has_memory(half)
        weights = memory.move(NONE, half)
        assert sums(weights) == expected
        assert memory.region.session == f"s{number}", "registered once"


def test_a_full_disk_changes_nothing(memory: RankMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(weights: Weights, path: Path) -> None:
        raise StartupError(f"weights cannot be kept in {path.parent}: no space left")

    monkeypatch.setattr(rank_memory, "save_weights", full)
    weights = load()
    expected = sums(weights)
    with pytest.raises(StartupError, match="no space left"):
        memory.move(ALL, weights)
    assert sums(weights) == expected
    monkeypatch.setattr(rank_memory, "save_weights", save_weights)
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    with pytest.raises(StartupError, match="cannot be kept in /proc"):
        memory.move(ALL, weights)
    monkeypatch.setattr(tempfile, "tempdir", None)
    back = memory.move(NONE, memory.move(ALL, weights))
    assert sums(back) == expected


def test_a_pool_that_cannot_be_registered_leaves_all_released(memory: RankMemory, backend: Backend) -> None:
    weights = load()
    expected = sums(weights)
    away = memory.move(ALL, weights)
    backend.refuses = True
    with pytest.raises(StartupError, match="locked memory"):
        memory.move(NONE, away)
    assert memory.region.session == "s1"
    backend.refuses = False
    assert sums(memory.move(NONE, away)) == expected
    assert memory.region.session == "s2"


def test_graphs_are_no_bytes(memory: RankMemory) -> None:
    weights = load()
    assert memory.move(frozenset({"graphs"}), weights) is weights
    assert memory.move(NONE, weights) is weights
    assert memory.region.session == "s1"


def test_weights_that_came_meanwhile_stay(memory: RankMemory) -> None:
    """An update that was prepared before may be committed while the old weights are away."""
    memory.move(ALL, load())
    fresh = load()
    assert memory.move(NONE, fresh) is fresh


# ---- all ranks of a node ----------------------------------------------------------------------------


class Node:
    """Rank 0 and one more. Each cannot do what `errors` says of it, by what would be released then."""

    def __init__(self) -> None:
        self.released = [NONE, NONE]
        self.errors: dict[tuple[int, frozenset[MemoryTag]], str] = {}

    def move_rank(self, rank: int, released: frozenset[MemoryTag]) -> None:
        if error := self.errors.get((rank, released)):
            raise StartupError(error)
        self.released[rank] = released

    def move_memory(self, released: frozenset[MemoryTag]) -> RankCall:
        call = RankCall(["TP rank 1"])
        try:
            self.move_rank(1, released)
            call.take("TP rank 1", RankDone(call_id=0))
        except StartupError as error:
            call.take("TP rank 1", RankDone(call_id=0, error=str(error)))
        return call

    def move(self, before: frozenset[MemoryTag], after: frozenset[MemoryTag]) -> None:
        move_together(lambda released: self.move_rank(0, released), self, before, after)()


@pytest.fixture
def node() -> Node:
    return Node()


def test_all_ranks_move(node: Node) -> None:
    node.move(NONE, ALL)
    assert node.released == [ALL, ALL]
    node.move(ALL, NONE)
    assert node.released == [NONE, NONE]
    alone: list[frozenset[MemoryTag]] = []
    move_together(alone.append, None, NONE, ALL)()
    assert alone == [ALL]


@pytest.mark.parametrize(("before", "after"), [(NONE, ALL), (ALL, NONE)])
@pytest.mark.parametrize(("rank", "reason"), [(0, "^disk full"), (1, "^TP rank 1: disk full")])
def test_where_one_cannot_all_are_as_they_were(
    node: Node, before: frozenset[MemoryTag], after: frozenset[MemoryTag], rank: int, reason: str
) -> None:
    node.released = [before, before]
    node.errors = {(rank, after): "disk full"}
    with pytest.raises(StartupError, match=reason):
        node.move(before, after)
    assert node.released == [before, before]


def test_a_node_that_cannot_have_all_of_its_memory_back_ends(node: Node) -> None:
    node.errors = {(1, ALL): "disk full", (0, NONE): "out of memory"}
    with pytest.raises(RuntimeError, match="a rank cannot have its memory back: out of memory"):
        node.move(NONE, ALL)
    node.released = [ALL, ALL]
    node.errors = {(1, NONE): "out of memory", (0, ALL): "disk full"}
    with pytest.raises(StartupError, match="TP rank 1: out of memory"):  # the node serves nothing, and lives
        node.move(ALL, NONE)
