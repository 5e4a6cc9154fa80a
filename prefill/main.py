"""Builds the prefill scheduler from its parts and runs it."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

import zmq

from ..components.load_inquirer import LoadInquirer
from ..components.page_allocator import PageAllocator
from ..components.prefix_cache import PrefixCache
from ..messages.channel import ServerChannel
from ..messages.link_guard import LinkKeys
from ..messages.memory_region import MemoryRegion
from ..messages.timeline import SpanClock
from ..node.control_assembly import make_control
from ..node.process import start_node
from ..node.run import run
from ..runtime.config import NodeConfig
from ..transfer.page_digests import DigestWorker
from ..transfer.prefill_rooms import PrefillRooms
from .jobs import PrefillJobs
from .last_chunk import LastChunk
from .limits import PrefillLimits
from .report import PrefillReport
from .scheduler import PrefillScheduler, ToPrefill
from .settings import prefill_settings
from .wire import Wire

# The kernel kills further ranks once the first one, whose ports peers look at, is gone: until then they may
# write.
_RANK_OUTLIVES_S = 1.0


def _transfer_addresses(regions: Sequence[MemoryRegion]) -> tuple[str, ...]:
    """Where the ranks' transfer engines listen. One without a port writes from its own process alone."""
    parts = [region.session.rpartition(":") for region in regions]
    return tuple(f"{host}:{port}" for host, _, port in parts if host and port.isdigit())


def run_prefill(config: NodeConfig, listener: socket.socket, incarnation: str = "") -> int:
    """Serve until SIGTERM. Returns the exit code; raises StartupError when it cannot start."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link_keys = LinkKeys.of(config.cluster_secret)
    server: ServerChannel[ToPrefill] = ServerChannel(context, config.host, 0, ToPrefill, keys=link_keys)
    node = start_node(config, listener, server.socket, server.port, incarnation)
    allocator = PageAllocator(node.num_pages)
    cache = None if config.disable_prefix_cache else PrefixCache(allocator, config.page_size)
    digests = DigestWorker(node.memory, node.layout)
    node.waiter.add(digests.fileno())
    limits = PrefillLimits(
        max_batch_tokens=config.chunked_prefill_size,
        max_batch_rows=config.max_running_requests,
        max_waiting=config.max_queued_prefills,
        returns_hidden_states=config.enable_return_hidden_states,
        overlaps_transfer=not config.disable_transfer_overlap,
    )
    clock = SpanClock(time.monotonic, node.unix_minus_monotonic_s)
    last_chunk = LastChunk(config.page_size, node.layout.page_bytes // config.page_size)
    jobs = PrefillJobs(
        allocator=allocator,
        cache=cache,
        engine=node.engine,
        build=node.build,
        status=node.status,
        layout=node.layout,
        limits=limits,
        last_chunk=last_chunk,
        clock=clock,
    )
    control = make_control(node, prefill_settings(limits), drop_cache=jobs.drop_cache)
    rooms = PrefillRooms(
        node.identity,
        settle_s=max(node.backend.settle_s, _RANK_OUTLIVES_S if node.ranks is not None else 0.0),
        transfer_addresses=_transfer_addresses(node.regions),
        unix_minus_monotonic_s=node.unix_minus_monotonic_s,
    )
    load_inquirer = LoadInquirer(page_size=config.page_size, max_running_requests=config.max_running_requests)
    scheduler = PrefillScheduler(
        jobs=jobs,
        rooms=rooms,
        wire=Wire(server.send, node.movers, last_chunk, node.metrics, clock),
        digests=digests,
        control=control,
        send=server.send,
        load_inquirer=load_inquirer,
        metrics=node.metrics,
        limits=limits,
        clock=clock,
    )
    report = PrefillReport(jobs, rooms, load_inquirer, node.metrics)
    return run(node, scheduler, report, server, control, clock)
