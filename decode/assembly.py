"""Puts the parts of a decode node together: for its process, for tests and for the simulation alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..components.output_streamer import OutputStreamer
from ..components.prefix_cache import PrefixCache
from ..messages.kv_layout import KVLayout
from ..messages.node import AttemptFailed, TokenOutputs
from ..node.control import NodeControl
from ..node.edges import NodeEdges
from ..runtime.config import VerifyPages
from ..runtime.peer_clock import PeerClocks
from ..transfer.decode_rooms import DecodeRooms
from ..weights.loaded import LoadedModel
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


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeEdges:
    """What this role stands on beside `NodeEdges`."""

    sent_output: Callable[[TokenOutputs | AttemptFailed], None]  # told of every output
    links: PeerLinks
    death_probe: DeathProbe
    rooms: DecodeRooms
    copy_page: Callable[[int, int], None]
    poison: Callable[[list[int]], None] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeOptions:
    """How the parts are set. `local_prefill_*`: see LocalPrefillPolicy."""

    layout: KVLayout  # of all heads
    limits: DecodeLimits
    eos_token_ids: tuple[int, ...]
    max_pinned_pages: int  # of all sessions
    keeps_prefixes: bool
    conservativeness: float
    local_prefill_threshold: int | None
    local_prefill_chunk: int | None
    verify_pages: VerifyPages


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeAssembly:
    control: NodeControl[LoadedModel]
    scheduler: DecodeScheduler
    report: DecodeReport
    waiting: Waiting
    handoffs: Handoffs
    running: Running
    cache: PrefixCache
    pages: RequestPages
    pins: SessionPins
    growth: GrowthEstimate
    streamer: OutputStreamer


def assemble(node: NodeEdges, edges: DecodeEdges, options: DecodeOptions) -> DecodeAssembly:
    page_size = options.layout.page_size
    cache = PrefixCache(node.allocator, page_size)
    pins = SessionPins(cache, max_pages=options.max_pinned_pages)
    pages = RequestPages(
        node.allocator,
        cache,
        edges.copy_page,
        edges.poison,
        pins=pins,
        keeps_prefixes=options.keeps_prefixes,
    )
    growth = GrowthEstimate(options.conservativeness)
    local_prefill = LocalPrefillPolicy(
        threshold=options.local_prefill_threshold,
        chunk_tokens=options.local_prefill_chunk,
        page_size=page_size,
        page_bytes=options.layout.page_bytes,
    )
    control = node.make_control(decode_settings(growth, local_prefill), pages.drop_cache)
    gone_clients: set[bytes] = set()

    def send_output(client: bytes, message: TokenOutputs | AttemptFailed) -> None:
        if not node.send(client, message):
            gone_clients.add(client)
        edges.sent_output(message)

    streamer = OutputStreamer(send_output, grace_s=node.timing.closed_attempt_s)
    peer_clocks = PeerClocks()
    timeline = Timeline(node.clock, streamer, peer_clocks)
    outputs = Outputs(
        streamer,
        timeline,
        node.send,
        gone_clients,
        eos_token_ids=options.eos_token_ids,
        max_model_len=options.limits.max_model_len,
    )
    waiting = Waiting(
        pages=pages,
        growth=growth,
        outputs=outputs,
        control=control,
        status=node.status,
        metrics=node.metrics,
        limits=options.limits,
        clock=node.clock,
        overtaking_s=node.timing.overtaking_s,
    )
    handoffs = Handoffs(
        rooms=edges.rooms,
        peers=PrefillPeers(edges.links, edges.death_probe, peer_clocks, node.clock, control.heard),
        allocator=node.allocator,
        pages=pages,
        digests=node.digests,
        verify_pages=options.verify_pages,
        outputs=outputs,
        timeline=timeline,
        local_prefill=local_prefill,
        load_inquirer=node.load_inquirer,
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
        load_inquirer=node.load_inquirer,
        metrics=node.metrics,
        limits=options.limits,
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
        send=node.send,
        timing=node.timing,
    )
    report = DecodeReport(
        waiting=waiting,
        handoffs=handoffs,
        running=running,
        pages=pages,
        pins=pins,
        load_inquirer=node.load_inquirer,
        metrics=node.metrics,
    )
    return DecodeAssembly(
        control=control,
        scheduler=scheduler,
        report=report,
        waiting=waiting,
        handoffs=handoffs,
        running=running,
        cache=cache,
        pages=pages,
        pins=pins,
        growth=growth,
        streamer=streamer,
    )
