"""Whether a prefill node that cannot be asked is dead: its host says so by refusing every port that it had.

A refused connection comes from the host's kernel, which closes the sockets of a process when all of its
threads have ended. A timeout, an unreachable host or a connection that is accepted say nothing: the node may
be frozen, the network cut, or the port in another's hands. The addresses must be the hosts' own: something in
between, which refuses on behalf of a host that it cannot reach, would make a proof of what is none.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Mapping

from ..runtime.completions import Completions
from ..runtime.timing import Timing


def is_refused(address: str, timeout_s: float) -> bool:
    """Whether ``ip:port`` refuses a connection, rather than accepting it or being silent."""
    host, _, port = address.rpartition(":")
    try:
        ip = ipaddress.ip_address(host.strip("[]"))  # a name may mean another host by now
        if not 0 < int(port) < 1 << 16:
            return False
        socket.create_connection((str(ip), int(port)), timeout_s).close()
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):
        return False
    return False


class DeathProbe:
    """Asks on a thread of its own, which sleeps while nobody is suspected."""

    def __init__(self, timing: Timing, refuses: Callable[[str, float], bool] = is_refused) -> None:
        self._timing = timing
        self._refuses = refuses
        self._proven = Completions[str]()
        self._wake = threading.Condition()
        # What follows is guarded by `_wake`.
        self._suspects: Mapping[str, tuple[str, ...]] = {}
        self._thread: threading.Thread | None = None

    def watch(self, suspects: Mapping[str, tuple[str, ...]]) -> None:
        """Incarnations to ask about from now on, with what were their addresses; replaces those before."""
        if suspects == self._suspects:
            return
        with self._wake:
            self._suspects = suspects
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="death-probe", daemon=True)
                self._thread.start()
            self._wake.notify()

    def poll(self) -> list[str]:
        """Incarnations whose death is proven since the last call."""
        return self._proven.drain()

    def fileno(self) -> int:
        """Readable while `poll` has something."""
        return self._proven.fileno()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._suspects:
                    self._wake.wait()
                suspects = dict(self._suspects)
            # Within one round: an address that was refused a while ago may be another's by now.
            for incarnation, addresses in suspects.items():
                if all(self._refuses(address, self._timing.death_probe_timeout_s) for address in addresses):
                    self._proven.push(incarnation)
            with self._wake:
                self._wake.wait(self._timing.death_probe_interval_s)
