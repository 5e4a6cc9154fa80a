"""Processes that belong together: children die with their parent, and the parent says why a child ended."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_MAX_LAST_WORDS_BYTES = 4096
_KEYS_VARIABLE = "PDSERVE_KEYS"
# What a parent tells a child before it ends it: nobody will take its place. (One that is ended alone gets a
# successor, which inherits the listener.)
NO_SUCCESSOR = signal.SIGUSR1
# What a child tells its supervisor: it takes no more connections, its successor may.
SUCCESSOR_MAY_START = signal.SIGUSR2


@dataclass(frozen=True, slots=True, repr=False)
class AccessKeys:
    """Who may ask over HTTP: bearer tokens for everything but the admin routes, and the one for those too.

    `cluster_secret`: what processes of one cluster know each other by; empty if they have none.
    """

    api: tuple[str, ...] = ()
    admin: str = ""
    cluster_secret: str = ""

    @property
    def first(self) -> str:
        """What a process of ours shows to another one for ordinary routes; empty if none is needed."""
        return self.api[0] if self.api else ""


NO_KEYS = AccessKeys()


def die_with_parent(parent_pid: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel for this signal when the parent ends (Linux only), whatever ends it."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent_pid:  # it ended before it was asked for
        os.kill(os.getpid(), number)


def ignore_stray_signals() -> None:
    """Signals whose default is to end the process, and that mean nothing to a server: a log rotation's
    SIGHUP must cut no stream."""
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


class Succession:
    """Whether another process will take this one's place when it ends; make it in the main thread."""

    def __init__(self) -> None:
        self._parent_pid = os.getppid()
        self._is_denied = False
        signal.signal(NO_SUCCESSOR, self._on_denied)

    def _on_denied(self, number: int, frame: object) -> None:
        del number, frame
        self._is_denied = True

    @property
    def is_expected(self) -> bool:
        return not self._is_denied and os.getppid() == self._parent_pid

    def begin(self) -> None:
        os.kill(self._parent_pid, SUCCESSOR_MAY_START)


def adopt_orphans() -> None:
    """From now on, what a descendant leaves behind becomes a child of this process (Linux only)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def reap_orphans(own: Collection[int]) -> int:
    """Collects what has ended of the processes that were adopted; returns how many still live.

    `own`: pids of children that were not adopted, whose ends are another's to collect.
    """
    num_living = 0
    for child in psutil.Process().children():
        if child.pid not in own:
            with contextlib.suppress(ChildProcessError):  # it was this process's own, and just ended
                num_living += os.waitpid(child.pid, os.WNOHANG)[0] == 0
    return num_living


def spawn(
    arguments: Sequence[str],
    pass_fds: Sequence[int] = (),
    keys: AccessKeys = NO_KEYS,
    *,
    stdout: int | None = None,
    stderr: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start `pdserve ARGUMENTS…` with this interpreter, in a process group of its own. It dies with us.

    `stdout`, `stderr`: as `subprocess.Popen` takes them; ours where None.

    Own group: Ctrl-C reaches the parent alone, which then ends its children in order. `-P` keeps the
    working directory off the child's module path: a checkout of pdserve has folders named like packages.
    Keys travel in the child's environment, because `ps` shows command lines to every user of the host.
    """
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "pdserve", *arguments, "--parent-pid", str(os.getpid())],
        process_group=0,
        pass_fds=pass_fds,
        stdout=stdout,
        stderr=stderr,
        env={**os.environ, _KEYS_VARIABLE: json.dumps(asdict(keys))},
    )


def handed_keys() -> AccessKeys:
    """The keys that our parent gave to `spawn`; they are taken out of the environment."""
    given = json.loads(os.environ.pop(_KEYS_VARIABLE, "{}"))
    return AccessKeys(tuple(given.get("api", ())), given.get("admin", ""), given.get("cluster_secret", ""))


class LastWords:
    """A few bytes of memory in which a child leaves why it could not start. Close it when the child ended."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("last-words")

    @property
    def arguments(self) -> list[str]:
        """For the child, which must inherit `fd`."""
        return ["--last-words-fd", str(self.fd)]

    def read(self) -> str:
        return os.pread(self.fd, _MAX_LAST_WORDS_BYTES, 0).decode(errors="replace")

    def close(self) -> None:
        os.close(self.fd)


def leave_last_words(fd: int, reason: str) -> None:
    os.pwrite(fd, reason.encode()[:_MAX_LAST_WORDS_BYTES], 0)


def end(process: subprocess.Popen[Any], grace_s: float) -> None:
    """SIGTERM, then SIGKILL after `grace_s`."""
    if process.poll() is None:
        process.terminate()
        wait_or_kill(process, grace_s)


def wait_or_kill(process: subprocess.Popen[Any], grace_s: float) -> None:
    """Give a process that was told to end its time; a second SIGTERM would cut its drain short."""
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_now(code: int) -> NoReturn:
    """End this process, whose parts are closed, without the interpreter's own tear-down.

    With torch and Mooncake loaded that takes a second and more, for memory that the kernel frees anyway.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def obituary(name: str, process: subprocess.Popen[bytes]) -> str:
    """Why a child ended, in words."""
    code = process.poll()
    if code is None:
        return f"{name} (pid {process.pid}) runs"
    if code < 0:
        return f"{name} (pid {process.pid}) was ended by {signal.Signals(-code).name}"
    return f"{name} (pid {process.pid}) ended with exit code {code}"


def usable_cores() -> int:
    """Cores that this process may run on: fewer than the host has under `taskset` or in many containers."""
    return len(os.sched_getaffinity(0))


def available_memory_bytes() -> int:
    """Memory that this host, or this container if it is limited, can still give."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, max(0, int(text) - int(used.read_text())))
    return available


def return_free_memory() -> None:
    """What this process has freed goes back to the host; the allocator keeps it otherwise for what comes."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def address_toward(host: str) -> str:
    """Our address on the way to `host`: the loopback one where it is this machine's own. Raises OSError when
    its name is not known."""
    (family, _, _, _, address), *_ = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing, only picks a route
        return str(probe.getsockname()[0])


def routable_host(host: str) -> str:
    """The address that others reach this host by: `host` itself unless it means "all interfaces"."""
    if host not in ("0.0.0.0", "::", ""):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # documentation address: sends nothing, only picks a route
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
