"""A checkpoint's config.json and generation_config.json, read and checked. No torch here.

Both spellings are read: transformers 4 (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and transformers 5
(``rope_parameters``, ``dtype``). What a config asks for that the decoder does not do is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ..messages.kv_layout import DTYPE_BYTES, KVLayout
from ..runtime.errors import StartupError
from .family import Family
from .llama import LLAMA
from .mistral import MISTRAL
from .qwen2 import QWEN2
from .qwen3 import QWEN3

log = logging.getLogger(__name__)

FAMILIES = {family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}

# What each rope type must state beside rope_theta.
_ROPE_REQUIRED: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset({"factor"}),
}
_ROPE_KNOWN = frozenset(
    {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        "attention_factor",
        "attn_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "finetuned",  # of the first yarn code: what its dynamic form does to short prompts; read by nobody
    }
)

_GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """How rotation angles follow from positions. Fields that a type does not use keep their defaults."""

    rope_type: str = "default"  # "default" | "linear" | "llama3" | "yarn"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position_embeddings: int = 0  # llama3, yarn
    attention_factor: float | None = None  # yarn; None: from factor, mscale, mscale_all_dim, attn_factor
    attn_factor: float = 1.0  # yarn: multiplies what follows from factor, mscale and mscale_all_dim
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of a decoder-only transformer."""

    family: str  # "llama" | "mistral" | "qwen2" | "qwen3"
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool  # on query, key and value
    o_bias: bool  # on attention's output projection
    mlp_bias: bool
    qk_norm: bool
    max_model_len: int  # tokens; with linear and yarn, what they extend the original length to
    dtype: str  # a key of DTYPE_BYTES
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_dir(
        cls, path: Path, tokenizer: Path | None = None, generation: Path | None = None
    ) -> ModelConfig:
        """Read ``path/config.json``; EOS ids of ``generation_config.json`` and of the tokenizer, which may
        lie in other folders, are added to its own. Where there is none at all a warning says so.

        Raises `StartupError` with the name of the field for anything missing, malformed or not supported.
        """
        raw = _RawConfig(_read_json(path / "config.json"), path / "config.json")
        family = _family(raw)
        _refuse_unsupported(raw, family)
        hidden_size = raw.positive("hidden_size")
        num_heads = raw.positive("num_attention_heads")
        num_kv_heads = raw.optional("num_key_value_heads", int) or family.default_num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise raw.error(
                f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            )
        head_dim = raw.optional("head_dim", int) or family.default_head_dim
        if head_dim is None:
            if hidden_size % num_heads:
                raise raw.error(
                    f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"
                )
            head_dim = hidden_size // num_heads
        if head_dim % 2:
            raise raw.error(f"head_dim {head_dim} is odd; rotary embedding needs pairs")
        max_positions = raw.positive("max_position_embeddings")
        rope = _rope(raw, max_positions)
        defaults = read_generation_defaults(generation or path)
        vocab_size = raw.positive("vocab_size")
        eos = (*raw.token_ids("eos_token_id"), *defaults.get("eos_token_id", ()))
        tokenizer_eos = read_tokenizer_eos(tokenizer or path)
        if tokenizer_eos is not None and tokenizer_eos < vocab_size:
            eos = (*eos, tokenizer_eos)
        if not eos:
            log.warning("%s names no EOS token: answers end at their length or at a stop string only", path)
        return cls(
            family=family.name,
            architecture=family.architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=raw.positive("intermediate_size"),
            num_layers=raw.positive("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=raw.number("rms_norm_eps", 1e-6),
            rope=rope,
            tie_word_embeddings=raw.flag("tie_word_embeddings"),
            attention_bias=raw.bias(family.qkv_bias),
            o_bias=raw.bias(family.o_bias),
            mlp_bias=raw.bias(family.mlp_bias),
            qk_norm=family.qk_norm,
            max_model_len=max(max_positions, _extended_length(rope, max_positions)),
            dtype=_dtype(raw),
            eos_token_ids=tuple(dict.fromkeys(eos)),
        )


def read_generation_defaults(path: Path) -> dict[str, Any]:
    """What ``generation_config.json`` sets of temperature, top_p, top_k, min_p, repetition_penalty (numbers)
    and eos_token_id (a tuple). ``do_sample: false`` is temperature 0. No file, no defaults."""
    file = path / "generation_config.json"
    if not file.exists():
        return {}
    raw = _RawConfig(_read_json(file), file)
    defaults: dict[str, Any] = {}
    for name in _GENERATION_DEFAULTS:
        value = raw.optional(name, int) if name == "top_k" else raw.optional(name, float)
        if value is not None:
            defaults[name] = value
    if raw.optional("do_sample", bool) is False:
        defaults["temperature"] = 0.0
    eos = raw.token_ids("eos_token_id")
    if eos:
        defaults["eos_token_id"] = eos
    return defaults


class _AddedToken(msgspec.Struct):
    content: str
    id: int = -1  # in tokenizer_config.json the key is


class _TokenizerConfig(msgspec.Struct):
    """The part of tokenizer_config.json that is read here."""

    eos_token: str | _AddedToken | None = None
    added_tokens_decoder: dict[int, _AddedToken] = {}


class _Vocabulary(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]] = {}  # a list: of a unigram model, indices are ids


