"""Random weights for ``--load-format dummy``: what a model costs can be measured without its checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import torch
from torch import Tensor

from ..models.config import ModelConfig
from .model_weights import Weights, fuse_weights, tensor_shapes
from .tensor_parallel import WHOLE, Shard

_SPREAD = 0.02  # of a trained model's projections


def dummy_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, shard: Shard = WHOLE
) -> Weights:
    """A rank's share; every node and rank makes the same. A whole tensor is made at a time, in float32."""
    shapes = tensor_shapes(config)

    def tensor(name: str, part: tuple[slice, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shapes[name])[part]
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
        generator = torch.Generator().manual_seed(seed)
        return torch.empty(shapes[name]).uniform_(-_SPREAD, _SPREAD, generator=generator)[part]

    return fuse_weights(tensor, config, dtype, device, shard)


def dummy_fingerprint(config: ModelConfig) -> str:
    """Of the weights of that config, 32 hex digits."""
    described = json.dumps({"dummy": asdict(config)}, sort_keys=True)
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()
