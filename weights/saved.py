"""Writes a model that is served as a checkpoint, on this host or where a URL says."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from fsspec.core import url_to_fs
from torch import Tensor

from ..engine.checkpoint_writer import write_checkpoint
from ..runtime.errors import StartupError
from .loaded import LoadedModel


def save_model(model: LoadedModel, tensors: Mapping[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    """Its whole tensors, into a new folder. Raises StartupError."""
    write_checkpoint(folder, model.path, tensors, model.fingerprint, max_shard_bytes)


def upload_model(model: LoadedModel, tensors: Mapping[str, Tensor], url: str, max_shard_bytes: int) -> None:
    """To where fsspec reaches by this URL: `s3://bucket/folder` where s3fs is installed, and so on. It is
    written on this host first. Raises StartupError."""
    try:
        files, path = url_to_fs(url)
    except (ValueError, ImportError) as error:  # an unknown scheme, or one whose package is not installed
        raise StartupError(f"{url} cannot be written: {error}") from error
    with tempfile.TemporaryDirectory(prefix="pdserve-save-") as scratch:
        folder = Path(scratch) / "model"
        save_model(model, tensors, folder, max_shard_bytes)
        try:
            if files.exists(path) and files.ls(path):
                raise StartupError(f"{url} is there already and not empty: name a new folder")
            files.makedirs(path, exist_ok=True)
            for file in sorted(folder.iterdir()):
                files.put_file(str(file), f"{path}/{file.name}")
        except (OSError, ValueError, NotImplementedError) as error:  # the last: one that only reads
            raise StartupError(f"{url} cannot be written: {error}") from error
