"""What a node does at start and at a weight update, without its processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pdserve.engine.device import HOST
from pdserve.models.config import ModelConfig, kv_layout
from pdserve.models.paths import ModelPaths
from pdserve.node import start
from pdserve.runtime.command_line import node_config
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.errors import StartupError
from pdserve.weights.loaded import load_replacement


@pytest.mark.parametrize(
    ("free_contexts", "expected"),
    [(400.0, 32.0), (40.0, 10.0), (3.0, 1.0), (1.0, 0.5)],  # of memory beside the weights, of the pool
)
def test_f4_the_default_pool_holds_a_context_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, free_contexts: float, expected: float
) -> None:
    model = ModelConfig.from_dir(SHIPPED_MODEL)
    layout = kv_layout(model, 16, "float32")
    num_context = layout.pages_for(512)
    free_bytes = int(free_contexts * num_context * layout.stride_bytes)
    monkeypatch.setattr(start, "_weight_bytes", lambda *_: 0)
    monkeypatch.setattr(start, "available_memory_bytes", lambda: free_bytes)
    config = node_config("decode", {})
    assert start._num_pages(config, model, layout, 512) == int(expected * num_context)


def test_f4_the_weights_need_room_beside_the_pool() -> None:
    tensors = load_file(SHIPPED_MODEL / "model.safetensors")
    num_values = sum(tensor.numel() for tensor in tensors.values())
    assert start._weight_bytes(ModelConfig.from_dir(SHIPPED_MODEL), "float32") == 4 * num_values


def test_another_model_is_refused_before_its_tensors_are_read(tmp_path: Path) -> None:
    """It may be larger than the memory that is left; so here it has no tensors at all."""
    config = json.loads((SHIPPED_MODEL / "config.json").read_text())
    config["num_hidden_layers"] += 74
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(SHIPPED_MODEL / "generation_config.json", tmp_path)
    with pytest.raises(StartupError, match="cannot replace the model that is served: its num_layers is 80"):
        load_replacement(ModelPaths(tmp_path), ModelConfig.from_dir(SHIPPED_MODEL), "float32", HOST)