class _TokenizerFile(msgspec.Struct):
    """The part of tokenizer.json that is read here."""

    added_tokens: list[_AddedToken] = []
    model: _Vocabulary = msgspec.field(default_factory=_Vocabulary)


def read_tokenizer_eos(path: Path) -> int | None:
    """The id of the ``eos_token`` of ``tokenizer_config.json``. None: it names none, or none with an id.

    Files that cannot be read are no error here: a node needs no tokenizer, and who needs one says why.
    """
    config = _decode_file(path / "tokenizer_config.json", _TokenizerConfig)
    if config is None or config.eos_token is None:
        return None
    eos = config.eos_token if isinstance(config.eos_token, str) else config.eos_token.content
    for token_id, token in config.added_tokens_decoder.items():
        if token.content == eos:
            return token_id
    tokenizer = _decode_file(path / "tokenizer.json", _TokenizerFile)
    if tokenizer is None:
        return None
    for token in tokenizer.added_tokens:
        if token.content == eos:
            return token.id
    vocab = tokenizer.model.vocab
    if isinstance(vocab, dict):
        return vocab.get(eos)
    return next((index for index, (piece, _) in enumerate(vocab) if piece == eos), None)


def read_vocabulary_digest(path: Path) -> str:
    """Of which token id means what in ``path/tokenizer.json``, 32 hex digits; empty without such a file.

    However the file is written, the same vocabulary has the same digest.
    """
    tokenizer = _decode_file(path / "tokenizer.json", _TokenizerFile)
    if tokenizer is None:
        return ""
    vocab = tokenizer.model.vocab
    pieces = vocab if isinstance(vocab, dict) else {piece: index for index, (piece, _) in enumerate(vocab)}
    pieces = pieces | {token.content: token.id for token in tokenizer.added_tokens}
    return hashlib.blake2b(msgspec.json.encode(sorted(pieces.items())), digest_size=16).hexdigest()


def _decode_file(file: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError):
        return None


def resolve_dtype(dtype: str, config: ModelConfig, native: Container[str]) -> str:
    """``auto`` is the checkpoint's own where the device has it in hardware (`native`), else float32."""
    if dtype == "auto":
        return config.dtype if config.dtype in native else "float32"
    if dtype not in DTYPE_BYTES:
        raise StartupError(f"--dtype {dtype} is not one of auto, {', '.join(DTYPE_BYTES)}")
    return dtype


def kv_layout(config: ModelConfig, page_size: int, dtype: str, page_stride_bytes: int = 0) -> KVLayout:
    """The KV layout of a model on one rank; `dtype` is resolved."""
    return KVLayout(
        num_kv_heads=config.num_kv_heads,
        num_layers=config.num_layers,
        page_size=page_size,
        head_dim=config.head_dim,
        dtype=dtype,
        page_stride_bytes=page_stride_bytes,
    )


