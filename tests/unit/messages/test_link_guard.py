"""Links with a cluster secret: who does not have it is not heard, and both sides say so."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

import pytest
import zmq

from pdserve.messages.channel import ClientChannel, ServerChannel
from pdserve.messages.codec import Codec
from pdserve.messages.link_guard import NOT_OF_THE_CLUSTER, LinkKeys
from pdserve.messages.node import CallReply, ClientToNode, NodeToClient, Ping
from pdserve.runtime.errors import StartupError
from pdserve.tests.deadline import DEADLINE_S
from pdserve.tests.unit.messages.conftest import Context, wait_for

SECRET, OTHER = "a" * 64, "b" * 64
Client = ClientChannel[NodeToClient]
Server = ServerChannel[ClientToNode]


@pytest.fixture
def server(context: Context) -> Iterator[Server]:
    server: Server = ServerChannel(context, "127.0.0.1", 0, ClientToNode, keys=LinkKeys.of(SECRET))
    yield server
    server.close()


def connect(context: Context, server: Server, keys: LinkKeys | None) -> Client:
    client: Client = ClientChannel(context, f"tcp://127.0.0.1:{server.port}", NodeToClient, keys=keys)
    client.send(Ping(call_id=1))
    return client


def is_lost(client: Client) -> bool:
    assert list(client.receive()) == []
    return client.lost


def keys_of(secret: str) -> LinkKeys:
    keys = LinkKeys.of(secret)
    assert keys is not None
    return keys


def test_who_has_the_secret_is_heard_and_answered(context: Context, server: Server) -> None:
    client = connect(context, server, LinkKeys.of(SECRET))
    assert server.socket.poll(DEADLINE_S * 1000)
    ((link, message),) = server.receive()
    assert message == Ping(call_id=1)
    assert server.send(link, CallReply(call_id=1, success=True))
    assert client.socket.poll(DEADLINE_S * 1000)
    assert list(client.receive()) == [CallReply(call_id=1, success=True)]
    client.close()


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(None, id="no secret"),
        pytest.param(LinkKeys.of(OTHER), id="another secret"),
        pytest.param(
            LinkKeys(
                server_public=keys_of(SECRET).server_public,
                server_secret=b"",
                client_public=keys_of(OTHER).client_public,
                client_secret=keys_of(OTHER).client_secret,
            ),
            id="the server's public key alone",
        ),
    ],
)
def test_a_stranger_is_lost_and_told_why(
    context: Context, server: Server, keys: LinkKeys | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        client = connect(context, server, keys)
        wait_for(lambda: is_lost(client))
        wait_for(lambda: "do not have this cluster's secret" in caplog.text)
    assert NOT_OF_THE_CLUSTER in caplog.text
    assert list(server.receive()) == []
    client.close()


def test_a_secret_without_curve_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda capability: capability != "curve")
    assert LinkKeys.of("") is None
    with pytest.raises(StartupError, match="was built without CURVE"):
        LinkKeys.of(SECRET)


def test_many_strangers_are_one_line(
    context: Context, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        client = connect(context, server, None)
        wait_for(partial(is_lost, client))
        client.close()
    wait_for(lambda: "handshakes failed" in caplog.text)  # the guard's thread may tell it later
    assert caplog.text.count("handshakes failed") == 1


def test_a_bare_socket_is_not_heard_either(context: Context, server: Server) -> None:
    codec: Codec[ClientToNode] = Codec(ClientToNode)
    for kind in (zmq.DEALER, zmq.REQ, zmq.PUSH):
        with zmq.Context() as theirs, theirs.socket(kind) as stranger:
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.connect(f"tcp://127.0.0.1:{server.port}")
            stranger.send(codec.encode(Ping(call_id=1)))
            assert not server.socket.poll(100)


def test_a_guarded_client_does_not_talk_to_a_server_in_the_clear(context: Context) -> None:
    server: Server = ServerChannel(context, "127.0.0.1", 0, ClientToNode, keys=None)
    client = connect(context, server, LinkKeys.of(SECRET))
    wait_for(lambda: is_lost(client))
    assert list(server.receive()) == []
    client.close()
    server.close()
