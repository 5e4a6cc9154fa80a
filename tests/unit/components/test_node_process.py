"""What a node does at start and at a weight update, without its processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pdserve.components.loaded_model import load_replacement
from pdserve.engine.model_config import ModelConfig
from pdserve.engine.model_paths import ModelPaths
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.errors import StartupError


def test_another_model_is_refused_before_its_tensors_are_read(tmp_path: Path) -> None:
    """It may be larger than the memory that is left; so here it has no tensors at all."""
    config = json.loads((SHIPPED_MODEL / "config.json").read_text())
    config["num_hidden_layers"] += 74
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(SHIPPED_MODEL / "generation_config.json", tmp_path)
    with pytest.raises(StartupError, match="cannot replace the model that is served: its num_layers is 80"):
        load_replacement(ModelPaths(tmp_path), ModelConfig.from_dir(SHIPPED_MODEL), "float32")
