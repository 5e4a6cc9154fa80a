"""Weights by name: views, replacements, and checksums that do not depend on the split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pdserve.engine.model_weights import Checkpoint, Weights, load_weights, read_update
from pdserve.engine.named_weights import (
    merge_checksums,
    named_parts,
    part_checksums,
    replace_tensors,
    whole_checksum,
)
from pdserve.engine.tensor_parallel import WHOLE, Shard
from pdserve.models.config import ModelConfig
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.errors import StartupError

CPU = torch.device("cpu")
CONFIG = ModelConfig.from_dir(SHIPPED_MODEL)
Q, K, DOWN = (
    f"model.layers.1.{part}.weight" for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
)
EMBEDDING = "model.embed_tokens.weight"


def load(shard: Shard = WHOLE) -> Weights:
    return load_weights(SHIPPED_MODEL, CONFIG, torch.float32, CPU, shard)


def original(name: str) -> Tensor:
    with Checkpoint(SHIPPED_MODEL) as checkpoint:
        return checkpoint.tensor(name).float()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_tensor_is_found_by_its_name(size: int) -> None:
    for rank in range(size):
        shard = Shard(rank, size)
        parts = named_parts(load(shard), CONFIG, shard)
        for name, named in parts.items():
            whole = original(name)
            assert named.shape == tuple(whole.shape)
            assert torch.equal(named.data, whole[named.part] if named.part else whole), name


@pytest.mark.parametrize("size", [1, 2])
def test_replaced_tensors_are_those_given_and_the_old_weights_stay(size: int) -> None:
    names = (Q, K, DOWN, EMBEDDING)
    given = {name: original(name) + 1 for name in names}
    for rank in range(size):
        shard = Shard(rank, size)
        old = load(shard)
        before = part_checksums(old, CONFIG, shard)
        new = replace_tensors(old, given, CONFIG, shard, "a test")
        assert part_checksums(old, CONFIG, shard) == before
        for name, named in named_parts(new, CONFIG, shard).items():
            whole = original(name) + (1 if name in names else 0)
            assert torch.equal(named.data, whole[named.part] if named.part else whole), name
        assert new.layers[2].qkv is old.layers[2].qkv, "what is not replaced is not copied"
        rows = shard.vocab_rows(CONFIG)
        assert torch.equal(new.lm_head, new.embed_tokens[rows]), "tied"


@pytest.mark.parametrize("rank", [0, 1])
def test_tensors_that_hold_nan_are_told_with_their_source(
    rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    given = {name: original(name) for name in (Q, DOWN)}
    shard = Shard(rank, 2)
    replace_tensors(load(shard), given, CONFIG, shard, "an update over the group 'rl'")
    assert "NaN" not in caplog.text
    given[DOWN][:] = float("nan")
    replace_tensors(load(shard), given, CONFIG, shard, "an update over the group 'rl'")
    assert "an update over the group 'rl': 1 of 2 tensors hold NaN or infinity" in caplog.text
    assert DOWN in caplog.text
    assert Q not in caplog.text


def checksums(size: int, given: dict[str, Tensor] | None = None) -> dict[str, str]:
    of_ranks = []
    for rank in range(size):
        shard = Shard(rank, size)
        weights = replace_tensors(load(shard), given or {}, CONFIG, shard, "a test")
        of_ranks.append(part_checksums(weights, CONFIG, shard))
    return merge_checksums(of_ranks)


def test_checksums_are_the_same_for_any_number_of_ranks() -> None:
    alone = checksums(1)
    assert checksums(2) == alone
    assert checksums(4) == alone  # more ranks than KV heads: each head lies on several
    assert len(set(alone.values())) > len(alone) // 2


def test_one_bit_or_two_swapped_elements_change_one_checksum_and_the_whole() -> None:
    alone = checksums(1)
    flipped = original(DOWN)
    flipped.view(torch.int32)[3, 5] ^= 1
    swapped = original(Q)
    swapped[[0, 1]] = swapped[[1, 0]]
    for name, tensor in ((DOWN, flipped), (Q, swapped)):
        changed = checksums(2, {name: tensor})
        assert {other for other in alone if alone[other] != changed[other]} == {name}
        assert whole_checksum(changed) != whole_checksum(alone)


def update_file(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    file = tmp_path / "update.safetensors"
    save_file(tensors, file)
    return file


def test_an_update_may_hold_some_tensors_and_a_copy_of_a_tied_head(tmp_path: Path) -> None:
    given = {Q: original(Q), "lm_head.weight": original(EMBEDDING)}
    read = read_update(update_file(tmp_path, given), CONFIG)
    assert list(read) == [Q]
    assert torch.equal(read[Q], given[Q])


def test_what_is_wrong_in_an_update_is_named(tmp_path: Path) -> None:
    given = {
        "model.layers.99.mlp.up_proj.weight": torch.zeros(1),
        K: torch.zeros(3, 4),
        DOWN: torch.zeros(original(DOWN).shape, dtype=torch.int8),
        Q: original(Q),
    }
    with pytest.raises(StartupError) as error:
        read_update(update_file(tmp_path, given), CONFIG)
    message = str(error.value)
    assert "model.layers.99.mlp.up_proj.weight is no tensor of this" in message
    assert f"{K} has shape [3, 4], not {list(original(K).shape)}" in message
    assert f"{DOWN} is of type I8" in message
    assert Q not in message


def test_an_update_without_tensors_or_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no tensor of the model"):
        read_update(update_file(tmp_path, {"lm_head.weight": original(EMBEDDING)}), CONFIG)
    broken = tmp_path / "broken"
    broken.write_bytes(b"pickle")
    with pytest.raises(StartupError, match="cannot be read"):
        read_update(broken, CONFIG)
