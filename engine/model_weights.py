"""A checkpoint's tensors: read from safetensors, checked by name and shape, fused for the decoder."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..models.config import ModelConfig
from ..runtime.errors import StartupError
from .load_progress import LoadProgress
from .tensor_parallel import WHOLE, Shard

_log = logging.getLogger(__name__)
_FLOATS = ("F32", "BF16", "F16", "F64")  # a quantized tensor is no number without its scale

# Beside saved weights: which fingerprint they had where they served, for who loads them in the same type.
FINGERPRINT_FILE = "pdserve_fingerprint.json"

_MAX_NAMED = 8  # tensors that one error names

# What a tensor contributes to the digest: this many blocks, evenly spaced, first and last included.
_DIGEST_BLOCKS = 16
_DIGEST_BLOCK_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """One decoder layer. H: hidden size, D: head_dim, I: intermediate size."""

    input_norm: Tensor  # [H]
    qkv: Tensor  # [(Hq + 2·Hkv)·D, H]: query, key, value
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    o: Tensor  # [H, Hq·D]
    o_bias: Tensor | None
    post_attention_norm: Tensor  # [H]
    gate_up: Tensor  # [2·I, H]
    gate_up_bias: Tensor | None
    down: Tensor  # [H, I]
    down_bias: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    embed_tokens: Tensor  # [V, H]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [H]
    lm_head: Tensor  # [V, H], or this rank's rows of it; the embedding's own memory where they are tied

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.dtype


class Checkpoint:
    """The tensors of a folder by name, across its shards, or of one safetensors file. A context manager: it
    holds the files open. Raises StartupError for what cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files = ExitStack()
        self._shard_of: dict[str, Any] = {}
        self._file_of: dict[str, Path] = {}
        for file in [path] if path.is_file() else _shards(path):
            try:
                shard = self._files.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                self._files.close()
                raise StartupError(f"{file}: cannot be read: {error}") from error
            self._shard_of.update(dict.fromkeys(shard.keys(), shard))
            self._file_of.update(dict.fromkeys(shard.keys(), file))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def names(self) -> set[str]:
        return set(self._shard_of)

    def file(self, name: str) -> Path:
        """That holds the tensor."""
        return self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._shard_of[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors spells it: ``BF16``."""
        return str(self._shard_of[name].get_slice(name).get_dtype())

    def tensor(self, name: str, part: tuple[slice, ...] = ()) -> Tensor:
        """`part` of the tensor, all of it where empty; no more than that is read."""
        file = self._shard_of[name]
        tensor: Tensor = file.get_slice(name)[part] if part else file.get_tensor(name)
        return tensor


def load_weights(
    path: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, shard: Shard = WHOLE
) -> Weights:
    """Read the checkpoint in `path`, or a rank's share of it; `config` is the whole model's. Raises
    `StartupError` naming tensors that are missing, unexpected or of another shape. One tensor at a time is
    held twice. Rank 0 tells how far it is."""
    shapes = tensor_shapes(config)
    broken: list[str] = []
    with Checkpoint(path) as checkpoint:
        _check_tensors(path, checkpoint, shapes, config)
        wanted = [name for name, shape in shapes.items() if shard.part(name, shape, config) is not None]
        progress = LoadProgress(
            path,
            {name: checkpoint.file(name) for name in wanted},
            {name: math.prod(shapes[name]) * dtype.itemsize for name in wanted},
            silent=shard.rank > 0,
        )

        def tensor(name: str, part: tuple[slice, ...]) -> Tensor:
            read = checkpoint.tensor(name, part).to(dtype)  # in which a large number may become infinity
            if not is_finite(read):
                broken.append(name)
            progress.read(name)
            return read

        with progress:
            weights = fuse_weights(tensor, config, dtype, device, shard)
    warn_of_broken(broken, len(shapes), str(path))
    return weights


def fuse_weights(
    tensor: Callable[[str, tuple[slice, ...]], Tensor],
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard = WHOLE,
) -> Weights:
    """A rank's share of the weights, of tensors that `tensor` gives by the checkpoint's names: a part of one,
    all of it where the slices are empty."""
    shapes = tensor_shapes(config)
    parts = {name: shard.part(name, shape, config) for name, shape in shapes.items()}

    def fused(*names: str) -> Tensor:
        of_part = [torch.empty(shapes[name], device="meta")[parts[name] or ()].shape for name in names]
        rows = [shape[0] for shape in of_part]
        whole = torch.empty((sum(rows), *of_part[0][1:]), dtype=dtype, device=device)
        for target, name in zip(torch.split(whole, rows), names, strict=True):
            target.copy_(tensor(name, parts[name] or ()))
        return whole

    def optional(*names: str) -> Tensor | None:
        return fused(*names) if parts.get(names[0]) is not None else None

    def layer(index: int) -> LayerWeights:
        prefix = f"model.layers.{index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        qkv = [f"{attention}{part}_proj" for part in "qkv"]
        gate_up = [f"{mlp}gate_proj", f"{mlp}up_proj"]
        return LayerWeights(
            input_norm=fused(f"{prefix}input_layernorm.weight"),
            qkv=fused(*(f"{name}.weight" for name in qkv)),
            qkv_bias=optional(*(f"{name}.bias" for name in qkv)),
            q_norm=optional(f"{attention}q_norm.weight"),
            k_norm=optional(f"{attention}k_norm.weight"),
            o=fused(f"{attention}o_proj.weight"),
            o_bias=optional(f"{attention}o_proj.bias"),
            post_attention_norm=fused(f"{prefix}post_attention_layernorm.weight"),
            gate_up=fused(*(f"{name}.weight" for name in gate_up)),
            gate_up_bias=optional(*(f"{name}.bias" for name in gate_up)),
            down=fused(f"{mlp}down_proj.weight"),
            down_bias=optional(f"{mlp}down_proj.bias"),
        )

    embed_tokens = fused("model.embed_tokens.weight")
    return Weights(
        embed_tokens=embed_tokens,
        layers=tuple(layer(index) for index in range(config.num_layers)),
        norm=fused("model.norm.weight"),
        lm_head=(
            embed_tokens[shard.vocab_rows(config)] if config.tie_word_embeddings else fused("lm_head.weight")
        ),
    )


def is_finite(tensor: Tensor) -> bool:
    """Holds neither NaN nor infinity. Read once and not copied, unlike with torch's `isfinite`."""
    return math.isfinite(tensor.sum(dtype=torch.float32).item())


def warn_of_broken(broken: Sequence[str], num_tensors: int, source: str) -> None:
    """Of so many tensors from `source`, these are not finite. They are served all the same: who trains may
    want to see it."""
    if broken:
        _log.warning(
            "%s: %d of %d tensors hold NaN or infinity, as a training that diverged leaves them; answers "
            "will make no sense: %s%s",
            source,
            len(broken),
            num_tensors,
            ", ".join(broken[:_MAX_NAMED]),
            ", ..." if len(broken) > _MAX_NAMED else "",
        )


def weights_digest(path: Path, config: ModelConfig, base: str = "") -> str:
    """A fingerprint of config and weights, the same for any sharding of the same checkpoint, 32 hex digits.
    Where `path` holds some tensors only, `base` is the fingerprint of the weights that the others are of.

    It reads up to 64 KiB of each tensor: 16 blocks, evenly spaced. A tensor that was trained further differs
    nearly everywhere, so that is enough to tell checkpoints apart, and its cost grows with the number of
    tensors, not with their size. It is no protection against a forger.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(asdict(config), sort_keys=True).encode())
    digest.update(base.encode())
    with Checkpoint(path) as checkpoint:
        for name in sorted(checkpoint.names):
            tensor = checkpoint.tensor(name)
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            for block in _sample(tensor):
                digest.update(block)
    return digest.hexdigest()


def fingerprint_of(path: Path, config: ModelConfig, dtype: str) -> str:
    """Of a checkpoint that is loaded as `dtype`: the digest of its bytes, or of weights that a node has saved
    the one that they served under, as long as nobody has changed them since."""
    digest = weights_digest(path, config)
    try:
        known = json.loads((path / FINGERPRINT_FILE).read_text(encoding="utf-8"))
        if known["digest"] == digest and known["dtype"] == dtype:
            return str(known["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return digest


def read_update(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a safetensors file with some of a model's tensors, or all, by name.

    They are views of the file until they are copied. Raises StartupError that names those that are no part of
    this model, of another shape, or of a type that is no plain number.
    """
    shapes = tensor_shapes(config)
    wrong = []
    with Checkpoint(path) as given:
        harmless = _harmless(given, config)
        for name in sorted(given.names - harmless):
            if name not in shapes:
                wrong.append(f"{name} is no tensor of this {config.architecture}")
            elif given.shape(name) != shapes[name]:
                wrong.append(f"{name} has shape {list(given.shape(name))}, not {list(shapes[name])}")
            elif given.dtype(name) not in _FLOATS:
                wrong.append(f"{name} is of type {given.dtype(name)}; {', '.join(_FLOATS)} are read")
        if wrong:
            more = f"; and {len(wrong) - _MAX_NAMED} more" if len(wrong) > _MAX_NAMED else ""
            raise StartupError("; ".join(wrong[:_MAX_NAMED]) + more)
        names = given.names - harmless
        if not names:
            raise StartupError("the update holds no tensor of the model")
        return {name: given.tensor(name) for name in names}


def _harmless(checkpoint: Checkpoint, config: ModelConfig) -> set[str]:
    """Old checkpoints keep the rotary frequencies, and tied ones may keep a copy of the embedding."""
    names = {name for name in checkpoint.names if name.endswith(".rotary_emb.inv_freq")}
    return names | ({"lm_head.weight"} & checkpoint.names if config.tie_word_embeddings else set())


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the checkpoint of such a model has."""
    hidden, intermediate, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections = {
        "self_attn.q_proj": (q_size, hidden, config.attention_bias),
        "self_attn.k_proj": (kv_size, hidden, config.attention_bias),
        "self_attn.v_proj": (kv_size, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, q_size, config.o_bias),
        "mlp.gate_proj": (intermediate, hidden, config.mlp_bias),
        "mlp.up_proj": (intermediate, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, intermediate, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (config.head_dim,)
        for name, (num_out, num_in, has_bias) in projections.items():
            shapes[f"{prefix}{name}.weight"] = (num_out, num_in)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (num_out,)
    return shapes


def _shards(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if single.exists():
        return [single]
    if not index.exists():
        raise StartupError(f"{path}: has neither model.safetensors nor model.safetensors.index.json")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [path / name for name in sorted(set(weight_map.values()))]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise StartupError(f"{index}: has no readable weight_map") from error


def _check_tensors(
    path: Path, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig
) -> None:
    if missing := shapes.keys() - checkpoint.names:
        raise StartupError(f"{path}: {_listed(missing)} missing from the checkpoint")
    if unexpected := checkpoint.names - shapes.keys() - _harmless(checkpoint, config):
        raise StartupError(f"{path}: {_listed(unexpected)} not part of a {config.architecture} like this one")
    for name, shape in shapes.items():
        if checkpoint.shape(name) != shape:
            raise StartupError(
                f"{path}: {name} has shape {list(checkpoint.shape(name))}, config.json asks for {list(shape)}"
            )
        if checkpoint.dtype(name) not in _FLOATS:
            kinds = ", ".join(_FLOATS)
            raise StartupError(f"{path}: {name} is of type {checkpoint.dtype(name)}; {kinds} are read")


def _listed(names: set[str]) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} more are" if others else f"{first} is"


def _sample(tensor: Tensor) -> Iterator[bytes]:
    data = tensor.contiguous().flatten().view(torch.uint8)
    last = max(data.numel() - _DIGEST_BLOCK_BYTES, 0)
    starts = sorted({last * block // (_DIGEST_BLOCKS - 1) for block in range(_DIGEST_BLOCKS)})
    for start in starts:
        yield data[start : start + _DIGEST_BLOCK_BYTES].numpy().tobytes()
