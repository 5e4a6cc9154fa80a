"""Builds the decode scheduler from its parts and runs it."""

from __future__ import annotations

import socket
import time

import zmq

from ..components.load_inquirer import LoadInquirer
from ..components.output_streamer import OutputStreamer
from ..components.page_allocator import PageAllocator
from ..components.prefix_cache import PrefixCache
from ..messages.channel import ServerChannel
from ..messages.link_guard import LinkKeys
from ..messages.node import AttemptFailed, ClientToNode, TokenOutputs
from ..messages.timeline import SpanClock
from ..node.control_assembly import make_control
from ..node.crash_hook import CrashHook, kill_this_process
from ..node.process import start_node
from ..node.run import run
from ..runtime.config import NodeConfig
from ..runtime.peer_clock import PeerClocks
from ..transfer.decode_rooms import DecodeRooms
from ..transfer.page_digests import DigestWorker
from .death_probe import DeathProbe
from .growth_estimate import GrowthEstimate
from .handoffs import Handoffs
from .limits import DecodeLimits
from .local_prefill import LocalPrefillPolicy
from .outputs import Outputs
from .peer_links import PeerLinks
from .prefill_peers import PrefillPeers
from .report import DecodeReport
from .request_pages import RequestPages
from .running import Running
from .scheduler import DecodeScheduler
from .session_pins import SessionPins
from .settings import decode_settings
from .timeline import Timeline
from .waiting import Waiting


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
    clock = SpanClock(time.monotonic, node.unix_minus_monotonic_s)
    peer_clocks = PeerClocks()
    streamer = OutputStreamer(send_output)
    timeline = Timeline(clock, streamer, peer_clocks)
    limits = DecodeLimits(
        max_running=config.max_running_requests,
        max_batch_tokens=max(config.chunked_prefill_size, config.max_running_requests + 1),
        max_model_len=node.max_model_len,
        returns_hidden_states=config.enable_return_hidden_states,
    )
    outputs = Outputs(
        streamer,
        timeline,
        server.send,
        gone_clients,
        eos_token_ids=node.model.config.eos_token_ids,
        max_model_len=node.max_model_len,
    )
    load_inquirer = LoadInquirer(page_size=config.page_size, max_running_requests=config.max_running_requests)
    control = make_control(node, decode_settings(growth, local_prefill), drop_cache=pages.drop_cache)
    waiting = Waiting(
        pages=pages,
        growth=growth,
        outputs=outputs,
        control=control,
        status=node.status,
        metrics=node.metrics,
        limits=limits,
        clock=clock,
    )
    handoffs = Handoffs(
        rooms=DecodeRooms(node.identity, node.regions, node.num_pages),
        peers=PrefillPeers(
            PeerLinks(context, node.waiter, link_keys), death_probe, peer_clocks, clock, control.heard
        ),
        allocator=allocator,
        pages=pages,
        digests=digests,
        verify_pages=config.verify_pages,
        outputs=outputs,
        timeline=timeline,
        local_prefill=local_prefill,
        load_inquirer=load_inquirer,
        metrics=node.metrics,
    )
    running = Running(
        pages=pages,
        growth=growth,
        outputs=outputs,
        timeline=timeline,
        local_prefill=local_prefill,
        engine=node.engine,
        build=node.build,
        load_inquirer=load_inquirer,
        metrics=node.metrics,
        limits=limits,
    )
    scheduler = DecodeScheduler(
        waiting=waiting,
        handoffs=handoffs,
        running=running,
        outputs=outputs,
        pages=pages,
        pins=pins,
        local_prefill=local_prefill,
        control=control,
        status=node.status,
        send=server.send,
    )
    report = DecodeReport(
        waiting=waiting,
        handoffs=handoffs,
        running=running,
        pages=pages,
        pins=pins,
        load_inquirer=load_inquirer,
        metrics=node.metrics,
    )
    return run(node, scheduler, report, server, control, clock)
