"""Takes everything that has arrived at a node's socket, as typed messages."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

from ..messages.channel import ServerChannel
from ..messages.malformed import Head, MalformedMessage
from ..messages.node import AttemptFailed, CallReply
from ..messages.peer import Drained, RoomFailed, RoomId
from ..runtime.logs import Throttle

T = TypeVar("T")
_log = logging.getLogger(__name__)


class RequestReceiver(Generic[T]):
    """Reads a node's ROUTER socket without blocking.

    A frame that is not a message of this node is logged and dropped, and refused by name if its sender waits
    for an answer: it never reaches a handler, and it never ends the loop. `max_per_step` bounds what one turn
    of the loop handles.
    """

    def __init__(self, channel: ServerChannel[T], max_per_step: int = 256) -> None:
        self._channel = channel
        self._max_per_step = max_per_step
        self.num_malformed = 0
        self._complaints = Throttle()

    def receive(self) -> Iterator[tuple[bytes, T]]:
        for count, (link, message) in enumerate(self._channel.receive(), start=1):
            if isinstance(message, MalformedMessage):
                self.num_malformed += 1
                if num := self._complaints.add(time.monotonic()):
                    _log.warning(
                        "dropped %d malformed messages, the last from %s: %s", num, link.hex(), message.error
                    )
                why = f"this node does not understand {message.head.type!r}: {message.error}"
                for answer in refusals(message.head, why):
                    self._channel.send(link, answer)
            else:
                yield link, message
            if count >= self._max_per_step:
                return


def refusals(head: Head, why: str) -> tuple[msgspec.Struct, ...]:
    """What the sender waits for, as a no that no retry changes. Nothing was done of its message."""
    match head:
        case Head(type="generate", request_id=request_id, attempt=attempt):
            failed = AttemptFailed(
                request_id=request_id, attempt=attempt, code="invalid", reason=why, retriable=False
            )
            return (failed,)
        case Head(type="prefill_request", room=RoomId() as room, epoch=epoch):
            refused = RoomFailed(room=room, epoch=epoch, reason=why, code="invalid", retriable=False)
            return refused, Drained(room=room, epoch=epoch, clean=True)
        case Head(call_id=int() as call_id):
            return (CallReply(call_id=call_id, success=False, message=why),)
        case _:
            return ()
