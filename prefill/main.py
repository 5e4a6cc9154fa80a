"""Builds the prefill scheduler from its parts and runs it."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

import zmq

from ..components.control_assembly import make_control
from ..components.load_inquirer import LoadInquirer
from ..components.node_process import run, start_node
from ..components.page_allocator import PageAllocator
from ..components.prefix_cache import PrefixCache
from ..components.request_receiver import RequestReceiver
from ..messages.channel import ServerChannel
from ..messages.link_guard import LinkKeys
from ..messages.memory_region import MemoryRegion
from ..runtime.config import NodeConfig
from ..transfer.page_digests import DigestWorker
from ..transfer.prefill_rooms import PrefillRooms
from .limits import PrefillLimits
from .scheduler import PrefillScheduler, ToPrefill
from .settings import prefill_settings

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
    scheduler = PrefillScheduler(
        receiver=RequestReceiver(server),
        send=server.send,
        rooms=PrefillRooms(
            node.identity,
            settle_s=max(node.backend.settle_s, _RANK_OUTLIVES_S if node.ranks is not None else 0.0),
            transfer_addresses=_transfer_addresses(node.regions),
            unix_minus_monotonic_s=node.unix_minus_monotonic_s,
        ),
        movers=node.movers,
        allocator=allocator,
        cache=cache,
        digests=digests,
        engine=node.engine,
        side_jobs=node.jobs,
        build=node.build,
        control=make_control(
            node, prefill_settings(limits), drop_cache=lambda: cache is None or cache.reset()
        ),
        swap=node.swap,
        status=node.status,
        layout=node.layout,
        load_inquirer=LoadInquirer(
            page_size=config.page_size, max_running_requests=config.max_running_requests
        ),
        metrics=node.metrics,
        loop_times=node.loop_times,
        limits=limits,
        unix_minus_monotonic_s=node.unix_minus_monotonic_s,
        clock=time.monotonic,
    )
    return run(node, scheduler, scheduler.fail_open_requests)
