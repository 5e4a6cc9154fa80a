"""zmq sockets as schedulers use them: one bound ROUTER per node, one DEALER per peer and epoch.

Nothing here blocks and nothing is dropped for lack of room: queues are unbounded, because admission bounds
what can be in them. A DEALER never reconnects by itself: a new connection is a new epoch and a new socket,
so no message of an old epoch can arrive on it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from .bounds import MAX_MESSAGE_BYTES
from .codec import Codec
from .link_guard import HANDSHAKE_FAILED, NOT_OF_THE_CLUSTER, LinkGuard, LinkKeys
from .malformed import MalformedMessage, malformed

_log = logging.getLogger(__name__)
T = TypeVar("T")


def _configure(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    # A peer whose host vanished sends no FIN; keepalive notices it.
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 5)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 2)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)


class ServerChannel(Generic[T]):
    """The ROUTER socket that a node binds. With keys, the context has one such socket alone."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        host: str,
        port: int,
        receives: object,
        *,
        keys: LinkKeys | None,
    ) -> None:
        """Binds ``tcp://host:port`` (0: any free port). Raises zmq.ZMQError when it is taken."""
        self._codec: Codec[T] = Codec(receives)
        self.socket = context.socket(zmq.ROUTER)
        _configure(self.socket)
        # Without it a message to a client that has left would vanish unnoticed.
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # Who says that more is to come is cut off before any memory is taken for it.
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._guard: LinkGuard | None = None
        if keys is not None:
            keys.secure_server(self.socket)
            self._guard = LinkGuard(context, keys, self.socket)
        if port:
            self.socket.bind(f"tcp://{host}:{port}")
            self.port = port
        else:
            self.port = self.socket.bind_to_random_port(f"tcp://{host}")

    def receive(self) -> Iterator[tuple[bytes, T | MalformedMessage]]:
        """Everything that has arrived, with the link it came on."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            link, payload = frames[0], frames[-1]
            try:
                yield link, self._codec.decode(payload)
            except msgspec.DecodeError as error:
                yield link, malformed(payload, error)

    def send(self, link: bytes, message: msgspec.Struct) -> bool:
        """False when the client is gone."""
        try:
            self.socket.send_multipart([link, self._codec.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def close(self) -> None:
        if self._guard is not None:
            self._guard.close()
        self.socket.close()


class ClientChannel(Generic[T]):
    """One DEALER connection to a node: one epoch. ``lost`` turns true once and for ever."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        receives: object,
        *,
        keys: LinkKeys | None,
    ) -> None:
        """Raises zmq.ZMQError for what is no address."""
        self._codec: Codec[T] = Codec(receives)
        self.address = address
        self.lost = False
        self.connected = False
        self.socket = context.socket(zmq.DEALER)
        _configure(self.socket)
        if keys is not None:
            keys.secure_client(self.socket)
        self.socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self.socket.setsockopt(zmq.CONNECT_TIMEOUT, 2000)
        self.monitor: zmq.Socket[Any] = self.socket.get_monitor_socket(
            zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | HANDSHAKE_FAILED
        )
        try:
            self.socket.connect(address)
        except zmq.ZMQError:
            self.close()
            raise

    def receive(self) -> Iterator[T | MalformedMessage]:
        self._read_monitor()
        while True:
            try:
                payload = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                yield self._codec.decode(payload)
            except msgspec.DecodeError as error:
                yield malformed(payload, error)

    def _read_monitor(self) -> None:
        while self.monitor.poll(0):
            event = parse_monitor_message(self.monitor.recv_multipart())["event"]
            if event == zmq.EVENT_CONNECTED:
                self.connected = True
            else:
                self.lost = True
                if event & HANDSHAKE_FAILED:
                    _log.warning("%s: %s", self.address, NOT_OF_THE_CLUSTER)

    def send(self, message: msgspec.Struct) -> None:
        """A message to a lost node is dropped: its epoch has ended."""
        if self.lost:
            return
        try:
            self.socket.send(self._codec.encode(message), zmq.NOBLOCK)
        except zmq.Again:  # the connection has just ended, and the monitor was not read yet
            self.lost = True

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close()
