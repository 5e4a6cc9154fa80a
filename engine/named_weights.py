"""Weights by the names that a checkpoint gives them: read them, check them, replace some of them.

The decoder holds query, key and value, and gate and up, as one tensor each; a name is a view of some rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..messages.kv_layout import kv_heads_of_rank
from ..models.config import ModelConfig
from .model_weights import LayerWeights, Weights, is_finite, tensor_shapes, warn_of_broken
from .tensor_parallel import Shard

# Of each field of LayerWeights: the tensors it is made of, one below the other.
_LAYER_PARTS = {
    "input_norm": ("input_layernorm.weight",),
    "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "qkv_bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "q_norm": ("self_attn.q_norm.weight",),
    "k_norm": ("self_attn.k_norm.weight",),
    "o": ("self_attn.o_proj.weight",),
    "o_bias": ("self_attn.o_proj.bias",),
    "post_attention_norm": ("post_attention_layernorm.weight",),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "gate_up_bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "down": ("mlp.down_proj.weight",),
    "down_bias": ("mlp.down_proj.bias",),
}
_TOP_PARTS = {"embed_tokens": "model.embed_tokens.weight", "norm": "model.norm.weight"}

_BLOCK = 1 << 18  # elements whose checksum is computed at once: a few MB
_ODD_1, _ODD_2 = -7046029254386353131, -4658895280553007687  # 64-bit odd constants of splitmix64
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class NamedPart:
    """A rank's part of a tensor of the checkpoint."""

    data: Tensor  # a view of what the decoder computes with
    shape: tuple[int, ...]  # of the whole tensor
    part: tuple[slice, ...]  # which part of it `data` is; empty: all


def named_parts(weights: Weights, config: ModelConfig, shard: Shard) -> dict[str, NamedPart]:
    """What a rank holds, by name; `config` is the whole model's. Writing to `data` writes the weights."""
    shapes = tensor_shapes(config)
    found: dict[str, NamedPart] = {}

    def add(fused: Tensor, names: tuple[str, ...]) -> None:
        first = 0
        for name in names:
            shape = shapes[name]
            part = shard.part(name, shape, config) or ()
            num_rows = len(range(shape[0])[part[0]]) if part else shape[0]
            found[name] = NamedPart(fused[first : first + num_rows], shape, part)
            first += num_rows

    for field, name in _TOP_PARTS.items():
        add(getattr(weights, field), (name,))
    if not config.tie_word_embeddings:
        add(weights.lm_head, ("lm_head.weight",))
    for index, layer in enumerate(weights.layers):
        for field, parts in _LAYER_PARTS.items():
            fused = getattr(layer, field)
            if fused is not None:
                add(fused, tuple(f"model.layers.{index}.{part}" for part in parts))
    return found


def replace_tensors(
    weights: Weights, tensors: Mapping[str, Tensor], config: ModelConfig, shard: Shard, source: str
) -> Weights:
    """`weights` with some tensors replaced; what is not replaced is shared with it, and nothing is written.

    `tensors` are whole ones by name, of the shapes that `tensor_shapes` says; a rank takes its part. The log
    tells of those that hold NaN, and where they came from: `source`.
    """
    given = tensors.keys()

    def fresh_layer(index: int, layer: LayerWeights) -> LayerWeights:
        prefix = f"model.layers.{index}."
        changes = {
            field: getattr(layer, field).clone()
            for field, parts in _LAYER_PARTS.items()
            if getattr(layer, field) is not None and any(prefix + part in given for part in parts)
        }
        return dataclasses.replace(layer, **changes)

    changes = {field: getattr(weights, field).clone() for field, name in _TOP_PARTS.items() if name in given}
    if config.tie_word_embeddings:
        embedding = changes.get("embed_tokens", weights.embed_tokens)
        changes["lm_head"] = embedding[shard.vocab_rows(config)]
    elif "lm_head.weight" in given:
        changes["lm_head"] = weights.lm_head.clone()
    layers = tuple(fresh_layer(index, layer) for index, layer in enumerate(weights.layers))
    fresh = dataclasses.replace(weights, layers=layers, **changes)
    parts = named_parts(fresh, config, shard)
    broken: list[str] = []
    for name, tensor in tensors.items():
        if name in parts:  # a bias behind a partial sum is on rank 0 alone
            parts[name].data.copy_(tensor[parts[name].part] if parts[name].part else tensor)
            if not is_finite(parts[name].data):
                broken.append(name)
    warn_of_broken(broken, len(tensors), source)
    return fresh


def part_checksums(weights: Weights, config: ModelConfig, shard: Shard) -> dict[str, int]:
    """By name, what this rank adds to each tensor's checksum: the sum of all ranks' is the tensor's, modulo
    2^64. It depends on every bit and on where it is, not on how the tensor is split. A part that several
    ranks hold is counted by the first of them; a tensor of which nothing is left has no entry."""
    return {name: _checksum(named) for name, named in answered_parts(weights, config, shard).items()}


def answered_parts(weights: Weights, config: ModelConfig, shard: Shard) -> dict[str, NamedPart]:
    """`named_parts` without those that a rank before this one has too: all ranks' together are every tensor
    once."""
    return {
        name: named
        for name, named in named_parts(weights, config, shard).items()
        if _is_first(name, named, config, shard)
    }


def merge_checksums(of_ranks: list[dict[str, int]]) -> dict[str, str]:
    """Of the whole tensors, 16 hex digits each."""
    names = sorted({name for sums in of_ranks for name in sums})
    return {name: f"{sum(sums.get(name, 0) for sums in of_ranks) & _MASK:016x}" for name in names}


def whole_checksum(tensors: Mapping[str, str]) -> str:
    """One for all tensors, from the checksum of each."""
    text = "\n".join(f"{name} {tensors[name]}" for name in sorted(tensors))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _is_first(name: str, named: NamedPart, config: ModelConfig, shard: Shard) -> bool:
    if shard.rank == 0:
        return True
    if not named.part:
        return False  # every rank has all of it
    if "k_proj" in name or "v_proj" in name:
        heads = [
            kv_heads_of_rank(config.num_kv_heads, shard.size, rank) for rank in (shard.rank - 1, shard.rank)
        ]
        return heads[0] != heads[1]
    return True


def _checksum(named: NamedPart) -> int:
    """Of one part, its elements numbered as in the whole tensor."""
    total = 0
    for bits, numbers in _blocks(named):
        mixed = (bits + 1) * _ODD_1 + numbers * _ODD_2
        mixed = (mixed ^ (mixed >> 31)) * _ODD_2
        total += int((mixed ^ (mixed >> 29)).sum().item())
    return total & _MASK


def _blocks(named: NamedPart) -> Iterator[tuple[Tensor, Tensor]]:
    """The bits of some elements, and their numbers in the whole tensor, as int64 ``[N]`` each."""
    data = named.data if named.data.ndim == 2 else named.data[:, None]
    num_columns = named.shape[1] if len(named.shape) == 2 else 1
    rows, columns = (*named.part, slice(None), slice(None))[:2]
    first_row, first_column = rows.start or 0, columns.start or 0
    as_integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()]
    column_numbers = torch.arange(first_column, first_column + data.shape[1])
    rows_at_once = max(1, _BLOCK // max(1, data.shape[1]))
    for start in range(0, data.shape[0], rows_at_once):
        block = data[start : start + rows_at_once]
        row_numbers = torch.arange(first_row + start, first_row + start + block.shape[0])
        numbers = row_numbers[:, None] * num_columns + column_numbers
        yield block.contiguous().view(as_integer).flatten().long(), numbers.flatten()
