"""Rotation angles of a model: inverse frequencies and the scale of cos and sin, as transformers has them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..models.config import RopeConfig


class RotaryAngles:
    """cos and sin of a step's positions; computed once a step, used by every layer."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim).to(device)
        self._scale = attention_scale(rope)

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``positions [T]`` int64 → cos, sin ``[T, head_dim / 2]``."""
        angles = positions[:, None].float() * self._frequencies
        return (angles.cos() * self._scale).to(dtype), (angles.sin() * self._scale).to(dtype)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per token of each pair of dimensions, ``[head_dim / 2]`` float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    match rope.rope_type:
        case "default":
            return frequencies
        case "linear":
            return frequencies / rope.factor
        case "llama3":
            return _llama3(rope, frequencies)
        case "yarn":
            return _yarn(rope, frequencies, head_dim)
        case unknown:
            raise ValueError(f"rope type {unknown!r}")


def attention_scale(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: 1 but for yarn."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        scale = _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    else:
        scale = _mscale(rope.factor, 1.0)
    return rope.attn_factor * scale


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended.

    Source: Llama 3.1's ``apply_scaling``.
    """
    low, high = rope.low_freq_factor, rope.high_freq_factor
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)  # in the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


def _yarn(rope: RopeConfig, frequencies: Tensor, head_dim: int) -> Tensor:
    """Dimensions that turn often are kept, those that turn rarely stretched, with a ramp between.

    Source: Peng et al., "YaRN", 2023, section 3.2.
    """

    def dimension_of(turns: float) -> float:
        context = rope.original_max_position_embeddings
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(head_dim // 2).float() - low) / (high - low)).clamp(0, 1)
    return stretched * frequencies / rope.factor + (1 - stretched) * frequencies
