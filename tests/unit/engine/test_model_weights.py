from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdserve.engine.model_weights import (
    FINGERPRINT_FILE,
    Weights,
    fingerprint_of,
    load_weights,
    weights_digest,
)
from pdserve.models.config import ModelConfig
from pdserve.runtime.errors import StartupError

CPU = torch.device("cpu")
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(folder, ModelConfig.from_dir(folder), dtype, CPU)


def digest(folder: Path) -> str:
    return weights_digest(folder, ModelConfig.from_dir(folder))


@pytest.fixture
def altered(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``altered(name=tensor)``: a copy of a checkpoint with tensors replaced, or removed by None."""

    def copy(model: str = "llama", changes: dict[str, torch.Tensor | None] | None = None) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(checkpoint(model), folder)
        tensors = {**load_file(folder / "model.safetensors"), **(changes or {})}
        save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
        return folder

    return copy


def test_parts_are_fused_in_order(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen2")
    raw = load_file(folder / "model.safetensors")
    weights = load(folder, torch.float16)
    prefix = "model.layers.2."
    qkv = [raw[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"]
    biases = [raw[f"{prefix}self_attn.{part}_proj.bias"] for part in "qkv"]
    gate_up = [raw[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up")]
    layer = weights.layers[2]
    assert torch.equal(layer.qkv, torch.cat(qkv).half())
    assert layer.qkv_bias is not None
    assert torch.equal(layer.qkv_bias, torch.cat(biases).half())
    assert torch.equal(layer.gate_up, torch.cat(gate_up).half())
    assert layer.o_bias is layer.q_norm is None
    assert weights.lm_head.data_ptr() == weights.embed_tokens.data_ptr()
    assert weights.lm_head.shape == weights.embed_tokens.shape
    assert weights.dtype == torch.float16


def test_missing_tensor(altered: Callable[..., Path]) -> None:
    with pytest.raises(StartupError, match=f"{K_PROJ} is missing"):
        load(altered(changes={K_PROJ: None}))


def test_unexpected_tensors(altered: Callable[..., Path]) -> None:
    extra = {f"model.layers.{layer}.self_attn.q_norm.weight": torch.ones(16) for layer in range(3)}
    with pytest.raises(StartupError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight and 2 more are not"):
        load(altered(changes=extra))


def test_misshapen_tensor(altered: Callable[..., Path]) -> None:
    with pytest.raises(StartupError, match=rf"{K_PROJ} has shape \[31, 96\].*\[32, 96\]"):
        load(altered(changes={K_PROJ: torch.ones(31, 96)}))


def test_quantized_tensors_are_not_taken_for_numbers(altered: Callable[..., Path]) -> None:
    with pytest.raises(StartupError, match=f"{K_PROJ} is of type I8; F32, BF16, F16, F64 are read"):
        load(altered(changes={K_PROJ: torch.ones(32, 96, dtype=torch.int8)}))


def test_harmless_tensors_are_passed_over(altered: Callable[..., Path]) -> None:
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    load(altered("qwen2", {**frequencies, "lm_head.weight": torch.ones(416, 84)}))


def test_no_weights(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copy(checkpoint("llama") / "config.json", tmp_path)
    with pytest.raises(StartupError, match=r"neither model\.safetensors nor"):
        load(tmp_path)


@pytest.mark.parametrize("index", ["{}", "[", '{"weight_map": [1]}'])
def test_bad_index(checkpoint: Callable[..., Path], tmp_path: Path, index: str) -> None:
    shutil.copy(checkpoint("llama") / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(StartupError, match="weight_map"):
        load(tmp_path)


def test_an_index_that_cannot_be_read(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Of a weight update, any other error would end the node."""
    shutil.copy(checkpoint("llama") / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").mkdir()
    with pytest.raises(StartupError, match="weight_map"):
        load(tmp_path)


def test_a_shard_that_is_not_there_or_cut_short(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint("mistral", shards=3), folder)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(StartupError, match="model-00002-of-00003"):
        load(folder)
    shard.unlink()
    with pytest.raises(StartupError, match="model-00002-of-00003"):
        load(folder)


def test_digest_is_of_config_and_contents(
    checkpoint: Callable[..., Path], altered: Callable[..., Path]
) -> None:
    folder = checkpoint("llama")
    assert digest(folder) == digest(folder)
    assert digest(checkpoint("llama", shards=2)) == digest(folder)
    assert digest(checkpoint("llama", config_style=4)) == digest(folder)
    others = [
        checkpoint("llama", seed=1),
        checkpoint("llama", dtype="bfloat16"),
        checkpoint("llama", overrides={"rms_norm_eps": 1e-5}),
        altered(changes={K_PROJ: load_file(folder / "model.safetensors")[K_PROJ] * 1.001}),
    ]
    assert len({digest(other) for other in (folder, *others)}) == 1 + len(others)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_told(
    checkpoint: Callable[..., Path],
    altered: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    value: float,
) -> None:
    """They are served all the same: which tensors, and how many, is for an operator to judge."""
    tensor = load_file(checkpoint("llama") / "model.safetensors")[K_PROJ].clone()
    tensor[0, 0] = value
    load(checkpoint("llama"))
    assert "NaN" not in caplog.text
    load(altered(changes={K_PROJ: tensor}))
    assert "tensors hold NaN or infinity" in caplog.text
    assert K_PROJ in caplog.text


def test_a_fingerprint_file_that_nests_too_deeply_is_no_fingerprint(altered: Callable[..., Path]) -> None:
    folder = altered()
    (folder / FINGERPRINT_FILE).write_text("[" * 100_000)
    config = ModelConfig.from_dir(folder)
    assert fingerprint_of(folder, config, "float32") == weights_digest(folder, config)
