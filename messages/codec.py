"""msgpack encoding of every message; decoding validates against the receiver's union."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")


class Codec(Generic[T]):
    """Decodes one receiver's union and encodes anything.

    A tag outside the union, a missing field or a wrong type raises msgspec.ValidationError, which names
    the path; bytes that are no message at all raise its base, msgspec.DecodeError, and nothing else. A
    receiver logs it and goes on.
    """

    def __init__(self, receives: object) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(receives)

    def encode(self, message: msgspec.Struct) -> bytes:
        return self._encoder.encode(message)

    def decode(self, data: bytes) -> T:
        try:
            return self._decoder.decode(data)
        except (UnicodeDecodeError, RecursionError) as error:  # msgspec lets these two through as they are
            raise msgspec.DecodeError(str(error)) from error
