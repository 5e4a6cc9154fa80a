"""Builds the prefill scheduler from its parts and runs it."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

import zmq

from ..messages.channel import ServerChannel
from ..messages.link_guard import LinkKeys
from ..messages.memory_region import MemoryRegion
from ..messages.timeline import SpanClock
from ..node.edges import edges_of
from ..node.run import run
from ..node.start import start_node
from ..runtime.config import NodeConfig
from ..transfer.page_digests import DigestWorker
from ..transfer.prefill_rooms import PrefillRooms
from .assembly import PrefillEdges, assemble
from .limits import PrefillLimits
from .scheduler import ToPrefill


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
    digests = DigestWorker(node.memory, node.layout)
    node.waiter.add(digests.fileno())
    clock = SpanClock(node.unix_minus_monotonic_s, time.monotonic)
    prefill = assemble(
        edges_of(node, server.send, digests, clock),
        PrefillEdges(
            movers=node.movers,
            rooms=PrefillRooms(
                node.served.identity,
                config.timing,
                settle_s=max(
                    node.backend.settle_s, config.timing.rank_outlives_s if node.ranks is not None else 0.0
                ),
                transfer_addresses=_transfer_addresses(node.served.regions),
                unix_minus_monotonic_s=node.unix_minus_monotonic_s,
            ),
        ),
        node.layout,
        PrefillLimits(
            max_batch_tokens=config.chunked_prefill_size,
            max_batch_rows=config.max_running_requests,
            max_waiting=config.max_queued_prefills,
            returns_hidden_states=config.enable_return_hidden_states,
            overlaps_transfer=not config.disable_transfer_overlap,
        ),
        keeps_prefixes=not config.disable_prefix_cache,
    )
    return run(node, prefill.scheduler, prefill.report, server, prefill.control, clock)
