"""Puts the parts of a prefill node together: for its process, for tests and for the simulation alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..components.prefix_cache import PrefixCache
from ..messages.kv_layout import KVLayout
from ..node.control import NodeControl
from ..node.edges import NodeEdges
from ..transfer.backends.base import Mover
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
    """What this role stands on beside `NodeEdges`."""

    movers: Sequence[Mover]  # of each rank
    rooms: PrefillRooms


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillAssembly:
    control: NodeControl[LoadedModel]
    scheduler: PrefillScheduler
    report: PrefillReport
    jobs: PrefillJobs
    cache: PrefixCache | None


def assemble(
    node: NodeEdges, edges: PrefillEdges, layout: KVLayout, limits: PrefillLimits, *, keeps_prefixes: bool
) -> PrefillAssembly:
    """`layout`: of all heads."""
    cache = PrefixCache(node.allocator, layout.page_size) if keeps_prefixes else None
    last_chunk = LastChunk(layout.page_size, layout.page_bytes // layout.page_size)
    jobs = PrefillJobs(
        allocator=node.allocator,
        cache=cache,
        engine=node.engine,
        build=node.build,
        status=node.status,
        layout=layout,
        limits=limits,
        last_chunk=last_chunk,
        clock=node.clock,
    )
    control = node.make_control(prefill_settings(limits), jobs.drop_cache)
    scheduler = PrefillScheduler(
        jobs=jobs,
        rooms=edges.rooms,
        wire=Wire(
            node.send,
            edges.movers,
            last_chunk,
            node.metrics,
            node.clock,
            stuck_after_s=node.timing.stuck_contact_s,
        ),
        digests=node.digests,
        control=control,
        send=node.send,
        load_inquirer=node.load_inquirer,
        metrics=node.metrics,
        limits=limits,
        clock=node.clock,
    )
    report = PrefillReport(jobs, edges.rooms, node.load_inquirer, node.metrics)
    return PrefillAssembly(control=control, scheduler=scheduler, report=report, jobs=jobs, cache=cache)
