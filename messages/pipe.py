"""A pair of connected sockets between a process and its child: whole messages, in order, both ways."""

from __future__ import annotations

import socket
import threading
from queue import SimpleQueue
from typing import Generic, TypeVar

import msgspec

from .codec import Codec
from .malformed import MalformedMessage, malformed

T = TypeVar("T")

_LENGTH_BYTES = 8
_READ_BYTES = 1 << 20


class Pipe(Generic[T]):
    """One end. Nothing blocks the caller: a thread sends, because a reader may be held for long."""

    def __init__(self, end: socket.socket, receives: object, name: str) -> None:
        self.closed = False  # by the other end, or because its process is gone
        self._socket = end
        self._codec: Codec[T] = Codec(receives)
        self._buffer = bytearray()
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name=f"{name}-sender", daemon=True)
        self._sender.start()

    def fileno(self) -> int:
        """Readable while `receive` has something, and once the other end is closed."""
        return self._socket.fileno()

    def send(self, message: msgspec.Struct) -> None:
        """Any thread may. A message to an end that is closed is dropped."""
        self._outbox.put(self._codec.encode(message))

    def receive(self) -> list[T | MalformedMessage]:
        """Every message that has arrived whole. One that is out of bounds cannot be sent on purpose, but may
        hold what somebody else has said."""
        while not self.closed:
            try:
                data = self._socket.recv(_READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionError:
                data = b""
            self._buffer += data
            self.closed = not data
        messages: list[T | MalformedMessage] = []
        begin = 0
        while begin + _LENGTH_BYTES <= len(self._buffer):
            start = begin + _LENGTH_BYTES
            end = start + int.from_bytes(self._buffer[begin:start], "little")
            if end > len(self._buffer):
                break
            payload = bytes(self._buffer[start:end])
            try:
                messages.append(self._codec.decode(payload))
            except msgspec.DecodeError as error:
                messages.append(malformed(payload, error))
            begin = end
        del self._buffer[:begin]
        return messages

    def close(self) -> None:
        """Sends what is queued, unless the other end does not read, and closes."""
        self._outbox.put(None)
        self._sender.join(timeout=1.0)
        self._socket.close()

    def _send_all(self) -> None:
        while (data := self._outbox.get()) is not None:
            try:
                self._socket.sendall(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
            except OSError:  # the reader is gone, which `receive` tells
                return
