"""Fakes for the router's tests: nodes that answer in process, by script.

A fake decode node continues a prompt by a formula, so any test knows the one right stream:
`expected_tokens(prompt, choice, n)`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

import msgspec
import pytest

from pdserve.api.generation import GenerateSpec, ModelCard
from pdserve.links.entry_lookup import NoNodeError
from pdserve.links.node_calls import NodeCalls, NodeUnavailableError, StreamMessage
from pdserve.messages.node import (
    AttemptFailed,
    CallReply,
    CancelRequest,
    ClientToNode,
    FailureCode,
    Finish,
    GenerateRequest,
    ModelInfo,
    NodeEntry,
    NodeLoad,
    Pong,
    RequestStateReply,
    ResendFrom,
    Role,
    Roster,
    ServerInfoReply,
    TokenOutput,
    TokenOutputs,
    renewed,
)
from pdserve.messages.operation import ClusterOperation, InternalState, ProfileReply
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.weights import (
    FromDisk,
    FromGpuMemory,
    FromGroup,
    FromPeer,
    FromServed,
    FromSharedMemory,
    FromTensors,
    MemoryReply,
    MemoryTag,
    UpdateGroupSpec,
    WeightChecksReply,
    WeightSource,
    WeightsReply,
)
from pdserve.messages.work import Work
from pdserve.router.administration import Administration, SessionCalls
from pdserve.router.assembly import Router, build_router
from pdserve.router.operator import ClusterOperator
from pdserve.router.options import RouterOptions
from pdserve.router.requests import Requests
from pdserve.router.service import RouterService
from pdserve.router.state import RouterState
from pdserve.router.updates.coordinator import WeightUpdates
from pdserve.router.view import RouterView
from pdserve.runtime.config import Routing
from pdserve.runtime.timing import Timing
from pdserve.simulation.clock import EventQueue, SimulationLoop
from pdserve.tests.deadline import DEADLINE_S

EOS = 0
PAGE_SIZE = 4
MODEL = ModelCard(
    name="model",
    path="/m",
    model_type="qwen3",
    architectures=(),
    vocab_size=1000,
    max_model_len=1000,
    eos_token_ids=(EOS,),
    created=0,
)


def expected_tokens(prompt: tuple[int, ...], choice: int, count: int) -> list[int]:
    return [1 + (sum(prompt) + 31 * choice + 7 * position) % 997 for position in range(count)]


def make_entry(role: Role = "decode", name: str = "d", **changes: object) -> NodeEntry:
    values: dict[str, Any] = {
        "url": f"http://{name}",
        "role": role,
        "incarnation": f"{name}-1",
        "zmq_address": f"tcp://{name}",
        "model_name": "model",
        "model_fingerprint": "print",
        "weight_version": "v1",
    }
    return NodeEntry(**{**values, **changes})


def make_spec(
    request_id: str = "r",
    prompt: tuple[int, ...] = (1, 2, 3),
    max_tokens: int = 8,
    num_choices: int = 1,
    timeout_s: float | None = None,
    priority: int = 0,
    cache_salt: str = "",
    **sampling: Any,  # noqa: ANN401  the fields of SamplingParams
) -> GenerateSpec:
    return GenerateSpec(
        request_id=request_id,
        work=Work(
            prompt_ids=prompt,
            choices=tuple(range(num_choices)),
            sampling=SamplingParams(max_tokens=max_tokens, **sampling),
            cache_salt=cache_salt,
        ),
        stream=True,
        timeout_s=timeout_s,
        priority=priority,
    )


@dataclass(eq=False)
class FakeNode:
    """A scheduler in process. ``peers``: whom a decode node is ready with."""

    entry: NodeEntry
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
    fail_with: list[AttemptFailed | FailureCode] = field(default_factory=list)  # one for each next attempt
    stage_reply: str = ""  # why it refuses a part of new weights
    prepare_reply: str = ""  # why it refuses new weights
    prepared_fingerprint: str = "new"  # of those that it does not refuse
    released: set[MemoryTag] = field(default_factory=set)
    release_reply: str = ""  # why it does not release memory, or resume it
    join_reply: str = ""  # why it joins no group
    commit_reply: str = ""  # why it fails to swap
    operation_reply: str = ""  # why it does not do what an operator asks
    operations: list[ClusterOperation] = field(default_factory=list)
    traces: tuple[str, ...] = ()
    rank_traces: tuple[tuple[int, str], ...] = ()
    death_reply: str = ""  # why it believes in no peer's death
    hangs_in: str = "no call"  # until its link is lost
    received: list[ClientToNode] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    sources: list[WeightSource] = field(default_factory=list)  # of weights that it was to prepare
    links: list[FakeLink] = field(default_factory=list)

    def requests(self) -> list[GenerateRequest]:
        return [message for message in self.received if isinstance(message, GenerateRequest)]

    def cancels(self) -> list[CancelRequest]:
        return [message for message in self.received if isinstance(message, CancelRequest)]

    def resends(self) -> list[ResendFrom]:
        return [message for message in self.received if isinstance(message, ResendFrom)]

    def rosters(self) -> list[Roster]:
        return [message for message in self.received if isinstance(message, Roster)]

    def die(self) -> None:
        """kill -9: every link is reset."""
        self.alive = False
        for link in list(self.links):
            link.reset("connection lost")

    def start_again(self, incarnation: str, peers: tuple[str, ...] = ("p-1",)) -> None:
        self.die()
        self.entry = msgspec.structs.replace(self.entry, incarnation=incarnation)
        self.alive, self.hangs_in, self.peers = True, "no call", peers
        self.released.clear()

    def emit(self, message: StreamMessage) -> None:
        for link in list(self.links):
            link.on_stream(message)


class FakeLink:
    def __init__(
        self, node: FakeNode, on_stream: Callable[[StreamMessage], None], on_lost: Callable[[str], None]
    ) -> None:
        self.node = node
        self.on_stream = on_stream
        self.on_lost = on_lost
        self.lost = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()
        self.staged = b""
        self.prepared: dict[str, str] = {}
        self.num_sent: Counter[tuple[str, int]] = Counter()  # tokens of each choice, by request and attempt
        node.links.append(self)
        if not node.alive:
            asyncio.get_running_loop().call_soon(self.reset, "cannot connect")

    def reset(self, reason: str) -> None:
        if not self.lost.is_set():
            self.end()
            self.on_lost(reason)

    def end(self) -> None:
        self.lost.set()
        for task in self.tasks:
            task.cancel()
        if self in self.node.links:
            self.node.links.remove(self)

    def send(self, message: ClientToNode) -> None:
        if self.lost.is_set():
            raise NodeUnavailableError("lost")
        self.node.received.append(message)
        if isinstance(message, CancelRequest) and message.aborts and self.node.answers_aborts:
            asyncio.get_running_loop().call_soon(self.abort_attempt, message)
        if isinstance(message, GenerateRequest):
            task = asyncio.create_task(self.serve(message))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def abort_attempt(self, cancel: CancelRequest) -> None:
        for request in self.node.requests():
            if (request.request_id, request.attempt) == (cancel.request_id, cancel.attempt):
                outputs = tuple(self.last_output(request, choice) for choice in request.work.choices)
                self.on_stream(TokenOutputs(outputs=outputs))

    def last_output(self, request: GenerateRequest, choice: int) -> TokenOutput:
        position = self.num_sent[request.request_id, request.attempt]
        tokens = expected_tokens(request.work.prompt_ids, choice, position + self.node.num_withheld)
        return TokenOutput(
            request_id=request.request_id,
            attempt=request.attempt,
            choice=choice,
            position=position,
            token_ids=tuple(tokens[position:]),
            finish=Finish(reason="abort"),
        )

    async def serve(self, request: GenerateRequest) -> None:
        await asyncio.sleep(0)
        if self.node.fail_with:
            failure = self.node.fail_with.pop(0)
            if not isinstance(failure, AttemptFailed):
                failure = AttemptFailed(
                    request_id=request.request_id,
                    attempt=request.attempt,
                    code=failure,
                    reason=f"scripted {failure}",
                    retriable=failure != "invalid",
                )
            self.on_stream(failure)
            return
        start = len(request.work.output_ids)
        limit = self.node.tokens_per_attempt
        for position in range(start, request.work.sampling.max_tokens):
            if limit is not None and position - start >= limit:
                return
            outputs = []
            for choice in request.work.choices:
                if any(
                    cancel.attempt == request.attempt
                    and cancel.request_id == request.request_id
                    and (not cancel.choices or choice in cancel.choices)
                    for cancel in self.node.cancels()
                ):
                    continue
                tokens = expected_tokens(request.work.prompt_ids, choice, position + 1)
                is_last = position + 1 == request.work.sampling.max_tokens
                outputs.append(
                    TokenOutput(
                        request_id=request.request_id,
                        attempt=request.attempt,
                        choice=choice,
                        position=position,
                        token_ids=(tokens[-1],),
                        weight_version=self.node.entry.weight_version if position == start else "",
                        finish=Finish(reason="length") if is_last else None,
                    )
                )
            self.num_sent[request.request_id, request.attempt] = position + 1
            self.on_stream(TokenOutputs(outputs=tuple(outputs)))
            await asyncio.sleep(self.node.pace_s)

    async def _answer(self, what: str) -> None:
        self.node.calls.append(what)
        await asyncio.sleep(0)
        if what.startswith(self.node.hangs_in):
            await self.lost.wait()
        if self.lost.is_set():
            raise NodeUnavailableError("lost")

    async def ping(self, timeout_s: float) -> Pong:
        if not self.node.answers_pings:
            await asyncio.sleep(timeout_s)
            raise NodeUnavailableError("no answer to Ping")
        await self._answer("ping")
        return Pong(
            call_id=1,
            entry=self.node.entry,
            load=self.node.load,
            ready_peers=self.node.peers,
            refused_peers={},
            draining=self.node.draining,
        )

    async def server_info(self) -> ServerInfoReply:
        await self._answer("server_info")
        entry = self.node.entry
        model = ModelInfo(
            model_name=entry.model_name,
            model_path="/m",
            model_type="qwen3",
            architectures=(),
            vocab_size=1000,
            max_model_len=100,
            eos_token_ids=(EOS,),
            dtype="float32",
            weight_version=entry.weight_version,
            model_fingerprint=entry.model_fingerprint,
        )
        return ServerInfoReply(call_id=1, entry=entry, model=model, config={"port": 1}, load=self.node.load)

    async def operate(self, operation: ClusterOperation) -> CallReply:
        await self._answer("operate")
        self.node.operations.append(operation)
        reason = self.node.operation_reply
        return CallReply(call_id=1, success=not reason, message=reason)

    async def internal_state(self) -> InternalState:
        await self._answer("internal_state")
        return InternalState(
            settings={},
            requests={},
            pause="",
            forward_sleep_s=0.0,
            is_profiling=False,
            log_level="info",
            is_gc_frozen=False,
            memory_rss_bytes=5,
        )

    async def stop_profile(self) -> ProfileReply:
        await self._answer("stop_profile")
        reason = self.node.operation_reply
        return ProfileReply(
            call_id=1,
            success=not reason,
            message=reason,
            traces=self.node.traces,
            rank_traces=self.node.rank_traces,
        )

    async def flush_cache(self, flush_timeout_s: float) -> CallReply:
        await self._answer(f"flush {flush_timeout_s:g}")
        return CallReply(call_id=1, success=True, message="flushed")

    async def abort(self, request_id: str, *, all_requests: bool) -> CallReply:
        await self._answer(f"abort {request_id or all_requests}")
        return CallReply(call_id=1, success=False)

    async def assert_peer_death(self, incarnation: str) -> CallReply:
        await self._answer(f"dead {incarnation}")
        return CallReply(call_id=1, success=not self.node.death_reply, message=self.node.death_reply)

    async def request_state(self, request_id: str) -> RequestStateReply:
        await self._answer("request_state")
        known = any(request.request_id == request_id for request in self.node.requests())
        return RequestStateReply(call_id=1, state="running" if known else "")

    async def stage_weights(self, update_id: str, offset: int, data: bytes) -> CallReply:
        await self._answer(f"stage {len(data)} at {offset}")
        self.staged = self.staged[:offset] + data
        return CallReply(call_id=1, success=not self.node.stage_reply, message=self.node.stage_reply)

    async def prepare_weights(
        self,
        update_id: str,
        source: WeightSource,
        weight_version: str,
    ) -> CallReply:
        match source:
            case FromDisk(model_path=path):
                pass
            case FromTensors():
                path = self.staged.decode()
            case FromGroup(group_name=path) | FromSharedMemory(name=path):
                pass
            case FromGpuMemory(device_uuid=path) | FromPeer(zmq_address=path):
                pass
            case FromServed():
                path = "served"
        self.node.sources.append(source)
        await self._answer(f"prepare {path} {weight_version}")
        self.prepared = {"weight_version": weight_version, "update_id": update_id}
        if isinstance(source, FromPeer) and source.fingerprint:
            self.prepared["model_fingerprint"] = source.fingerprint
        refused = self.node.prepare_reply
        return CallReply(call_id=1, success=not refused, message=refused or self.node.prepared_fingerprint)

    async def join_update_group(self, group: UpdateGroupSpec, rank: int) -> CallReply:
        await self._answer(f"join {group.name} as {rank} of {group.world_size}")
        return CallReply(call_id=1, success=not self.node.join_reply, message=self.node.join_reply)

    async def leave_update_group(self, group_name: str) -> CallReply:
        await self._answer(f"leave {group_name}")
        return CallReply(call_id=1, success=True)

    async def release_memory(self, tags: tuple[MemoryTag, ...]) -> MemoryReply:
        await self._answer(f"release {' '.join(tags)}")
        if not self.node.release_reply:
            self.node.released |= set(tags)
        return self._memory_reply()

    async def resume_memory(self, tags: tuple[MemoryTag, ...], *, if_released: bool = False) -> MemoryReply:
        await self._answer(f"resume {' '.join(tags)}")
        assert if_released, "all are asked alike"
        resumed = self.node.released & set(tags)
        if resumed and self.node.release_reply:
            return self._memory_reply()
        self.node.released -= resumed
        if resumed and not self.node.released:
            incarnation = renewed(self.node.entry.incarnation)
            self.node.entry = msgspec.structs.replace(self.node.entry, incarnation=incarnation)
        return msgspec.structs.replace(self._memory_reply(), success=True, resumed=tuple(sorted(resumed)))

    def _memory_reply(self) -> MemoryReply:
        refused, released = self.node.release_reply, tuple(sorted(self.node.released))
        return MemoryReply(call_id=1, success=not refused, message=refused, released=released)

    async def get_weights(self, name: str, truncate_size: int) -> WeightsReply:
        await self._answer(f"get {name} {truncate_size}")
        return WeightsReply(call_id=1, success=True, values=[0.5])

    async def save_weights(self, target: str, *, is_remote: bool, max_shard_bytes: int) -> CallReply:
        await self._answer(f"save {target} {is_remote} {max_shard_bytes}")
        return CallReply(call_id=1, success=not self.node.stage_reply, message=self.node.stage_reply)

    async def check_weights(self) -> WeightChecksReply:
        await self._answer("check")
        return WeightChecksReply(call_id=1, success=True, whole="ab", tensors={"t": "ab"})

    async def commit_weights(self, update_id: str) -> CallReply:
        await self._answer("commit")
        if why := self.node.commit_reply:
            code: Literal["", "not_prepared"] = "not_prepared" if "not prepared" in why else ""
            return CallReply(call_id=1, success=False, message=why, code=code)
        self.node.entry = msgspec.structs.replace(self.node.entry, **self.prepared)
        return CallReply(call_id=1, success=True)

    async def discard_weights(self, update_id: str) -> CallReply:
        await self._answer("discard")
        return CallReply(call_id=1, success=True)

    async def close(self) -> None:
        self.end()


class FakeNet:
    """Where nodes are found by address and URL."""

    def __init__(self) -> None:
        self.nodes: dict[str, FakeNode] = {}  # by url

    def add(self, node: FakeNode) -> FakeNode:
        self.nodes[node.entry.url] = node
        return node

    def connect(
        self, address: str, *, on_stream: Callable[[StreamMessage], None], on_lost: Callable[[str], None]
    ) -> NodeCalls:
        node = next((node for node in self.nodes.values() if node.entry.zmq_address == address), None)
        if node is None:
            raise NodeUnavailableError(f"cannot connect to {address!r}")
        return cast(NodeCalls, FakeLink(node, on_stream, on_lost))

    async def lookup(self, url: str) -> NodeEntry:
        node = self.nodes.get(url)
        if node is None or not node.alive:
            raise NoNodeError(f"{url} does not answer as a node")
        return node.entry


class Bench:
    """A router over fake nodes."""

    def __init__(self, net: FakeNet) -> None:
        self.net = net
        self.router: Router
        self.model = MODEL
        self.static_urls: tuple[str, ...] = ()
        self.options: dict[str, Any] = {
            "ping_interval_s": 0.01,
            "entry_interval_s": 0.01,
            "front_ping_interval_s": 0.01,
            "drain_s": 0.01,
            "roster_interval_s": 0.05,
            "retry_delay_s": 0.001,
        }

    @property
    def service(self) -> RouterService:
        return self.router.service

    @property
    def state(self) -> RouterState:
        return self.router.service.state

    @property
    def requests(self) -> Requests:
        return self.router.service.state.requests

    @property
    def weights(self) -> WeightUpdates:
        return self.router.weights

    @property
    def admin(self) -> Administration:
        return self.router.administration

    @property
    def sessions(self) -> SessionCalls:
        return self.router.sessions

    @property
    def operator(self) -> ClusterOperator:
        return self.router.operator

    @property
    def view(self) -> RouterView:
        return self.router.view

    async def start(self, **options: object) -> None:
        """`options`: fields of Routing and of Timing."""
        given: dict[str, Any] = {**self.options, **options}
        durations = {field.name for field in fields(Timing)} & given.keys()
        timing = Timing(**{name: given.pop(name) for name in durations})
        self.router = build_router(
            RouterOptions(routing=Routing(**given), timing=timing),
            model=self.model,
            connect=self.net.connect,
            lookup=self.net.lookup,
            static_urls=self.static_urls,
            clock=asyncio.get_running_loop().time,
        )
        self.router.start()
        for node in self.net.nodes.values():
            if node.entry.url not in self.static_urls:
                await self.admin.register_worker(node.entry.url, node.entry)

    def prefill(self, name: str = "p") -> FakeNode:
        return self.net.add(FakeNode(make_entry("prefill", name)))

    def decode(self, name: str = "d", peers: tuple[str, ...] = ("p-1",)) -> FakeNode:
        return self.net.add(FakeNode(make_entry("decode", name), peers=peers))

    async def ready(self, num_ready: int = 2) -> None:
        await self.until(lambda: sum(worker.ready for worker in self.view.workers()) == num_ready)

    @staticmethod
    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110 (any condition)
                await asyncio.sleep(0.001)


class LogicalTime(SimulationLoop):
    """Time passes while everybody sleeps, and then at once: no machine is too busy for a deadline."""

    def __init__(self) -> None:
        super().__init__(EventQueue())

    def run_in_executor(  # type: ignore[override]  # not worth its type variables
        self,
        executor: Executor | None,
        func: Callable[..., Any],
        *args: Any,  # noqa: ANN401
    ) -> asyncio.Future[Any]:
        """Done at once: a thread's time would be real."""
        del executor
        done = self.create_future()
        done.set_result(func(*args))
        return done


def pytest_asyncio_loop_factories(
    item: pytest.Function,
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """All that a bench talks to is in this process."""
    return {"time": LogicalTime if "bench" in item.fixturenames else asyncio.new_event_loop}


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """Ends with the router's invariants."""
    bench = Bench(FakeNet())
    yield bench
    if hasattr(bench, "router"):
        assert bench.requests.violations() == []
        await bench.service.close()
        assert bench.requests.violations() == []
        assert not bench.service.crashed.done()


@pytest.fixture
def entry() -> Callable[..., NodeEntry]:
    return make_entry


@pytest.fixture
def spec() -> Callable[..., GenerateSpec]:
    return make_spec


@pytest.fixture
def model() -> ModelCard:
    return MODEL


@pytest.fixture
def expected() -> Callable[[tuple[int, ...], int, int], list[int]]:
    return expected_tokens