class _RawConfig:
    """A JSON object whose fields are read with a type; errors name file and field."""

    def __init__(self, values: Mapping[str, Any], source: Path) -> None:
        self.values = values
        self.source = source

    def error(self, problem: str) -> StartupError:
        return StartupError(f"{self.source}: {problem}")

    def optional(self, name: str, kind: type[T]) -> T | None:
        """The field, or None where it is absent or null. A whole number is a float too."""
        value = self.values.get(name)
        if value is None:
            return None
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"{name} is {value!r}, not a {kind.__name__}")
        return value

    def positive(self, name: str) -> int:
        value = self.optional(name, int)
        if value is None:
            raise self.error(f"{name} is missing")
        if value < 1:
            raise self.error(f"{name} is {value}, not positive")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.optional(name, float)
        return default if value is None else value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.optional(name, bool)
        return default if value is None else value

    def bias(self, declared: bool | str) -> bool:
        return self.flag(declared) if isinstance(declared, str) else declared

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.values.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            raise self.error(f"{name} is {value!r}, not a token id or a list of them")
        return tuple(ids)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartupError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise StartupError(f"{file}: is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise StartupError(f"{file}: is not a JSON object")
    return values


def _family(raw: _RawConfig) -> Family:
    architectures = raw.optional("architectures", list)
    if not architectures:
        raise raw.error("architectures is missing")
    for architecture in architectures:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    raise raw.error(f"architectures {architectures} is not supported; supported: {', '.join(FAMILIES)}")


def _refuse_unsupported(raw: _RawConfig, family: Family) -> None:
    model_type = raw.optional("model_type", str)
    if model_type is None:
        raise raw.error(f"model_type is missing; of {family.architecture} it is {family.name!r}")
    if model_type != family.name:
        raise raw.error(f"model_type {model_type!r} does not go with {family.architecture}")
    activation = raw.optional("hidden_act", str)
    if activation not in (None, "silu"):
        raise raw.error(f"hidden_act {activation!r} is not supported; supported: silu")
    if raw.values.get("quantization_config") is not None:
        raise raw.error("quantization_config is not supported; use a checkpoint that is not quantized")
    if raw.number("partial_rotary_factor", 1.0) != 1.0:
        raise raw.error("partial_rotary_factor other than 1 is not supported")
    if family.window_switch is None:
        window = raw.values.get("sliding_window", family.default_sliding_window)
        if window is not None:
            raise raw.error(f"sliding_window {window} is not supported; only null is")
    elif raw.flag(family.window_switch):
        raise raw.error(f"{family.window_switch} is not supported; only false is")
    other_layers = set(raw.optional("layer_types", list) or ()) - {"full_attention"}
    if other_layers:
        raise raw.error(f"layer_types {sorted(other_layers)} is not supported; supported: full_attention")


def _rope(raw: _RawConfig, max_positions: int) -> RopeConfig:
    """transformers 5 keeps everything in ``rope_parameters``; transformers 4 has ``rope_theta`` beside
    ``rope_scaling``, whose type is ``rope_type`` or, older, ``type``. The original length may stand at the
    top level too, and counts first there, as in transformers."""
    field = "rope_parameters" if raw.values.get("rope_parameters") is not None else "rope_scaling"
    values = dict(raw.optional(field, dict) or {})
    theta = values.pop("rope_theta", raw.values.get("rope_theta"))
    older_type = values.pop("type", None)
    rope_type = values.pop("rope_type", older_type) or "default"
    if older_type not in (None, rope_type):
        raise raw.error(f"{field} has rope_type {rope_type!r} and type {older_type!r}")
    if rope_type not in _ROPE_REQUIRED:
        raise raw.error(
            f"{field}: rope_type {rope_type!r} is not supported; supported: {', '.join(_ROPE_REQUIRED)}"
        )
    if values.pop("partial_rotary_factor", None) not in (None, 1.0):
        raise raw.error(f"{field}: partial_rotary_factor other than 1 is not supported")
    values = {name: value for name, value in values.items() if value is not None}
    if missing := _ROPE_REQUIRED[rope_type] - values.keys():
        raise raw.error(f"{field}: rope_type {rope_type!r} needs {', '.join(sorted(missing))}")
    if unknown := values.keys() - _ROPE_KNOWN:
        raise raw.error(f"{field}: {', '.join(sorted(unknown))} is not supported")
    used = _RawConfig({**values, "rope_theta": theta}, raw.source)
    original = (
        raw.optional("original_max_position_embeddings", int)
        or used.optional("original_max_position_embeddings", int)
        or max_positions
    )
    return RopeConfig(
        rope_type=rope_type,
        theta=used.number("rope_theta", 10000.0),
        factor=used.number("factor", 1.0),
        low_freq_factor=used.number("low_freq_factor", 1.0),
        high_freq_factor=used.number("high_freq_factor", 4.0),
        original_max_position_embeddings=original,
        attention_factor=used.optional("attention_factor", float),
        attn_factor=used.number("attn_factor", 1.0),
        beta_fast=used.number("beta_fast", 32.0),
        beta_slow=used.number("beta_slow", 1.0),
        mscale=used.optional("mscale", float),
        mscale_all_dim=used.optional("mscale_all_dim", float),
        truncate=used.flag("truncate", default=True),
    )


def _extended_length(rope: RopeConfig, max_positions: int) -> int:
    """Tokens that the rope reaches, 0 for a type whose ``max_position_embeddings`` says that itself."""
    match rope.rope_type:
        case "linear":
            return int(max_positions * rope.factor)
        case "yarn":
            return int(rope.original_max_position_embeddings * rope.factor)
        case _:
            return 0


def _dtype(raw: _RawConfig) -> str:
    """transformers 5 writes ``dtype``, transformers 4 ``torch_dtype``; a config with neither is float32."""
    value = raw.optional("dtype", str) or raw.optional("torch_dtype", str) or "float32"
    name = value.removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise raw.error(f"dtype {value!r} is not supported; supported: {', '.join(DTYPE_BYTES)}")
    return name
