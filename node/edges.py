"""What the parts of a node stand on, whatever its role."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from ..components.load_inquirer import LoadInquirer
from ..components.metrics_reporter import MetricsReporter
from ..components.page_allocator import PageAllocator
from ..engine.engine_thread import Forwards
from ..engine.forward_batch import ForwardBatch
from ..engine.schedule_batch import ScheduleBatch
from ..messages.timeline import SpanClock
from ..runtime.timing import Timing
from ..transfer.page_digests import DigestWorker
from ..weights.loaded import LoadedModel
from .control import NodeControl
from .control_assembly import make_control
from .live_settings import LiveSettings
from .start import Node
from .status import NodeStatus


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeEdges:
    """Sockets, memory, engine, clocks. Fakes have these places in tests and in the simulation."""

    send: Callable[[bytes, msgspec.Struct], bool]  # False: that client is gone
    allocator: PageAllocator
    digests: DigestWorker
    engine: Forwards
    build: Callable[[ScheduleBatch], ForwardBatch]
    make_control: Callable[[LiveSettings, Callable[[], bool]], NodeControl[LoadedModel]]
    status: NodeStatus
    metrics: MetricsReporter
    load_inquirer: LoadInquirer
    clock: SpanClock
    timing: Timing


def edges_of(
    node: Node, send: Callable[[bytes, msgspec.Struct], bool], digests: DigestWorker, clock: SpanClock
) -> NodeEdges:
    """Those of a node in its own process."""
    config = node.config
    return NodeEdges(
        send=send,
        allocator=PageAllocator(node.num_pages),
        digests=digests,
        engine=node.engine,
        build=node.build,
        make_control=partial(make_control, node),
        status=node.status,
        metrics=node.metrics,
        load_inquirer=LoadInquirer(
            page_size=config.page_size, max_running_requests=config.max_running_requests
        ),
        clock=clock,
        timing=config.timing,
    )
