"""Results on their way from a thread to the loop."""

from __future__ import annotations

import os
import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class Completions(Generic[T]):
    """Any thread pushes; the loop sleeps on the descriptor among its other ones, and drains."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._results: list[T] = []
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def push(self, result: T) -> None:
        with self._lock:
            self._results.append(result)
            if len(self._results) == 1 and self._event >= 0:
                os.eventfd_write(self._event, 1)

    def drain(self) -> list[T]:
        """Every result since the last call, in the order of `push`."""
        with self._lock:
            results, self._results = self._results, []
            if results and self._event >= 0:
                os.eventfd_read(self._event)
        return results

    def fileno(self) -> int:
        """Readable while `drain` has results."""
        return self._event

    def close(self) -> None:
        with self._lock:
            event, self._event = self._event, -1
            if event >= 0:
                os.close(event)
