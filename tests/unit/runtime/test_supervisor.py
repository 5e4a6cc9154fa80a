"""`pdserve up`: children that die too early, later, or again and again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from pdserve.runtime import supervisor as supervisor_module
from pdserve.runtime.errors import StartupError
from pdserve.runtime.process import NO_KEYS, SUCCESSOR_MAY_START, AccessKeys, wait_or_kill
from pdserve.runtime.supervisor import Child, Supervisor
from pdserve.runtime.timing import Timing
from pdserve.tests.deadline import DEADLINE_S
from pdserve.tests.present import at_present

pytestmark = pytest.mark.process

AT_ONCE = Timing(restart_s=0.0)
SLEEP = "import time; time.sleep(600)"


@pytest.fixture(autouse=True)
def tiny_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child's one argument is the Python it runs; nothing waits for long."""

    def spawn(arguments: Sequence[str], pass_fds: Sequence[int], keys: AccessKeys) -> subprocess.Popen[bytes]:
        assert keys == NO_KEYS
        return subprocess.Popen([sys.executable, "-S", "-P", "-c", *arguments], pass_fds=pass_fds)

    monkeypatch.setattr(supervisor_module, "spawn", spawn)
    monkeypatch.setattr(supervisor_module, "_POLL_S", 0.01)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The supervisor takes the process's signal handlers; pytest gets its own back."""
    kept = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, SUCCESSOR_MAY_START)
    }
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def child(code: str, name: str = "decode 0") -> Child:
    return Child(name, [code], grace_s=DEADLINE_S)


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def process_of(child: Child) -> subprocess.Popen[bytes]:
    assert child.process is not None
    return child.process


def test_ready_children_go_on_until_the_block_ends() -> None:
    first, second = child(SLEEP, "router"), child(SLEEP)
    with Supervisor([first, second], AT_ONCE) as supervisor:
        assert supervisor.wait_ready(str, DEADLINE_S)
        assert process_of(first).poll() is None
        assert process_of(second).poll() is None
    assert process_of(first).returncode == process_of(second).returncode == -signal.SIGTERM


def test_a_child_steps_back_by_as_much_as_it_is_told() -> None:
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    polite, other = child(SLEEP), child(SLEEP)
    polite.nice = 3
    with Supervisor([polite, other], AT_ONCE):
        niceness = [os.getpriority(os.PRIO_PROCESS, process_of(each).pid) for each in (polite, other)]
    assert niceness == [min(19, ours + 3), ours]


def test_a_child_that_ends_before_the_cluster_is_ready_ends_the_start() -> None:
    healthy, broken = child(SLEEP, "router"), child("raise SystemExit(3)", "prefill 0")
    with (
        pytest.raises(
            StartupError, match=r"^prefill 0 \(pid \d+\) ended with exit code 3 before the cluster"
        ),
        Supervisor([healthy, broken], AT_ONCE) as supervisor,
    ):
        supervisor.wait_ready(lambda: "no node", DEADLINE_S)
    assert process_of(healthy).returncode == -signal.SIGTERM


def test_a_child_that_cannot_start_leaves_the_reason() -> None:
    code = "import os, sys; os.pwrite(int(sys.argv[2]), b'no model at x', 0); raise SystemExit(1)"
    with (
        pytest.raises(StartupError, match=r"exit code 1 before the cluster was ready: no model at x$"),
        Supervisor([child(code, "router")], AT_ONCE) as supervisor,
    ):
        supervisor.wait_ready(lambda: "no node", DEADLINE_S)


def test_the_end_of_the_owner_ends_the_wait_and_the_run() -> None:
    for owner_pid in (os.getppid(), os.getppid() + 1):
        is_gone = owner_pid != os.getppid()
        started = child(SLEEP)
        with Supervisor([started], AT_ONCE, owner_pid=owner_pid) as supervisor:
            assert supervisor.wait_ready(str, DEADLINE_S) == (not is_gone)
            if is_gone:
                supervisor.run()
        assert process_of(started).returncode == -signal.SIGTERM


