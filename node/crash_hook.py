"""Ends a node in mid-stream, for tests of what the rest of the cluster does then."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from ..messages.node import AttemptFailed, TokenOutputs


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class CrashHook:
    """Calls `end` once `limit` outputs of choices were sent; 0: never. What a client has not received by then
    is lost, as in any crash."""

    def __init__(self, limit: int, end: Callable[[], None]) -> None:
        self._limit = limit
        self._end = end
        self._num_sent = 0

    def sent(self, message: TokenOutputs | AttemptFailed) -> None:
        if not self._limit or not isinstance(message, TokenOutputs):
            return
        before, self._num_sent = self._num_sent, self._num_sent + len(message.outputs)
        if before < self._limit <= self._num_sent:
            self._end()
