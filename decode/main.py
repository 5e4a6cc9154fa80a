"""Builds the decode scheduler from its parts and runs it."""

from __future__ import annotations

import socket
import time

import zmq

from ..messages.channel import ServerChannel
from ..messages.link_guard import LinkKeys
from ..messages.node import ClientToNode
from ..messages.timeline import SpanClock
from ..node.crash_hook import CrashHook, kill_this_process
from ..node.edges import edges_of
from ..node.run import run
from ..node.start import start_node
from ..runtime.config import NodeConfig
from ..transfer.decode_rooms import DecodeRooms
from ..transfer.page_digests import DigestWorker
from .assembly import DecodeEdges, DecodeOptions, assemble
from .death_probe import DeathProbe
from .limits import DecodeLimits
from .peer_links import PeerLinks


def run_decode(config: NodeConfig, listener: socket.socket, incarnation: str = "") -> int:
    """Serve until SIGTERM. Returns the exit code; raises StartupError when it cannot start."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link_keys = LinkKeys.of(config.cluster_secret)
    server: ServerChannel[ClientToNode] = ServerChannel(context, config.host, 0, ClientToNode, keys=link_keys)
    node = start_node(config, listener, server.socket, server.port, incarnation)
    digests, death_probe = DigestWorker(node.memory, node.layout), DeathProbe(config.timing)
    node.waiter.add(digests.fileno())
    node.waiter.add(death_probe.fileno())
    clock = SpanClock(node.unix_minus_monotonic_s, time.monotonic)
    # A colocated node has nobody else to prefill: its chunks are as long as those of a prefill node.
    default_chunk = config.chunked_prefill_size if config.colocated else None
    decode = assemble(
        edges_of(node, server.send, digests, clock),
        DecodeEdges(
            sent_output=CrashHook(config.crash_after_outputs, kill_this_process).sent,
            links=PeerLinks(context, node.waiter, link_keys),
            death_probe=death_probe,
            rooms=DecodeRooms(node.served.identity, node.served.regions, node.num_pages, config.timing),
            copy_page=node.copy_page,
            poison=node.poison if config.poison_reserved_pages else None,
        ),
        DecodeOptions(
            layout=node.layout,
            limits=DecodeLimits(
                max_running=config.max_running_requests,
                max_batch_tokens=max(config.chunked_prefill_size, config.max_running_requests + 1),
                max_model_len=node.max_model_len,
                returns_hidden_states=config.enable_return_hidden_states,
            ),
            eos_token_ids=node.served.model.config.eos_token_ids,
            max_pinned_pages=int(node.num_pages * config.session_cache_fraction),
            keeps_prefixes=not config.disable_prefix_cache,
            conservativeness=config.schedule_conservativeness,
            local_prefill_threshold=config.local_prefill_threshold,
            local_prefill_chunk=config.local_prefill_chunk_size or default_chunk,
            verify_pages=config.verify_pages,
        ),
    )
    return run(node, decode.scheduler, decode.report, server, decode.control, clock)
