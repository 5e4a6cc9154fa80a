"""A process that has imported all that pdserve's processes import; those of test clusters are forked from it.

Nearly all that the start of a process costs is imports: 2 to 5 s of processor each, and a cluster has six. A
forked process is as real as an executed one: it has a pid, memory, descriptors, signals and a command line of
its own, and is the child of who started it, so that waiting, killing, freezing and the kernel's notice of a
parent's death are what they are. That takes a nursery for each process that starts others: the nursery, its
child, forks a process that forks the new one and ends; the new one falls to the next ancestor that adopts
orphans, which the starter is.

Imports alone are shared. A fork copies the thread that calls it and no other, so a nursery that has a second
one refuses; what makes threads when it is imported (Mooncake's wheel) each process imports for itself.

`python -m pdserve.tests.nursery CHANNEL PADDING` is the first one, of a test session. In the session's
process and in each that comes of it, `subprocess.Popen` forks what begins with ``python -P -m pdserve``.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from pdserve.cli import main as run
from pdserve.runtime.process import adopt_orphans, end_now

_COMMAND = (sys.executable, "-P", "-m", "pdserve")
_IMPORTED = [
    f"pdserve.{name}"
    for name in (
        "decode.main",
        "front.main",
        "prefill.main",
        "ranks.worker",
        "router.main",
        "transfer.backends.faulty",
    )
]
_STARTS_OTHERS = ("up", "serve", "demo", "prefill", "decode")
_STDIO = (0, 1, 2)
_MAX_ORDER_BYTES = 1 << 20
_MAX_FDS = 64
_FREE_FROM = 500  # of file descriptors: no process of ours has so many when it starts
_PADDING = "." * 8192  # room for the command line of whatever is forked


@dataclass(frozen=True)
class _Order:
    """A process to be started; its descriptors travel beside it."""

    parent_pid: int
    arguments: Sequence[str]  # behind `pdserve`
    cwd: str
    env: Mapping[str, str]
    fds: Sequence[int]  # the numbers of the descriptors in the new process
    process_group: int  # -1: that of the nursery


class _Orders:
    """The starter's end of the channel to its nursery."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lock = threading.Lock()

    def give(self, order: _Order, fds: Sequence[int]) -> int:
        """→ the pid of the new process, our child already. Raises RuntimeError when the nursery refuses."""
        with self._lock:
            socket.send_fds(self._channel, [json.dumps(asdict(order)).encode()], fds)
            answer = self._channel.recv(_MAX_ORDER_BYTES).decode()
        if not answer.isdecimal():
            raise RuntimeError(answer or "the nursery has ended")
        return int(answer)

    def close(self) -> None:
        self._channel.close()


class _ForkedPopen(subprocess.Popen[Any]):
    """`subprocess.Popen`, which leaves processes of pdserve to the nursery."""

    orders: _Orders | None = None  # of this process

    def _execute_child(self, *given: Any) -> None:  # noqa: ANN401  what Popen gives the step that makes it
        arguments, _, _, _, pass_fds, cwd, env, _, _, _, *pipes = given[:16]  # of CPython 3.11 to 3.14
        if self.orders is None or tuple(arguments[: len(_COMMAND)]) != _COMMAND:
            super()._execute_child(*given)  # type: ignore[misc]
            return
        ends = (pipes[0], pipes[3], pipes[5])  # of the new process; -1: as ours
        stdio = [own if end == -1 else end for own, end in zip(_STDIO, ends, strict=True)]
        order = _Order(
            parent_pid=os.getpid(),
            arguments=arguments[len(_COMMAND) :],
            cwd=os.fspath(cwd or Path.cwd()),
            env=dict(os.environ if env is None else env),
            fds=(*_STDIO, *pass_fds),
            process_group=given[-1],
        )
        self.pid = self.orders.give(order, [*stdio, *pass_fds])
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


