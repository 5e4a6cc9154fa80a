"""A frame that is no message of its receiver, and what can still be told of it."""

from __future__ import annotations

import msgspec

from .bounds import Name, Number
from .peer import RoomId


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer needs, of any message that asks for one."""

    type: Name = ""
    call_id: Number | None = None
    request_id: str = ""  # of any kind: what is wrong may be this
    attempt: Number = 0
    room: RoomId | None = None
    epoch: Number = 0


class MalformedMessage(msgspec.Struct, frozen=True):
    """Stands for the frame. Its `head` is empty where not even that can be read."""

    error: str
    head: Head = Head()


def head_of(message: msgspec.Struct) -> Head:
    """Of one that was understood."""
    head = msgspec.convert(message, Head, from_attributes=True)
    return msgspec.structs.replace(head, type=str(message.__struct_config__.tag))


def malformed(payload: bytes, error: msgspec.DecodeError) -> MalformedMessage:
    try:
        return MalformedMessage(str(error), msgspec.msgpack.decode(payload, type=Head))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return MalformedMessage(str(error))
