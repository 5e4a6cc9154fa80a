"""Saved weights are a checkpoint: the same bits, the same fingerprint, loadable by us and by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pdserve.engine.device import HOST
from pdserve.engine.model_weights import FINGERPRINT_FILE, weights_digest
from pdserve.engine.named_weights import named_parts
from pdserve.engine.tensor_parallel import WHOLE
from pdserve.models.config import ModelConfig
from pdserve.models.paths import ModelPaths
from pdserve.runtime.errors import StartupError
from pdserve.weights.loaded import LoadedModel, load_model, load_replacement, updated_model
from pdserve.weights.saved import save_model, upload_model

GIB = 1 << 30


def load(folder: Path, dtype: str = "float32") -> LoadedModel:
    return load_model(folder, ModelConfig.from_dir(folder), dtype, HOST)


def tensors_of(model: LoadedModel) -> dict[str, Tensor]:
    return {name: part.data for name, part in named_parts(model.weights, model.config, WHOLE).items()}


def assert_same_bits(one: LoadedModel, other: LoadedModel) -> None:
    ours, theirs = (named_parts(model.weights, model.config, WHOLE) for model in (one, other))
    assert ours.keys() == theirs.keys()
    for name, part in ours.items():
        assert torch.equal(part.data, theirs[name].data), name


@pytest.mark.parametrize("max_shard_bytes", [GIB, 20_000])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_loaded_back_as_the_same_model(
    checkpoint: Callable[..., Path], tmp_path: Path, tied: bool, max_shard_bytes: int
) -> None:
    source = checkpoint("qwen3", overrides={"tie_word_embeddings": tied})
    model = load(source)
    folder = tmp_path / "saved" / "here"
    save_model(model, tensors_of(model), folder, max_shard_bytes)
    again = load(folder)
    assert_same_bits(model, again)
    assert again.fingerprint == model.fingerprint
    assert (max_shard_bytes == GIB) == (folder / "model.safetensors").exists()
    if max_shard_bytes < GIB:
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert len(set(index.values())) > 2
    assert {file.name for file in source.iterdir()} - {file.name for file in folder.iterdir()} <= {
        "model.safetensors"
    }
    assert list(folder.parent.iterdir()) == [folder]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_input_embeddings()
    assert isinstance(reference, torch.nn.Embedding)
    embedding = named_parts(model.weights, model.config, WHOLE)["model.embed_tokens.weight"].data
    assert torch.equal(reference.weight.detach(), embedding)


def test_a_partly_updated_model_keeps_the_fingerprint_that_it_serves_under(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = load(checkpoint("llama"))
    update = tmp_path / "update.safetensors"
    save_file({"model.norm.weight": torch.full_like(base.weights.norm, 0.5)}, update)
    model = updated_model(update, base, "a test")
    save_model(model, tensors_of(model), tmp_path / "saved", GIB)
    again = load(tmp_path / "saved")
    assert again.fingerprint == model.fingerprint != base.fingerprint
    assert_same_bits(model, again)
    replacement = load_replacement(ModelPaths(tmp_path / "saved"), base.config, "float32", HOST)
    assert replacement.fingerprint == model.fingerprint


def test_converted_weights_are_the_same_model_in_that_type_only(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = load(checkpoint("llama"), "bfloat16")
    save_model(model, tensors_of(model), tmp_path / "saved", GIB)
    folder = tmp_path / "saved"
    assert ModelConfig.from_dir(folder).dtype == "bfloat16"
    assert load(folder, "bfloat16").fingerprint == model.fingerprint
    rounded = load(folder, "float32")
    assert rounded.fingerprint == weights_digest(folder, rounded.config) != model.fingerprint


def test_saved_weights_that_were_changed_are_another_model(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = load(checkpoint("llama"))
    folder = tmp_path / "saved"
    save_model(model, tensors_of(model), folder, GIB)
    tensors = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    tensors["model.norm.weight"] += 1.0
    save_file(tensors, folder / "model.safetensors")
    assert load(folder).fingerprint != model.fingerprint


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"digest": "x", "dtype": "float32"}'])
def test_a_fingerprint_file_that_says_nothing_is_passed_over(
    checkpoint: Callable[..., Path], tmp_path: Path, content: str
) -> None:
    model = load(checkpoint("llama"))
    save_model(model, tensors_of(model), tmp_path / "saved", GIB)
    (tmp_path / "saved" / FINGERPRINT_FILE).write_text(content)
    again = load(tmp_path / "saved")
    assert again.fingerprint == weights_digest(tmp_path / "saved", again.config)


def test_a_failed_save_leaves_nothing(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = load(checkpoint("llama"))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    with pytest.raises(StartupError, match="not empty"):
        save_model(model, tensors_of(model), taken, GIB)
    (tmp_path / "plain").write_text("a file")
    with pytest.raises(StartupError, match="cannot be saved"):
        save_model(model, tensors_of(model), tmp_path / "plain" / "model", GIB)
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "plain"}
    assert (taken / "file").read_text() == "mine"


def test_an_upload_goes_where_the_url_says(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = load(checkpoint("llama"))
    url = f"file://{tmp_path}/bucket/model"
    upload_model(model, tensors_of(model), url, 20_000)
    again = load(tmp_path / "bucket" / "model")
    assert_same_bits(model, again)
    assert again.fingerprint == model.fingerprint
    with pytest.raises(StartupError, match="not empty"):
        upload_model(model, tensors_of(model), url, GIB)
    with pytest.raises(StartupError, match=r"nowhere://x cannot be written.*nowhere"):
        upload_model(model, tensors_of(model), "nowhere://x", GIB)
