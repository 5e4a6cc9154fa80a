"""Channels over real sockets: order, malformed frames, and ends that leave."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import zmq

from pdserve.messages import channel
from pdserve.messages.bounds import MAX_MESSAGE_BYTES, MAX_PAGES, MAX_TOKENS
from pdserve.messages.channel import ClientChannel, ServerChannel
from pdserve.messages.malformed import MalformedMessage
from pdserve.messages.node import CallReply, ClientToNode, NodeToClient, Ping
from pdserve.runtime.listen import bind_http
from pdserve.tests.deadline import DEADLINE_S
from pdserve.tests.unit.messages.conftest import Context, wait_for

Server = ServerChannel[ClientToNode]
Client = ClientChannel[NodeToClient]


@pytest.fixture
def server(context: Context) -> Server:
    return ServerChannel(context, "127.0.0.1", 0, ClientToNode, keys=None)


@pytest.fixture
def client(context: Context, server: Server) -> Client:
    return ClientChannel(context, f"tcp://127.0.0.1:{server.port}", NodeToClient, keys=None)


def receive(channel: Server | Client, count: int) -> list[Any]:
    """The next `count` messages."""
    received: list[Any] = []

    def enough() -> bool:
        received.extend(channel.receive())
        return len(received) >= count

    wait_for(enough)
    assert len(received) == count
    return received


def test_messages_arrive_in_order_both_ways(server: Server, client: Client) -> None:
    for number in range(500):
        client.send(Ping(call_id=number))
    received = receive(server, 500)
    assert [message.call_id for _, message in received] == list(range(500))
    (link,) = {link for link, _ in received}

    for number in range(500):
        assert server.send(link, CallReply(call_id=number, success=True))
    assert [reply.call_id for reply in receive(client, 500)] == list(range(500))
    assert client.connected
    assert not client.lost


def test_each_client_is_a_link_of_its_own(context: Context, server: Server, client: Client) -> None:
    other: Client = ClientChannel(context, client.address, NodeToClient, keys=None)
    client.send(Ping(call_id=1))
    other.send(Ping(call_id=2))
    links = {message.call_id: link for link, message in receive(server, 2)}
    assert server.send(links[2], CallReply(call_id=2, success=True))
    assert server.send(links[1], CallReply(call_id=1, success=True))
    assert receive(client, 1)[0].call_id == 1
    assert receive(other, 1)[0].call_id == 2


MALFORMED = [
    b"",
    b"\xc1",
    msgspec.msgpack.encode({"type": "no_such"}),
    msgspec.msgpack.encode({"type": "ping", "call_id": "x"}),
    b"\x83\xa4type\xa5abort\xa7call_id\x01\xaarequest_id\xa2\xff\xfe",
    b"\x83\xa4type\xa4ping\xa7call_id\x01\xa1x" + b"\x91" * 100_000 + b"\x01",
]


def test_a_server_goes_on_after_malformed_frames(server: Server, client: Client) -> None:
    for payload in MALFORMED:
        client.socket.send(payload)
    client.socket.send_multipart([b"one", b"frame", b"too many"])
    client.send(Ping(call_id=9))
    *malformed, (link, last) = receive(server, len(MALFORMED) + 2)
    assert all(isinstance(message, MalformedMessage) and message.error for _, message in malformed)
    assert last == Ping(call_id=9)
    assert server.send(link, CallReply(call_id=9, success=True))


def test_a_frame_beyond_the_bound_cuts_off_its_sender_alone(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "MAX_MESSAGE_BYTES", 1000)
    server: Server = ServerChannel(context, "127.0.0.1", 0, ClientToNode, keys=None)
    address = f"tcp://127.0.0.1:{server.port}"
    rude, other = (ClientChannel[NodeToClient](context, address, NodeToClient, keys=None) for _ in range(2))
    rude.socket.send(bytes(1001))
    wait_for(lambda: lost(rude))
    other.send(Ping(call_id=1))
    assert [message for _, message in receive(server, 1)] == [Ping(call_id=1)]


def test_the_largest_prefill_request_is_within_the_bound() -> None:
    num_bytes_of_id = len(msgspec.msgpack.encode(2**31 - 1))
    num_bytes_of_page = len(msgspec.msgpack.encode(2**50))
    ids, pages = 2 * MAX_TOKENS * num_bytes_of_id, 2 * MAX_PAGES * num_bytes_of_page
    assert ids + pages < MAX_MESSAGE_BYTES


def test_a_client_goes_on_after_malformed_frames(server: Server, client: Client) -> None:
    client.send(Ping(call_id=1))
    ((link, _),) = receive(server, 1)
    for payload in MALFORMED:
        server.socket.send_multipart([link, payload])
    server.send(link, CallReply(call_id=9, success=True))
    *malformed, last = receive(client, len(MALFORMED) + 1)
    assert all(isinstance(message, MalformedMessage) for message in malformed)
    assert last == CallReply(call_id=9, success=True)


def test_sending_to_a_client_that_is_gone_is_false(server: Server, client: Client) -> None:
    client.send(Ping(call_id=1))
    ((link, _),) = receive(server, 1)
    reply = CallReply(call_id=1, success=True)
    assert server.send(link, reply)
    client.close()
    wait_for(lambda: not server.send(link, reply))
    assert not server.send(link, reply)
    assert not server.send(b"never seen", reply)


def lost(client: Client) -> bool:
    assert list(client.receive()) == []
    return client.lost


def test_a_server_that_leaves_is_lost_for_good(context: Context, server: Server, client: Client) -> None:
    client.send(Ping(call_id=1))
    receive(server, 1)
    server.close()
    wait_for(lambda: lost(client))

    heir: Server = ServerChannel(context, "127.0.0.1", server.port, ClientToNode, keys=None)
    client.send(Ping(call_id=2))
    fresh: Client = ClientChannel(context, client.address, NodeToClient, keys=None)
    fresh.send(Ping(call_id=3))
    assert [message.call_id for _, message in receive(heir, 1)] == [3]
    assert lost(client)
    assert not fresh.lost


def test_sending_in_the_moment_of_the_loss_raises_nothing(server: Server, client: Client) -> None:
    client.send(Ping(call_id=1))
    receive(server, 1)
    server.close()

    def refused() -> bool:
        # The monitor is not read here, as between two turns of a loop.
        client.send(Ping(call_id=2))
        return client.lost

    wait_for(refused)


def test_nobody_listens_is_lost_too(context: Context) -> None:
    with bind_http("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    client: Client = ClientChannel(context, f"tcp://127.0.0.1:{port}", NodeToClient, keys=None)
    wait_for(lambda: lost(client))
    assert not client.connected


def test_a_monitor_wakes_whoever_waits_for_the_loss(server: Server, client: Client) -> None:
    client.send(Ping(call_id=1))
    receive(server, 1)
    list(client.receive())
    server.close()
    assert client.monitor.poll(int(DEADLINE_S * 1000))


def test_a_taken_port_is_refused(context: Context, server: Server) -> None:
    with pytest.raises(zmq.ZMQError):
        ServerChannel(context, "127.0.0.1", server.port, ClientToNode, keys=None)


def test_a_name_is_a_host_to_bind_too(context: Context) -> None:
    server: Server = ServerChannel(context, "localhost", 0, ClientToNode, keys=None)
    client: Client = ClientChannel(context, f"tcp://localhost:{server.port}", NodeToClient, keys=None)
    client.send(Ping(call_id=1))
    receive(server, 1)


def test_a_closed_client_leaves_nothing_behind(context: Context, client: Client) -> None:
    client.close()
    assert client.socket.closed
    assert client.monitor.closed
