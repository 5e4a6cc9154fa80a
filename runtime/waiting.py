"""Where a scheduler's loop sleeps: until a message, a finished forward, a finished write, or a deadline."""

from __future__ import annotations

from typing import Any

import zmq


class Waiter:
    """Sleeps on any number of sockets and file descriptors."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()

    def add(self, source: zmq.Socket[Any] | int) -> None:
        self._poller.register(source, zmq.POLLIN)

    def remove(self, source: zmq.Socket[Any] | int) -> None:
        self._poller.unregister(source)

    def wait(self, timeout_s: float) -> None:
        """Return when something is readable, or after `timeout_s` (rounded up to a millisecond)."""
        self._poller.poll(max(0, int(timeout_s * 1000 + 0.999)))