@contextmanager
def nursery() -> Iterator[None]:
    """Within, what this process starts of pdserve is forked. It adopts orphans from now on."""
    adopt_orphans()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-P", "-m", "pdserve.tests.nursery", str(theirs.fileno()), _PADDING]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # or numpy's BLAS makes threads when it is imported
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL, env=env)
    theirs.close()
    orders = _Orders(ours)
    try:
        with _forking(orders):
            yield
    finally:
        orders.close()
        process.wait()


@contextmanager
def _forking(orders: _Orders) -> Iterator[None]:
    with (
        mock.patch.object(_ForkedPopen, "orders", orders),
        mock.patch.object(subprocess, "Popen", _ForkedPopen),
    ):
        yield


# ---- in the nursery ---------------------------------------------------------------------------------


def _serve(channel: socket.socket) -> tuple[_Order, list[int]]:
    """Forks a process for each order, and ends when no more can come. Returns in the new ones alone: with
    the order, and its descriptors."""
    while True:
        message, fds, _, _ = socket.recv_fds(channel, _MAX_ORDER_BYTES, _MAX_FDS)
        if not message:
            os._exit(0)
        if (num_threads := len(os.listdir("/proc/self/task"))) != 1:
            channel.send(f"the nursery has {num_threads} threads: an import has made some".encode())
            continue
        reader, writer = os.pipe()
        middle_pid = os.fork()
        if middle_pid == 0:
            middle_pid = os.getpid()
            if pid := os.fork():
                os.write(writer, str(pid).encode())
                os._exit(0)
            while os.getppid() == middle_pid:  # its end makes us the starter's child
                time.sleep(0.0005)
            channel.detach()  # of the nursery; all that is not ours is closed soon
            return _Order(**json.loads(message)), fds
        os.waitpid(middle_pid, 0)
        channel.send(os.read(reader, 32))
        for fd in (reader, writer, *fds):
            os.close(fd)


def _become(order: _Order, fds: Sequence[int], own: int | None) -> int | None:
    """Descriptors, directory, environment, group and name of the new process. Returns `own`, a descriptor of
    ours, as it is now."""
    moved = [_out_of_the_way(fd) for fd in fds]
    own = None if own is None else _out_of_the_way(own)
    _close_all_but((*moved, own))
    for fd, number in zip(moved, order.fds, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(order.cwd)
    os.environ.clear()
    os.environ.update(order.env)
    if order.process_group >= 0:
        os.setpgid(0, order.process_group)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["pdserve", *order.arguments]
    _rename([*_COMMAND, *order.arguments])
    return own


def _out_of_the_way(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FREE_FROM)


def _close_all_but(kept: Sequence[int | None]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):  # the one that listed them
                os.close(int(name))


def _rename(words: Sequence[str]) -> None:
    """The command line that `ps` shows: the kernel reads it where it was when the first nursery started."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = (
        int(fields[45]),
        int(fields[46]),
    )  # arg_start and arg_end of proc(5), whose field 3 is fields[0]
    line = b"".join(word.encode() + b"\0" for word in words)
    ctypes.memmove(begin, line.ljust(end - begin, b"\0"), end - begin)


def main() -> NoReturn:
    """The first nursery's; in each process that comes of it, what that one is to do."""
    for name in _IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: who started us ends us
    gc.collect()
    gc.freeze()  # or the first collection of each process would copy every page
    channel = socket.socket(fileno=int(sys.argv[1]))
    while True:
        order, fds = _serve(channel)
        own, pid = None, 0
        if order.arguments[0] in _STARTS_OTHERS:
            ours, theirs = (end.detach() for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            pid = os.fork()
            if pid == 0:
                _close_all_but((*_STDIO, theirs))
                channel = socket.socket(fileno=theirs)
                continue
            adopt_orphans()
            own = ours
        own = _become(order, fds, own)
        forking = contextlib.nullcontext() if own is None else _forking(_Orders(socket.socket(fileno=own)))
        with forking:
            try:
                code = run(order.arguments)
            except SystemExit as error:  # argparse's
                code = int(error.code or 0)
        if pid:  # who looks at what we left behind must not find our nursery on its way out
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        end_now(code)  # the interpreter's own end would take torch apart in processes that never asked for it


if __name__ == "__main__":
    main()
