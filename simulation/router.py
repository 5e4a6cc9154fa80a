"""A router: the real `RouterState`, between simulated connections, logical time and its clients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, assert_never

import msgspec

from ..api.generation import ChoiceDelta, GenerateSpec, GenerationInfo, ModelCard
from ..messages.node import AttemptFailed, NodeEntry, Pong, TokenOutputs
from ..messages.node import Ping as PingMessage
from ..router.events import (
    Action,
    Arrival,
    CloseLink,
    Deliver,
    Dispatch,
    End,
    Event,
    Fail,
    Found,
    LinkLost,
    Log,
    LookUp,
    NotFound,
    OpenLink,
    Ping,
    Pinged,
    PingUnanswered,
    Ponged,
    Send,
    Sent,
    Tick,
)
from ..router.options import RouterOptions
from ..router.state import RouterState
from ..runtime.errors import RequestError
from .clock import EventQueue

LOOKUP_S = 0.002
SHORTEST_SLEEP_S = 0.001


class Reader(Protocol):
    """Hears of one request, in the order in which things happened."""

    def deliver(self, delta: ChoiceDelta) -> None: ...

    def end(self) -> None: ...

    def fail(self, error: RequestError) -> None: ...


class Wire(Protocol):
    """A connection to a node, as its client holds it."""

    def to_server(self, message: msgspec.Struct) -> None: ...

    def close(self) -> None: ...


class Wires(Protocol):
    """What makes them: `network.Network`, or a test's own."""

    def connect(
        self,
        address: str,
        *,
        client_name: str,
        on_message: Callable[[msgspec.Struct], None],
        on_down: Callable[[], None],
    ) -> Wire | None:
        """None: nobody listens there, which `on_down` tells in a while."""
        ...


@dataclass(slots=True, eq=False)
class _Link:
    wire: Wire | None = None
    num_pings: int = 0
    awaited_ping: int = 0  # the one under way; 0: none

    def send(self, message: msgspec.Struct) -> None:
        if self.wire is not None:
            self.wire.to_server(message)


class SimulatedRouter:
    """`entry_at`: what a node at a URL says of itself; None: nobody answers there."""

    def __init__(
        self,
        name: str,
        options: RouterOptions,
        *,
        model: ModelCard,
        static_urls: Sequence[str],
        entry_at: Callable[[str], NodeEntry | None],
        wires: Wires,
        events: EventQueue,
    ) -> None:
        self.name = name
        self.state = RouterState(options, model=model, router_id=name, static_urls=static_urls)
        self._ping_timeout_s = options.timing.lease_s
        self._entry_at = entry_at
        self._wires = wires
        self._events = events
        self._readers: dict[str, Reader] = {}  # by request id
        self._links: dict[str, _Link] = {}  # by incarnation
        self._timer_at = math.inf

    def start(self) -> None:
        self.tell(Tick())

    def generate(self, spec: GenerateSpec, info: GenerationInfo, reader: Reader, client: str = "") -> None:
        """Raises RequestError when it is refused."""
        actions = self.state.handle(Arrival(spec, info, client), self._events.now)
        self._readers[spec.request_id] = reader
        self._carry_out(actions)

    def tell(self, event: Event) -> None:
        self._carry_out(self.state.handle(event, self._events.now))

    # ---- actions ------------------------------------------------------------------------------------

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Deliver(request_id, delta):
                    self._soon(partial(self._readers[request_id].deliver, delta))
                case End(request_id):
                    self._soon(self._readers.pop(request_id).end)
                case Fail(request_id, error):
                    self._soon(partial(self._readers.pop(request_id).fail, error))
                case Dispatch(attempt, message):
                    self._links[attempt.pair.decode].send(message)
                    self.tell(Sent(attempt.request_id, attempt.number))
                case Send(incarnation, message):
                    self._links[incarnation].send(message)
                case Ping(incarnation):
                    self._ping(incarnation, self._links[incarnation])
                case OpenLink(incarnation, address):
                    self._open_link(incarnation, address)
                case CloseLink(incarnation):
                    if (wire := self._links.pop(incarnation).wire) is not None:
                        wire.close()
                case LookUp(url):
                    self._events.after(LOOKUP_S, partial(self._look_up, url))
                case Log(text=text):
                    self._events.note(f"{self.name}: {text}")
                case _:
                    assert_never(action)
        self._arm()

    def _soon(self, hear: Callable[[], None]) -> None:
        """A reader has its turn when the router is done with what happened."""
        self._events.after(0.0, hear)

    def _arm(self) -> None:
        if self.state.due_at < self._timer_at:
            when = self._timer_at = max(self.state.due_at, self._events.now + SHORTEST_SLEEP_S)
            self._events.at(when, partial(self._on_timer, when))

    def _on_timer(self, when: float) -> None:
        if when != self._timer_at:
            return
        self._timer_at = math.inf
        if self.state.due_at <= when:
            self.tell(Tick())
        self._arm()

    # ---- nodes --------------------------------------------------------------------------------------

    def _open_link(self, incarnation: str, address: str) -> None:
        link = self._links[incarnation] = _Link()
        link.wire = self._wires.connect(
            address,
            client_name=self.name,
            on_message=partial(self._arrive, incarnation, link),
            on_down=partial(self._down, incarnation, link),
        )

    def _arrive(self, incarnation: str, link: _Link, message: msgspec.Struct) -> None:
        match message:
            case Pong(call_id=number) if number == link.awaited_ping:
                link.awaited_ping = 0
                self.tell(Ponged(incarnation, message))
            case TokenOutputs() | AttemptFailed():
                self.tell(message)

    def _down(self, incarnation: str, link: _Link) -> None:
        if self._links.get(incarnation) is link:
            self.tell(LinkLost(incarnation, "the connection is lost"))

    def _ping(self, incarnation: str, link: _Link) -> None:
        link.num_pings += 1
        number = link.awaited_ping = link.num_pings
        link.send(PingMessage(call_id=number))
        self.tell(Pinged(incarnation))
        self._events.after(self._ping_timeout_s, partial(self._no_pong, incarnation, link, number))

    def _no_pong(self, incarnation: str, link: _Link, number: int) -> None:
        if self._links.get(incarnation) is link and link.awaited_ping == number:
            link.awaited_ping = 0
            self.tell(PingUnanswered(incarnation, "no answer to Ping"))

    def _look_up(self, url: str) -> None:
        entry = self._entry_at(url)
        self.tell(NotFound(url, f"{url} does not answer") if entry is None else Found(url, entry))
