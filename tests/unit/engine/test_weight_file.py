"""Weights out to a file and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pdserve.engine.model_weights import load_weights
from pdserve.engine.named_weights import part_checksums
from pdserve.engine.tensor_parallel import WHOLE
from pdserve.engine.weight_file import read_weights, save_weights, without_memory
from pdserve.models.config import ModelConfig
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.errors import StartupError

CONFIG = ModelConfig.from_dir(SHIPPED_MODEL)


def test_every_bit_comes_back_and_tied_weights_stay_tied(tmp_path: Path) -> None:
    weights = load_weights(SHIPPED_MODEL, CONFIG, torch.float32, torch.device("cpu"))
    file = tmp_path / "weights"
    save_weights(weights, file)
    shell = without_memory(weights)
    assert shell.embed_tokens.is_meta
    assert all(layer.qkv.is_meta and layer.down.is_meta for layer in shell.layers)
    back = read_weights(file, shell)
    assert part_checksums(back, CONFIG, WHOLE) == part_checksums(weights, CONFIG, WHOLE)
    assert back.lm_head.data_ptr() == back.embed_tokens.data_ptr()


def test_a_file_that_cannot_be_written_or_read_is_told(tmp_path: Path) -> None:
    weights = load_weights(SHIPPED_MODEL, CONFIG, torch.float32, torch.device("cpu"))
    with pytest.raises(StartupError, match="cannot be kept"):
        save_weights(weights, tmp_path / "no" / "folder")
    with pytest.raises(StartupError, match="cannot be read"):
        read_weights(tmp_path / "none", weights)
