"""A prefill and a decode node in one process: the real schedulers and parts, fakes at the edges only.

Faked are the clock, the sockets, the engine, the transfer backend and the checkpoint on disk. Forwards and
writes end when a test says so, never by themselves, so every order of events can be arranged.

The engine continues a sequence by a formula (`expected_tokens`), and keeps "KV" that can be checked: the slot
of position i holds a number made of the weights and of all tokens up to i. Each forward verifies every slot
that attention would read and that it may write those it writes; the backend verifies that what it writes is
exposed or in quarantine. `Pair.settle` checks the invariants of both nodes each time.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, TypeVar, cast

import msgspec

from pdserve.components.flush_wrapper import FlushWrapper
from pdserve.components.invariant_checker import check_idle, check_pages, check_requests
from pdserve.components.load_inquirer import LoadInquirer
from pdserve.components.metrics_reporter import MetricsReporter
from pdserve.components.node_control import NodeControl
from pdserve.components.node_process import LoadedModel
from pdserve.components.node_status import NodeStatus
from pdserve.components.output_streamer import OutputStreamer
from pdserve.components.page_allocator import PageAllocator
from pdserve.components.prefix_cache import PrefixCache
from pdserve.components.request_receiver import RequestReceiver
from pdserve.components.weight_updater import Prepared, WeightUpdater
from pdserve.decode.batching import DecodeRow
from pdserve.decode.peer_links import LinkDown, PeerLinks
from pdserve.decode.request_pages import RequestPages
from pdserve.decode.scheduler import DecodeLimits, DecodeScheduler
from pdserve.decode.sequence import DecodeRequest, RequestState
from pdserve.decode.sequence import Sequence as DecodeSequence
from pdserve.engine.engine_thread import EngineThread, JobResult
from pdserve.engine.forward_batch import ForwardBatch, ForwardOutput, RowOutput, SampledToken
from pdserve.engine.schedule_batch import ScheduleBatch, ScheduledRow
from pdserve.messages.channel import ServerChannel
from pdserve.messages.codec import Codec
from pdserve.messages.kv_layout import KVLayout
from pdserve.messages.node import (
    AttemptFailed,
    CancelRequest,
    ClientToNode,
    Finish,
    GenerateRequest,
    ModelInfo,
    NodeEntry,
    NodeToClient,
    Role,
    Roster,
    TokenOutputs,
)
from pdserve.messages.peer import (
    PROTOCOL_VERSION,
    MemoryRegion,
    PeerIdentity,
    PeerToDecode,
    PeerToPrefill,
)
from pdserve.messages.sampling import SamplingParams, TokenLogprob
from pdserve.prefill.job import JobState
from pdserve.prefill.scheduler import PrefillLimits, PrefillScheduler, ToPrefill
from pdserve.runtime.config import node_config
from pdserve.runtime.errors import PdserveError, StartupError
from pdserve.transfer.backends.base import WriteResult, WriteState
from pdserve.transfer.copy_plan import Run
from pdserve.transfer.decode_rooms import DecodeRooms
from pdserve.transfer.prefill_rooms import PrefillRooms

PAGE_SIZE = 4
LAYOUT = KVLayout(num_kv_heads=1, num_layers=1, page_size=PAGE_SIZE, head_dim=2, dtype="float32")
EOS = 0  # never sampled by the formula
ADDRESS = "tcp://prefill:1"
ROUTER = b"router"
SETTLE_S = 2.0
INITIAL_VERSION = "default"
T = TypeVar("T")


def next_token(token_ids: Sequence[int], choice: int) -> int:
    return 1 + zlib.crc32(repr((tuple(token_ids), choice)).encode()) % 997


def expected_tokens(prompt: Sequence[int], count: int, choice: int = 0) -> list[int]:
    """The only right continuation of a prompt."""
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(next_token(token_ids, choice))
    return token_ids[len(prompt) :]


def prompt_of(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Prompts of different seeds share no page."""
    return tuple(1 + (seed * 101 + position) % 997 for position in range(num_tokens))


# ---- KV ---------------------------------------------------------------------------------------------


