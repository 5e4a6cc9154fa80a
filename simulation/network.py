"""Control connections between processes, as zmq's DEALER and ROUTER sockets make them over TCP.

Within one connection messages arrive in order, each once. Between connections there is no order: what was
sent on an old one may come after what was sent on its successor. A connection ends with a word to whoever
connected (its socket monitor), or in silence, as when a host vanishes.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from ..decode.peer_links import LinkDown
from ..messages.peer import PeerRefused, PeerToDecode, PeerToPrefill, RoomBusy
from .clock import EventQueue
from .situations import Statistics

AWAKE_S = 0.5  # who was frozen runs for so long before it is frozen again
MONITOR_S = 0.2  # a socket monitor reports the end of a connection within this


@dataclass(slots=True)
class Latency:
    """One way, in seconds; rarely a message takes much longer."""

    usual_s: float = 0.0003
    late_rate: float = 0.02
    late_s: float = 0.4


class Process:
    """What can crash, freeze and go on: one life of a node."""

    def __init__(self, name: str, events: EventQueue) -> None:
        self.name = name
        self.is_alive = True
        self.is_frozen = False
        self.resumed_at = 0.0
        self.num_freezes = 0
        self.step: Callable[[], None] = lambda: None
        self._events = events
        self._waiting: list[Callable[[], None]] = []
        self._when_over: list[Callable[[], None]] = []
        self._is_woken = False

    def do(self, what: Callable[[], None]) -> None:
        """Now; when it goes on if it is frozen; never if it is dead."""
        if not self.is_alive:
            return
        if self.is_frozen:
            self._waiting.append(what)
        else:
            what()

    def when_over(self, what: Callable[[], None]) -> None:
        """When this freeze ends, by going on or by death."""
        self._when_over.append(what)

    def wake(self) -> None:
        """Let its loop turn."""
        if not self._is_woken:
            self._is_woken = True
            self._events.after(0.0, self._turn)

    def _turn(self) -> None:
        self._is_woken = False
        if self.is_alive and not self.is_frozen:
            self.step()

    @property
    def has_run(self) -> bool:
        """It is awake, and has been for a while."""
        return self.is_alive and not self.is_frozen and self._events.now >= self.resumed_at + AWAKE_S

    def freeze(self) -> None:
        self.is_frozen = True
        self.num_freezes += 1

    def resume(self) -> None:
        self.is_frozen = False
        self.resumed_at = self._events.now
        waiting, self._waiting = self._waiting, []
        for what in (*waiting, *self._end_of_freeze()):
            what()
        self.wake()

    def die(self) -> None:
        self.is_alive = False
        self.is_frozen = False
        self._waiting.clear()
        for what in self._end_of_freeze():
            what()

    def _end_of_freeze(self) -> list[Callable[[], None]]:
        over, self._when_over = self._when_over, []
        return over


class Connection:
    """One TCP connection. The server knows it by `link`; `on_message` and `on_down` run at the client."""

    def __init__(
        self,
        network: Network,
        link: bytes,
        server: Host,
        *,
        client_name: str,
        on_message: Callable[[Any], None],
        on_down: Callable[[], None],
    ) -> None:
        self.network = network
        self.link = link
        self.server = server
        self.client_name = client_name
        self.on_message = on_message
        self.on_down = on_down
        self.is_cut = False
        self.is_silent = False
        self.is_closed = False  # by the client
        self.stall_s = 0.0  # what is sent to the server comes so much later
        self._last_at = [0.0, 0.0]  # to the server, to the client

    def to_server(self, message: msgspec.Struct) -> None:
        if not self.is_cut:
            number = self.network.next_number(self.client_name)
            self.network.events.at(self._arrival(0), lambda: self._arrive_at_server(message, number))

    def to_client(self, message: msgspec.Struct) -> bool:
        """False: the server's socket knows that the client is gone."""
        if self.is_cut or self.is_closed:
            return self.is_silent
        number = self.network.next_number(self.server.process.name)
        self.network.events.at(self._arrival(1), lambda: self._arrive_at_client(message, number))
        return True

    def _arrival(self, direction: int) -> float:
        """After all that was sent before it in the same direction."""
        delay_s = self.network.delay_s() + (0.0 if direction else self.stall_s)
        when = max(self._last_at[direction], self.network.events.now + delay_s)
        self._last_at[direction] = when
        return when

    def _arrive_at_server(self, message: msgspec.Struct, number: int) -> None:
        # The client may have closed it since: what is on its way arrives.
        if self.is_cut or not self.server.process.is_alive:
            return
        self.network.count_order(self.client_name, self.server.process.name, number)
        self.server.inbox.append((self.link, message))
        self.server.process.wake()

    def _arrive_at_client(self, message: msgspec.Struct, number: int) -> None:
        if self.is_cut or self.is_closed:
            return
        self.network.count_order(self.server.process.name, self.client_name, number)
        self.on_message(message)

    def cut(self, *, silently: bool = False) -> None:
        """Nothing that is on its way arrives. Silently: neither side is told."""
        if self.is_cut:
            return
        self.is_cut = True
        self.is_silent = silently
        if not silently:
            self.network.events.after(self.network.random.random() * MONITOR_S, self._tell)

    def _tell(self) -> None:
        if not self.is_closed:
            self.on_down()

    def close(self) -> None:
        """By the client."""
        self.is_closed = True


