"""A prefill and a decode node composed of their real parts, as their `main` modules compose them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, Protocol, TypeVar, cast

import msgspec

from ..components.flush_wrapper import FlushWrapper
from ..components.invariant_checker import check_idle, check_pages, check_requests
from ..components.load_inquirer import LoadInquirer
from ..components.metrics_reporter import MetricsReporter
from ..components.page_allocator import PageAllocator
from ..components.prefix_cache import PrefixCache
from ..components.request_receiver import RequestReceiver
from ..decode import assembly as decode_assembly
from ..decode.admission import Capacity
from ..decode.assembly import DecodeEdges, DecodeOptions
from ..decode.death_probe import DeathProbe
from ..decode.limits import DecodeLimits
from ..decode.peer_links import LinkDown, PeerLinks
from ..decode.sequence import DecodeRequest, Sequence
from ..engine.engine_thread import Forwards
from ..engine.forward_batch import ForwardBatch
from ..engine.schedule_batch import ScheduleBatch
from ..messages.channel import ServerChannel
from ..messages.malformed import MalformedMessage
from ..messages.memory_region import MemoryRegion
from ..messages.node import ClientToNode, ModelInfo, NodeEntry, Role
from ..messages.peer import PROTOCOL_VERSION, PeerIdentity, PeerToDecode, PeerToPrefill
from ..messages.timeline import SpanClock
from ..messages.weights import FromGpuMemory, FromPeer, JoinUpdateGroup, MemoryTag
from ..node.control import NodeControl
from ..node.edges import NodeEdges
from ..node.live_settings import LiveSettings
from ..node.loop import Report, RoleLoop
from ..node.loop_times import LoopTimes
from ..node.memory_occupation import Announced, MemoryOccupation
from ..node.operations import NodeOperations
from ..node.status import NodeStatus, announce
from ..prefill import assembly as prefill_assembly
from ..prefill.assembly import PrefillEdges
from ..prefill.job import JobState
from ..prefill.limits import PrefillLimits
from ..prefill.scheduler import ToPrefill
from ..runtime.command_line import node_config
from ..runtime.config import VerifyPages
from ..runtime.containment import Containment
from ..runtime.errors import StartupError
from ..runtime.timing import UNSCALED
from ..transfer.backends.base import Mover
from ..transfer.decode_rooms import DecodeRooms
from ..transfer.page_digests import DigestWorker
from ..transfer.prefill_rooms import PrefillRooms
from ..weights.images import WeightImage, WeightImages
from ..weights.loaded import LoadedModel
from ..weights.outbox import WeightOutbox
from ..weights.staged import StagedFile
from ..weights.update_groups import Group, UpdateGroups
from ..weights.updater import (
    LoadFolder,
    LoadOrder,
    LoadServed,
    LoadTensors,
    Prepared,
    Sums,
    TensorHead,
    WeightUpdater,
)
from .engine import FakeEngine
from .side_work import FakeDeathProbe, FakeDigests, NoImageJobs, NoOutbox, NoProfiler
from .tokens import EOS, LAYOUT, PAGE_SIZE, VOCAB_SIZE, Pool

INITIAL_VERSION = "default"
BACKEND = "fake"  # also the name of its transport
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class FakeCheckpoint:
    path: Path
    fingerprint: str


def _no_group(message: JoinUpdateGroup) -> Group:
    raise StartupError(f"group {message.group_name!r} was not joined: there is no trainer here")


def _no_gpu(source: FromGpuMemory) -> StagedFile:
    raise StartupError(f"there is no GPU {source.device_uuid} here")


def _no_peer(source: FromPeer) -> StagedFile:
    raise StartupError(f"{source.zmq_address} is no address of a node")


def _no_image() -> Callable[[], WeightImage]:
    raise StartupError("simulated weights are no file")


class FakeStore:
    """Weights are a name: the folder's, or what a file of tensors holds."""

    def __init__(self, served: Callable[[], str]) -> None:
        self._served = served

    def load(self, order: LoadOrder) -> Callable[[], FakeCheckpoint]:
        def job() -> FakeCheckpoint:
            match order:
                case LoadFolder(path):
                    pass
                case LoadTensors(file=file):
                    path = Path(file.read_text())
                case LoadServed():
                    path = Path(self._served())
            if path.name.startswith("wrong"):
                raise StartupError(f"{path} cannot replace the model that is served")
            return FakeCheckpoint(path, f"print of {path.name}")

        return job

    def drop(self) -> None:
        pass

    def check(self) -> Callable[[], Sums]:
        served = self._served()
        return lambda: Sums({"tensor": f"sum of {served}"}, f"sum of {served}")

    def head(self, name: str, num_rows: int) -> Callable[[], TensorHead]:
        def job() -> TensorHead:
            if name != "tensor":
                raise StartupError(f"the model has no tensor {name!r}")
            return TensorHead("float32", (8,), [0.5] * num_rows)

        return job

    def save(self, target: str, *, is_remote: bool, max_shard_bytes: int) -> Callable[[], None]:
        def job() -> None:
            if is_remote:
                raise StartupError(f"{target} cannot be written")

        return job


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of both nodes of a pair."""

    prefill_pages: int = 32
    decode_pages: int = 32
    chunk_tokens: int = 8
    max_rows: int = 16
    max_waiting: int = 8
    max_running: int = 8
    max_model_len: int = 1000
    has_cache: bool = True
    decode_has_cache: bool = True
    local_prefill_threshold: int | None = None
    local_prefill_chunk: int = 8
    conservativeness: float = 1.0
    is_colocated: bool = False
    overlaps_transfer: bool = True
    returns_hidden_states: bool = True
    session_cache_fraction: float = 0.5
    verify_pages: VerifyPages = "off"
    eos_token_ids: tuple[int, ...] = (EOS,)


class Server(Protocol[T_co]):
    """A node's bound socket, in place of ServerChannel."""

    def receive(self) -> Iterator[tuple[bytes, T_co | MalformedMessage]]: ...

    def send(self, link: bytes, message: msgspec.Struct) -> bool: ...


