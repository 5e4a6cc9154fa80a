"""A `ForwardBatch` as bytes, for the ranks that compute it without having decided it."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import torch
from torch import Tensor

from .forward_batch import ForwardBatch


def encode_batch(batch: ForwardBatch) -> bytes:
    """What a further rank needs of it: it samples nothing, so what only sampling reads is left out."""
    followed = dataclasses.replace(batch, row_ids=(), sampling=None, entries=(), hidden_rows=())
    return _ENCODER.encode(followed)


def decode_batch(data: bytes) -> ForwardBatch:
    return _DECODER.decode(data)


def _encoded(value: object) -> Any:  # noqa: ANN401  msgspec's hooks are typed so
    match value:
        case Tensor():
            array = value.contiguous().view(torch.uint8) if value.dim() else value
            return (str(value.dtype), value.shape, array.numpy().tobytes())
        case torch.dtype():
            return str(value)
        case _:
            raise _unsupported(type(value))


def _decoded(kind: type, value: Any) -> Any:  # noqa: ANN401
    if kind is torch.dtype:
        return _dtype(value)
    if kind is Tensor:
        name, shape, data = value
        if not data:
            return torch.empty(shape, dtype=_dtype(name))
        return torch.frombuffer(bytearray(data), dtype=_dtype(name)).view(shape)
    raise _unsupported(kind)


def _unsupported(kind: type) -> NotImplementedError:
    """What msgspec asks hooks to raise. A TypeError would become a ValidationError while decoding, as if the
    bytes were wrong and not this module, which lacks a type."""
    return NotImplementedError(f"a forward batch with a {kind.__name__} cannot be sent to other ranks")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_encoded)
_DECODER = msgspec.msgpack.Decoder(ForwardBatch, dec_hook=_decoded)
