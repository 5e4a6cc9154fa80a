"""A router's state in virtual time, between scripted nodes and readers: no loop, no socket, no waiting.

A scripted decode node continues a prompt by a formula, so any test knows the one right stream:
`expected_tokens(prompt, choice, n)`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import msgspec

from pdserve.api.generation import ChoiceDelta, GenerateSpec, GenerationInfo, ModelCard
from pdserve.messages.node import (
    AttemptFailed,
    CancelRequest,
    FailureCode,
    Finish,
    GenerateRequest,
    NodeEntry,
    NodeLoad,
    Ping,
    Pong,
    ResendFrom,
    Roster,
    TokenOutput,
    TokenOutputs,
)
from pdserve.router.events import Abort, ChoiceStopped, Event, ReaderLeft, Registered
from pdserve.router.options import RouterOptions
from pdserve.router.requests import Requests
from pdserve.router.state import RouterState
from pdserve.runtime.config import Routing
from pdserve.runtime.errors import RequestError
from pdserve.runtime.timing import Timing
from pdserve.simulation.clock import EventQueue
from pdserve.simulation.router import SimulatedRouter

from .conftest import MODEL, PAGE_SIZE, expected_tokens, make_entry

PATIENCE_S = 700.0  # of virtual time


@dataclass(eq=False)
class ScriptedNode:
    """`peers`: whom a decode node is ready with."""

    entry: NodeEntry
    events: EventQueue
    peers: tuple[str, ...] = ()
    load: NodeLoad = field(
        default_factory=lambda: NodeLoad(
            num_total_pages=1000, num_free_pages=1000, page_size=PAGE_SIZE, max_running_requests=64
        )
    )
    alive: bool = True
    answers_pings: bool = True
    draining: bool = False
    tokens_per_attempt: int | None = None  # then it hangs
    pace_s: float = 0.0  # between tokens
    num_withheld: int = 0  # tokens that an abort finds, and that were not sent yet
    answers_aborts: bool = True
    fail_with: list[FailureCode] = field(default_factory=list)  # one for each next attempt
    received: list[msgspec.Struct] = field(default_factory=list)
    cancelled: list[CancelRequest] = field(default_factory=list)
    wires: list[ScriptedWire] = field(default_factory=list)

    def requests(self) -> list[GenerateRequest]:
        return [message for message in self.received if isinstance(message, GenerateRequest)]

    def cancels(self) -> list[CancelRequest]:
        return self.cancelled

    def resends(self) -> list[ResendFrom]:
        return [message for message in self.received if isinstance(message, ResendFrom)]

    def rosters(self) -> list[Roster]:
        return [message for message in self.received if isinstance(message, Roster)]

    def num_pings(self) -> int:
        return sum(isinstance(message, Ping) for message in self.received)

    def die(self) -> None:
        """kill -9: every connection is reset."""
        self.alive = False
        self.reset()

    def reset(self) -> None:
        for wire in list(self.wires):
            wire.reset()

    def start_again(self, incarnation: str) -> None:
        self.die()
        self.entry = msgspec.structs.replace(self.entry, incarnation=incarnation)
        self.alive = True

    def emit(self, message: TokenOutputs | AttemptFailed) -> None:
        for wire in list(self.wires):
            wire.to_client(message)


class ScriptedWire:
    """One connection. What is sent arrives at once, the answers when the sender is done."""

    def __init__(
        self, node: ScriptedNode, on_message: Callable[[msgspec.Struct], None], on_down: Callable[[], None]
    ) -> None:
        self.node = node
        self.to_client = on_message
        self._on_down = on_down
        self._is_open = True
        self._num_sent: Counter[tuple[str, int]] = Counter()  # tokens a choice, by request and attempt
        node.wires.append(self)

    def close(self) -> None:
        self._is_open = False
        if self in self.node.wires:
            self.node.wires.remove(self)

    def reset(self) -> None:
        if self._is_open:
            self.close()
            self._on_down()

    def to_server(self, message: msgspec.Struct) -> None:
        if not self._is_open:
            return
        self.node.received.append(message)
        if isinstance(message, CancelRequest):
            self.node.cancelled.append(message)
        match message:
            case Ping() if self.node.answers_pings:
                self._soon(partial(self._pong, message))
            case CancelRequest(aborts=True) if self.node.answers_aborts:
                self._soon(partial(self._abort, message))
            case GenerateRequest():
                self._soon(partial(self._begin, message))

    def _soon(self, act: Callable[[], None], after_s: float = 0.0) -> None:
        self.node.events.after(after_s, lambda: act() if self._is_open else None)

    def _pong(self, ping: Ping) -> None:
        node = self.node
        pong = Pong(
            call_id=ping.call_id,
            entry=node.entry,
            load=node.load,
            ready_peers=node.peers,
            refused_peers={},
            draining=node.draining,
        )
        self.to_client(pong)

    def _abort(self, cancel: CancelRequest) -> None:
        for request in self.node.requests():
            if (request.request_id, request.attempt) == (cancel.request_id, cancel.attempt):
                self.to_client(
                    TokenOutputs(outputs=tuple(self._last(request, c) for c in request.work.choices))
                )

    def _last(self, request: GenerateRequest, choice: int) -> TokenOutput:
        position = self._num_sent[request.request_id, request.attempt]
        tokens = expected_tokens(request.work.prompt_ids, choice, position + self.node.num_withheld)
        return TokenOutput(
            request_id=request.request_id,
            attempt=request.attempt,
            choice=choice,
            position=position,
            token_ids=tuple(tokens[position:]),
            finish=Finish(reason="abort"),
        )

    def _begin(self, request: GenerateRequest) -> None:
        if not self.node.fail_with:
            self._step(request, len(request.work.output_ids))
            return
        code = self.node.fail_with.pop(0)
        failure = AttemptFailed(
            request_id=request.request_id,
            attempt=request.attempt,
            code=code,
            reason=f"scripted {code}",
            retriable=code != "invalid",
        )
        self.to_client(failure)

    def _step(self, request: GenerateRequest, position: int) -> None:
        limit, start = self.node.tokens_per_attempt, len(request.work.output_ids)
        if limit is not None and position - start >= limit:
            return
        live = [choice for choice in request.work.choices if not self._is_cancelled(request, choice)]
        outputs = tuple(self._output(request, choice, position, start) for choice in live)
        self._num_sent[request.request_id, request.attempt] = position + 1
        if outputs:
            self.to_client(TokenOutputs(outputs=outputs))
        if live and position + 1 < request.work.sampling.max_tokens:
            self._soon(partial(self._step, request, position + 1), self.node.pace_s)

    def _is_cancelled(self, request: GenerateRequest, choice: int) -> bool:
        return any(
            (cancel.request_id, cancel.attempt) == (request.request_id, request.attempt)
            and (not cancel.choices or choice in cancel.choices)
            for cancel in self.node.cancelled
        )

    def _output(self, request: GenerateRequest, choice: int, position: int, start: int) -> TokenOutput:
        is_last = position + 1 == request.work.sampling.max_tokens
        return TokenOutput(
            request_id=request.request_id,
            attempt=request.attempt,
            choice=choice,
            position=position,
            token_ids=(expected_tokens(request.work.prompt_ids, choice, position + 1)[-1],),
            weight_version=self.node.entry.weight_version if position == start else "",
            finish=Finish(reason="length") if is_last else None,
        )


class Answer:
    """A `Reader` that keeps what it hears; `on_delta` may act on it."""

    def __init__(self, request_id: str, router: SimulatedRouter) -> None:
        self.info = GenerationInfo(num_attempts=0)
        self.deltas: list[ChoiceDelta] = []
        self.error: RequestError | None = None
        self.is_over = False
        self.on_delta: Callable[[ChoiceDelta], None] = lambda delta: None
        self._request_id = request_id
        self._router = router
        self._stopped: set[int] = set()

    def deliver(self, delta: ChoiceDelta) -> None:
        if delta.choice not in self._stopped:
            self.deltas.append(delta)
            self.on_delta(delta)

    def end(self) -> None:
        self.is_over = True

    def fail(self, error: RequestError) -> None:
        self.error = error
        self.is_over = True

    @property
    def ids(self) -> dict[int, list[int]]:
        """All token ids by choice."""
        ids: dict[int, list[int]] = {}
        for delta in self.deltas:
            ids.setdefault(delta.choice, []).extend(delta.token_ids)
        return ids

    def stop_choice(self, choice: int) -> None:
        self._stopped.add(choice)
        self._router.tell(ChoiceStopped(self._request_id, choice))

    def cancel(self) -> None:
        self._router.tell(ReaderLeft(self._request_id))


class Lab:
    """A router over scripted nodes, which are registered when it starts. It is given `options` of
    Routing and of Timing."""

    def __init__(self) -> None:
        self.events = EventQueue()
        self.events.trace = []  # the router's log
        self.nodes: dict[str, ScriptedNode] = {}  # by URL
        self.router: SimulatedRouter
        self.model: ModelCard = MODEL
        self.static_urls: Sequence[str] = ()
        self.options: dict[str, Any] = {
            "ping_interval_s": 0.01,
            "entry_interval_s": 0.01,
            "front_ping_interval_s": 0.01,
            "drain_s": 0.01,
            "roster_interval_s": 0.05,
            "retry_delay_s": 0.001,
        }

    def prefill(self, name: str = "p") -> ScriptedNode:
        return self._add(make_entry("prefill", name))

    def decode(self, name: str = "d", peers: tuple[str, ...] = ("p-1",)) -> ScriptedNode:
        return self._add(make_entry("decode", name), peers)

    def _add(self, entry: NodeEntry, peers: tuple[str, ...] = ()) -> ScriptedNode:
        node = self.nodes[entry.url] = ScriptedNode(entry, self.events, peers)
        return node

    def start(self, **options: object) -> None:
        given: dict[str, Any] = {**self.options, **options}
        durations = {field.name for field in fields(Timing)} & given.keys()
        timing = Timing(**{name: given.pop(name) for name in durations})
        self.router = SimulatedRouter(
            "router",
            RouterOptions(routing=Routing(**given), timing=timing),
            model=self.model,
            static_urls=self.static_urls,
            entry_at=self._entry_at,
            wires=self,
            events=self.events,
        )
        self.router.start()
        for node in self.nodes.values():
            if node.entry.url not in self.static_urls:
                self.register(node)

    def _entry_at(self, url: str) -> NodeEntry | None:
        node = self.nodes.get(url)
        return node.entry if node is not None and node.alive else None

    def connect(
        self,
        address: str,
        *,
        client_name: str,
        on_message: Callable[[msgspec.Struct], None],
        on_down: Callable[[], None],
    ) -> ScriptedWire | None:
        for node in self.nodes.values():
            if node.entry.zmq_address == address and node.alive:
                return ScriptedWire(node, on_message, on_down)
        self.events.after(0.0, on_down)
        return None

    @property
    def state(self) -> RouterState:
        return self.router.state

    @property
    def requests(self) -> Requests:
        return self.router.state.requests

    def tell(self, event: Event) -> None:
        self.router.tell(event)

    def register(self, node: ScriptedNode) -> None:
        self.tell(Registered(node.entry))

    def abort(self, *request_ids: str) -> None:
        self.tell(Abort(request_ids))

    def generate(self, spec: GenerateSpec, client: str = "") -> Answer:
        """Raises RequestError when it is refused."""
        answer = Answer(spec.request_id, self.router)
        self.router.generate(spec, answer.info, answer, client)
        return answer

    def read(self, answer: Answer) -> dict[int, list[int]]:
        """All token ids by choice, to the end; every choice must end exactly once. Raises RequestError."""
        self.until(lambda: answer.is_over)
        if answer.error is not None:
            raise answer.error
        ended = Counter(delta.choice for delta in answer.deltas if delta.finish_reason is not None)
        assert ended.keys() == answer.ids.keys(), "a choice has no end"
        assert all(count == 1 for count in ended.values())
        return answer.ids

    def complete(self, spec: GenerateSpec) -> dict[int, list[int]]:
        return self.read(self.generate(spec))

    def is_ready(self) -> bool:
        return bool(self.state.nodes.ready_pairs())

    def ready(self, num_ready: int = 2) -> None:
        pairs = self.state.nodes.ready_pairs
        self.until(lambda: len({node.incarnation for pair in pairs() for node in pair}) == num_ready)

    def healthy(self) -> list[str]:
        nodes = self.state.nodes
        return sorted(node.incarnation for node in nodes if nodes.healthy(node))

    def load_of(self, node: ScriptedNode) -> NodeLoad:
        """As the router knows it."""
        known = self.state.nodes.get(node.entry.incarnation)
        assert known is not None
        return known.load

    def open_session(self, session_id: str = "") -> str:
        return self.state.open_session(session_id, 0, None, self.events.now)

    def log(self) -> list[str]:
        return list(self.events.trace or ())

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = self.events.now + PATIENCE_S
        while not condition():
            assert self.events.run_next(deadline), "it never comes about"

    def run(self, seconds: float) -> None:
        end = self.events.now + seconds
        while self.events.run_next(end):
            pass
