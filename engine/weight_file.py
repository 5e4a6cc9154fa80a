"""A rank's weights as they are in memory, out to a file and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..runtime.errors import StartupError
from .model_weights import LayerWeights, Weights


def save_weights(weights: Weights, path: Path) -> None:
    """Raises StartupError when the disk does not take them."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in _named(weights).items()}, path)
    except (OSError, SafetensorError) as error:
        raise StartupError(f"weights cannot be kept in {path.parent}: {error}") from error


def read_weights(path: Path, like: Weights) -> Weights:
    """What `save_weights` wrote. `like` has the same fields and shapes, of whatever device."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StartupError(f"the weights kept in {path} cannot be read: {error}") from error
    layers = []
    for index, layer in enumerate(like.layers):
        fields: dict[str, Any] = {
            field.name: tensors.get(f"{index}.{field.name}") for field in dataclasses.fields(LayerWeights)
        }
        layers.append(dataclasses.replace(layer, **fields))
    embedding = tensors["embed_tokens"]
    lm_head = tensors.get("lm_head")
    if lm_head is None:  # tied: rows of the embedding
        start = like.lm_head.storage_offset() // max(1, like.lm_head.shape[1])
        lm_head = embedding[start : start + like.lm_head.shape[0]]
    return Weights(embed_tokens=embedding, layers=tuple(layers), norm=tensors["norm"], lm_head=lm_head)


def without_memory(weights: Weights) -> Weights:
    """The same shapes and no values."""
    embedding = weights.embed_tokens.to("meta")
    lm_head = weights.lm_head.to("meta")
    if _is_tied(weights):
        start = weights.lm_head.storage_offset() // max(1, weights.lm_head.shape[1])
        lm_head = embedding[start : start + weights.lm_head.shape[0]]
    layers = tuple(dataclasses.replace(layer, **_on_meta(layer)) for layer in weights.layers)
    return Weights(embed_tokens=embedding, layers=layers, norm=weights.norm.to("meta"), lm_head=lm_head)


def has_memory(weights: Weights) -> bool:
    """Not what `without_memory` returned."""
    return not weights.norm.is_meta


def require_memory(weights: Weights) -> None:
    """Raises StartupError for what `without_memory` returned."""
    if not has_memory(weights):
        raise StartupError("the memory of the weights is released: resume it first")


def _on_meta(layer: LayerWeights) -> dict[str, Any]:
    tensors = {field.name: getattr(layer, field.name) for field in dataclasses.fields(LayerWeights)}
    return {name: None if tensor is None else tensor.to("meta") for name, tensor in tensors.items()}


def _named(weights: Weights) -> dict[str, Tensor]:
    named = {"embed_tokens": weights.embed_tokens, "norm": weights.norm}
    if not _is_tied(weights):
        named["lm_head"] = weights.lm_head
    for index, layer in enumerate(weights.layers):
        for field in dataclasses.fields(LayerWeights):
            tensor = getattr(layer, field.name)
            if tensor is not None:
                named[f"{index}.{field.name}"] = tensor
    return named


def _is_tied(weights: Weights) -> bool:
    def storage(tensor: Tensor) -> int:
        return tensor.untyped_storage().data_ptr()

    return storage(weights.lm_head) == storage(weights.embed_tokens)
