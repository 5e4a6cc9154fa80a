"""Builds the decode scheduler from its parts and runs it."""

from __future__ import annotations

import socket
import time

import zmq

from ..components.control_assembly import make_control
from ..components.crash_hook import CrashHook, kill_this_process
from ..components.load_inquirer import LoadInquirer
from ..components.node_process import run, start_node
from ..components.output_streamer import OutputStreamer
from ..components.page_allocator import PageAllocator
from ..components.prefix_cache import PrefixCache
from ..components.request_receiver import RequestReceiver
from ..messages.channel import ServerChannel
from ..messages.link_guard import LinkKeys
from ..messages.node import AttemptFailed, ClientToNode, TokenOutputs
from ..runtime.config import NodeConfig
from ..transfer.decode_rooms import DecodeRooms
from ..transfer.page_digests import DigestWorker
from .death_probe import DeathProbe
from .growth_estimate import GrowthEstimate
from .local_prefill import LocalPrefillPolicy
from .peer_links import PeerLinks
from .request_pages import RequestPages
from .scheduler import DecodeLimits, DecodeScheduler
from .session_pins import SessionPins
from .settings import decode_settings


def run_decode(config: NodeConfig, listener: socket.socket, incarnation: str = "") -> int:
    """Serve until SIGTERM. Returns the exit code; raises StartupError when it cannot start."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link_keys = LinkKeys.of(config.cluster_secret)
    server: ServerChannel[ClientToNode] = ServerChannel(context, config.host, 0, ClientToNode, keys=link_keys)
    node = start_node(config, listener, server.socket, server.port, incarnation)
    allocator = PageAllocator(node.num_pages)
    cache = PrefixCache(allocator, config.page_size)
    pins = SessionPins(cache, max_pages=int(node.num_pages * config.session_cache_fraction))
    poison = node.poison if config.poison_reserved_pages else None
    pages = RequestPages(
        allocator,
        cache,
        node.copy_page,
        poison,
        pins=pins,
        keeps_prefixes=not config.disable_prefix_cache,
    )
    digests = DigestWorker(node.memory, node.layout)
    node.waiter.add(digests.fileno())
    gone_clients: set[bytes] = set()
    # A colocated node has nobody else to prefill: its chunks are as long as those of a prefill node.
    default_chunk = config.chunked_prefill_size if config.colocated else None
    death_probe = DeathProbe()
    node.waiter.add(death_probe.fileno())

    crash = CrashHook(config.crash_after_outputs, kill_this_process)

    def send_output(client: bytes, message: TokenOutputs | AttemptFailed) -> None:
        if not server.send(client, message):
            gone_clients.add(client)
        crash.sent(message)

    growth = GrowthEstimate(config.schedule_conservativeness)
    local_prefill = LocalPrefillPolicy(
        threshold=config.local_prefill_threshold,
        chunk_tokens=config.local_prefill_chunk_size or default_chunk,
        page_size=config.page_size,
        page_bytes=node.layout.page_bytes,
    )
    scheduler = DecodeScheduler(
        receiver=RequestReceiver(server),
        send=server.send,
        links=PeerLinks(context, node.waiter, link_keys),
        death_probe=death_probe,
        rooms=DecodeRooms(node.identity, node.regions, node.num_pages),
        allocator=allocator,
        cache=cache,
        pages=pages,
        pins=pins,
        growth=growth,
        local_prefill=local_prefill,
        digests=digests,
        engine=node.engine,
        side_jobs=node.jobs,
        build=node.build,
        streamer=OutputStreamer(send_output),
        gone_clients=gone_clients,
        control=make_control(node, decode_settings(growth, local_prefill), drop_cache=pages.drop_cache),
        swap=node.swap,
        status=node.status,
        load_inquirer=LoadInquirer(
            page_size=config.page_size, max_running_requests=config.max_running_requests
        ),
        metrics=node.metrics,
        loop_times=node.loop_times,
        verify_pages=config.verify_pages,
        limits=DecodeLimits(
            max_running=config.max_running_requests,
            max_batch_tokens=max(config.chunked_prefill_size, config.max_running_requests + 1),
            max_model_len=node.max_model_len,
            returns_hidden_states=config.enable_return_hidden_states,
        ),
        eos_token_ids=node.model.config.eos_token_ids,
        unix_minus_monotonic_s=node.unix_minus_monotonic_s,
        clock=time.monotonic,
    )
    return run(node, scheduler, scheduler.fail_open_requests)
