"""Weights that could serve: read from a checkpoint, or made of those that serve and some new tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..engine.device import DeviceRuntime
from ..engine.dummy_weights import dummy_fingerprint, dummy_weights
from ..engine.kv_pool import TORCH_DTYPES
from ..engine.model_weights import (
    Weights,
    fingerprint_of,
    load_weights,
    read_update,
    tensor_shapes,
    weights_digest,
)
from ..engine.named_weights import replace_tensors
from ..engine.tensor_parallel import WHOLE, Shard
from ..models.config import ModelConfig
from ..models.paths import ModelPaths
from ..runtime.errors import StartupError


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Weights that could serve, and the config they were checked against."""

    path: Path  # the checkpoint that they are of, or began with
    config: ModelConfig
    weights: Weights
    fingerprint: str


def load_model(
    path: Path, config: ModelConfig, dtype: str, runtime: DeviceRuntime, shard: Shard = WHOLE
) -> LoadedModel:
    """Reads a rank's share of a checkpoint of this config; `dtype` is a key of TORCH_DTYPES. Raises
    StartupError. The fingerprint is the whole checkpoint's."""
    try:
        weights = load_weights(path, config, TORCH_DTYPES[dtype], runtime.device, shard)
    except RuntimeError as error:  # how torch reports that memory is out; the old weights can serve on
        raise StartupError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
    return LoadedModel(path, config, weights, fingerprint_of(path, config, dtype))


def dummy_model(
    path: Path, config: ModelConfig, dtype: str, runtime: DeviceRuntime, shard: Shard = WHOLE
) -> LoadedModel:
    """The same model with random weights; `path` needs none. Raises StartupError."""
    try:
        weights = dummy_weights(config, TORCH_DTYPES[dtype], runtime.device, shard)
    except RuntimeError as error:  # how torch reports that memory is out
        raise StartupError(f"random weights cannot be made: {str(error).splitlines()[0]}") from error
    return LoadedModel(path, config, weights, dummy_fingerprint(config))


def load_replacement(
    paths: ModelPaths, current: ModelConfig, dtype: str, runtime: DeviceRuntime, shard: Shard = WHOLE
) -> LoadedModel:
    """Reads a checkpoint that can be swapped in for a model of this config. Raises StartupError."""
    path, config = paths.model, paths.read_config()
    # Before any tensor is read: another model may be larger than the memory that is left.
    if (difference := _difference(current, config)) is not None:
        raise StartupError(f"{path} cannot replace the model that is served: {difference}")
    return load_model(path, config, dtype, runtime, shard)


def updated_model(
    file: Path, base: LoadedModel, source: str, shard: Shard = WHOLE, fingerprint: str = ""
) -> LoadedModel:
    """`base` with the tensors of a safetensors file in place of its own. Raises StartupError. The log tells
    of those that hold NaN, and where they came from: `source`.

    Without `fingerprint` it follows from what `base` has and from the file. When the file holds every tensor
    it is that of a checkpoint of these tensors.
    """
    weights = updated_weights(file, base.weights, base.config, shard, source)
    if not fingerprint:
        covers_all = tensor_shapes(base.config).keys() <= read_update(file, base.config).keys()
        fingerprint = weights_digest(file, base.config, "" if covers_all else base.fingerprint)
    return replace(base, weights=weights, fingerprint=fingerprint)


def updated_weights(file: Path, weights: Weights, config: ModelConfig, shard: Shard, source: str) -> Weights:
    """A rank's share of the same; `config` is the whole model's. Raises StartupError."""
    try:
        return replace_tensors(weights, read_update(file, config), config, shard, source)
    except RuntimeError as error:  # how torch reports that memory is out
        raise StartupError(f"the update cannot be loaded: {str(error).splitlines()[0]}") from error


def _difference(ours: ModelConfig, theirs: ModelConfig) -> str | None:
    """The first field in which two models differ that one engine cannot swap."""
    for name in ModelConfig.__slots__:
        if name != "dtype" and getattr(ours, name) != getattr(theirs, name):
            return f"its {name} is {getattr(theirs, name)}, not {getattr(ours, name)}"
    return None