class Pool:
    """What each slot of each page holds; None: nothing that a forward may read."""

    def __init__(self, num_pages: int) -> None:
        self.pages: list[tuple[int | None, ...]] = [(None,) * PAGE_SIZE for _ in range(num_pages)]

    def poison(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.pages[page] = (None,) * PAGE_SIZE

    def copy(self, source: int, destination: int) -> None:
        self.pages[destination] = self.pages[source]

    def write(self, page: int, slot: int, value: int) -> None:
        self.pages[page] = (*self.pages[page][:slot], value, *self.pages[page][slot + 1 :])


def kv_of(token_ids: Sequence[int], weights: str) -> list[int]:
    """The right content of the slots of a sequence: each depends on all tokens before it."""
    values: list[int] = []
    value = zlib.crc32(weights.encode())
    for token in token_ids:
        value = zlib.crc32(token.to_bytes(4, "little"), value)
        values.append(value)
    return values


# ---- the engine -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    name: str
    run: Callable[[], Any]


class FakeEngine:
    """Forwards wait in `queued` until `finish`; `batches` remembers all of them."""

    def __init__(self, name: str, pool: Pool, allocator: PageAllocator, journal: list[str]) -> None:
        self.name = name
        self.pool = pool
        self.allocator = allocator
        self.journal = journal
        self.weights = "weights-1"
        self.queued: deque[ScheduleBatch | _Job] = deque()
        self.results: deque[ForwardOutput | JobResult] = deque()
        self.batches: list[ScheduleBatch] = []

    @staticmethod
    def build(batch: ScheduleBatch) -> ScheduleBatch:
        """A copy, as the real one is: the scheduler may append to what it named."""
        rows = (replace(row, token_ids=tuple(row.token_ids), pages=tuple(row.pages)) for row in batch.rows)
        return replace(batch, rows=tuple(rows))

    def submit(self, batch: ScheduleBatch) -> None:
        for row in batch.rows:
            self.journal.append(f"{self.name} forward {row.row_id} [{row.start}, {row.end})")
            self._check_writable(row)
        self.batches.append(batch)
        self.queued.append(batch)

    def submit_job(self, name: str, run: Callable[[], Any]) -> None:
        self.queued.append(_Job(name, run))

    def poll(self) -> list[ForwardOutput | JobResult]:
        results = list(self.results)
        self.results.clear()
        return results

    def fileno(self) -> int:
        return -1

    # ---- for tests ----

    def finish(self) -> bool:
        """The oldest forward or job is done; False if there is none."""
        if not self.queued:
            return False
        work = self.queued.popleft()
        if isinstance(work, ScheduleBatch):
            rows = tuple(self._compute(row) for row in work.rows)
            self.results.append(ForwardOutput(len(self.batches), rows, 0.0, 0.001))
        else:
            self.results.append(_job_result(work))
        return True

    def row_ids(self, index: int = -1) -> list[str | int]:
        """The requests in a batch."""
        return [row.row_id for row in self.batches[index].rows]

    def rows_of(self, request_id: str) -> list[ScheduledRow]:
        return [row for batch in self.batches for row in batch.rows if row.row_id == request_id]

    def _compute(self, row: ScheduledRow) -> RowOutput:
        self._check_writable(row)
        values = kv_of(row.token_ids[: row.end], self.weights)
        for position in range(row.start):
            page, slot = row.pages[position // PAGE_SIZE], position % PAGE_SIZE
            found = self.pool.pages[page][slot]
            assert found == values[position], f"{self.name}, {row.row_id}: position {position} holds {found}"
        for position in range(row.start, row.end):
            self.pool.write(row.pages[position // PAGE_SIZE], position % PAGE_SIZE, values[position])
        known = row.token_ids[: row.end]
        return RowOutput(row.row_id, _sample(row, known), _prompt_logprobs(row))

    def _check_writable(self, row: ScheduledRow) -> None:
        for index in range(row.start // PAGE_SIZE, (row.end - 1) // PAGE_SIZE + 1):
            state = self.allocator.describe(row.pages[index])
            assert state.startswith("private"), f"{self.name}, {row.row_id}: writes a page that is {state}"


def _sample(row: ScheduledRow, known: Sequence[int]) -> tuple[SampledToken, ...]:
    tokens = [(choice, next_token(known, choice)) for choice in row.choices]
    wants_logprobs = row.sampling.num_logprobs is not None
    return tuple(
        SampledToken(choice, token, TokenLogprob(token, -0.5) if wants_logprobs else None)
        for choice, token in tokens
    )


def _prompt_logprobs(row: ScheduledRow) -> tuple[TokenLogprob, ...]:
    if row.prompt_logprobs_from is None:
        return ()
    positions = range(max(row.prompt_logprobs_from, row.start + 1), min(row.end + 1, row.num_prompt_tokens))
    return tuple(TokenLogprob(row.token_ids[position], -float(position)) for position in positions)


def _job_result(job: _Job) -> JobResult:
    try:
        return JobResult(job.name, job.run(), None, 0.0, 0.0)
    except PdserveError as error:
        return JobResult(job.name, None, error, 0.0, 0.0)


# ---- the wire ---------------------------------------------------------------------------------------


@dataclass
class HeldWrite:
    handle: int
    copies: list[tuple[int, int]]  # source page, destination page


class FakeBackend:
    """Holds every write until told. With `has_started` a cancel comes too late for any of them."""

    name = "fake"
    transport = "fake"
    settle_s = SETTLE_S

    def __init__(
        self, source: Pool, destination: Pool, decode_allocator: PageAllocator, journal: list[str]
    ) -> None:
        self.source = source
        self.destination = destination
        self.decode_allocator = decode_allocator
        self.journal = journal
        self.held: list[HeldWrite] = []
        self.failed: list[HeldWrite] = []  # may land late
        self.results: list[WriteResult] = []
        self.num_bytes = 0  # that are in place
        self.num_pages_written = 0
        self.has_started = False
        self.connected: set[str] = set()

    @property
    def num_outstanding(self) -> int:
        return len(self.held)

    def allocate(self, num_bytes: int) -> memoryview:
        raise NotImplementedError

    def register(self) -> MemoryRegion:
        raise NotImplementedError

    def first_contact(self, handle: int, region: MemoryRegion) -> None:
        self.connected.add(region.session)
        self.results.append(WriteResult(handle, WriteState.DONE))

    def submit(self, handle: int, region: MemoryRegion, run: Run) -> None:
        assert region.session in self.connected
        source, dest, num_pages = (
            bytes_ // LAYOUT.page_bytes for bytes_ in (run.source, run.dest, run.num_bytes)
        )
        copies = [(source + i, dest + i) for i in range(num_pages)]
        self.journal += [f"write page {page}" for page, _ in copies]
        self.held.append(HeldWrite(handle, copies))

    def cancel(self, handles: Iterable[int]) -> None:
        if self.has_started:
            return
        cancelled = set(handles)
        for write in [write for write in self.held if write.handle in cancelled]:
            self.held.remove(write)
            self.results.append(WriteResult(write.handle, WriteState.CANCELLED))

    def disconnect(self, region: MemoryRegion) -> None:
        assert not self.held
        self.connected.discard(region.session)

    def poll(self) -> list[WriteResult]:
        results, self.results = self.results, []
        return results

    def fileno(self) -> int:
        return -1

    def stuck_s(self, now: float) -> float:
        return 0.0

    def close(self) -> None:
        pass

    # ---- for tests ----

    def finish(self, count: int | None = None) -> bool:
        """The oldest writes are in place (all of them if no count is given); False if there is none."""
        done = self.held[:count]
        del self.held[: len(done)]
        for write in done:
            self._land(write)
            self.num_bytes += len(write.copies) * LAYOUT.page_bytes
            self.num_pages_written += len(write.copies)
            self.results.append(WriteResult(write.handle, WriteState.DONE))
        return bool(done)

    def fail(self, count: int | None = None) -> None:
        """The oldest writes fail. What was sent of them may land for a while: `land_late`."""
        failed = self.held[:count]
        del self.held[: len(failed)]
        self.failed += failed
        self.results += [WriteResult(write.handle, WriteState.FAILED, "the wire broke") for write in failed]

    def land_late(self) -> None:
        for write in self.failed:
            self._land(write)
        self.failed.clear()

    def _land(self, write: HeldWrite) -> None:
        for source, destination in write.copies:
            state = self.decode_allocator.describe(destination)
            assert state.startswith(("exposed", "quarantined")), f"a write lands on a page that is {state}"
            self.destination.pages[destination] = self.source.pages[source]


# ---- the sockets ------------------------------------------------------------------------------------


@dataclass
class Wire:
    """One epoch's connection."""

    epoch: int
    link: bytes
    is_down: bool = False
    to_prefill: deque[PeerToPrefill] = field(default_factory=deque)
    to_decode: deque[PeerToDecode] = field(default_factory=deque)


class FakeServer(Generic[T]):
    """A node's bound socket. Messages go through the codec, as on the wire."""

    def __init__(self, receives: object) -> None:
        self._codec: Codec[T] = Codec(receives)
        self._to_client: Codec[NodeToClient] = Codec(NodeToClient)
        self._to_decode: Codec[PeerToDecode] = Codec(PeerToDecode)
        self.inbox: deque[tuple[bytes, T]] = deque()
        self.sent: dict[bytes, list[NodeToClient]] = {}
        self.gone: set[bytes] = set()
        self.wires: dict[bytes, Wire] = {}

    def deliver(self, link: bytes, message: msgspec.Struct) -> None:
        self.inbox.append((link, self._codec.decode(self._codec.encode(message))))

    def receive(self) -> Iterator[tuple[bytes, T]]:
        while self.inbox:
            yield self.inbox.popleft()

    def send(self, link: bytes, message: msgspec.Struct) -> bool:
        if link in self.gone:
            return False
        if link in self.wires:
            wire = self.wires[link]
            if not wire.is_down:
                wire.to_decode.append(self._to_decode.decode(self._to_decode.encode(message)))
            return not wire.is_down
        decoded = self._to_client.decode(self._to_client.encode(message))
        self.sent.setdefault(link, []).append(decoded)
        return True


class Network:
    """Decode's connections to prefill, in place of PeerLinks: in order, until they are cut."""

    def __init__(self, server: FakeServer[ToPrefill], journal: list[str]) -> None:
        self.server = server
        self.journal = journal
        self.wires: dict[str, Wire] = {}
        self.holds_to_prefill = False
        self.holds_to_decode = False

    def open(self, address: str, epoch: int) -> None:
        assert address == ADDRESS
        self.close(address)
        wire = self.wires[address] = Wire(epoch, f"epoch-{epoch}".encode())
        self.server.wires[wire.link] = wire

    def close(self, address: str) -> None:
        wire = self.wires.pop(address, None)
        if wire is not None:
            wire.is_down = True

    def send(self, address: str, message: PeerToPrefill) -> None:
        wire = self.wires.get(address)
        if wire is not None and not wire.is_down:
            wire.to_prefill.append(message)

    def receive(self) -> Iterator[tuple[str, PeerToDecode | LinkDown]]:
        for address, wire in list(self.wires.items()):
            while wire.to_decode and not self.holds_to_decode and self.wires.get(address) is wire:
                message = wire.to_decode.popleft()
                self.journal.append(f"{type(message).__name__} arrives")
                yield address, message
            if wire.is_down and self.wires.get(address) is wire:
                yield address, LinkDown(wire.epoch)

    # ---- for tests ----

    def cut(self) -> None:
        """The connection is lost, with all that was on it."""
        for wire in self.wires.values():
            wire.is_down = True
            wire.to_prefill.clear()
            wire.to_decode.clear()

    def deliver(self) -> None:
        for wire in self.wires.values():
            while wire.to_prefill and not self.holds_to_prefill:
                self.server.deliver(wire.link, wire.to_prefill.popleft())

    @property
    def is_quiet(self) -> bool:
        return all(
            not wire.is_down
            and (self.holds_to_prefill or not wire.to_prefill)
            and (self.holds_to_decode or not wire.to_decode)
            for wire in self.wires.values()
        )


# ---- the nodes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FakeCheckpoint:
    path: Path
    fingerprint: str


def load_checkpoint(path: Path) -> FakeCheckpoint:
    if path.name.startswith("wrong"):
        raise StartupError(f"{path} cannot replace the model that is served")
    return FakeCheckpoint(path, f"print of {path.name}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    prefill_pages: int = 32
    decode_pages: int = 32
    chunk_tokens: int = 8
    max_rows: int = 16
    max_waiting: int = 8
    max_running: int = 8
    max_model_len: int = 1000
    has_cache: bool = True
    is_colocated: bool = False
    eos_token_ids: tuple[int, ...] = (EOS,)


class _Base(Generic[T]):
    """What both nodes have: the parts around the scheduler, wired as main.py wires them."""

    def __init__(
        self, role: Role, receives: object, num_pages: int, settings: Settings, journal: list[str]
    ) -> None:
        self.server: FakeServer[T] = FakeServer(receives)
        self.pool = Pool(num_pages)
        self.allocator = PageAllocator(num_pages)
        self.engine = FakeEngine(role, self.pool, self.allocator, journal)
        self.identity = PeerIdentity(
            incarnation=f"{role}-1",
            protocol_version=PROTOCOL_VERSION,
            model_fingerprint="print of weights-1",
            weight_version=INITIAL_VERSION,
            layout=LAYOUT,
            tp_size=1,
            backend=FakeBackend.name,
            transport=FakeBackend.transport,
        )
        entry = NodeEntry(
            url=f"http://{role}",
            role=role,
            incarnation=self.identity.incarnation,
            zmq_address=f"tcp://{role}:1",
            model_name="model",
            model_fingerprint=self.identity.model_fingerprint,
            weight_version=INITIAL_VERSION,
            colocated=settings.is_colocated and role == "decode",
        )
        model = ModelInfo(
            model_name="model",
            model_path="weights-1",
            model_type="qwen3",
            architectures=(),
            vocab_size=1000,
            max_model_len=settings.max_model_len,
            eos_token_ids=settings.eos_token_ids,
            dtype="float32",
            weight_version=INITIAL_VERSION,
            model_fingerprint=self.identity.model_fingerprint,
        )
        self.status = NodeStatus(entry, model, node_config(role, {}), LAYOUT, FakeBackend.transport)
        self.weights: WeightUpdater[FakeCheckpoint] = WeightUpdater(load_checkpoint, self.engine.submit_job)
        self.metrics = MetricsReporter("model", role)
        self.load_inquirer = LoadInquirer(page_size=PAGE_SIZE, max_running_requests=settings.max_running)
        self.receiver: RequestReceiver[T] = RequestReceiver(cast("ServerChannel[T]", self.server))

    def control(self, drop_cache: Callable[[], bool]) -> NodeControl[FakeCheckpoint]:
        return NodeControl(
            status=self.status,
            flush=FlushWrapper(),
            weights=self.weights,
            metrics=self.metrics,
            drop_cache=drop_cache,
        )

    def swap(self, prepared: Prepared[FakeCheckpoint]) -> PeerIdentity:
        checkpoint = prepared.checkpoint
        self.engine.weights = checkpoint.path.name
        self.status.renew(str(checkpoint.path), checkpoint.fingerprint, prepared.weight_version)
        self.identity = msgspec.structs.replace(
            self.identity,
            model_fingerprint=checkpoint.fingerprint,
            weight_version=prepared.weight_version,
        )
        return self.identity

    def common(self, drop_cache: Callable[[], bool]) -> dict[str, Any]:
        return {
            "receiver": self.receiver,
            "send": self.server.send,
            "allocator": self.allocator,
            "engine": cast(EngineThread, self.engine),
            "build": cast("Callable[[ScheduleBatch], ForwardBatch]", self.engine.build),
            "control": cast("NodeControl[LoadedModel]", self.control(drop_cache)),
            "weights": cast("WeightUpdater[LoadedModel]", self.weights),
            "swap": self.swap,
            "status": self.status,
            "load_inquirer": self.load_inquirer,
            "metrics": self.metrics,
            "unix_minus_monotonic_s": 0.0,
        }


class PrefillNode(_Base[ToPrefill]):
    def __init__(self, settings: Settings, backend: FakeBackend, journal: list[str]) -> None:
        super().__init__("prefill", ToPrefill, settings.prefill_pages, settings, journal)
        backend.source = self.pool
        self.backend = backend
        self.cache = PrefixCache(self.allocator, PAGE_SIZE) if settings.has_cache else None
        self.rooms = PrefillRooms(self.identity, settle_s=backend.settle_s)
        self.scheduler = PrefillScheduler(
            **self.common(lambda: self.cache is None or self.cache.reset()),
            rooms=self.rooms,
            movers=(backend,),
            cache=self.cache,
            layout=LAYOUT,
            limits=PrefillLimits(
                max_batch_tokens=settings.chunk_tokens,
                max_batch_rows=settings.max_rows,
                max_waiting=settings.max_waiting,
            ),
        )

    @property
    def caches(self) -> list[PrefixCache]:
        return [self.cache] if self.cache else []

    @property
    def states(self) -> dict[str, list[Any]]:
        jobs = self.scheduler.jobs.items()
        return {state.value: [room for room, job in jobs if job.state is state] for state in JobState}

    def check(self) -> None:
        check_pages(self.allocator, self.caches, owners=self.scheduler.jobs.keys())
        check_requests(self.states)

    def check_idle(self) -> None:
        assert self.scheduler.is_idle
        check_idle(self.allocator, self.caches, states=self.states)


class DecodeNode(_Base[ClientToNode]):
    def __init__(self, settings: Settings, network: Network, journal: list[str]) -> None:
        super().__init__("decode", ClientToNode, settings.decode_pages, settings, journal)
        self.pages = RequestPages(self.allocator, PAGE_SIZE, self.pool.copy, self.pool.poison)
        pool_bytes = settings.decode_pages * LAYOUT.page_bytes
        region = MemoryRegion(
            session="decode", address=0, num_bytes=pool_bytes + 8, scratch_address=pool_bytes
        )
        self.rooms = DecodeRooms(self.identity, (region,), settings.decode_pages)
        gone_clients: set[bytes] = set()

        def send_output(client: bytes, message: msgspec.Struct) -> None:
            if not self.server.send(client, message):
                gone_clients.add(client)

        self.streamer = OutputStreamer(send_output)
        self.scheduler = DecodeScheduler(
            **self.common(lambda: True),
            links=cast(PeerLinks, network),
            rooms=self.rooms,
            pages=self.pages,
            streamer=self.streamer,
            gone_clients=gone_clients,
            limits=DecodeLimits(
                max_running=settings.max_running,
                max_batch_tokens=max(settings.chunk_tokens, settings.max_running + 1),
                max_model_len=settings.max_model_len,
            ),
            eos_token_ids=settings.eos_token_ids,
        )

    @property
    def states(self) -> dict[str, list[Any]]:
        requests = self.scheduler.requests.values()
        return {
            state.value: [request.key for request in requests if request.state is state]
            for state in RequestState
        }

    def check(self) -> None:
        scheduler = self.scheduler
        sequences = self._sequences()
        rooms = [*self.allocator.exposed_rooms(), *self.allocator.quarantined_rooms()]
        check_pages(
            self.allocator,
            [],
            owners=[sequence.owner for sequence in sequences],
            open_rooms=[room for room in rooms if self.rooms.state_of(room) is not None],
            forked_pages={page for sequence in sequences for page in sequence.shared_pages},
        )
        check_requests(self.states)
        self.pages.check_promises([cast(DecodeRequest, SimpleNamespace(sequences=sequences))])
        self.streamer.check()
        counts = self.allocator.counts()
        assert counts.quarantined == self.rooms.num_quarantined_pages
        assert counts.exposed == self.rooms.num_exposed_pages(ADDRESS) - counts.quarantined
        in_handoff = {request.room: request for request in scheduler.requests.values() if request.room}
        assert in_handoff == scheduler.by_room
        assert set(self.allocator.exposed_rooms()) == in_handoff.keys()
        for request in scheduler.requests.values():
            assert (request.state is RequestState.HANDOFF) == (request.room is not None)
            assert request.live_sequences, "a request without a live choice is not forgotten"

    def _sequences(self) -> list[DecodeSequence]:
        """Of every request, and cancelled ones that a forward still writes."""
        found = {
            id(sequence): sequence
            for request in self.scheduler.requests.values()
            for sequence in request.sequences
        }
        for row in self.scheduler.forward:
            in_forward = [row.sequence] if isinstance(row, DecodeRow) else row.request.sequences
            found.update({id(sequence): sequence for sequence in in_forward})
        return list(found.values())

    def check_idle(self) -> None:
        assert self.scheduler.is_idle
        assert self.rooms.is_idle, "a room is still in quarantine"
        assert self.pages.num_available == self.allocator.num_pages
        check_idle(self.allocator, [], states=self.states)


# ---- the client -------------------------------------------------------------------------------------


@dataclass
class Stream:
    """What a client has of one attempt."""

    tokens: dict[int, list[int]] = field(default_factory=dict)  # by choice
    finishes: dict[int, Finish] = field(default_factory=dict)
    failure: AttemptFailed | None = None
    num_cached_tokens: int = 0
    weight_version: str = ""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    span_names: list[str] = field(default_factory=list)
    message_sizes: list[int] = field(default_factory=list)  # tokens in each output

    @property
    def reasons(self) -> dict[int, str]:
        return {choice: finish.reason for choice, finish in self.finishes.items()}


def read_stream(
    messages: Iterable[NodeToClient], request_id: str, attempt: int = 1, *, base: int = 0
) -> Stream:
    """Puts an attempt's messages together; anything but the next token, or a second end, is an error."""
    stream = Stream()
    for message in messages:
        if isinstance(message, AttemptFailed) and (message.request_id, message.attempt) == (
            request_id,
            attempt,
        ):
            assert stream.failure is None, "an attempt failed twice"
            stream.failure = message
        elif isinstance(message, TokenOutputs):
            for output in message.outputs:
                if (output.request_id, output.attempt) != (request_id, attempt):
                    continue
                assert stream.failure is None, "a token after the failure"
                assert output.choice not in stream.finishes, "a token after the end"
                tokens = stream.tokens.setdefault(output.choice, [])
                assert output.position == base + len(tokens), "a gap or a repeat"
                tokens += output.token_ids
                stream.message_sizes.append(len(output.token_ids))
                stream.num_cached_tokens = output.num_cached_tokens or stream.num_cached_tokens
                stream.weight_version = output.weight_version or stream.weight_version
                stream.prompt_logprobs = output.prompt_logprobs or stream.prompt_logprobs
                stream.span_names += [span.name for span in output.spans]
                if output.finish is not None:
                    stream.finishes[output.choice] = output.finish
    return stream


# ---- the pair ---------------------------------------------------------------------------------------


class Pair:
    """Both nodes, connected and ready. `settle` lets everything happen that needs no forward and no write."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401, the fields of Settings
        self.settings = Settings(**settings)
        self.now = 100.0
        self.journal: list[str] = []
        no_pool, no_allocator = Pool(1), PageAllocator(1)
        self.backend = FakeBackend(no_pool, no_pool, no_allocator, self.journal)
        self.prefill = PrefillNode(self.settings, self.backend, self.journal)
        self.network = Network(self.prefill.server, self.journal)
        self.decode = DecodeNode(self.settings, self.network, self.journal)
        self.backend.destination = self.decode.pool
        self.backend.decode_allocator = self.decode.allocator
        if not self.settings.is_colocated:
            self.connect()

    def connect(self) -> None:
        self.to_decode(Roster(router_id="router", nodes=(self.prefill.status.entry,)))
        assert self.decode.rooms.ready_peers() == {"prefill-1": ADDRESS}
        self.journal.clear()

    # ---- time ----

    def step(self) -> None:
        """One turn of each loop."""
        self.network.deliver()
        self.prefill.scheduler.step(self.now)
        self.decode.scheduler.step(self.now)

    def settle(self) -> None:
        for _ in range(1000):
            self.step()
            if self._is_quiet:
                self.prefill.check()
                self.decode.check()
                return
        raise AssertionError("the loops do not come to rest")

    @property
    def _is_quiet(self) -> bool:
        nodes_are_quiet = not (
            self.prefill.server.inbox
            or self.decode.server.inbox
            or self.prefill.engine.results
            or self.decode.engine.results
            or self.backend.results
        )
        return nodes_are_quiet and self.network.is_quiet

    def advance(self, seconds: float) -> None:
        """Time passes while both loops run well."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 0.1)
            self.settle()

    # ---- work ----

    def compute(self, *nodes: PrefillNode | DecodeNode) -> None:
        """One forward of each of these nodes (of both if none is named) is done."""
        for node in nodes or (self.prefill, self.decode):
            node.engine.finish()
        self.settle()

    def write(self, count: int | None = None) -> None:
        """The oldest writes are in place."""
        self.backend.finish(count)
        self.settle()

    def run(self, max_turns: int = 2000) -> None:
        """Forwards and writes end as fast as they come, until both nodes are at rest."""
        self.settle()
        for _ in range(max_turns):
            worked = [self.prefill.engine.finish(), self.backend.finish(), self.decode.engine.finish()]
            if not any(worked):
                return
            self.settle()
        raise AssertionError("the work does not end")

    def finish(self) -> None:
        """To the end of all work and all quarantine; both nodes must then be empty."""
        self.run()
        self.advance(5.0)
        self.run()
        self.prefill.check_idle()
        self.decode.check_idle()

    # ---- messages ----

    def generate(
        self,
        request_id: str,
        prompt: Sequence[int],
        *,
        max_tokens: int = 4,
        attempt: int = 1,
        output_ids: Sequence[int] = (),
        choices: tuple[int, ...] = (0,),
        deadline_s: float = 1000.0,
        stream_interval: int = 1,
        client: bytes = ROUTER,
        prefill: str = "prefill-1",
        **sampling: Any,  # noqa: ANN401, the fields of SamplingParams
    ) -> None:
        """Send a request to decode; nothing moves until the loops do."""
        message = GenerateRequest(
            request_id=request_id,
            attempt=attempt,
            prompt_ids=tuple(prompt),
            output_ids=tuple(output_ids),
            choices=choices,
            sampling=SamplingParams(max_tokens=max_tokens, **sampling),
            prefill_incarnation="" if self.settings.is_colocated else prefill,
            deadline_s=deadline_s,
            stream_interval=stream_interval,
        )
        self.decode.server.deliver(client, message)

    def start(self, request_id: str, prompt: Sequence[int], **options: Any) -> None:  # noqa: ANN401
        self.generate(request_id, prompt, **options)
        self.settle()

    def cancel(self, request_id: str, *choices: int) -> None:
        self.to_decode(CancelRequest(request_id=request_id, attempt=1, choices=choices))

    def to_decode(self, message: ClientToNode, client: bytes = ROUTER) -> None:
        self.decode.server.deliver(client, message)
        self.settle()

    def to_prefill(self, message: ClientToNode, client: bytes = ROUTER) -> None:
        self.prefill.server.deliver(client, message)
        self.settle()

    def stream(self, request_id: str, attempt: int = 1, *, client: bytes = ROUTER, base: int = 0) -> Stream:
        return read_stream(self.decode.server.sent.get(client, ()), request_id, attempt, base=base)

    def tokens(self, request_id: str, choice: int = 0) -> list[int]:
        return self.stream(request_id).tokens.get(choice, [])

    def last_reply(self, node: PrefillNode | DecodeNode, client: bytes = ROUTER) -> NodeToClient:
        return node.server.sent[client][-1]

    def state(self, request_id: str) -> str:
        """The state that a request is in on decode; empty: it is gone."""
        return next(
            (
                request.state.value
                for request in self.decode.scheduler.requests.values()
                if request.message.request_id == request_id
            ),
            "",
        )

    def check_answer(self, request_id: str, prompt: Sequence[int], max_tokens: int, choice: int = 0) -> None:
        """The whole answer came, ended by its length."""
        stream = self.stream(request_id)
        assert stream.failure is None, stream.failure
        assert stream.tokens[choice] == expected_tokens(prompt, max_tokens, choice)
        assert stream.finishes[choice] == Finish(reason="length")
