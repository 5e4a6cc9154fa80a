"""Only a host that refuses every port proves a death."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from pdserve.decode.death_probe import DeathProbe, is_refused
from pdserve.runtime.timing import UNSCALED
from pdserve.tests.deadline import DEADLINE_S


@pytest.fixture
def listening() -> Iterator[str]:
    """Accepted by the kernel, though nobody takes the connection: so does the host of a frozen process."""
    with socket.create_server(("127.0.0.1", 0), backlog=1) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    """Bound and released, so that nobody else listens there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_a_closed_port_refuses(closed: str) -> None:
    assert is_refused(closed, 1.0)


def test_a_port_of_a_frozen_process_does_not(listening: str) -> None:
    for _ in range(3):
        assert not is_refused(listening, 1.0)


@pytest.mark.parametrize("error", [TimeoutError, OSError(113, "No route to host"), ConnectionResetError])
def test_silence_and_an_unreachable_host_are_no_refusal(
    error: type[OSError] | OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(socket, "create_connection", fail)
    assert not is_refused("10.0.0.1:1", 1.0)


@pytest.mark.parametrize("address", ["", ":1", "nowhere", "127.0.0.1:port", "127.0.0.1:99999", "localhost:1"])
def test_what_is_no_address_refuses_nothing(address: str) -> None:
    assert not is_refused(address, 1.0)


def test_a_death_is_proven_by_all_ports_and_not_by_one(closed: str, listening: str) -> None:
    asked = threading.Semaphore(0)

    def refuses(address: str, timeout_s: float) -> bool:
        asked.release()
        return is_refused(address, timeout_s)

    probe = DeathProbe(UNSCALED, refuses)
    assert probe.poll() == []
    probe.watch({"half": (closed, listening)})
    assert asked.acquire(timeout=DEADLINE_S)
    assert asked.acquire(timeout=DEADLINE_S)
    probe.watch({"half": (closed, listening), "dead": (closed, closed)})
    assert select.select([probe], [], [], 30)[0]
    assert probe.poll() == ["dead"]
    assert select.select([probe], [], [], 0)[0] == []


def test_it_asks_again_until_the_port_is_refused() -> None:
    answers = iter([False, False, True])
    probe = DeathProbe(replace(UNSCALED, death_probe_interval_s=0.01), lambda *_: next(answers, True))
    probe.watch({"P1": ("a:1",)})
    assert select.select([probe], [], [], 30)[0]
    assert probe.poll() == ["P1"]
    probe.watch({})