def test_a_cluster_that_is_never_ready_is_given_up() -> None:
    with (
        pytest.raises(StartupError, match=r"the cluster was not ready within 0 s: no node$"),
        Supervisor([child(SLEEP)], AT_ONCE) as supervisor,
    ):
        supervisor.wait_ready(lambda: "no node", 0.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait(number: signal.Signals) -> None:
    started = child(SLEEP)

    def why_not() -> str:
        os.kill(os.getpid(), number)
        return "stopped"

    with Supervisor([started], AT_ONCE) as supervisor:
        assert not supervisor.wait_ready(why_not, DEADLINE_S)
    assert process_of(started).returncode == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_and_the_children(number: signal.Signals) -> None:
    started = child(f"import os, time; os.kill(os.getppid(), {int(number)}); time.sleep(600)")
    with Supervisor([started], AT_ONCE) as supervisor:
        supervisor.run()
    assert process_of(started).returncode == -signal.SIGTERM


def test_a_child_that_dies_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    mortal, other = child(SLEEP), child(SLEEP, "router")
    with Supervisor([mortal, other], AT_ONCE) as supervisor:
        first, unharmed = process_of(mortal), process_of(other)
        first.kill()
        first.wait()
        assert wait_for(lambda: is_alive_again(supervisor, mortal))
        assert process_of(mortal).pid != first.pid
        assert process_of(mortal).poll() is None
        assert process_of(other) is unharmed
    assert mortal.num_deaths == 1
    assert f"decode 0 (pid {first.pid}) was ended by SIGKILL; starting it again" in caplog.messages


def is_alive_again(supervisor: Supervisor, child: Child) -> bool:
    supervisor._keep_alive(child, time.monotonic())
    return child.process is not None


def test_an_obituary_waits_for_the_last_process_of_an_incarnation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child leaves a process behind: until that has ended too, nobody is told that the child is dead."""
    read_end, write_end = os.pipe()
    code = (
        "import os, subprocess, time; orphan = subprocess.Popen(['sleep', '600']);"
        f"os.write({write_end}, str(orphan.pid).encode()); time.sleep(600)"
    )
    mortal = child(code, "prefill 0")
    mortal.has_incarnation = True
    buried: list[str] = []
    monkeypatch.setattr(
        supervisor_module,
        "spawn",
        lambda arguments, pass_fds, keys: subprocess.Popen(
            [sys.executable, "-S", "-P", "-c", *arguments], pass_fds=(write_end,)
        ),
    )
    with Supervisor([mortal], Timing(restart_s=60.0), buried.append) as supervisor:
        orphan_pid = int(os.read(read_end, 20))
        assert len(mortal.incarnation) == 32
        supervisor._bury()
        assert buried == []
        process = process_of(mortal)
        process.kill()
        process.wait()
        supervisor._keep_alive(mortal, time.monotonic())
        for _ in range(3):
            supervisor._bury()
        assert buried == [], "its orphan lives"
        os.kill(orphan_pid, signal.SIGKILL)

        def is_buried() -> bool:
            supervisor._bury()
            return bool(buried)

        assert wait_for(is_buried)
        assert buried == [mortal.incarnation]
        supervisor._bury()
        assert len(buried) == 1, "told once"
        with pytest.raises(ProcessLookupError):
            os.kill(orphan_pid, 0)
    os.close(read_end)
    os.close(write_end)


def test_each_start_is_an_incarnation_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: list[Sequence[str]] = []

    def spawn(given: Sequence[str], *_: object) -> subprocess.Popen[bytes]:
        arguments.append(given)
        return subprocess.Popen([sys.executable, "-S", "-P", "-c", SLEEP])

    monkeypatch.setattr(supervisor_module, "spawn", spawn)
    node, router = Child("decode 0", ["decode"], 1.0, has_incarnation=True), Child("router", ["router"], 1.0)
    for started in (node, node, router):
        started.start()
        process_of(started).kill()
        process_of(started).wait()
    first, second, third = arguments
    assert first[:2] == second[:2] == ["decode", "--incarnation"]
    assert first[2] != second[2] == node.incarnation
    assert third[0] == "router"
    assert "--incarnation" not in third
    node.close()
    router.close()


def test_a_child_that_keeps_dying_is_started_after_growing_pauses_and_the_others_live_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    mortal, healthy = child("raise SystemExit(9)"), child(SLEEP, "router")
    pauses = []
    with Supervisor([mortal, healthy], Timing()) as supervisor:
        now = time.monotonic()
        for _ in range(9):
            process_of(mortal).wait()
            supervisor._keep_alive(mortal, now)
            assert mortal.process is None
            pauses.append(mortal.restart_at - now)
            supervisor._keep_alive(mortal, mortal.restart_at - 0.001)
            assert at_present(mortal.process) is None
            supervisor._keep_alive(mortal, mortal.restart_at)
            assert at_present(mortal.process) is not None
        assert process_of(healthy).poll() is None
        process_of(mortal).wait()
    assert pauses == pytest.approx([0, 1, 2, 4, 8, 16, 32, 60, 60])
    assert caplog.messages[1].endswith("ended with exit code 9; starting it again")
    assert caplog.messages[2].endswith(
        "is unhealthy: 3 deaths, each soon after a start; starting it again in 2 s"
    )


def test_a_router_that_drains_gets_a_successor_at_once_and_the_time_to_drain() -> None:
    """It has the same listener; both end in order."""
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"os.kill(os.getppid(), {int(SUCCESSOR_MAY_START)}); time.sleep(600)"
    )
    router = child(code, "router")
    router.listener = socket.create_server(("127.0.0.1", 0))
    with Supervisor([router, child(SLEEP)], AT_ONCE) as supervisor:
        first = process_of(router)
        assert wait_for(lambda: supervisor._succession_asked)
        supervisor._succeed(time.monotonic())
        second = process_of(router)
        assert second is not first
        assert second.poll() is first.poll() is None
        supervisor._end_retired(time.monotonic())
        assert first.poll() is None
        supervisor._end_retired(time.monotonic() + DEADLINE_S + 1)
        assert first.wait() == -signal.SIGKILL
        supervisor._keep_alive(router, time.monotonic())
        assert process_of(router) is second
        assert router.num_deaths == 0
        second.kill()


def test_a_child_that_dies_now_and_then_is_started_again_at_once() -> None:
    mortal = child("")
    with Supervisor([mortal], AT_ONCE) as supervisor:
        for _ in range(3):
            process_of(mortal).wait()
            an_hour_later = time.monotonic() + 3600.0
            supervisor._keep_alive(mortal, an_hour_later)
            assert mortal.num_deaths == 1
            supervisor._keep_alive(mortal, an_hour_later)
            assert mortal.process is not None


def test_a_child_that_is_told_to_end_again_and_again_is_started_again_at_once() -> None:
    """A rolling restart is no crash. What ends in order as soon as it has started does it of itself."""
    node = child("")
    with Supervisor([node], Timing()) as supervisor:
        for lived_s, num_deaths in ((2.0, 1), (2.0, 1), (2.0, 1), (0.5, 2), (0.5, 3), (2.0, 1)):
            process_of(node).wait()
            now = node.started_at + lived_s
            supervisor._keep_alive(node, now)
            assert node.num_deaths == num_deaths
            assert (node.restart_at == now) == (num_deaths == 1)
            supervisor._keep_alive(node, node.restart_at)
        process_of(node).wait()


def test_a_lost_terminal_ends_the_run_in_order_unless_it_was_to_be_ignored() -> None:
    """`nohup` leaves SIGHUP ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    started = child("import os, signal, time; os.kill(os.getppid(), signal.SIGHUP); time.sleep(600)")
    with Supervisor([started], AT_ONCE) as supervisor:
        supervisor.run()
    assert process_of(started).returncode == -signal.SIGTERM
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Supervisor([child(SLEEP)], AT_ONCE):
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_the_router_has_ended_before_the_nodes_are_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    router, prefill, decode = (child(SLEEP, name) for name in ("router", "prefill 0", "decode 0"))
    router.listener = socket.create_server(("127.0.0.1", 0))
    address = router.listener.getsockname()
    events: list[tuple[str, int]] = []
    terminate = subprocess.Popen.terminate

    def tell(process: subprocess.Popen[bytes]) -> None:
        events.append(("told", process.pid))
        if len(events) > 1:  # a node; taking its leave of the router, it is refused and does not wait
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address, timeout=DEADLINE_S)
        terminate(process)

    def wait(process: subprocess.Popen[bytes], grace_s: float) -> None:
        wait_or_kill(process, grace_s)
        events.append(("ended", process.pid))

    monkeypatch.setattr(subprocess.Popen, "terminate", tell)
    monkeypatch.setattr(supervisor_module, "wait_or_kill", wait)
    with Supervisor([router, prefill, decode], AT_ONCE):
        pass
    pids = [process_of(started).pid for started in (router, prefill, decode)]
    assert events[:2] == [("told", pids[0]), ("ended", pids[0])]
    assert events[2:] == [(event, pid) for event in ("told", "ended") for pid in pids[1:]]
