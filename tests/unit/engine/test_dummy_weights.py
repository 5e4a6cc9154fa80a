"""Random weights in place of a checkpoint's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from pdserve.engine.device import HOST
from pdserve.engine.dummy_weights import dummy_weights
from pdserve.engine.model_weights import load_weights
from pdserve.engine.tensor_parallel import Shard
from pdserve.models.config import ModelConfig
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.weights.loaded import dummy_model

CPU = torch.device("cpu")
CONFIG = ModelConfig.from_dir(SHIPPED_MODEL)


def test_they_have_the_shapes_of_the_checkpoints() -> None:
    real = load_weights(SHIPPED_MODEL, CONFIG, torch.float32, CPU)
    dummy = dummy_weights(CONFIG, torch.float32, CPU)
    for field in dataclasses.fields(real.layers[0]):
        ours, theirs = vars_of(dummy)[field.name], vars_of(real)[field.name]
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert ours.shape == theirs.shape
            assert bool(ours.isfinite().all())
    assert dummy.embed_tokens.shape == real.embed_tokens.shape


def vars_of(weights: object) -> dict[str, torch.Tensor | None]:
    layer = weights.layers[0]  # type: ignore[attr-defined]
    return {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}


def test_a_rank_has_its_share_of_what_the_whole_has() -> None:
    whole = dummy_weights(CONFIG, torch.float32, CPU)
    share = dummy_weights(CONFIG, torch.float32, CPU, Shard(1, 2))
    half = whole.layers[0].down.shape[1] // 2
    assert torch.equal(share.layers[0].down, whole.layers[0].down[:, half:])


def test_every_node_makes_the_same_and_knows_them_by_the_config(tmp_path: Path) -> None:
    one, other = (dummy_model(tmp_path, CONFIG, "bfloat16", HOST) for _ in range(2))
    assert one.fingerprint == other.fingerprint
    assert torch.equal(one.weights.layers[1].qkv, other.weights.layers[1].qkv)
    longer = dataclasses.replace(CONFIG, max_model_len=CONFIG.max_model_len + 1)
    assert dummy_model(tmp_path, longer, "bfloat16", HOST).fingerprint != one.fingerprint
