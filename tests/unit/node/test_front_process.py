"""A scheduler and its HTTP front: who goes on when a front ends."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from pdserve.node.front_process import FrontProcess
from pdserve.runtime.process import NO_SUCCESSOR

pytestmark = pytest.mark.process

PAUSE_S = 0.5
SLEEP = "import time; time.sleep(600)"


class Starts:
    """Counts the processes that it starts."""

    def __init__(self, code: str) -> None:
        self._code = code
        self.processes: list[subprocess.Popen[bytes]] = []

    def __call__(self) -> subprocess.Popen[bytes]:
        self.processes.append(subprocess.Popen([sys.executable, "-c", self._code]))
        return self.processes[-1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_front_is_started_again_after_a_pause(number: signal.Signals) -> None:
    starts = Starts(SLEEP)
    front = FrontProcess(starts, pause_s=PAUSE_S)
    try:
        front.keep_alive(10.0)
        assert len(starts.processes) == 1
        starts.processes[0].send_signal(number)
        starts.processes[0].wait()
        front.keep_alive(11.0)
        front.keep_alive(11.1)
        assert len(starts.processes) == 1
        front.keep_alive(12.0)
        front.keep_alive(13.0)
        assert len(starts.processes) == 2
    finally:
        front.close()
    assert -starts.processes[1].returncode in (NO_SUCCESSOR, signal.SIGTERM)


def test_so_is_one_that_ended_in_order() -> None:
    starts = Starts("")
    front = FrontProcess(starts, pause_s=PAUSE_S)
    starts.processes[0].wait()
    front.keep_alive(10.0)
    front.keep_alive(11.0)
    assert len(starts.processes) == 2
    front.close()


def test_a_node_ends_with_a_front_that_failed() -> None:
    starts = Starts("raise SystemExit(3)")
    front = FrontProcess(starts, pause_s=PAUSE_S)
    starts.processes[0].wait()
    with pytest.raises(RuntimeError, match="the HTTP front ended with exit code 3"):
        front.keep_alive(10.0)
    front.close()


def test_a_front_that_is_dead_is_closed() -> None:
    starts = Starts(SLEEP)
    front = FrontProcess(starts, pause_s=PAUSE_S)
    starts.processes[0].kill()
    starts.processes[0].wait()
    front.keep_alive(10.0)
    front.close()
    assert len(starts.processes) == 1
