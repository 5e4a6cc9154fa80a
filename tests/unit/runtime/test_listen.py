"""Listening sockets: the port that was asked for, the next free one, or a line that says why not."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.runtime import listen
from pdserve.runtime.errors import StartupError
from pdserve.runtime.listen import bind_http, bind_unix, http_url, inherit_http


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on, with free ones after it."""
    with bind_http("127.0.0.1", 0) as listener:
        port: int = listener.getsockname()[1]
        if port > 65000:
            pytest.skip("too few ports after this one")
        yield port


def test_port_0_takes_any_and_listens() -> None:
    with bind_http("127.0.0.1", 0) as listener:
        address = listener.getsockname()
        with socket.create_connection(address, timeout=5):
            assert http_url("127.0.0.1", listener) == f"http://127.0.0.1:{address[1]}"


def test_a_taken_port_gives_the_next_free_one_and_says_so(
    taken: int, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING, "pdserve"),
        bind_http("127.0.0.1", taken, or_next=True) as listener,
    ):
        port = listener.getsockname()[1]
    assert taken < port < taken + 100
    said = f"port {taken} is taken by another program: listening on port {port}; --port fixes it"
    assert caplog.messages == [said]


def test_f14_a_port_that_was_asked_for_is_that_or_none(taken: int) -> None:
    with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{taken}: Address already in use; "):
        bind_http("127.0.0.1", taken)


def test_a_free_port_is_taken_silently(taken: int, caplog: pytest.LogCaptureFixture) -> None:
    with bind_http("127.0.0.1", taken + 1, or_next=True) as first:
        free = first.getsockname()[1]
    caplog.clear()
    with bind_http("127.0.0.1", free, or_next=True) as listener:
        assert listener.getsockname()[1] == free
    assert caplog.messages == []


def test_when_every_port_is_taken_the_range_is_named(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "_PORTS_TRIED", 1)
    with pytest.raises(StartupError, match=f"ports {taken} to {taken} on 127.0.0.1 are all taken.*--port"):
        bind_http("127.0.0.1", taken, or_next=True)


def test_the_range_ends_with_the_last_port(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EADDRINUSE, "Address already in use")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(StartupError, match="ports 65530 to 65535 on"):
        bind_http("127.0.0.1", 65530, or_next=True)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_that_is_not_ours_is_refused(host: str) -> None:
    with pytest.raises(StartupError, match=f"cannot listen on {host}:8000: .*--host"):
        bind_http(host, 8000)


def test_a_url_puts_an_ipv6_address_in_brackets() -> None:
    try:
        listener = bind_http("::1", 0)
    except StartupError:
        pytest.skip("no IPv6 here")
    with listener:
        assert http_url("::1", listener) == f"http://[::1]:{listener.getsockname()[1]}"


def test_a_descriptor_is_inherited_with_its_address() -> None:
    with bind_http("127.0.0.1", 0) as listener, inherit_http(os.dup(listener.fileno())) as inherited:
        assert inherited.getsockname() == listener.getsockname()
        assert inherited.family == socket.AF_INET


def test_a_unix_socket_that_a_dead_server_left_behind_is_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "router.sock")
    bind_unix(path).close()
    with bind_unix(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def test_a_unix_socket_that_is_served_is_not_taken(tmp_path: Path) -> None:
    path = str(tmp_path / "router.sock")
    with bind_unix(path), pytest.raises(StartupError, match=r"--uds .*: something listens there"):
        bind_unix(path)


@pytest.mark.parametrize("path", ["/nowhere/router.sock", "x" * 200])
def test_a_unix_socket_that_cannot_be_made_is_one_line(path: str) -> None:
    with pytest.raises(StartupError, match=r"--uds [^\n]*; choose another path$"):
        bind_unix(path)


def test_a_file_is_not_taken_for_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("kept")
    with pytest.raises(StartupError):
        bind_unix(str(path))
    assert path.read_text() == "kept"
