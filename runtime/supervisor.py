"""Runs a cluster's processes on this host: `pdserve up`.

A child that ends before the cluster was ready ends the start, with the reason. Later a node that dies is
started again at once, and the router goes on with the others meanwhile; one that keeps dying waits longer
each time.

A router that is told to end leaves the listener, which is the supervisor's, to a successor that is started at
once, while it answers what it has accepted: whoever connects meanwhile waits for that one.

The supervisor takes in the processes that a dead child leaves behind. Once the last of them has ended, it
knows that nothing of that incarnation lives any more, and says so: the *obituary*.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil

from .errors import StartupError
from .process import (
    NO_KEYS,
    NO_SUCCESSOR,
    SUCCESSOR_MAY_START,
    AccessKeys,
    LastWords,
    adopt_orphans,
    obituary,
    reap_orphans,
    spawn,
    wait_or_kill,
)
from .timing import Timing

_log = logging.getLogger(__name__)
_UNHEALTHY_AFTER = 3  # deaths in a row
_POLL_S = 0.1


def _tell_nobody(incarnation: str) -> None:
    del incarnation


@dataclass(slots=True)
class Child:
    name: str
    arguments: Sequence[str]
    grace_s: float  # between SIGTERM and SIGKILL
    nice: int = 0  # more than ours; its own children have that too
    listener: socket.socket | None = None  # inherited; it outlives a child that is started again
    keys: AccessKeys = NO_KEYS
    process: subprocess.Popen[bytes] | None = None
    last_words: LastWords | None = None
    num_deaths: int = 0  # since it last ran steadily
    has_incarnation: bool = False  # a node, which is told at each start under which name it lives
    incarnation: str = ""
    started_at: float = field(default=0.0)
    restart_at: float = field(default=0.0)  # when it is dead

    def start(self) -> None:
        if self.last_words is not None:
            self.last_words.close()
        self.last_words = LastWords()
        pass_fds = [self.last_words.fd] + ([] if self.listener is None else [self.listener.fileno()])
        arguments = list(self.arguments)
        if self.has_incarnation:
            self.incarnation = uuid.uuid4().hex
            arguments += ["--incarnation", self.incarnation]
        arguments += self.last_words.arguments
        self.process = spawn(arguments, pass_fds, self.keys)
        if self.nice:  # before it has other threads, which would keep theirs
            os.setpriority(os.PRIO_PROCESS, self.process.pid, os.getpriority(os.PRIO_PROCESS, 0) + self.nice)
        self.started_at = time.monotonic()

    def close(self) -> None:
        """Lets go of what outlives the process."""
        if self.last_words is not None:
            self.last_words.close()
            self.last_words = None
        if self.listener is not None:
            self.listener.close()

    @property
    def reason(self) -> str:
        """Its last words, for the end of a sentence about its end."""
        words = self.last_words.read() if self.last_words is not None else ""
        return f": {words}" if words else ""


def restart_pause_s(num_deaths: int, timing: Timing) -> float:
    """Before a child is started again that has died so many times in a row: none after the first."""
    if num_deaths == 1:
        return 0.0
    return min(timing.max_restart_s, timing.restart_s * 2.0 ** (min(num_deaths, 10) - 2))


class Supervisor:
    """Starts children in order. The first one, the router, ends before the others are told to: what it has
    accepted needs them. A second signal ends all at once. With `owner_pid`, our parent's, the end of that
    process is a signal too. (The kernel's own notice comes when the *thread* that started us ends.)

    `on_reaped` gets each incarnation of which no process lives any more; it must not block.
    """

    def __init__(
        self,
        children: Sequence[Child],
        timing: Timing,
        on_reaped: Callable[[str], None] = _tell_nobody,
        owner_pid: int | None = None,
    ) -> None:
        self._children = list(children)
        self._timing = timing
        self._on_reaped = on_reaped
        self._owner_pid = owner_pid
        self._dying: list[str] = []  # incarnations whose child has ended; others of their processes may live
        self._stopping = False
        self._succession_asked = False
        self._retired: list[tuple[subprocess.Popen[bytes], float]] = []  # they drain; when they are killed
        self._strangers: frozenset[int] = frozenset()  # children that this process had before: not ours

    def __enter__(self) -> Supervisor:
        self._strangers = frozenset(child.pid for child in psutil.Process().children())
        adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(SUCCESSOR_MAY_START, self._on_succession)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(signal.SIGHUP, self._on_signal)  # the terminal is gone
        for child in self._children:
            child.start()
        return self

    def __exit__(self, *_: object) -> None:
        for children in (self._children[:1], self._children[1:]):
            self._terminate(children)
            for process, kill_at in self._retired:  # a second signal would cut their drain short
                wait_or_kill(process, max(0.0, kill_at - time.monotonic()))
            for child in children:
                if child.process is not None:
                    wait_or_kill(child.process, child.grace_s)
                child.close()  # or the nodes, taking their leave, would wait for the router's answer

    @property
    def _is_stopping(self) -> bool:
        return self._stopping or (self._owner_pid is not None and os.getppid() != self._owner_pid)

    def _on_signal(self, number: int, frame: object) -> None:
        del number, frame
        if self._stopping:
            self._terminate(self._children)
        self._stopping = True

    def _on_succession(self, number: int, frame: object) -> None:
        del number, frame
        self._succession_asked = True

    @staticmethod
    def _terminate(children: Sequence[Child]) -> None:
        for child in children:
            if child.process is not None and child.process.poll() is None:
                if child.listener is not None:
                    child.process.send_signal(NO_SUCCESSOR)
                child.process.terminate()

    def wait_ready(self, why_not: Callable[[], str], timeout_s: float) -> bool:
        """True when `why_not` is empty; False when a signal asked to stop, or the owner is gone.

        Raises StartupError when a child ended first or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while not self._is_stopping:
            reason = why_not()
            if not reason:
                return True
            for child in self._children:
                if child.process is not None and child.process.poll() is not None:
                    what = f"{obituary(child.name, child.process)} before the cluster was ready"
                    raise StartupError(f"{what}{child.reason}")
            if time.monotonic() > deadline:
                raise StartupError(f"the cluster was not ready within {timeout_s:.0f} s: {reason}")
            time.sleep(_POLL_S)
        return False

    def run(self) -> None:
        """Until SIGTERM, SIGINT, SIGHUP or the owner's end."""
        while not self._is_stopping:
            now = time.monotonic()
            if self._succession_asked:
                self._succession_asked = False
                self._succeed(now)
            self._end_retired(now)
            for child in self._children:
                self._keep_alive(child, now)
            self._bury()
            time.sleep(_POLL_S)

    def _succeed(self, now: float) -> None:
        for child in self._children:
            if child.listener is not None and child.process is not None and child.process.poll() is None:
                _log.info("%s (pid %d) drains; its successor starts", child.name, child.process.pid)
                self._retired.append((child.process, now + child.grace_s))
                child.start()

    def _end_retired(self, now: float) -> None:
        for process, kill_at in self._retired:
            if now > kill_at:
                process.kill()
        self._retired = [each for each in self._retired if each[0].poll() is None]

    def _keep_alive(self, child: Child, now: float) -> None:
        process = child.process
        if process is None:
            if now >= child.restart_at:
                child.start()
            return
        if process.poll() is None:
            return
        lived_s = now - child.started_at
        was_told_to = process.returncode == 0 and lived_s > self._timing.restart_s  # as rolling restarts do
        if was_told_to or lived_s > self._timing.steady_s:
            child.num_deaths = 0
        child.process = None
        child.num_deaths += 1
        pause_s = restart_pause_s(child.num_deaths, self._timing)
        child.restart_at = now + pause_s
        ended = f"{obituary(child.name, process)}{child.reason}"
        if child.num_deaths < _UNHEALTHY_AFTER:
            _log.error("%s; starting it again", ended)
        else:
            _log.error(
                "%s; %s is unhealthy: %d deaths, each soon after a start; starting it again in %g s",
                *(ended, child.name, child.num_deaths, pause_s),
            )
        if child.incarnation:
            self._dying.append(child.incarnation)

    def _bury(self) -> None:
        """Tells of the dead once no orphan is left. Whose it was cannot be seen: all wait for it."""
        if not self._dying:
            return
        own = {child.process.pid for child in self._children if child.process is not None}
        own |= {process.pid for process, _ in self._retired}
        if reap_orphans(own | self._strangers) == 0:
            for incarnation in self._dying:
                self._on_reaped(incarnation)
            self._dying.clear()