class Host:
    """A process with its bound socket."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.inbox: deque[tuple[bytes, Any]] = deque()
        self.connections: dict[bytes, Connection] = {}

    def receive(self) -> Iterator[tuple[bytes, Any]]:
        while self.inbox:
            yield self.inbox.popleft()

    def send(self, link: bytes, message: msgspec.Struct) -> bool:
        return self.connections[link].to_client(message)

    @property
    def live_connections(self) -> list[Connection]:
        return [each for each in self.connections.values() if not (each.is_cut or each.is_closed)]


class Network:
    def __init__(
        self, events: EventQueue, generator: random.Random, latency: Latency, statistics: Statistics
    ) -> None:
        self.events = events
        self.random = generator
        self.latency = latency
        self.statistics = statistics
        self.hosts: dict[str, Host] = {}  # who listens at an address now
        self._num_connections = 0
        self._num_sent: dict[str, int] = {}
        self._last_heard: dict[tuple[str, str], int] = {}

    def delay_s(self) -> float:
        if self.random.random() < self.latency.late_rate:
            return self.random.random() * self.latency.late_s
        return self.latency.usual_s * (0.5 + self.random.random())

    def connect(
        self,
        address: str,
        *,
        client_name: str,
        on_message: Callable[[Any], None],
        on_down: Callable[[], None],
    ) -> Connection | None:
        """None: nobody listens there, which `on_down` tells in a while."""
        host = self.hosts.get(address)
        if host is None or not host.process.is_alive:
            self.events.after(self.random.random() * MONITOR_S, on_down)
            return None
        self._num_connections += 1
        link = f"{client_name}/{self._num_connections}".encode()
        connection = Connection(
            self, link, host, client_name=client_name, on_message=on_message, on_down=on_down
        )
        host.connections[link] = connection
        return connection

    def next_number(self, sender: str) -> int:
        number = self._num_sent[sender] = self._num_sent.get(sender, 0) + 1
        return number

    def count_order(self, sender: str, receiver: str, number: int) -> None:
        last = self._last_heard.get((sender, receiver), 0)
        if number < last:
            self.statistics.count("messages reordered between connections")
        else:
            self._last_heard[sender, receiver] = number


class PeerConnections:
    """A decode node's connections to prefill nodes, in place of PeerLinks: one per address, one per epoch."""

    def __init__(self, network: Network, process: Process) -> None:
        self._network = network
        self._process = process
        self._connections: dict[str, tuple[int, Connection | None]] = {}
        self._inbox: deque[tuple[str, int, PeerToDecode | LinkDown]] = deque()

    def open(self, address: str, epoch: int) -> None:
        self.close(address)

        def arrive(message: PeerToDecode | LinkDown) -> None:
            self._look_at(message)
            self._inbox.append((address, epoch, message))
            self._process.wake()

        connection = self._network.connect(
            address,
            client_name=self._process.name,
            on_message=arrive,
            on_down=lambda: arrive(LinkDown(epoch)),
        )
        self._connections[address] = (epoch, connection)

    def close(self, address: str) -> None:
        _, connection = self._connections.pop(address, (0, None))
        if connection is not None:
            connection.close()

    def send(self, address: str, message: PeerToPrefill) -> None:
        _, connection = self._connections.get(address, (0, None))
        if connection is not None:
            connection.to_server(message)

    def receive(self) -> Iterator[tuple[str, PeerToDecode | LinkDown]]:
        """What a message leads to may close its own connection: what else came on it is dropped then."""
        while self._inbox:
            address, epoch, message = self._inbox.popleft()
            if address in self._connections and self._connections[address][0] == epoch:
                yield address, message

    def _look_at(self, message: PeerToDecode | LinkDown) -> None:
        events, statistics = self._network.events, self._network.statistics
        if events.trace is not None:
            events.note(f"{self._process.name} <- prefill: {message}")
        if isinstance(message, RoomBusy):
            statistics.count("rooms refused as busy")
        elif isinstance(message, PeerRefused) and "weight" in message.reason:
            statistics.count("rooms and pairs refused for other weights")

    @property
    def open_connections(self) -> list[Connection]:
        return [connection for _, connection in self._connections.values() if connection is not None]
