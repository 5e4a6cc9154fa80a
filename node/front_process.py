"""A node's HTTP front as its scheduler keeps it: started, started again when it was killed, ended."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable

from ..runtime.process import NO_SUCCESSOR, end, obituary

_log = logging.getLogger(__name__)


class FrontProcess:
    """What a node works on goes past its front, so a front that was killed or told to end (by an operator, or
    by the kernel for want of memory) costs no request: another one takes over the listener. One that failed
    would fail again: the node ends, and says why.

    `start` makes a front on the node's listener; `pause_s` is between the end of one and the next.
    """

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]], *, pause_s: float) -> None:
        self._start = start
        self._pause_s = pause_s
        self._process: subprocess.Popen[bytes] | None = start()
        self._start_after = 0.0  # when it is dead

    def keep_alive(self, now: float) -> None:
        """Raises RuntimeError when it failed."""
        if self._process is None:
            if now >= self._start_after:
                self._process = self._start()
            return
        code = self._process.poll()
        if code is None:
            return
        if code > 0:
            raise RuntimeError(f"the HTTP front ended with exit code {code}")
        _log.error("%s; the node goes on, and starts it again", obituary("the HTTP front", self._process))
        self._process, self._start_after = None, now + self._pause_s

    def close(self) -> None:
        """It leaves the routers first: the node ends too."""
        if self._process is not None:
            self._process.send_signal(NO_SUCCESSOR)
            end(self._process, grace_s=5.0)
