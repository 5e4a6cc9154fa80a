"""Processes that belong together."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from pdserve.runtime.process import (
    NO_KEYS,
    AccessKeys,
    available_memory_bytes,
    end,
    handed_keys,
    obituary,
    routable_host,
    spawn,
    usable_cores,
    wait_or_kill,
)
from pdserve.tests.deadline import DEADLINE_S

pytestmark = pytest.mark.process

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
IGNORE_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP


def python(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE)


def running(code: str) -> subprocess.Popen[bytes]:
    """A process that has got as far as its `print`."""
    process = python(code)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = running(SLEEP)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def stubborn() -> Iterator[subprocess.Popen[bytes]]:
    process = running(IGNORE_SIGTERM)
    yield process
    process.kill()
    process.communicate()


def test_signals_that_mean_nothing_to_a_server_do_not_end_it() -> None:
    code = (
        "import os, signal; from pdserve.runtime.process import ignore_stray_signals;"
        "ignore_stray_signals();"
        "[signal.raise_signal(getattr(signal, f'SIG{name}')) for name in ('HUP', 'USR1', 'USR2', 'ALRM')];"
        "print('alive')"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done


def test_end_asks_first(sleeper: subprocess.Popen[bytes]) -> None:
    end(sleeper, grace_s=DEADLINE_S)
    assert sleeper.returncode == -signal.SIGTERM


def test_end_kills_what_does_not_listen(stubborn: subprocess.Popen[bytes]) -> None:
    end(stubborn, grace_s=0.05)
    assert stubborn.returncode == -signal.SIGKILL


def test_end_leaves_what_has_ended(sleeper: subprocess.Popen[bytes]) -> None:
    sleeper.kill()
    sleeper.wait()
    end(sleeper, grace_s=DEADLINE_S)
    assert sleeper.returncode == -signal.SIGKILL


def test_wait_or_kill_sends_no_second_sigterm(sleeper: subprocess.Popen[bytes]) -> None:
    wait_or_kill(sleeper, grace_s=0.05)
    assert sleeper.returncode == -signal.SIGKILL


def test_an_obituary_says_how_it_ended(sleeper: subprocess.Popen[bytes]) -> None:
    assert obituary("decode 0", sleeper) == f"decode 0 (pid {sleeper.pid}) runs"
    end(sleeper, grace_s=DEADLINE_S)
    assert obituary("decode 0", sleeper) == f"decode 0 (pid {sleeper.pid}) was ended by SIGTERM"
    failed = python("raise SystemExit(3)")
    failed.communicate()
    assert obituary("router", failed) == f"router (pid {failed.pid}) ended with exit code 3"


def ends(pid: int) -> bool:
    """Whether the process, which is no child of ours, ends within the deadline."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], DEADLINE_S)[0])
    finally:
        os.close(fd)


CHILD = """
import os, sys, time
from pdserve.runtime.process import die_with_parent
die_with_parent(int(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(600)
"""
PARENT = f"""
import os, subprocess, sys
subprocess.run([sys.executable, "-P", "-c", {CHILD!r}, str(os.getpid())])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_dies_with_its_parent_however_that_ends(number: signal.Signals) -> None:
    with python(PARENT) as parent:
        assert parent.stdout is not None
        child_pid = int(parent.stdout.readline())
        parent.send_signal(number)
        assert ends(child_pid)


def test_a_child_ends_at_once_when_its_parent_is_gone_already() -> None:
    code = "import subprocess; from pdserve.runtime.process import die_with_parent; die_with_parent(2**22)"
    process = python(code + "; print('still here')")
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, output) == (-signal.SIGTERM, b"")


def test_spawn_keeps_the_working_directory_off_the_module_path(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def popen(arguments: list[str], **options: object) -> None:
        seen.update(options, arguments=arguments)

    monkeypatch.setattr(subprocess, "Popen", popen)
    spawn(["router", "--port", "0"], pass_fds=(7,))
    del seen["env"]
    assert seen == {
        "arguments": [
            *(sys.executable, "-P", "-m", "pdserve", "router", "--port", "0"),
            *("--parent-pid", str(os.getpid())),
        ],
        "process_group": 0,
        "pass_fds": (7,),
        "stdout": None,
        "stderr": None,
    }


@pytest.mark.parametrize("keys", [NO_KEYS, AccessKeys(("key-1", 'key "2"'), "key-3")])
def test_api_keys_are_handed_on_but_not_in_the_command_line(
    keys: AccessKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def popen(arguments: list[str], **options: object) -> None:
        seen.update(options, arguments=arguments)

    monkeypatch.setattr(subprocess, "Popen", popen)
    spawn(["router"], keys=keys)
    assert not [argument for argument in seen["arguments"] if argument in (*keys.api, "key-3")]
    monkeypatch.setattr(os, "environ", seen["env"])
    assert handed_keys() == keys
    assert handed_keys() == NO_KEYS, "what this process starts gets them from `spawn` alone"


def test_end_now_skips_the_tear_down_but_no_output() -> None:
    code = "import atexit; from pdserve.runtime.process import end_now; atexit.register(print, 'torn down')"
    process = python(code + "; print('done'); end_now(3)")
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, output) == (3, b"done\n")


def test_cores_that_this_process_may_not_use_do_not_count() -> None:
    allowed = os.sched_getaffinity(0)
    assert usable_cores() == len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_this_host_has_memory_left() -> None:
    assert 0 < available_memory_bytes() < 1 << 50


@pytest.mark.parametrize("host", ["127.0.0.1", "10.1.2.3", "node-7", "::1"])
def test_a_host_with_a_name_is_reached_by_it(host: str) -> None:
    assert routable_host(host) == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_all_interfaces_are_reached_by_an_address_of_ours(host: str) -> None:
    found = routable_host(host)
    assert found not in ("0.0.0.0", "::", "")
    assert found.count(".") == 3
