from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer

from pdserve.engine.model_weights import tensor_shapes
from pdserve.models.config import ModelConfig

SCRIPT = Path(__file__).parents[3] / "scripts" / "tools" / "make_checkpoint.py"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.process
def test_the_command_writes_the_same_bytes_every_time(
    tmp_path: Path, checkpoint: Callable[..., Path]
) -> None:
    arguments = [
        "qwen3",
        str(tmp_path / "made"),
        "--seed",
        "3",
        "--shards",
        "2",
        "--set",
        "eos_token_id=[1, 2]",
    ]
    subprocess.run([sys.executable, str(SCRIPT), *arguments], check=True)
    same = checkpoint("qwen3", seed=3, shards=2, overrides={"eos_token_id": [1, 2]})
    assert contents(tmp_path / "made") == contents(same)
    assert ModelConfig.from_dir(same).eos_token_ids == (1, 2)


@pytest.mark.parametrize("model", ["llama", "mistral", "qwen2", "qwen3"])
def test_both_spellings_mean_the_same(checkpoint: Callable[..., Path], model: str) -> None:
    old, new = checkpoint(model, config_style=4), checkpoint(model)
    assert "rope_theta" in json.loads((old / "config.json").read_text())
    assert "rope_parameters" in json.loads((new / "config.json").read_text())
    assert ModelConfig.from_dir(old) == ModelConfig.from_dir(new)


def test_the_tokenizer_takes_any_text_and_fits_every_vocabulary(
    checkpoint: Callable[..., Path], checkpoint_script: ModuleType
) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint("llama") / "tokenizer.json"))
    text = "def main():\n\treturn 'Grüße, 你好 🙂'"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("<|im_end|>").ids == [2]
    smallest = min(model["vocab_size"] for model in checkpoint_script.MODELS.values())
    assert tokenizer.get_vocab_size() <= smallest


def test_the_measured_shapes_have_the_stated_sizes(checkpoint_script: ModuleType, tmp_path: Path) -> None:
    for model, millions in (("small-llama", 153), ("mid-qwen3", 596)):
        values = {**checkpoint_script.COMMON, **checkpoint_script.MODELS[model]}
        (tmp_path / "config.json").write_text(json.dumps(values))
        shapes = tensor_shapes(ModelConfig.from_dir(tmp_path))
        assert round(sum(prod(shape) for shape in shapes.values()) / 1e6) == millions
