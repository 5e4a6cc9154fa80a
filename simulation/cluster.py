"""The processes of one seed, their clients, the faults that befall them, and what is checked.

After every event: what a forward reads and writes, where a write lands, that whoever waits has a deadline.
Every 50 events: every page of every node, every request of every router. At the end, once faults have
stopped, frozen processes have gone on and deaths are proven: every request has ended once, with the right
tokens or with a failure that may be; and nothing is held on any node.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec

from ..api.generation import ModelCard
from ..components.metrics_reporter import MetricsReporter
from ..components.output_streamer import StreamKey
from ..links.node_calls import NodeUnavailableError, StreamMessage
from ..messages.node import CancelRequest, GenerateRequest, NodeEntry, Role, Roster
from ..messages.operation import ContinueGeneration, PauseGeneration
from ..messages.peer import AbortRoom, PeerHello, RoomId
from ..messages.weights import MEMORY_TAGS, FromDisk, of_one_node
from ..prefill.job import JobState
from ..router.events import (
    Abort,
    Event,
    Hold,
    Listen,
    NodesMove,
    NodesStandStill,
    Pause,
    Release,
    Resume,
    ShutDown,
)
from ..router.options import RouterOptions
from ..runtime.pause_gate import PauseMode
from ..runtime.timing import Timing
from ..transfer.prefill_rooms import LinkState
from .client import Client, Outcome
from .clock import EventQueue
from .network import Connection, Host, Network, PeerConnections, Process
from .nodes import INITIAL_VERSION, DecodeNode, Place, PrefillNode
from .plan import FAULTS_UNTIL_S, Fault, FaultKind, Order, OrderKind, Plan, RequestPlan, is_calm
from .router import SimulatedRouter
from .router_link import SimulatedLink
from .situations import Statistics
from .tokens import EOS, PAGE_SIZE, VOCAB_SIZE, expected_tokens
from .wire import Memory, SimulatedBackend

CHECK_EVERY = 50
MAX_EVENTS = 60_000
ROUTER_TIMING = Timing(no_pair_timeout_s=4.0, drain_s=3.0, gate_patience_s=0.5, weight_drain_s=3.0)
OPERATOR_TIMING = Timing(weight_update_s=2.0, weight_commit_s=0.3)
REST_S = 20.0  # after the last fault and the last request, the cluster is at rest within this
OVERDUE_S = 0.4
LONGEST_SILENCE_S = 10.0  # nobody waits longer for a peer that says nothing
LATE_S = 5.0  # a request has ended so long after its deadline
NOWHERE = "tcp://nowhere:1"
MODES: tuple[PauseMode, ...] = ("retract", "in_place")  # not "abort": it is a request's end
MODEL = ModelCard(
    name="model",
    path="weights-1",
    model_type="qwen3",
    architectures=(),
    vocab_size=VOCAB_SIZE,
    max_model_len=1000,
    eos_token_ids=(EOS,),
    created=0,
)
# Failures that faults may lead to. Others (400, 404, 500) say that something of ours is wrong.
LEGITIMATE_STATUS = (429, 503, 504)


class Violation(AssertionError):  # noqa: N818, it is a finding
    """Something that must hold does not."""


@dataclass(slots=True, eq=False)
class Life:
    """One life of a node: its process, its socket, and what runs in it."""

    role: Role
    process: Process
    host: Host
    node: PrefillNode | DecodeNode
    backend: SimulatedBackend | None
    peers: PeerConnections | None
    admitted: set[StreamKey] = field(default_factory=set)  # on decode, for the statistics
    timer_at: float = math.inf
    last_step_at: float = 0.0
    num_steps_at_once: int = 0


class SimulatedCluster:
    """Make it in a running `SimulationLoop`, then await `run`."""

    def __init__(self, plan: Plan, events: EventQueue, statistics: Statistics) -> None:
        self.plan = plan
        self.events = events
        self.statistics = statistics
        self.quality = replace(plan.quality)  # until the faults end
        self.latency = replace(plan.latency)
        self.network = Network(events, self._random("network"), self.latency, statistics)
        self.memories: dict[str, Memory] = {}
        self.lives: dict[int, Life] = {}  # the latest life of each node
        self.num_lives: dict[int, int] = {}
        self.replaced: list[Life] = []  # alive, but no longer at their address
        self.dead: list[str] = []  # incarnations of prefill nodes
        self.clients: list[Client] = []
        self.routers: list[SimulatedRouter] = []
        self.weights = "weights-1"  # the newest
        self.is_healed = False
        self._engine_random = self._random("engine")
        self._fault_random = self._random("faults")
        self._tasks: list[asyncio.Task[None]] = []
        self._next_check = CHECK_EVERY

    def _random(self, what: str) -> random.Random:
        return random.Random(f"{what}/{self.plan.seed}")

    # ---- the run ------------------------------------------------------------------------------------

    async def run(self) -> None:
        for node in self.plan.roles:
            self.start(node)
        for number in range(self.plan.num_routers):
            self._start_router(number)
        for fault in self.plan.faults:
            self.events.after(fault.at_s, partial(self.befall, fault))
        for order in self.plan.orders:
            self.events.after(order.at_s, partial(self._order_router, order))
        for request in self.plan.requests:
            self.events.after(request.at_s, partial(self._send, request))
        await self._heal()
        await self._clients_have_ended()
        await self._come_to_rest()
        self._check_outcomes()
        await self._flush()
        for router in self.routers:
            router.tell(ShutDown())
            self._check_router(router)

    def _now(self) -> float:
        return self.events.now

    def note(self, text: str) -> None:
        self.events.note(text)

    # ---- nodes --------------------------------------------------------------------------------------

    def start(self, number: int) -> None:
        """Another life of this node, at the same address."""
        plan = self.plan
        role = plan.roles[number]
        self.num_lives[number] = life_number = self.num_lives.get(number, 0) + 1
        name = f"{role}-{number}"
        place = Place(
            name=name,
            incarnation=f"{name}.{life_number}",
            model_path=self.weights,
            weight_version=INITIAL_VERSION if self.weights == "weights-1" else self.weights,
        )
        process = Process(place.incarnation, self.events)
        host = Host(process)
        backend: SimulatedBackend | None = None
        peers: PeerConnections | None = None
        node: PrefillNode | DecodeNode

        def on_queued() -> None:
            length_s = plan.forward_s * (0.5 + self._engine_random.random())
            self._finish_forward_after(length_s, life)

        def on_digest() -> None:
            self.statistics.count("page digests computed")
            self.events.after(plan.forward_s * self._engine_random.random(), process.wake)

        if role == "prefill":
            backend = SimulatedBackend(
                process,
                self.memories,
                self.events,
                self._random(f"wire/{place.incarnation}"),
                self.quality,
                self.statistics,
                self._freeze,
            )
            node = PrefillNode(
                place,
                host,
                backend,
                plan.settings,
                clock=self._now,
                on_queued=on_queued,
                on_digest=on_digest,
                metrics=METRICS["prefill"],
            )
            backend.source = node.pool
            backend.room_of_write = node.rooms.room_of_write
        else:
            peers = PeerConnections(self.network, process)
            node = DecodeNode(
                place,
                host,
                peers,
                plan.settings,
                clock=self._now,
                on_queued=on_queued,
                on_digest=on_digest,
                metrics=METRICS["decode"],
            )
            self.memories[place.incarnation] = Memory(process, node.pool, node.allocator)
        life = self.lives[number] = Life(role, process, host, node, backend, peers)
        process.step = lambda: self._step(life)
        self.network.hosts[place.address] = host
        if life_number > 1:
            self.statistics.count("reincarnations at an old address")
        process.wake()

    def _finish_forward_after(self, length_s: float, life: Life) -> None:
        # One after the other, as on the one thread of an engine.
        def finish() -> None:
            if life.node.engine.finish():
                life.process.wake()

        queued = len(life.node.engine.queued)
        self.events.after(length_s * queued, lambda: life.process.do(finish))

    def _step(self, life: Life) -> None:
        now = self.events.now
        if life.host.inbox:
            self._look_at_messages(life)
        life.node.loop.step(now)
        self._count_admissions(life)
        due = life.node.loop.next_deadline()
        self._check_deadlines(life, due)
        self._arm(life, now, due)
        if self.events.num_run >= self._next_check:
            self._next_check = self.events.num_run + CHECK_EVERY
            self.check()
            if self.events.num_run > MAX_EVENTS:
                raise Violation(f"no rest after {MAX_EVENTS} events")

    def _arm(self, life: Life, now: float, due: float) -> None:
        """Its loop turns again by its deadline. One timer is enough: a later deadline lets it run in vain."""
        if due < life.timer_at:
            life.timer_at = due
            self.events.at(due, lambda: self._on_timer(life, due))
        if now == life.last_step_at:
            life.num_steps_at_once += 1
            _require(life.num_steps_at_once < 1000, f"{life.process.name} turns and turns")
        else:
            life.last_step_at, life.num_steps_at_once = now, 0

    def _on_timer(self, life: Life, when: float) -> None:
        if life.timer_at != when:
            return
        life.timer_at = math.inf

        def look() -> None:
            due = life.node.loop.next_deadline()
            if due <= self.events.now:
                life.process.wake()
            else:
                self._arm(life, self.events.now, due)

        life.process.do(look)

    # ---- what is counted ----------------------------------------------------------------------------

    def _look_at_messages(self, life: Life) -> None:
        for link, message in life.host.inbox:
            if self.events.trace is not None:
                self.note(f"{life.process.name} <- {link.decode()}: {_describe(message)}")
            if isinstance(message, CancelRequest):
                self._count_cancel(life, StreamKey(link, message.request_id, message.attempt), message)
            elif isinstance(message, GenerateRequest) and message.was_retracted:
                self.statistics.count("requests retracted for want of pages")
            elif isinstance(message, AbortRoom):
                assert isinstance(life.node, PrefillNode)
                if life.node.jobs.get(message.room) is None:
                    self.statistics.count("aborts that overtook their request's end")

    def _count_admissions(self, life: Life) -> None:
        if not isinstance(life.node, DecodeNode):
            return
        for request in (*life.node.handoffs, *life.node.running):
            if request.key in life.admitted:
                continue
            life.admitted.add(request.key)
            if request.num_cached:
                self.statistics.count("prompts found in decode's cache")
            if life.node.running.is_prefilling(request.key):
                self.statistics.count("prompts that decode computes itself")

    def _count_cancel(self, life: Life, key: StreamKey, message: CancelRequest) -> None:
        assert isinstance(life.node, DecodeNode)
        node = life.node
        if message.choices:
            self.statistics.count("cancels of one choice of several")
        if key in node.waiting:
            self.statistics.count("cancels while waiting for pages on decode")
        elif key in node.running and not node.running.is_prefilling(key):
            self.statistics.count("cancels while running")
        elif (room := node.handoffs.room_of(key)) is not None:
            jobs = [
                other.node.jobs.get(room)
                for other in (*self.lives.values(), *self.replaced)
                if isinstance(other.node, PrefillNode)
            ]
            states = [job.state for job in jobs if job is not None and not job.is_over]
            where = {
                JobState.WAITING: "cancels while waiting on prefill",
                JobState.COMPUTING: "cancels while prefill computes",
                JobState.SENDING: "cancels while the last pages travel",
            }
            self.statistics.count(
                where[states[0]] if states else "cancels while prefill knows the room no more"
            )
        elif key not in node.running:
            self.statistics.count("cancels after the end on decode")

    # ---- routers and clients ------------------------------------------------------------------------

    def _start_router(self, number: int) -> None:
        router = SimulatedRouter(
            f"router-{number}",
            RouterOptions(timing=ROUTER_TIMING),
            model=MODEL,
            static_urls=[life.node.place.url for life in self.lives.values()],
            entry_at=self._entry_at,
            wires=self.network,
            events=self.events,
        )
        self.routers.append(router)
        router.start()

    def _entry_at(self, url: str) -> NodeEntry | None:
        for life in self.lives.values():
            if life.node.place.url == url and life.process.is_alive and not life.process.is_frozen:
                return life.node.status.entry
        return None

    def _send(self, request: RequestPlan) -> None:
        client = Client(request, self.routers[request.router], self.events, self.statistics)
        self.clients.append(client)
        client.arrive()

    async def _clients_have_ended(self) -> None:
        """Or should have."""
        last = max((each.at_s + each.timeout_s for each in self.plan.requests), default=0.0)
        until = self.events.start_s + last + sum(order.length_s for order in self.plan.orders) + LATE_S
        while self.events.now < until:
            if len(self.clients) == len(self.plan.requests) and all(c.outcome.is_over for c in self.clients):
                return
            await asyncio.sleep(0.05)

    # ---- orders to a router -------------------------------------------------------------------------

    def _order_router(self, order: Order) -> None:
        """What its operators do: an abort, or something that lasts a while."""
        router = self.routers[order.router]
        self.note(f"order {order.name}: {order.kind.value}")
        self.statistics.count(f"orders to a router: {order.kind.value}")
        match order.kind:
            case OrderKind.ABORT:
                running = [record.request_id for record in router.state.requests]
                router.tell(Abort(tuple(running[: order.num_requests])))
                return
            case OrderKind.PAUSE:
                router.tell(Pause("in_place"))
                end: Event = Resume()
            case OrderKind.HOLD_WAIT | OrderKind.HOLD_ABORT | OrderKind.HOLD_RETRACT:
                router.tell(Hold(order.kind.mode))
                end = Release()
            case OrderKind.LISTEN:
                router.tell(Listen(is_on=True))
                end = Listen(is_on=False)
            case OrderKind.STAND_STILL:
                router.tell(NodesStandStill())
                end = NodesMove()
        if order.kind is OrderKind.HOLD_RETRACT:
            _require(not len(router.state.requests.ledger), f"{router.name}: what was retracted runs on")
        self.events.after(order.length_s, partial(router.tell, end))

    # ---- faults -------------------------------------------------------------------------------------

    def befall(self, fault: Fault) -> None:
        life = self.lives[fault.node]
        if fault.kind is not FaultKind.UPDATE and not life.process.is_alive:
            return
        self.note(f"fault {fault.name}: {fault.kind.value} of {life.process.name}")
        match fault.kind:
            case FaultKind.CRASH:
                self.crash(fault)
            case FaultKind.FREEZE:
                self._freeze(life.process, fault.length_s)
            case FaultKind.REPLACE:
                self._replace(life, fault)
            case FaultKind.CUT_PEER:
                self._cut_peer(life, fault)
            case FaultKind.STALL:
                for connection in self._peer_connections(life):
                    self.statistics.count("connections stalled")
                    connection.stall_s = 2.0 * fault.length_s
            case FaultKind.CUT_ROUTER:
                for connection in life.host.live_connections:
                    if connection.client_name.startswith("router"):
                        self.statistics.count("connections of a router dropped")
                        connection.cut(silently=fault.silently)
            case FaultKind.UPDATE:
                self._tasks.append(asyncio.ensure_future(self._update_all("weights-2")))
            case FaultKind.STORM:
                self._tasks.append(asyncio.ensure_future(self._storm(fault)))

    def _freeze(self, process: Process, length_s: float) -> None:
        if not process.has_run or self.is_healed:
            return
        self.statistics.count(f"freezes of a {process.name.partition('-')[0]} node")
        self.note(f"{process.name} freezes for {length_s:.2f} s")
        process.freeze()
        self.events.after(length_s, lambda: self._resume(process))

    def _resume(self, process: Process) -> None:
        if process.is_frozen:
            self.note(f"{process.name} goes on")
            process.resume()

    def crash(self, fault: Fault) -> None:
        life = self.lives[fault.node]
        self.statistics.count(f"crashes of a {life.role} node")
        self._kill(life, silently=fault.silently)
        if life.role == "prefill" and fault.proof_after_s is not None:
            incarnation = life.process.name
            self.events.after(fault.proof_after_s, lambda: self._prove_during_run(incarnation))
        self.events.after(fault.length_s, lambda: self._restart(fault.node))

    def _kill(self, life: Life, *, silently: bool = False) -> None:
        if life.backend is not None:
            life.backend.die()
            self.dead.append(life.process.name)
        if life.peers is not None:
            for peer_connection in life.peers.open_connections:
                peer_connection.close()
        life.process.die()
        for connection in life.host.live_connections:
            connection.cut(silently=silently)

    def _replace(self, life: Life, fault: Fault) -> None:
        """Its address goes to another life while it stands still; when it goes on, so do its writes."""
        if not life.process.has_run:
            return
        self.statistics.count(f"{life.role} nodes replaced that were frozen")
        life.process.freeze()
        for connection in life.host.live_connections:
            connection.cut(silently=fault.silently)
        self.replaced.append(life)
        self.start(fault.node)
        self.events.after(fault.length_s, lambda: self._resume(life.process))

    def _restart(self, number: int) -> None:
        if not self.lives[number].process.is_alive:
            self.start(number)
            self.note(f"{self.lives[number].process.name} starts")

    def _prove_during_run(self, incarnation: str) -> None:
        self.statistics.count("deaths proven while the cluster runs")
        self._prove_death(incarnation)

    def _prove_death(self, incarnation: str) -> None:
        """The word of a supervisor comes to every decode node."""
        self.note(f"the death of {incarnation} is proven")
        for life in self.lives.values():
            if isinstance(life.node, DecodeNode):
                life.process.do(partial(self._tell_death, life, incarnation))

    def _tell_death(self, life: Life, incarnation: str) -> None:
        assert isinstance(life.node, DecodeNode)
        life.node.death_probe.proven.append(incarnation)
        life.process.wake()

    def _cut_peer(self, life: Life, fault: Fault) -> None:
        for connection in self._peer_connections(life):
            how = "in silence" if fault.silently else "with a word"
            self.statistics.count(f"connections dropped {how}")
            connection.cut(silently=fault.silently)

    @staticmethod
    def _peer_connections(life: Life) -> list[Connection]:
        """With the other side of the hand-off."""
        if life.peers is not None:
            return [each for each in life.peers.open_connections if not each.is_cut]
        return [each for each in life.host.live_connections if each.client_name.startswith("decode")]

    async def _update_all(self, weights: str) -> None:
        """Node by node, as somebody does who knows no better: pairs of different weights come about."""
        self.weights = weights
        for number in self.plan.roles:
            await self._update(number)
            await asyncio.sleep(self._fault_random.random() * 0.3)

    async def _update(self, number: int) -> None:
        """Until the node serves the newest weights; a life that began since does from the start."""
        while True:
            life = self.lives[number]
            if life.process.is_alive and life.node.engine.weights == self.weights:
                return
            await asyncio.sleep(0.05)
            link = SimulatedLink(
                self.network,
                life.node.place.address,
                client_name="operator",
                timing=OPERATOR_TIMING,
                on_stream=_ignore_stream,
                on_lost=_ignore_loss,
            )
            try:
                update_id = of_one_node(f"update of {life.process.name}")
                source = FromDisk(model_path=self.weights)
                prepared = await link.prepare_weights(update_id, source, self.weights)
                for _ in range(60 if prepared.success else 0):
                    if (await link.commit_weights(update_id)).success:
                        self.statistics.count("updates of weights")
                        return
                    await asyncio.sleep(0.05)
            except NodeUnavailableError:
                pass
            finally:
                await link.close()

    async def _storm(self, fault: Fault) -> None:
        """Whatever an operator may ask of the node, and what somebody says in a decode node's name."""
        draw = self._random(f"storm/{fault.name}")
        until = self.events.now + fault.length_s
        while self.events.now < until and not self.is_healed:
            self.statistics.count("control messages of a storm")
            if draw.random() < 0.2:
                self._impersonate(draw)
            else:
                async with self._operator(self.lives[fault.node]) as link:
                    await self._order(link, self.plan.roles[fault.node], draw)
            await asyncio.sleep(0.3 * draw.random())
        await self._set_right(self.lives[fault.node])

    async def _order(self, link: SimulatedLink, role: Role, draw: random.Random) -> None:
        match draw.randrange(4):
            case 0:
                entries = [life.node.status.entry for life in self.lives.values()]
                nowhere = msgspec.structs.replace(entries[0], role="prefill", zmq_address=NOWHERE)
                named = draw.sample([*entries, nowhere], draw.randint(0, len(entries)))
                link.send(Roster(router_id="operator", nodes=tuple(named)))
                await asyncio.sleep(0.05)
            case 1 if role == "prefill":  # a decode node's memory is known here by its first name
                reply = await link.release_memory(MEMORY_TAGS)
                self.statistics.count("memory released", times=reply.success)
            case 2:
                await link.operate(PauseGeneration(mode=draw.choice(MODES)))
            case _:
                await _go_on(link)

    async def _set_right(self, life: Life) -> None:
        async with self._operator(life) as link:
            await _go_on(link)

    @contextlib.asynccontextmanager
    async def _operator(self, life: Life) -> AsyncIterator[SimulatedLink]:
        """Of a node that does not answer nothing is heard."""
        link = SimulatedLink(
            self.network,
            life.node.place.address,
            client_name="operator",
            timing=OPERATOR_TIMING,
            on_stream=_ignore_stream,
            on_lost=_ignore_loss,
        )
        try:
            yield link
        except NodeUnavailableError:
            pass
        finally:
            await link.close()

    def _impersonate(self, draw: random.Random) -> None:
        """Somebody says hello to a prefill node as if it were a decode node, with whatever numbers."""
        prefill, decode = (
            draw.choice([life for life in self.lives.values() if life.role == role])
            for role in ("prefill", "decode")
        )
        assert isinstance(decode.node, DecodeNode)
        connection = self.network.connect(
            prefill.node.place.address,
            client_name="impostor",
            on_message=_ignore_message,
            on_down=_ignore_down,
        )
        if connection is None:
            return
        self.statistics.count("hellos in another's name")
        identity, epoch = decode.node.identity, draw.choice((0, 100, 2**63 - 1))
        regions, num_pages = decode.node.regions, len(decode.node.pool.pages)
        connection.to_server(PeerHello(epoch=epoch, identity=identity, regions=regions, num_pages=num_pages))
        if draw.random() < 0.5:
            connection.to_server(AbortRoom(room=RoomId(identity.incarnation, 2**63 - 1), epoch=epoch))

    async def _heal(self) -> None:
        """No fault from here on: who was frozen goes on, who died lives again, and deaths are proven."""
        await asyncio.sleep(FAULTS_UNTIL_S)
        self.note("no fault from here on")
        self.is_healed = True
        for name in ("slow_rate", "fail_rate", "fail_but_deliver_rate", "contact_fail_rate"):
            setattr(self.quality, name, 0.0)
        self.latency.late_rate = 0.0
        for number, life in list(self.lives.items()):
            self._resume(life.process)
            self._restart(number)
        for life in self.replaced:
            self._resume(life.process)
        await asyncio.sleep(self._fault_random.random())
        for life in self.replaced:
            self._kill(life)
        for incarnation in self.dead:
            self._prove_death(incarnation)
        for task in self._tasks:
            await task
        for life in self.lives.values():
            await self._set_right(life)
        for number in self.plan.roles:
            await self._update(number)

    # ---- checks -------------------------------------------------------------------------------------

    def check(self) -> None:
        """Everything."""
        for life in (*self.lives.values(), *self.replaced):
            if life.process.is_alive:
                life.node.check()
            if life.process.has_run:
                self._check_overdue(life)
        for router in self.routers:
            self._check_router(router)

    def _check_router(self, router: SimulatedRouter) -> None:
        violations = router.state.violations()
        _require(not violations, f"{router.name}: {'; '.join(violations)}")
        requests = router.state.requests
        _require(not requests.containment.num_faults, f"{router.name}: a handler has raised")
        overdue = [each.request_id for each in requests if each.deadline < self.events.now - OVERDUE_S]
        _require(not overdue, f"{router.name} works beyond a deadline: {overdue}")

    def _check_overdue(self, life: Life) -> None:
        """Whatever has a deadline ends by it, give and take a turn of a loop that is awake."""
        overdue_at = self.events.now - OVERDUE_S
        node = life.node
        if isinstance(node, DecodeNode):
            overdue = [request.key.request_id for request in node.requests if request.deadline_s < overdue_at]
        else:
            overdue = ["a room"] if node.rooms.next_deadline() < overdue_at else []
        _require(not overdue, f"{life.process.name} works beyond a deadline: {overdue}")
        until = self.events.now + LONGEST_SILENCE_S
        for peer, moves_on_at in node.rooms.moves_on_at().items():
            when = moves_on_at - self.events.now
            _require(overdue_at <= moves_on_at <= until, f"{life.process.name} waits {when:.1f} s for {peer}")

    def _check_deadlines(self, life: Life, due: float) -> None:
        """Whoever waits is looked at again by a time that is known."""
        node = life.node
        if isinstance(node, DecodeNode):
            # Rooms of suspects are the death probe's to look after, once a second on its own thread.
            is_probing = bool(node.death_probe.suspects)
            waits = bool(node.requests) or not (node.rooms.is_idle or is_probing)
        else:
            waits = node.rooms.num_open_rooms > 0
        _require(not waits or due < math.inf, f"{life.process.name} waits without a deadline")

    async def _come_to_rest(self) -> None:
        until = self.events.now + REST_S
        num_quiet = 0
        while num_quiet < 2:  # a message that was on its way at the first look has come by the second
            unrest = self._unrest()
            num_quiet = 0 if unrest else num_quiet + 1
            _require(self.events.now < until, f"no rest: {'; '.join(unrest)}")
            await asyncio.sleep(0.25)
        self.check()

    def _unrest(self) -> list[str]:
        found = []
        for life in self.lives.values():
            node = life.node
            if not node.scheduler.is_idle or node.engine.queued:
                found.append(f"{life.process.name} is busy: {_busy(node)}")
            if not node.rooms.is_idle:
                found.append(f"{life.process.name} has rooms: {node.allocator.counts()}")
        prefills = {each.node.identity.incarnation for each in self.lives.values() if each.role == "prefill"}
        for life in self.lives.values():
            if isinstance(life.node, DecodeNode) and life.node.rooms.ready_peers().keys() != prefills:
                found.append(f"{life.process.name} is ready with {list(life.node.rooms.ready_peers())} only")
        decodes = {each.process.name for each in self.lives.values() if each.role == "decode"}
        for life in self.lives.values():
            if isinstance(life.node, PrefillNode):
                ready = {
                    peer.incarnation for peer in life.node.rooms.peers() if peer.state is LinkState.READY
                }
                if ready != decodes:
                    found.append(f"{life.process.name} is ready for {sorted(ready)} only")
        alive = {life.node.status.entry.incarnation for life in self.lives.values()}
        for router in self.routers:
            requests, nodes = router.state.requests, router.state.nodes
            if len(requests) or requests.queue.num_waiting:
                found.append(f"{router.name} has {len(requests)} requests")
            if {node.incarnation: nodes.healthy(node) for node in nodes} != dict.fromkeys(alive, True):
                found.append(f"{router.name} knows {sorted(node.incarnation for node in nodes)}")
        return found

    def _check_outcomes(self) -> None:
        _require(len(self.clients) == len(self.plan.requests), "a request was never sent")
        for client in self.clients:
            self._check_outcome(client.outcome)

    def _check_outcome(self, outcome: Outcome) -> None:
        request, name = outcome.request, f"r{outcome.request.name}"
        _require(outcome.is_over, f"{name} has not ended")
        if outcome.info.num_attempts > 1 and any(outcome.tokens):
            self.statistics.count("new attempts from kept tokens")
        for choice, tokens in enumerate(outcome.tokens):
            expected = _expected(request, choice)
            _require(
                tokens == expected[: len(tokens)], f"{name}, choice {choice}: {tokens} in place of {expected}"
            )
            reason = outcome.finishes.get(choice)
            if reason in ("length", "stop"):
                _require(tokens == expected, f"{name}, choice {choice}: ended with {tokens} of {expected}")
                has_stop = expected[-1] in request.stop_token_ids
                _require(reason == ("stop" if has_stop else "length"), f"{name}: ended by {reason}")
        if outcome.has_left:
            return
        if outcome.error is None:
            _require(len(outcome.finishes) == request.num_choices, f"{name}: a choice has no end")
            if "abort" in outcome.finishes.values():
                return
            self.statistics.count("requests that ended with every token")
            if not _fits(request, self.plan.settings.decode_pages, request.num_choices):
                self.statistics.count("choices that ran in turns")
            if outcome.info.report.num_cached_tokens:
                self.statistics.count("prompts found in the prefix cache")
            if any(len(tokens) == 1 for tokens in outcome.tokens) and outcome.info.num_attempts == 1:
                self.statistics.count("first tokens that ended the request")
            return
        self.statistics.count("requests that failed for good")
        error = outcome.error
        if error.status == 400 and not _fits(request, self.plan.settings.decode_pages, num_choices=1):
            self.statistics.count("requests that can never fit")
            return
        _require(error.status in LEGITIMATE_STATUS, f"{name} failed with {error.status}: {error}")
        assert outcome.ended_at is not None
        is_late = outcome.ended_at >= self.events.start_s + request.at_s + request.timeout_s
        _require(error.code != "deadline_exceeded" or is_late, f"{name}: {error}, before its deadline")
        if is_calm(self.plan) and not is_late:
            raise Violation(f"{name} failed though nothing else did: {error}")

    async def _flush(self) -> None:
        """Nothing is held: what a cache has can be dropped, and then every page is free."""
        for life in self.lives.values():
            link = SimulatedLink(
                self.network,
                life.node.place.address,
                client_name="operator",
                timing=OPERATOR_TIMING,
                on_stream=_ignore_stream,
                on_lost=_ignore_loss,
            )
            reply = await link.flush_cache(1.0)
            await link.close()
            _require(reply.success, f"{life.process.name} cannot be flushed: {reply.message}")
            life.node.check_idle()
            counts = life.node.allocator.counts()
            _require(counts.free == counts.total, f"{life.process.name} leaks: {counts}")

    def fingerprint(self) -> int:
        """Equal for two runs of one plan."""
        text = repr((self.events.num_run, self.events.now, sorted(self.statistics.counts.items())))
        return zlib.crc32(text.encode())


