"""PeerLinks over real sockets: what arrives, links that go down, and links that are closed while read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from pdserve.decode.peer_links import LinkDown, PeerLinks
from pdserve.messages.channel import ServerChannel
from pdserve.messages.peer import (
    AbortRoom,
    ContactPing,
    PeerPing,
    PeerPong,
    PeerRefused,
    PeerToDecode,
    PeerToPrefill,
    RoomId,
)
from pdserve.runtime.waiting import Waiter


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


class Peer:
    """A prefill node's bound socket, with one connection to it."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], links: PeerLinks, epoch: int) -> None:
        self.server: ServerChannel[PeerToPrefill] = ServerChannel(
            context, "127.0.0.1", 0, PeerToPrefill, keys=None
        )
        self.address = f"tcp://127.0.0.1:{self.server.port}"
        links.open(self.address, epoch)
        links.send(self.address, PeerPing(epoch=epoch, seq=1))
        assert self.server.socket.poll(10_000)
        ((self.link, _),) = self.server.receive()

    def send(self, *messages: msgspec.Struct) -> None:
        for message in messages:
            assert self.server.send(self.link, message)


def wait_for_one(links: PeerLinks, waiter: Waiter) -> Iterator[tuple[str, PeerToDecode | LinkDown]]:
    """`receive`, once it has something."""
    for _ in range(100):
        received = links.receive()
        if (first := next(received, None)) is not None:
            yield from itertools.chain([first], received)
            return
        waiter.wait(0.1)
    raise AssertionError("nothing arrived")


def test_messages_of_a_peer_arrive_in_order(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    waiter = Waiter()
    links = PeerLinks(context, waiter, keys=None)
    peer = Peer(context, links, epoch=1)
    peer.send(ContactPing(epoch=1), PeerPong(epoch=1, seq=7))
    received: list[tuple[str, PeerToDecode | LinkDown]] = []
    while len(received) < 2:
        received += wait_for_one(links, waiter)
    assert received == [(peer.address, ContactPing(epoch=1)), (peer.address, PeerPong(epoch=1, seq=7))]


def test_a_message_may_close_its_own_link_while_others_wait_on_it(
    context: zmq.Context[zmq.Socket[bytes]],
) -> None:
    """PeerRefused does: the loop closes the link in the middle of reading it."""
    waiter = Waiter()
    links = PeerLinks(context, waiter, keys=None)
    peer = Peer(context, links, epoch=1)
    peer.send(PeerRefused(epoch=1, reason="another model"), PeerPong(epoch=1, seq=7))
    received = []
    for address, message in wait_for_one(links, waiter):
        received.append(message)
        links.close(address)
    assert received == [PeerRefused(epoch=1, reason="another model")]
    assert list(links.receive()) == []


def test_a_message_may_replace_its_own_link(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    waiter = Waiter()
    links = PeerLinks(context, waiter, keys=None)
    peer = Peer(context, links, epoch=1)
    peer.send(PeerRefused(epoch=1, reason="connect again"), PeerPong(epoch=1, seq=7))
    received = []
    for address, message in wait_for_one(links, waiter):
        received.append(message)
        links.open(address, 2)
        links.send(address, PeerPing(epoch=2, seq=1))
    assert received == [PeerRefused(epoch=1, reason="connect again")]
    assert peer.server.socket.poll(10_000)
    ((_, ping),) = peer.server.receive()
    assert ping == PeerPing(epoch=2, seq=1)


def test_a_peer_that_is_gone_is_reported_with_the_epoch(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    waiter = Waiter()
    links = PeerLinks(context, waiter, keys=None)
    peer = Peer(context, links, epoch=5)
    peer.server.close()
    ((address, message), *_) = wait_for_one(links, waiter)
    assert (address, message) == (peer.address, LinkDown(5))
    links.close(address)
    links.send(address, PeerPing(epoch=5, seq=2))  # to nobody: dropped
    assert list(links.receive()) == []


def test_what_is_no_message_ends_the_epoch(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """Else the word that it was to be, a welcome say, would be waited for in vain."""
    waiter = Waiter()
    links = PeerLinks(context, waiter, keys=None)
    peer = Peer(context, links, epoch=1)
    peer.send(AbortRoom(room=RoomId("D1", 1), epoch=1), PeerPong(epoch=1, seq=7))
    address, down = next(wait_for_one(links, waiter))
    assert isinstance(down, LinkDown)
    assert (address, down.epoch) == (peer.address, 1)
    assert down.reason.startswith("it sent no message: ")
    links.close(address)
    assert list(links.receive()) == []


@pytest.mark.parametrize("address", ["nonsense", "http://127.0.0.1:8100", "tcp://"])
def test_what_is_no_address_is_a_link_that_is_down(
    context: zmq.Context[zmq.Socket[bytes]], address: str
) -> None:
    """A roster names whatever somebody registered: it must not end the node."""
    waiter = Waiter()
    links = PeerLinks(context, waiter, keys=None)
    links.open(address, 1)
    links.send(address, PeerPing(epoch=1, seq=1))
    assert list(links.receive()) == [(address, LinkDown(1))]
    links.close(address)
    assert list(links.receive()) == []
    links.open(address, 2)
    assert list(links.receive()) == [(address, LinkDown(2))]