class SettlingMover(Mover, Protocol):
    """What a prefill node moves pages with, in place of a TransferBackend with a pool of bytes."""

    @property
    def settle_s(self) -> float: ...


class Links(Protocol):
    """A decode node's connections to prefill nodes, in place of PeerLinks."""

    def open(self, address: str, epoch: int) -> None: ...

    def close(self, address: str) -> None: ...

    def send(self, address: str, message: PeerToPrefill) -> None: ...

    def receive(self) -> Iterator[tuple[str, PeerToDecode | LinkDown]]: ...


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a node is, and which life of it this is."""

    name: str
    incarnation: str
    model_path: str = "weights-1"
    weight_version: str = INITIAL_VERSION

    @property
    def address(self) -> str:
        return f"tcp://{self.name}:1"

    @property
    def url(self) -> str:
        return f"http://{self.name}"

    @property
    def fingerprint(self) -> str:
        return f"print of {self.model_path}"


class _Base(Generic[T]):
    """What both nodes have: the parts around the scheduler."""

    def __init__(
        self,
        role: Role,
        place: Place,
        server: Server[T],
        num_pages: int,
        settings: Settings,
        *,
        clock: Callable[[], float],
        journal: list[str] | None,
        on_queued: Callable[[], None] | None,
        on_digest: Callable[[], None] | None,
        metrics: MetricsReporter | None,
    ) -> None:
        self.place = place
        self.server = server
        self.clock = clock
        self.pool = Pool(num_pages)
        self.allocator = PageAllocator(num_pages)
        self.engine = FakeEngine(place.name, self.pool, self.allocator, clock, journal, on_queued)
        self.engine.weights = place.model_path
        self.identity = PeerIdentity(
            incarnation=place.incarnation,
            protocol_version=PROTOCOL_VERSION,
            model_fingerprint=place.fingerprint,
            weight_version=place.weight_version,
            layout=LAYOUT,
            tp_size=1,
            backend=BACKEND,
            transport=BACKEND,
        )
        entry = NodeEntry(
            url=place.url,
            role=role,
            incarnation=place.incarnation,
            zmq_address=place.address,
            model_name="model",
            model_fingerprint=place.fingerprint,
            weight_version=place.weight_version,
            colocated=settings.is_colocated and role == "decode",
        )
        model = ModelInfo(
            model_name="model",
            model_path=place.model_path,
            model_type="qwen3",
            architectures=(),
            vocab_size=VOCAB_SIZE,
            max_model_len=settings.max_model_len,
            eos_token_ids=settings.eos_token_ids,
            dtype="float32",
            weight_version=place.weight_version,
            model_fingerprint=place.fingerprint,
        )
        self.status = NodeStatus(entry, model, node_config(role, {}), LAYOUT, BACKEND)
        self.weights: WeightUpdater[FakeCheckpoint] = WeightUpdater(
            FakeStore(lambda: self.engine.weights),
            self.engine.jobs.submit,
            lambda: self.status.weight_version,
            lambda: 1 << 40,
            UpdateGroups(_no_group, lambda: 1 << 40),
            _no_gpu,
            _no_peer,
        )
        self.metrics = metrics or MetricsReporter("model", role)
        self.digests = FakeDigests(self.pool, on_digest)
        self.load_inquirer = LoadInquirer(page_size=PAGE_SIZE, max_running_requests=settings.max_running)
        self.loop_times = LoopTimes()
        self.span_clock = SpanClock(0.0, clock)
        self.memory_journal: list[str] = []
        self.receiver: RequestReceiver[T] = RequestReceiver(cast("ServerChannel[T]", server))

    def _edges(self) -> NodeEdges:
        return NodeEdges(
            send=self.server.send,
            allocator=self.allocator,
            digests=cast(DigestWorker, self.digests),
            engine=cast(Forwards, self.engine),
            build=cast("Callable[[ScheduleBatch], ForwardBatch]", self.engine.build),
            make_control=self._make_control,
            status=self.status,
            metrics=self.metrics,
            load_inquirer=self.load_inquirer,
            clock=self.span_clock,
            timing=UNSCALED,
        )

    def _make_control(
        self, settings: LiveSettings, drop_cache: Callable[[], bool]
    ) -> NodeControl[LoadedModel]:
        self.control: NodeControl[FakeCheckpoint] = NodeControl(
            status=self.status,
            flush=FlushWrapper(),
            weights=self.weights,
            images=WeightImages(_no_image, lambda: "", NoImageJobs(), idle_s=UNSCALED.weight_image_idle_s),
            outbox=cast(WeightOutbox, NoOutbox()),
            memory=MemoryOccupation(self, self.engine.jobs.submit),
            operations=NodeOperations(
                settings=settings,
                engine=self.engine,
                profiler=NoProfiler(),
                loop_times=self.loop_times,
                ranks=None,
            ),
            metrics=self.metrics,
            drop_cache=drop_cache,
        )
        return cast("NodeControl[LoadedModel]", self.control)

    def swap(self, prepared: Prepared[FakeCheckpoint]) -> PeerIdentity:
        checkpoint = prepared.checkpoint
        self.engine.weights = checkpoint.path.name
        self.status.renew(
            str(checkpoint.path), checkpoint.fingerprint, prepared.weight_version, prepared.update_id
        )
        self.identity = msgspec.structs.replace(
            self.identity,
            model_fingerprint=checkpoint.fingerprint,
            weight_version=prepared.weight_version,
            update_id=prepared.update_id,
        )
        return self.identity

    @property
    def regions(self) -> tuple[MemoryRegion, ...]:
        """Every incarnation registers its memory anew."""
        pool_bytes = len(self.pool.pages) * LAYOUT.page_bytes
        region = MemoryRegion(
            session=self.identity.incarnation, address=0, num_bytes=pool_bytes + 8, scratch_address=pool_bytes
        )
        return (region,)

    # ---- MemoryPort: it keeps a list of what was done ----

    def move(self, before: frozenset[MemoryTag], after: frozenset[MemoryTag]) -> Callable[[], None]:
        what, tags = ("release", after - before) if after > before else ("resume", before - after)
        return lambda: self.memory_journal.append(f"{what} {sorted(tags)}")

    def announce(self, *, is_released: bool) -> Announced:
        self.identity = announce(self.status, self.identity, is_released=is_released)
        return Announced(self.status.shown(self.identity), self.regions)

    def _loop(self, role: Any, report: Report) -> RoleLoop[Any, FakeCheckpoint]:  # noqa: ANN401, either role
        return RoleLoop(
            role,
            report,
            receiver=cast("RequestReceiver[Any]", self.receiver),
            send=self.server.send,
            engine=self.engine,
            side_jobs=self.engine.jobs,
            control=self.control,
            swap=self.swap,
            status=self.status,
            metrics=self.metrics,
            loop_times=self.loop_times,
            unix_now=self.span_clock.unix_now,
            timing=UNSCALED,
        )


def check_nothing_raised(containments: Iterable[Containment]) -> None:
    assert not any(each.num_faults for each in containments), "a handler has raised"


class PrefillNode(_Base[ToPrefill]):
    def __init__(
        self,
        place: Place,
        server: Server[ToPrefill],
        backend: SettlingMover,
        settings: Settings,
        *,
        clock: Callable[[], float],
        journal: list[str] | None = None,
        on_queued: Callable[[], None] | None = None,
        on_digest: Callable[[], None] | None = None,
        metrics: MetricsReporter | None = None,
    ) -> None:
        super().__init__(
            "prefill",
            place,
            server,
            settings.prefill_pages,
            settings,
            clock=clock,
            journal=journal,
            on_queued=on_queued,
            on_digest=on_digest,
            metrics=metrics,
        )
        self.rooms = PrefillRooms(self.identity, UNSCALED, settle_s=backend.settle_s)
        self.limits = PrefillLimits(
            max_batch_tokens=settings.chunk_tokens,
            max_batch_rows=settings.max_rows,
            max_waiting=settings.max_waiting,
            overlaps_transfer=settings.overlaps_transfer,
            returns_hidden_states=settings.returns_hidden_states,
        )
        parts = prefill_assembly.assemble(
            self._edges(),
            PrefillEdges(movers=(backend,), rooms=self.rooms),
            LAYOUT,
            self.limits,
            keeps_prefixes=settings.has_cache,
        )
        self.cache, self.jobs, self.scheduler = parts.cache, parts.jobs, parts.scheduler
        self.report = parts.report
        self.loop = self._loop(self.scheduler, self.report)

    @property
    def caches(self) -> list[PrefixCache]:
        return [self.cache] if self.cache else []

    @property
    def states(self) -> dict[str, list[Any]]:
        return {state.value: [job.room for job in self.jobs if job.state is state] for state in JobState}

    @property
    def containments(self) -> tuple[Containment, ...]:
        return self.loop.containment, self.engine.containment, self.jobs.containment

    def check(self) -> None:
        check_nothing_raised(self.containments)
        check_pages(self.allocator, self.caches, owners=[job.room for job in self.jobs])
        check_requests(self.states)

    def check_idle(self) -> None:
        """Nothing runs, nothing is held but the cache."""
        assert self.scheduler.is_idle, f"{self.place.incarnation} is not idle"
        check_idle(self.allocator, self.caches, states=self.states)


class DecodeNode(_Base[ClientToNode]):
    def __init__(
        self,
        place: Place,
        server: Server[ClientToNode],
        links: Links,
        settings: Settings,
        *,
        clock: Callable[[], float],
        journal: list[str] | None = None,
        on_queued: Callable[[], None] | None = None,
        on_digest: Callable[[], None] | None = None,
        metrics: MetricsReporter | None = None,
    ) -> None:
        super().__init__(
            "decode",
            place,
            server,
            settings.decode_pages,
            settings,
            clock=clock,
            journal=journal,
            on_queued=on_queued,
            on_digest=on_digest,
            metrics=metrics,
        )
        self.rooms = DecodeRooms(self.identity, self.regions, settings.decode_pages, UNSCALED)
        self.death_probe = FakeDeathProbe()
        parts = decode_assembly.assemble(
            self._edges(),
            DecodeEdges(
                sent_output=lambda _: None,
                links=cast(PeerLinks, links),
                death_probe=cast(DeathProbe, self.death_probe),
                rooms=self.rooms,
                copy_page=self.pool.copy,
                poison=self.pool.poison,
            ),
            DecodeOptions(
                layout=LAYOUT,
                limits=DecodeLimits(
                    max_running=settings.max_running,
                    max_batch_tokens=max(settings.chunk_tokens, settings.max_running + 1),
                    max_model_len=settings.max_model_len,
                    returns_hidden_states=settings.returns_hidden_states,
                ),
                eos_token_ids=settings.eos_token_ids,
                max_pinned_pages=int(settings.decode_pages * settings.session_cache_fraction),
                keeps_prefixes=settings.decode_has_cache,
                conservativeness=settings.conservativeness,
                local_prefill_threshold=settings.local_prefill_threshold,
                local_prefill_chunk=settings.local_prefill_chunk,
                verify_pages=settings.verify_pages,
            ),
        )
        self.waiting, self.handoffs, self.running = parts.waiting, parts.handoffs, parts.running
        self.cache, self.pages, self.pins = parts.cache, parts.pages, parts.pins
        self.growth, self.streamer = parts.growth, parts.streamer
        self.scheduler, self.report = parts.scheduler, parts.report
        self.loop = self._loop(self.scheduler, self.report)

    @property
    def requests(self) -> list[DecodeRequest]:
        """Of every stage."""
        return [*self.waiting, *self.handoffs, *self.running]

    def capacity(self) -> Capacity:
        """What admission may give away now."""
        return self.waiting.capacity((self.handoffs, self.running), self.handoffs.num_stranded_pages)

    @property
    def states(self) -> dict[str, list[Any]]:
        running: dict[bool, list[Any]] = {True: [], False: []}
        for request in self.running:
            running[self.running.is_prefilling(request.key)].append(request.key)
        return {
            "waiting": [request.key for request in self.waiting],
            "handoff": [request.key for request in self.handoffs],
            "local_prefill": running[True],
            "running": running[False],
        }

    @property
    def containments(self) -> tuple[Containment, ...]:
        return (
            self.loop.containment,
            self.engine.containment,
            self.handoffs.containment,
            self.running.containment,
        )

    def check(self) -> None:
        """Between two turns of the loop: each page has one owner that is alive, and the parts agree."""
        check_nothing_raised(self.containments)
        sequences = self._sequences()
        open_rooms = self.handoffs.rooms()
        check_pages(
            self.allocator,
            [self.cache],
            owners=[sequence.owner for sequence in sequences],
            open_rooms=[*open_rooms, *self.handoffs.rooms_in_quarantine()],
        )
        check_requests(self.states)
        self.pages.check_promises([cast(DecodeRequest, SimpleNamespace(sequences=sequences))])
        self.streamer.check()
        self.pins.check()
        assert set(self.allocator.exposed_rooms()) == open_rooms, "exposure differs between the parts"
        num_quarantined = self.allocator.counts().quarantined
        assert num_quarantined == self.rooms.num_quarantined_pages, "quarantine differs between the parts"
        for request in self.requests:
            assert request.live_sequences, "a request without a live choice is not forgotten"

    def _sequences(self) -> list[Sequence]:
        """Of every request, and cancelled ones that a forward still writes."""
        others = [*self.waiting, *self.handoffs]
        held = [sequence for request in others for sequence in request.sequences]
        return [*held, *self.running.sequences()]

    def check_idle(self) -> None:
        """Nothing runs, nothing is held, no room is in quarantine."""
        assert self.scheduler.is_idle, f"{self.place.incarnation} is not idle"
        assert self.rooms.is_idle, "a room is still in quarantine"
        assert self.pages.num_available == self.allocator.num_pages, "pages are promised to nobody"
        check_idle(self.allocator, [self.cache], states=self.states)
