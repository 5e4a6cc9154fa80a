"""Puts the parts of a prefill node together: for its process, for tests and for the simulation alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from ..components.load_inquirer import LoadInquirer
from ..components.metrics_reporter import MetricsReporter
from ..components.page_allocator import PageAllocator
from ..components.prefix_cache import PrefixCache
from ..engine.engine_thread import EngineThread
from ..engine.forward_batch import ForwardBatch
from ..engine.schedule_batch import ScheduleBatch
from ..messages.kv_layout import KVLayout
from ..messages.timeline import SpanClock
from ..node.control import NodeControl
from ..node.live_settings import LiveSettings
from ..node.status import NodeStatus
from ..runtime.timing import Timing
from ..transfer.backends.base import Mover
from ..transfer.page_digests import DigestWorker
from ..transfer.prefill_rooms import PrefillRooms
from ..weights.loaded import LoadedModel
from .jobs import PrefillJobs
from .last_chunk import LastChunk
from .limits import PrefillLimits
from .report import PrefillReport
from .scheduler import PrefillScheduler
from .settings import prefill_settings
from .wire import Wire


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillEdges:
    """What the parts stand on: sockets, memory, engine. Fakes have these places in tests."""

    send: Callable[[bytes, msgspec.Struct], bool]
    movers: Sequence[Mover]  # of each rank
    rooms: PrefillRooms
    allocator: PageAllocator
    digests: DigestWorker
    engine: EngineThread
    build: Callable[[ScheduleBatch], ForwardBatch]
    make_control: Callable[[LiveSettings, Callable[[], bool]], NodeControl[LoadedModel]]
    status: NodeStatus
    metrics: MetricsReporter
    load_inquirer: LoadInquirer
    clock: SpanClock
    timing: Timing


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillAssembly:
    control: NodeControl[LoadedModel]
    scheduler: PrefillScheduler
    report: PrefillReport
    jobs: PrefillJobs
    cache: PrefixCache | None


def assemble(
    edges: PrefillEdges, layout: KVLayout, limits: PrefillLimits, *, keeps_prefixes: bool
) -> PrefillAssembly:
    """`layout`: of all heads."""
    cache = PrefixCache(edges.allocator, layout.page_size) if keeps_prefixes else None
    last_chunk = LastChunk(layout.page_size, layout.page_bytes // layout.page_size)
    jobs = PrefillJobs(
        allocator=edges.allocator,
        cache=cache,
        engine=edges.engine,
        build=edges.build,
        status=edges.status,
        layout=layout,
        limits=limits,
        last_chunk=last_chunk,
        clock=edges.clock,
    )
    control = edges.make_control(prefill_settings(limits), jobs.drop_cache)
    scheduler = PrefillScheduler(
        jobs=jobs,
        rooms=edges.rooms,
        wire=Wire(
            edges.send,
            edges.movers,
            last_chunk,
            edges.metrics,
            edges.clock,
            stuck_after_s=edges.timing.stuck_contact_s,
        ),
        digests=edges.digests,
        control=control,
        send=edges.send,
        load_inquirer=edges.load_inquirer,
        metrics=edges.metrics,
        limits=limits,
        clock=edges.clock,
    )
    report = PrefillReport(jobs, edges.rooms, edges.load_inquirer, edges.metrics)
    return PrefillAssembly(control=control, scheduler=scheduler, report=report, jobs=jobs, cache=cache)