# Metrics are written and never read here; one reporter for all saves the making of hundreds.
METRICS: dict[Role, MetricsReporter] = {
    "prefill": MetricsReporter("model", "prefill"),
    "decode": MetricsReporter("model", "decode"),
}


def _expected(request: RequestPlan, choice: int) -> list[int]:
    tokens = expected_tokens(request.prompt, request.max_tokens, choice)
    for index, token in enumerate(tokens):
        if token in request.stop_token_ids:
            return tokens[: index + 1]
    return tokens


def _fits(request: RequestPlan, num_pages: int, num_choices: int) -> bool:
    """Whether an empty decode node can hold all that so many choices of this request may ever need."""
    num_final = max(len(request.prompt), len(request.prompt) + request.max_tokens - 1)
    num_whole = len(request.prompt) // PAGE_SIZE
    num_most = -(-num_final // PAGE_SIZE)
    return num_most + (num_choices - 1) * (num_most - num_whole) <= num_pages


def _busy(node: PrefillNode | DecodeNode) -> str:
    return ", ".join(f"{len(held)} {state}" for state, held in node.states.items() if held)


def _describe(message: msgspec.Struct) -> str:
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    shown = [f"{name}={value!r}" for name, value in fields.items() if name in _SHOWN]
    return f"{type(message).__name__}({', '.join(shown)})"


_SHOWN = ("request_id", "attempt", "room", "epoch", "clean", "code", "reason", "seq", "choices", "dest_pages")


def _ignore_stream(message: StreamMessage) -> None:
    del message


def _ignore_loss(reason: str) -> None:
    del reason


def _ignore_message(message: msgspec.Struct) -> None:
    del message


def _ignore_down() -> None:
    pass


async def _go_on(link: SimulatedLink) -> None:
    """The node computes, and has its memory."""
    await link.operate(ContinueGeneration())
    await link.resume_memory(MEMORY_TAGS, if_released=True)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise Violation(what)
