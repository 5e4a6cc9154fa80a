"""Takes everything that has arrived at a node's socket, as typed messages."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Generic, TypeVar

from ..messages.channel import MalformedMessage, ServerChannel
from ..messages.node import CallReply

T = TypeVar("T")
_log = logging.getLogger(__name__)


class RequestReceiver(Generic[T]):
    """Reads a node's ROUTER socket without blocking.

    A frame that is not a message of this node is logged and dropped, and refused by name if its sender waits
    for a reply: it never reaches a handler, and it never ends the loop. `max_per_step` bounds what one turn
    of the loop handles.
    """

    def __init__(self, channel: ServerChannel[T], max_per_step: int = 256) -> None:
        self._channel = channel
        self._max_per_step = max_per_step
        self.num_malformed = 0

    def receive(self) -> Iterator[tuple[bytes, T]]:
        for count, (link, message) in enumerate(self._channel.receive(), start=1):
            if isinstance(message, MalformedMessage):
                self.num_malformed += 1
                _log.warning("dropped a malformed message from %s: %s", link.hex(), message.error)
                if message.call_id is not None:
                    text = f"this node does not understand {message.tag!r}: {message.error}"
                    self._channel.send(link, CallReply(call_id=message.call_id, success=False, message=text))
            else:
                yield link, message
            if count >= self._max_per_step:
                return
