"""The DEALER sockets of a decode node, one per prefill peer and epoch."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import zmq

from ..messages.channel import ClientChannel
from ..messages.link_guard import LinkKeys
from ..messages.malformed import MalformedMessage
from ..messages.peer import PeerToDecode, PeerToPrefill
from ..runtime.logs import Throttle
from ..runtime.waiting import Waiter

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The connection of this epoch is gone, or its peer says what is no message: then no word that is missing
    is waited for."""

    epoch: int
    reason: str = "the connection was closed"


@dataclass(frozen=True, slots=True)
class _Link:
    epoch: int
    channel: ClientChannel[PeerToDecode]


class PeerLinks:
    """Does what DecodeRooms asks for, and reads what comes."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], waiter: Waiter, keys: LinkKeys | None
    ) -> None:
        self._context = context
        self._keys = keys
        self._waiter = waiter
        self._links: dict[str, _Link] = {}
        self._complaints = Throttle()
        self._unopened: dict[str, int] = {}  # address -> epoch of a link that could not be made at all

    def open(self, address: str, epoch: int) -> None:
        """Connect. What is no address, as anyone may register one, is a link that goes down at once."""
        self.close(address)
        try:
            channel: ClientChannel[PeerToDecode] = ClientChannel(
                self._context, address, PeerToDecode, keys=self._keys
            )
        except zmq.ZMQError as error:
            _log.warning("cannot connect to %r: %s", address, error)
            self._unopened[address] = epoch
            return
        self._links[address] = _Link(epoch, channel)
        self._waiter.add(channel.socket)
        self._waiter.add(channel.monitor)

    def close(self, address: str) -> None:
        self._unopened.pop(address, None)
        link = self._links.pop(address, None)
        if link is not None:
            self._waiter.remove(link.channel.socket)
            self._waiter.remove(link.channel.monitor)
            link.channel.close()

    def send(self, address: str, message: PeerToPrefill) -> None:
        if (link := self._links.get(address)) is not None:
            link.channel.send(message)

    def receive(self) -> Iterator[tuple[str, PeerToDecode | LinkDown]]:
        """Everything that has arrived; a link that went down is reported after its last message.

        What a message leads to may close its own link, or replace it: what else came on it is dropped then.
        """
        for address, link in list(self._links.items()):
            for message in list(link.channel.receive()) if self._is_open(address, link) else ():
                if isinstance(message, MalformedMessage):
                    if num := self._complaints.add(time.monotonic()):
                        _log.warning(
                            "dropped %d malformed messages, the last from %s: %s", num, address, message.error
                        )
                    if self._is_open(address, link):
                        yield address, LinkDown(link.epoch, f"it sent no message: {message.error}")
                elif self._is_open(address, link):
                    yield address, message
            if self._is_open(address, link) and link.channel.lost:
                yield address, LinkDown(link.epoch)
        for address, epoch in list(self._unopened.items()):
            if self._unopened.get(address) == epoch:
                yield address, LinkDown(epoch)

    def _is_open(self, address: str, link: _Link) -> bool:
        return self._links.get(address) is link
