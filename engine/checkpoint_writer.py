"""The weights that serve, out to a folder that `--model` loads back as the same model."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..models.config import ModelConfig
from ..runtime.errors import StartupError
from .model_weights import FINGERPRINT_FILE, weights_digest

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth")


def write_checkpoint(
    folder: Path, source: Path, tensors: Mapping[str, Tensor], fingerprint: str, max_shard_bytes: int
) -> None:
    """Whole tensors, all of one type, as safetensors under the names of a checkpoint, in files of
    `max_shard_bytes` where that can be, with the other files of the checkpoint `source` that they began with.
    The folder is there at the end, or nothing is. Raises StartupError.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StartupError(f"{folder} is there already and not empty: name a new folder")
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        unfinished.mkdir(parents=True)
        _copy_other_files(source, unfinished)
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        _write_config(source, unfinished, dtype)
        _write_tensors(unfinished, tensors, max_shard_bytes)
        # What was updated in part, or converted, has a fingerprint that its bytes do not tell.
        digest = weights_digest(unfinished, ModelConfig.from_dir(unfinished))
        known = {"fingerprint": fingerprint, "dtype": dtype, "digest": digest}
        (unfinished / FINGERPRINT_FILE).write_text(json.dumps(known))
        os.rename(unfinished, folder)  # replaces an empty one
    except (OSError, SafetensorError) as error:
        raise StartupError(f"the weights cannot be saved to {folder}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _copy_other_files(source: Path, folder: Path) -> None:
    """Tokenizer, chat template, generation config: what a checkpoint has beside its weights."""
    for file in source.iterdir():
        is_weights = any(file.match(pattern) for pattern in _WEIGHT_FILES)
        if file.is_file() and not is_weights and file.name != FINGERPRINT_FILE:
            shutil.copyfile(file, folder / file.name)


def _write_config(source: Path, folder: Path, dtype: str) -> None:
    """The same, with the type that the weights are in now, under the spelling that it has."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    config.update(dict.fromkeys(names, dtype))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    shards = list(_shards(tensors, max_shard_bytes))
    if len(shards) == 1:
        _save(folder / "model.safetensors", tensors, shards[0])
        return
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        _save(folder / file, tensors, names)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Mapping[str, Tensor], max_bytes: int) -> Iterator[list[str]]:
    """Names of tensors that one file holds: at least one, and no more than fit."""
    names: list[str] = []
    num_bytes = 0
    for name in sorted(tensors):
        if names and num_bytes + tensors[name].nbytes > max_bytes:
            yield names
            names, num_bytes = [], 0
        names.append(name)
        num_bytes += tensors[name].nbytes
    yield names


def _save(file: Path, tensors: Mapping[str, Tensor], names: list[str]) -> None:
    # Copies: several names are rows of one tensor, which a file must not share.
    save_file({name: tensors[name].clone() for name in names}, file, metadata={"format": "pt"})
