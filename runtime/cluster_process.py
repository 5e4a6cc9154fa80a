"""`pdserve up` as a child of this process, which waits until it serves."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from .errors import StartupError
from .process import NO_KEYS, AccessKeys, LastWords, end, obituary, spawn

_READY = b"pdserve is ready at "
_GRACE_S = 90.0  # a router lets running requests end first, for a minute by default


class ClusterProcess:
    """A cluster with these arguments on a free port. It ends with this process, whatever ends that.

    Its log goes to `log_path`, or to our stderr.
    """

    def __init__(
        self, arguments: Sequence[str], log_path: Path | None = None, keys: AccessKeys = NO_KEYS
    ) -> None:
        self._arguments = ["up", "--port", "0", *arguments]
        self._log_path = log_path
        self._keys = keys
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Returns the router's URL when requests are accepted. Raises StartupError, one line, when the
        cluster ended instead; whatever else interrupts the wait ends the cluster."""
        last_words = LastWords()
        log = None if self._log_path is None else self._log_path.open("wb")
        try:
            self._process = spawn(
                [*self._arguments, *last_words.arguments],
                (last_words.fd,),
                self._keys,
                stdout=subprocess.PIPE,
                stderr=None if log is None else log.fileno(),
            )
            return self._wait_ready(self._process, last_words)
        except BaseException:
            self.stop()
            raise
        finally:
            last_words.close()
            if log is not None:
                log.close()

    def _wait_ready(self, process: subprocess.Popen[bytes], last_words: LastWords) -> str:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(_READY):
                return line.removeprefix(_READY).decode().strip()
        process.wait()
        raise StartupError(last_words.read() or f"{obituary('pdserve up', process)}; see its log")

    @property
    def pid(self) -> int:
        """Of `pdserve up`, whose children are the router and the nodes."""
        assert self._process is not None, "the cluster was not started"
        return self._process.pid

    def why_it_ended(self) -> str:
        """In words; empty while it runs."""
        if self._process is None or self._process.poll() is None:
            return ""
        return obituary("pdserve up", self._process)

    def stop(self) -> int:
        """Ends the cluster and returns its exit code. Idempotent."""
        if self._process is None:
            return 0
        end(self._process, _GRACE_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return int(self._process.returncode)
