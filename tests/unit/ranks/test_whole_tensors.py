"""Every tensor is put together from its parts, once and where they belong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pdserve.engine.model_weights import Weights, load_weights
from pdserve.engine.tensor_parallel import Shard
from pdserve.engine.weight_file import without_memory
from pdserve.messages.ranks import RankDone
from pdserve.messages.weights import TensorSpec
from pdserve.models.config import ModelConfig
from pdserve.ranks.group import RankCall
from pdserve.ranks.whole_tensors import gather_tensors, mapped_tensors, write_parts
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.errors import StartupError
from pdserve.weights.staged import staged_file

CONFIG = ModelConfig.from_dir(SHIPPED_MODEL)
Q, DOWN, NORM = (
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.norm.weight",
)
PLENTY = 1 << 40


def load(rank: int, size: int) -> Weights:
    return load_weights(SHIPPED_MODEL, CONFIG, torch.float32, torch.device("cpu"), Shard(rank, size))


def original() -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_file(SHIPPED_MODEL / "model.safetensors").items()}


class OtherRanks:
    """Ranks 1 to `size` - 1, at work in this process."""

    def __init__(self, size: int, error: str = "") -> None:
        self.size = size
        self.error = error
        self.files: list[dict[str, tuple[int, ...]]] = []  # that were to be filled

    def fill_tensors(self, file: Path) -> RankCall:
        self.files.append({name: tuple(tensor.shape) for name, tensor in mapped_tensors(file).items()})
        call = RankCall(f"TP rank {rank}" for rank in range(1, self.size))
        for rank in range(1, self.size):
            write_parts(file, load(rank, self.size), CONFIG, Shard(rank, self.size))
            call.take(f"TP rank {rank}", RankDone(call_id=0, error=self.error))
        return call


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_tensors_are_whole(size: int) -> None:
    others = OtherRanks(size) if size > 1 else None
    found = gather_tensors(load(0, size), CONFIG, Shard(0, size), others, lambda: PLENTY)()
    expected = original()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_heads_that_lie_on_several_ranks_are_written_by_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the others hold wrong copies."""
    size = 2 * CONFIG.num_kv_heads
    weights = load(0, size)
    others = OtherRanks(size)
    holds_copies = {rank for rank in range(size) if rank % 2}

    def spoiled(rank: int, size: int) -> Weights:
        weights = load_weights(SHIPPED_MODEL, CONFIG, torch.float32, torch.device("cpu"), Shard(rank, size))
        head = CONFIG.head_dim
        for layer in weights.layers if rank in holds_copies else ():
            layer.qkv[-2 * head :] = torch.nan  # key and value
        weights.norm[:] = torch.nan
        return weights

    monkeypatch.setitem(globals(), "load", spoiled)
    found = gather_tensors(weights, CONFIG, Shard(0, size), others, lambda: PLENTY)()
    for name, tensor in original().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", [Q, DOWN])
@pytest.mark.parametrize("num_rows", [1, 40, 10_000])
def test_the_first_rows_of_a_split_tensor_take_no_more_than_they_are(name: str, num_rows: int) -> None:
    others = OtherRanks(2)
    head = gather_tensors(load(0, 2), CONFIG, Shard(0, 2), others, lambda: PLENTY, head=(name, num_rows))()
    expected = original()[name][:num_rows]
    assert others.files == [{name: tuple(expected.shape)}]
    assert torch.equal(head[name], expected)


def test_what_every_rank_has_is_asked_of_nobody() -> None:
    others = OtherRanks(2)
    head = gather_tensors(load(0, 2), CONFIG, Shard(0, 2), others, lambda: PLENTY, head=(NORM, 3))()
    assert torch.equal(head[NORM], original()[NORM])
    assert not others.files


def test_what_does_not_fit_is_not_begun() -> None:
    num_bytes = sum(tensor.nbytes for tensor in original().values())
    others = OtherRanks(2)
    weights = load(0, 2)

    def gather(available_bytes: int, spare_bytes: int) -> None:
        gather_tensors(
            weights, CONFIG, Shard(0, 2), others, lambda: available_bytes, spare_bytes=spare_bytes
        )()

    with pytest.raises(StartupError, match=r"takes \d+ MiB: this host has \d+ MiB left"):
        gather(num_bytes - 1, 0)
    with pytest.raises(StartupError, match=r"and 1 MiB beside it: this host has"):
        gather(num_bytes + 5, 6)
    assert not others.files
    gather(num_bytes, 0)
    gather(2 * num_bytes, 1 << 50)  # no more than once more is needed beside them
    assert len(others.files) == 2


def test_what_cannot_be_is_told() -> None:
    shard = Shard(0, 2)
    weights = load(0, 2)
    with pytest.raises(StartupError, match="TP rank 1: no room"):
        gather_tensors(weights, CONFIG, shard, OtherRanks(2, "no room"), lambda: PLENTY)()
    with pytest.raises(StartupError, match=r"has no tensor 'model\.other'"):
        gather_tensors(weights, CONFIG, shard, None, lambda: PLENTY, head=("model.other", 1))()
    with pytest.raises(StartupError, match="is released"):
        gather_tensors(without_memory(weights), CONFIG, shard, OtherRanks(2), lambda: PLENTY)()
    with pytest.raises(StartupError, match="cannot be opened"):
        write_parts(Path("/proc/self/fd/99999"), weights, CONFIG, shard)


def test_an_lm_head_of_its_own_is_whole() -> None:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    lm_head = torch.randn(config.vocab_size, config.hidden_size)
    with staged_file() as file:
        file.lay_out([TensorSpec("lm_head.weight", "float32", tuple(lm_head.shape))])
    for rank in range(3):
        shard = Shard(rank, 3)
        weights = dataclasses.replace(load(0, 1), lm_head=lm_head[shard.vocab_rows(config)])
        write_parts(file.path, weights, config, shard)
    assert torch.equal(mapped_tensors(file.path)["lm_head.weight"], lm_head)
    file.close()
