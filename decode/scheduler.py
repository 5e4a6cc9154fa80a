"""The decode binary's loop.

Life cycle of a request here; it is in exactly one state:

1. **Waiting**: a GenerateRequest arrived. It waits for a place in the batch and for pages: what the prefix
   cache holds of its prompt is locked, the rest of the prompt is reserved at once, and the growth that is
   expected of its output is counted.
2. **Handoff**: the missing pages are exposed to the prefill node that the router chose. The first token
   arrives and is streamed while the last pages are still in flight; if it ends the request, it ends here.
   (**Local prefill** instead, where that is cheaper, on a colocated node, and when no prefill node is alive:
   the chunks ride along in the decode batch, short ones while others decode.)
3. **Running**: all pages are in place. The prompt's join the prefix cache and choices fork: whole pages are
   shared, the partial one is copied. Each step samples one token of every choice. When there are too few
   pages for all to grow, the youngest is **retracted**: its attempt fails retriably, its pages stay cached.
4. Gone: finished, cancelled or failed. Its whole pages stay in the prefix cache until others need them; those
   that a peer may still write are quarantined.
"""

from __future__ import annotations

import itertools
import logging
import math
from array import array
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import assert_never

import msgspec

from ..components import request_limits
from ..components.invariant_checker import IdleCheck, check_idle
from ..components.load_inquirer import LoadInquirer
from ..components.loaded_model import LoadedModel
from ..components.loop_times import LoopTimes
from ..components.metrics_reporter import MetricsReporter, StepKind
from ..components.node_control import ControlCall, ControlResult, NodeControl
from ..components.node_status import NodeStatus
from ..components.output_streamer import OutputStreamer, StreamKey
from ..components.page_allocator import PageAllocator
from ..components.prefix_cache import PrefixCache
from ..components.request_receiver import RequestReceiver, refusals
from ..components.stop_conditions import check_finish
from ..components.weight_updater import Prepared
from ..engine.engine_thread import EngineThread, JobResult
from ..engine.forward_batch import ForwardBatch, ForwardOutput, RowOutput, SampledToken
from ..engine.job_thread import JobThread
from ..engine.schedule_batch import ScheduleBatch
from ..messages.malformed import head_of
from ..messages.node import (
    AbortRequests,
    AssertPeerDeath,
    AttemptFailed,
    CallReply,
    CancelRequest,
    ClientToNode,
    FailureCode,
    Finish,
    GenerateRequest,
    GetRequestState,
    NodeLoad,
    Ping,
    Pong,
    RequestStateReply,
    ResendFrom,
    Roster,
)
from ..messages.operation import (
    CloseSession,
    ContinueGeneration,
    PauseGeneration,
)
from ..messages.peer import (
    HandoffDone,
    PeerIdentity,
    PeerPing,
    PeerPong,
    PeerRefused,
    PeerToDecode,
    RoomId,
    SampledFirstToken,
)
from ..messages.timeline import SpanClock, covered_s, duration_of
from ..runtime.config import HIDDEN_STATES_FLAG, VerifyPages
from ..runtime.containment import PROCESS_FAULTS, Containment, nobody_waits
from ..runtime.pause_gate import PauseGate
from ..runtime.peer_clock import PeerClocks
from ..transfer.actions import (
    CloseLink,
    DecodeAction,
    FirstTokenArrived,
    HandoffComplete,
    OpenLink,
    PagesReleased,
    PeerLost,
    PeerReady,
    RoomEnded,
    SendToPrefill,
)
from ..transfer.decode_rooms import DecodeRooms
from ..transfer.page_digests import Digests, DigestWorker, pages_to_verify
from .admission import OVERTAKING_LIMIT_S, Capacity, choose_admitted
from .batching import DecodeRow, PrefillRow, Row, decode_row, prefill_rows
from .death_probe import DeathProbe
from .growth_estimate import GrowthEstimate
from .local_prefill import LocalPrefillPolicy
from .peer_links import LinkDown, PeerLinks
from .request_pages import RequestPages
from .retraction import choose_victim
from .rosters import Rosters
from .sequence import DecodeRequest, RequestState, Sequence
from .session_pins import SessionPins
from .timeline import Timeline

_log = logging.getLogger(__name__)

_DEADLINE_CHECK_S = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLimits:
    max_running: int  # sequences in a batch
    max_batch_tokens: int  # of a step that prefills locally
    max_model_len: int
    returns_hidden_states: bool = False


class DecodeScheduler:
    """Composed of named parts; decides nothing that one of them could decide."""

    def __init__(
        self,
        *,
        receiver: RequestReceiver[ClientToNode],
        send: Callable[[bytes, msgspec.Struct], bool],
        links: PeerLinks,
        death_probe: DeathProbe,
        rooms: DecodeRooms,
        allocator: PageAllocator,
        cache: PrefixCache,
        pages: RequestPages,
        pins: SessionPins,
        growth: GrowthEstimate,
        local_prefill: LocalPrefillPolicy,
        digests: DigestWorker,
        engine: EngineThread,
        side_jobs: JobThread,
        build: Callable[[ScheduleBatch], ForwardBatch],
        streamer: OutputStreamer,
        gone_clients: set[bytes],
        control: NodeControl[LoadedModel],
        swap: Callable[[Prepared[LoadedModel]], PeerIdentity],
        status: NodeStatus,
        load_inquirer: LoadInquirer,
        metrics: MetricsReporter,
        loop_times: LoopTimes,
        verify_pages: VerifyPages,
        limits: DecodeLimits,
        eos_token_ids: tuple[int, ...],
        unix_minus_monotonic_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.receiver = receiver
        self.send = send
        self.links = links
        self.death_probe = death_probe
        self.rooms = rooms
        self.allocator = allocator
        self.cache = cache
        self.pages = pages
        self.pins = pins
        self.growth = growth
        self.local_prefill = local_prefill
        self.digests = digests
        self.engine = engine
        self.side_jobs = side_jobs
        self.build = build
        self.streamer = streamer
        self.gone_clients = gone_clients  # found out by sending to them
        self.control = control
        self.swap = swap
        self.status = status
        self.load_inquirer = load_inquirer
        self.metrics = metrics
        self.loop_times = loop_times
        self.verify_pages = verify_pages
        self.limits = limits
        self.eos_token_ids = frozenset(eos_token_ids)
        self.clock = SpanClock(clock, unix_minus_monotonic_s)
        self.peer_clocks = PeerClocks()  # by address
        self.timeline = Timeline(self.clock, streamer, self.peer_clocks)

        self.requests: dict[StreamKey, DecodeRequest] = {}  # every one, in order of arrival
        self.by_room: dict[RoomId, DecodeRequest] = {}
        self.verifying: dict[RoomId, HandoffDone] = {}  # all is in place, and not compared yet
        self.forward: list[Row] = []  # on the engine thread
        self.rosters = Rosters()
        self.next_deadline_check = 0.0
        self.idle_check = IdleCheck()
        self.gate = PauseGate()
        self.containment = Containment()
        self.is_draining = False

    # ---- the loop -----------------------------------------------------------------------------------

    def step(self, now: float) -> None:
        self.move_deadlines(self.gate.stood_still_s(now))
        for link, message in self.receiver.receive():
            with self.loop_times.handling(message), self.contained(link, message, now):
                self.handle(link, message, now)
        for address, peer_message in self.links.receive():
            if isinstance(peer_message, LinkDown):
                self.act(self.rooms.on_link_down(address, peer_message.epoch, now), now)
            else:
                with self.contained_peer(peer_message, now):
                    self.handle_peer(address, peer_message, now)
        for incarnation in self.death_probe.poll():
            self.act(self.rooms.peer_death_proven(incarnation, now), now)
        for digests in self.digests.poll():
            self.compare_digests(digests, now)
        for finished in self.engine.poll():
            if isinstance(finished, JobResult):
                self.finish_job(finished, now)
            else:
                self.apply(finished, now)
        for job in self.side_jobs.poll():
            self.finish_job(job, now)
        self.act(self.rooms.tick(now), now)
        self.death_probe.watch(self.rooms.suspects())
        self.expire(now)
        self.pins.poll(now)
        if not self.gate.is_paused:
            self.admit_waiting(now)
            self.launch_forward(now)
        self.timeline.sent()
        self.streamer.flush_step(now)
        self.drop_gone_clients(now)
        self.reply(self.control.poll(now, idle=self.is_idle, is_drained=self.rooms.is_idle), now)
        if self.idle_check.is_due(now, idle=self.is_idle):
            self.check_invariants()

    def next_deadline(self) -> float:
        """When `step` is due although nothing happens; infinity if nothing is waited for."""
        return min(
            self.rooms.next_deadline(),
            self.control.deadline or math.inf,
            self.streamer.next_expiry or math.inf,
            self.pins.deadline or math.inf,
            self.idle_check.deadline or math.inf,
            self.next_deadline_check if self.requests else math.inf,
        )

    @property
    def is_idle(self) -> bool:
        """Covers every queue of this binary.

        An open room has its request: who lets go of one aborts the room. Pages in quarantine are no work:
        they are left out.
        """
        return not self.requests and not self.forward and self.streamer.is_idle

    def handle(self, link: bytes, message: ClientToNode, now: float) -> None:
        match message:
            case GenerateRequest():
                self.accept(link, message, now)
            case CancelRequest():
                key = StreamKey(link, message.request_id, message.attempt)
                if not message.aborts:
                    self.cancel(key, message.choices, now)
                elif (request := self.requests.get(key)) is not None:
                    self.abort_all([request], now)
            case ResendFrom():
                key = StreamKey(link, message.request_id, message.attempt)
                if not self.streamer.resend(key, message.choice, message.position):
                    self.refuse(link, message, "peer_lost", "this output is not on record any more")
            case AbortRequests():
                self.abort(link, message, now)
            case AssertPeerDeath():
                self.assert_peer_death(link, message, now)
            case Roster():
                self.control.heard({node.update_id for node in message.nodes})
                self.take_roster(message, now)
            case Ping():
                self.send(link, self.pong(message))
            case _ if isinstance(message, ControlCall):
                self.observe()
                result = self.control.handle(
                    link,
                    message,
                    now,
                    load=self.load(),
                    idle=self.is_idle,
                    requests=self.num_in_states(),
                    pause=self.gate.mode,
                )
                self.reply(result, now)
            case PauseGeneration():
                self.pause(link, message, now)
            case ContinueGeneration():
                text = "continued" if self.gate.resume() else "it was not paused"
                self.send(link, CallReply(call_id=message.call_id, success=True, message=text))
            case CloseSession():
                held = "its pages are let go" if self.pins.close(message.session_id) else "it held no pages"
                self.send(link, CallReply(call_id=message.call_id, success=True, message=held))
            case GetRequestState():
                self.send(link, self.request_state(message, now))
            case _:
                assert_never(message)

    def handle_peer(self, address: str, message: PeerToDecode, now: float) -> None:
        match message:
            case PeerPong(seq=seq, unix_s=unix_s):
                self.peer_clocks.answered(address, seq, self.clock.unix_now(), unix_s)
            case PeerRefused(update_id=update_id):
                self.control.heard({update_id})
            case _:
                pass
        self.act(self.rooms.on_message(address, message, now), now)

    def contained(self, link: bytes, message: ClientToNode, now: float) -> AbstractContextManager[None]:
        """What raises in handling it ends what it was about, and nothing else."""

        def give_up(why: str) -> None:
            if isinstance(message, GenerateRequest):
                self.cancel(StreamKey(link, message.request_id, message.attempt), (), now)
            for answer in refusals(head_of(message), why):
                self.send(link, answer)

        return self.containment.around(str(message.__struct_config__.tag), give_up)

    def contained_peer(self, message: PeerToDecode, now: float) -> AbstractContextManager[None]:
        """Likewise. A peer whose word was not understood is silent, and loses its epoch by that."""

        def give_up(why: str) -> None:
            room = head_of(message).room
            request = None if room is None else self.by_room.get(room)
            if request is not None:
                self.fail(request, "transfer_failed", why, retriable=True)
                self.drop_room(request, now)

        return self.containment.around(str(message.__struct_config__.tag), give_up)

    def finish_job(self, job: JobResult, now: float) -> None:
        with self.containment.around(f"the end of {job.name!r}", nobody_waits):
            self.reply(self.control.finish_job(job), now)

    def act(self, actions: list[DecodeAction], now: float) -> None:
        for action in actions:
            match action:
                case OpenLink():
                    self.links.open(action.address, action.epoch)
                    self.peer_clocks.forget(action.address)
                case CloseLink():
                    self.links.close(action.address)
                case SendToPrefill():
                    if isinstance(action.message, PeerPing):
                        self.peer_clocks.pinged(action.address, action.message.seq, self.clock.unix_now())
                    self.links.send(action.address, action.message)
                case PeerReady():
                    _log.info("prefill node at %s is ready", action.address)
                case PeerLost():
                    _log.warning("prefill node at %s is lost: %s", action.address, action.reason)
                case FirstTokenArrived():
                    self.take_first_token(action, now)
                case HandoffComplete():
                    self.finish_handoff(action, now)
                case RoomEnded():
                    self.end_room(action)
                case PagesReleased():
                    self.allocator.release_room(action.room)
                case _:
                    assert_never(action)

    # ---- 1: waiting for pages and places ------------------------------------------------------------

    def accept(self, link: bytes, message: GenerateRequest, now: float) -> None:
        key = StreamKey(link, message.request_id, message.attempt)
        if key in self.streamer:
            return  # sent twice
        if self.is_draining:
            self.refuse(link, message, "shutting_down", "the decode node shuts down")
            return
        if self.control.awaits_swap or message.weight_version not in ("", self.status.weight_version):
            self.metrics.count_version_refusal()
            ours = "about to change" if self.control.awaits_swap else repr(self.status.weight_version)
            why = f"the request wants weights {message.weight_version!r}, the decode node's are {ours}"
            self.refuse(link, message, "version_skew", why)
            return
        if not self.control.takes_work:
            self.refuse(link, message, "not_ready", "memory is released")
            return
        request = DecodeRequest(
            key=key,
            message=message,
            arrived_s=now,
            deadline_s=now + message.deadline_s,
            sequences=[
                Sequence(
                    key=key,
                    choice=choice,
                    token_ids=[*message.prompt_ids, *message.output_ids],
                    num_prompt_tokens=len(message.prompt_ids),
                )
                for choice in message.choices
            ],
            state_since_s=now,
            reached_s=self.clock.now(),
        )
        if (reason := self.impossible(request)) is not None:
            self.refuse(link, message, "invalid", reason)
            return
        if not self.has_prefill(message):
            self.refuse(link, message, "not_ready", "the prefill node is not connected to this decode node")
            return
        self.streamer.open(
            key,
            message.choices,
            num_kept_tokens=len(message.output_ids),
            stream_interval=message.stream_interval,
            weight_version=self.status.weight_version,
        )
        self.requests[key] = request
        if message.session_id:
            self.pins.touch(message.session_id)

    def impossible(self, request: DecodeRequest) -> str | None:
        """Why this request can never be served here; None if it can."""
        message = request.message
        if not message.choices or len(set(message.choices)) != len(message.choices):
            return f"choices are {message.choices}: at least one is expected, and none twice"
        # The last token of an output is never read again, so scoring takes a prompt of the whole context.
        num_most = self.limits.max_model_len - (message.sampling.max_tokens > 1)
        if len(message.prompt_ids) > num_most:
            return (
                f"the prompt has {len(message.prompt_ids)} tokens; the decode node takes at most {num_most} "
                f"of its {self.limits.max_model_len} for prompt and output together"
            )
        need, num_choices = self.pages.need(request).total, len(request.sequences)
        if need > self.allocator.num_pages or num_choices > self.limits.max_running:
            return (
                f"the request may need {need} KV pages and {num_choices} places in the batch; "
                f"the decode node has {self.allocator.num_pages} and {self.limits.max_running}"
            )
        if message.sampling.hidden_states == "all" and not self.limits.returns_hidden_states:
            return f"the decode node was started without {HIDDEN_STATES_FLAG}"
        return request_limits.refusal(request.sequences[0].token_ids, message.sampling, self.status.model)

    def has_prefill(self, message: GenerateRequest) -> bool:
        if not message.prefill_incarnation:
            return True  # the router knows of none that is alive, or this node is colocated
        return self.rooms.ready_address(message.prefill_incarnation) is not None

    def refuse(self, link: bytes, message: GenerateRequest | ResendFrom, code: FailureCode, why: str) -> None:
        """Ends an attempt that has no record."""
        failed = AttemptFailed(
            request_id=message.request_id,
            attempt=message.attempt,
            code=code,
            reason=why,
            retriable=code != "invalid",
        )
        self.send(link, failed)

    def admit_waiting(self, now: float) -> None:
        waiting = [request for request in self.requests.values() if request.state is RequestState.WAITING]
        if not waiting:
            return
        awaited: set[str] = set()  # prefill nodes that an old request waits for: younger ones let it pass
        for request in choose_admitted(waiting, self.capacity, self.demand, now):
            message = request.message
            if self.prefills_locally(request):
                self.start_local_prefill(request, now)
            elif message.prefill_incarnation in awaited or self.start_handoff(request, now):
                continue
            elif now - request.arrived_s > OVERTAKING_LIMIT_S:
                awaited.add(message.prefill_incarnation)

    def capacity(self) -> Capacity:
        admitted = [
            request for request in self.requests.values() if request.state is not RequestState.WAITING
        ]
        return Capacity(
            pages=self.pages.num_available - self.pages.num_expected(admitted, self.growth.share),
            sequences=self.limits.max_running - sum(len(request.live_sequences) for request in admitted),
            most_pages=self.allocator.num_pages - self.rooms.num_stranded_pages,
        )

    def demand(self, request: DecodeRequest) -> int:
        return self.pages.demand(request, self.growth.share)

    def prefills_locally(self, request: DecodeRequest) -> bool:
        message = request.message
        if not message.prefill_incarnation:
            return True
        num_tokens = request.num_prefill_tokens
        return self.local_prefill.is_local(
            num_tokens=num_tokens,
            num_cached=self.pages.match(request).num_tokens,
            num_ahead_on_prefill=message.num_prefill_tokens_ahead or num_tokens,
            num_running=len(self.in_state(RequestState.RUNNING)),
        )

    def start_local_prefill(self, request: DecodeRequest, now: float) -> None:
        self.timeline.note(request, "decode_queue")
        self.pages.allocate_prompt(request)
        request.num_prefilled = request.num_cached
        self.load_inquirer.count_prompt(num_cached=request.num_cached)
        request.enter(RequestState.LOCAL_PREFILL, now)
        self.timeline.note(request, "reserve")

    def expire(self, now: float) -> None:
        """Rooms have their own deadlines; who waits or runs is looked at here."""
        if now < self.next_deadline_check:
            return
        self.next_deadline_check = now + _DEADLINE_CHECK_S
        for request in list(self.requests.values()):
            if now >= request.deadline_s and request.state is not RequestState.HANDOFF:
                self.fail(
                    request, "deadline", f"over its deadline while {request.state.value}", retriable=False
                )

    # ---- 2: the hand-off ----------------------------------------------------------------------------

    def start_handoff(self, request: DecodeRequest, now: float) -> bool:
        """False: it goes on waiting, as half of the pool is enough for one prefill node."""
        message = request.message
        address = self.rooms.ready_address(message.prefill_incarnation)
        if address is None:
            self.fail(request, "not_ready", "the prefill node is not connected any more", retriable=True)
            return True
        num_shared = len(self.pages.match(request).pages)
        num_missing = self.pages.need(request).prompt - num_shared
        if not self.rooms.may_expose(address, num_missing):
            return False
        self.timeline.note(request, "decode_queue")
        dest_pages = self.pages.expose(request, self.rooms.next_room_id)
        digest_pages = pages_to_verify(
            self.verify_pages, num_shared, len(dest_pages), self.rooms.next_room_id.counter
        )
        request.verified_pages = tuple(dest_pages[index] for index in digest_pages)
        request.room, actions = self.rooms.open_room(
            address,
            request_id=message.request_id,
            attempt=message.attempt,
            prompt_ids=message.prompt_ids,
            output_ids=message.output_ids,
            choices=request.choices,
            sampling=message.sampling,
            dest_pages=tuple(dest_pages),
            num_cached_tokens=request.num_cached,
            deadline_s=request.deadline_s - now,
            now=now,
            digest_pages=digest_pages,
            cache_salt=message.cache_salt,
        )
        self.by_room[request.room] = request
        request.enter(RequestState.HANDOFF, now)
        self.timeline.note(request, "reserve")
        self.act(actions, now)
        return True

    def take_first_token(self, action: FirstTokenArrived, now: float) -> None:
        """Streamed at once, while the last pages are in flight."""
        request = self.by_room[action.room]
        message = action.message
        num_computed = request.num_prefill_tokens - message.num_cached_tokens
        self.local_prefill.measured_prefill(num_computed, duration_of("prefill_chunk", message.spans))
        self.timeline.prefilled(request, message.spans, self.peer_address(request))
        self.streamer.prompt_done(
            request.key,
            num_cached_tokens=message.num_cached_tokens,
            prompt_logprobs=message.prompt_logprobs,
            prompt_hidden_states=message.prompt_hidden_states,
        )
        by_choice = {sequence.choice: sequence for sequence in request.live_sequences}
        for sampled in message.tokens:
            if (sequence := by_choice.get(sampled.choice)) is not None:
                self.take_token(request, sequence, sampled, message.hidden_state)
        if not request.live_sequences:
            self.drop_room(request, now)

    def finish_handoff(self, action: HandoffComplete, now: float) -> None:
        request = self.by_room[action.room]
        message = action.message
        self.timeline.handed_off(request, message.spans, self.peer_address(request))
        wires = [span for span in message.spans if span.name == "wire"]
        self.local_prefill.measured_wire(message.num_bytes, covered_s(wires, 0.0, math.inf))
        if request.verified_pages:
            # The pages stay the room's own until it is known what is in them.
            self.verifying[action.room] = message
            self.digests.submit(action.room, request.verified_pages)
        else:
            self.adopt_room(request, action.room, now)

    def compare_digests(self, computed: Digests, now: float) -> None:
        done = self.verifying.pop(computed.key, None)
        if done is None:  # cancelled meanwhile
            return
        request = self.by_room[done.room]
        pairs = itertools.zip_longest(computed.digests, done.digests)
        num_corrupt = 0 if computed.error else sum(here != there for here, there in pairs)
        self.metrics.count_verified(num_pages=len(computed.digests), num_corrupt=num_corrupt)
        if not (num_corrupt or computed.error):
            self.adopt_room(request, done.room, now)
            return
        corrupt = f"{num_corrupt} of {len(computed.digests)} verified KV pages arrived corrupt"
        reason = computed.error or corrupt
        _log.error("room %d: %s", done.room.counter, reason)
        del self.by_room[done.room]
        request.room = None
        self.allocator.release_room(done.room)  # every write is in place: nothing can follow
        self.fail(request, "transfer_failed", reason, retriable=True)

    def peer_address(self, request: DecodeRequest) -> str:
        return self.rooms.ready_address(request.message.prefill_incarnation) or ""

    def adopt_room(self, request: DecodeRequest, room: RoomId, now: float) -> None:
        del self.by_room[room]
        request.room = None
        self.load_inquirer.count_prompt(
            num_received=request.num_prefill_tokens - request.num_cached, num_cached=request.num_cached
        )
        self.pages.adopt(request, room)
        self.start_running(request, now)

    def start_running(self, request: DecodeRequest, now: float) -> None:
        request.enter(RequestState.RUNNING, now)
        for sequence in request.live_sequences:
            sequence.token_ids = array("q", sequence.token_ids)
        self.pages.fork(request)

    def end_room(self, action: RoomEnded) -> None:
        request = self.by_room.pop(action.room)
        request.room = None
        self.give_up_room_pages(action.room, quarantined=action.quarantined)
        if action.code == "version_skew":
            self.metrics.count_version_refusal()
        if action.code == "aborted":
            for sequence in request.live_sequences:
                self.finish(request, sequence, Finish(reason="abort"))
            self.forget_if_over(request)
        else:
            self.fail(request, action.code, action.reason, retriable=action.retriable)

    def drop_room(self, request: DecodeRequest, now: float) -> None:
        """Nobody needs what prefill still writes: the pages come back when prefill has drained."""
        if request.room is not None:
            del self.by_room[request.room]
            is_in_place = self.verifying.pop(request.room, None) is not None
            self.give_up_room_pages(request.room, quarantined=not is_in_place)
            self.act(self.rooms.abort(request.room, now), now)
            request.room = None
        self.forget_if_over(request)

    def give_up_room_pages(self, room: RoomId, *, quarantined: bool) -> None:
        if quarantined:
            self.allocator.quarantine(room)
        else:
            self.allocator.release_room(room)

    # ---- 3: running ---------------------------------------------------------------------------------

    def launch_forward(self, now: float) -> None:
        """One forward at a time: each needs the tokens of the one before."""
        if self.forward:
            return
        rows: list[Row] = list(self.decode_rows(now))
        budget = self.limits.max_batch_tokens - len(rows)
        if rows:
            budget = min(budget, self.local_prefill.chunk_tokens)
        rows += prefill_rows(self.in_state(RequestState.LOCAL_PREFILL), budget)
        if not rows:
            return
        try:
            batch = self.build(ScheduleBatch(rows=tuple(row.row for row in rows)))
        except Exception:  # which of them is at fault says each one alone
            if not self.give_up_faulty(rows):
                raise
            self.launch_forward(now)
            return
        for row in rows:
            self.mark_in_forward(row, now)
        self.forward = rows
        self.engine.submit(batch)

    def give_up_faulty(self, rows: Iterable[Row]) -> bool:
        """Fails the requests of whose rows no batch can be made. False: there is none."""
        num_before = self.containment.num_faults
        for row in rows:

            def give_up(why: str, request: DecodeRequest = row.request) -> None:
                self.fail(request, "invalid", why, retriable=False)

            if row.request.live_sequences:
                with self.containment.around("a row", give_up):
                    self.build(ScheduleBatch(rows=(row.row,)))
        return self.containment.num_faults > num_before

    def decode_rows(self, now: float) -> list[DecodeRow]:
        """One token of every choice that has a page for it. Oldest first, so that they find pages first."""
        rows: list[DecodeRow] = []
        has_retracted = False
        for request in self.in_state(RequestState.RUNNING):
            for sequence in request.live_sequences:
                while not (sequence.is_finished or self.pages.make_room(sequence)):
                    victim = choose_victim(self.requests.values(), may_wait=self.may_get_pages_back())
                    if victim is None:
                        break
                    self.retract(victim)
                    has_retracted = True
                else:
                    rows.append(decode_row(request, sequence))
        rows = [row for row in rows if not row.sequence.is_finished]
        if rows and not has_retracted:
            self.growth.step()
        return rows

    def may_get_pages_back(self) -> bool:
        """Whether someone beside the oldest who runs holds pages that will be free at some time."""
        num_holding = sum(request.state is not RequestState.WAITING for request in self.requests.values())
        return num_holding > 1 or self.rooms.num_quarantined_pages > self.rooms.num_stranded_pages

    def retract(self, request: DecodeRequest) -> None:
        """It is tried again, and admitted only when all that it can need is there."""
        _log.info("request %s is retracted: too few pages for all that runs", request.message.request_id)
        self.metrics.count_retraction()
        reason = "the decode node has too few KV pages for all that runs"
        self.fail(request, "retracted", reason, retriable=True)
        going_on = [
            (other, sequence)
            for other in self.in_state(RequestState.RUNNING)
            for sequence in other.live_sequences
        ]
        self.growth.retracted(
            num_output_tokens=sum(sequence.num_output_tokens for _, sequence in going_on),
            max_tokens=sum(other.message.sampling.max_tokens for other, _ in going_on),
            num_sequences=len(going_on),
        )

    def mark_in_forward(self, row: Row, now: float) -> None:
        match row:
            case DecodeRow():
                row.sequence.in_forward = True
            case PrefillRow(request=request):
                request.sequences[0].in_forward = True
                self.timeline.note(request, "prefill_queue")
                request.num_prefilled += row.row.num_tokens
            case _:
                assert_never(row)

    def apply(self, output: ForwardOutput, now: float) -> None:
        rows, self.forward = self.forward, []
        kinds = {type(row) for row in rows}
        kind: StepKind = "mixed" if len(kinds) > 1 else "decode" if DecodeRow in kinds else "prefill"
        self.metrics.count_step(kind, output.finished - output.started)
        if kind == "prefill":
            num_tokens = sum(row.row.num_tokens for row in rows)
            self.local_prefill.measured_local(num_tokens, output.finished - output.started)
        elif kind == "decode":
            self.local_prefill.measured_step(output.finished - output.started)
        for row, result in zip(rows, output.rows, strict=True):
            match row:
                case DecodeRow(request=request, sequence=sequence):
                    sequence.in_forward = False
                    if request.key in self.requests:
                        self.timeline.first_step(request, output)
                    self.apply_decoded(request, sequence, result, now)
                case PrefillRow(request=request):
                    request.sequences[0].in_forward = False
                    self.timeline.chunk(request, row, output)
                    self.apply_prefilled(request, row, result, now)
                case _:
                    assert_never(row)

    def apply_decoded(
        self, request: DecodeRequest, sequence: Sequence, result: RowOutput, now: float
    ) -> None:
        if sequence.is_finished:  # cancelled while it was computed
            self.pages.free(request, sequence)
            return
        sampled = result.tokens[0]
        self.load_inquirer.count_generated(1)
        self.take_token(request, sequence, sampled, result.hidden_state)
        self.forget_if_over(request)

    def apply_prefilled(self, request: DecodeRequest, row: PrefillRow, result: RowOutput, now: float) -> None:
        self.load_inquirer.count_prompt(num_computed=row.row.num_tokens)
        if not request.live_sequences:  # cancelled while it was computed
            for sequence in request.sequences:
                self.pages.free(request, sequence)
            return
        if row.row.prompt_logprobs_from == 0 and row.row.start == 0:
            request.prompt_logprobs.append(None)  # nothing precedes the first token
        request.prompt_logprobs += result.prompt_logprobs
        request.prompt_hidden_states.append(result.prompt_hidden_states)
        if not result.tokens:
            return
        self.streamer.prompt_done(
            request.key,
            num_cached_tokens=min(request.num_cached, len(request.message.prompt_ids)),
            prompt_logprobs=request.prompt_logprobs,
            prompt_hidden_states=b"".join(request.prompt_hidden_states),
        )
        self.load_inquirer.count_generated(len(result.tokens))
        self.start_running(request, now)
        for sequence, sampled in zip(request.sequences, result.tokens, strict=True):
            if not sequence.is_finished:
                self.take_token(request, sequence, sampled, result.hidden_state)
        self.forget_if_over(request)

    def take_token(
        self,
        request: DecodeRequest,
        sequence: Sequence,
        sampled: SampledToken | SampledFirstToken,
        hidden_state: bytes,
    ) -> None:
        """One token more of one choice: recorded, streamed, and perhaps its last."""
        token_id = sampled.token_id
        if not request.has_first_token:
            request.has_first_token = True
            self.timeline.relays(request)
        sequence.token_ids.append(token_id)
        self.streamer.append(request.key, sequence.choice, token_id, sampled.logprob, hidden_state)
        finish = check_finish(
            token_id,
            sequence.num_output_tokens,
            request.message.sampling,
            self.eos_token_ids,
            self.limits.max_model_len,
            len(sequence.token_ids),
        )
        if finish is not None:
            self.finish(request, sequence, finish)

    # ---- 4: gone ------------------------------------------------------------------------------------

    def finish(self, request: DecodeRequest, sequence: Sequence, finish: Finish) -> None:
        self.streamer.finish(request.key, sequence.choice, finish)
        self.end_sequence(request, sequence)

    def end_sequence(self, request: DecodeRequest, sequence: Sequence) -> None:
        """No token more. Its pages go back unless a forward or a peer may still write them."""
        sequence.is_finished = True
        if not sequence.in_forward:
            self.pages.free(request, sequence)

    def forget_if_over(self, request: DecodeRequest) -> None:
        if not request.live_sequences and request.room is None:
            self.requests.pop(request.key, None)

    def cancel(self, key: StreamKey, choices: tuple[int, ...], now: float) -> None:
        """The client wants no more of these choices (of all, when none is named)."""
        request = self.requests.get(key)
        if request is not None and request.state is RequestState.LOCAL_PREFILL:
            # No choice has a token yet that could be a reason to end it alone.
            choices = ()
        self.streamer.discard(key, choices)
        if request is None:
            return
        for sequence in request.live_sequences:
            if not choices or sequence.choice in choices:
                self.end_sequence(request, sequence)
        if not request.live_sequences:
            self.drop_room(request, now)
        elif request.state is RequestState.WAITING:
            request.sequences = request.live_sequences  # nothing is reserved for the others

    def fail(self, request: DecodeRequest, code: FailureCode, reason: str, *, retriable: bool) -> None:
        self.streamer.fail(request.key, code, reason, retriable)
        for sequence in request.live_sequences:
            self.end_sequence(request, sequence)
        self.forget_if_over(request)

    def abort(self, link: bytes, message: AbortRequests, now: float) -> None:
        aborted = [
            request
            for request in self.requests.values()
            if message.all_requests or request.message.request_id == message.request_id
        ]
        self.abort_all(aborted, now)
        text = f"{len(aborted)} requests aborted"
        self.send(link, CallReply(call_id=message.call_id, success=True, message=text))

    def abort_all(self, aborted: Iterable[DecodeRequest], now: float) -> None:
        for request in aborted:
            for sequence in request.live_sequences:
                self.finish(request, sequence, Finish(reason="abort"))
            self.drop_room(request, now)

    def pause(self, link: bytes, message: PauseGeneration, now: float) -> None:
        self.gate.pause(message.mode, now)
        match message.mode:
            case "abort":
                self.abort_all(list(self.requests.values()), now)
            case "retract":
                for request in list(self.requests.values()):
                    self.fail(request, "paused", "the decode node is paused", retriable=True)
                    self.drop_room(request, now)
            case "in_place":
                pass
            case _:
                assert_never(message.mode)
        self.send(link, CallReply(call_id=message.call_id, success=True, message="paused"))

    def move_deadlines(self, by_s: float) -> None:
        if by_s:
            self.rooms.extend_deadlines(by_s)
            for request in self.requests.values():
                request.deadline_s += by_s

    def drop_gone_clients(self, now: float) -> None:
        for client in sorted(self.gone_clients):
            for key in self.streamer.drop_client(client):
                self.cancel(key, (), now)
        self.gone_clients.clear()

    def fail_open_requests(self) -> None:
        """This process ends: what is left may be tried elsewhere."""
        for request in list(self.requests.values()):
            self.streamer.fail(request.key, "shutting_down", "the decode node shuts down", retriable=True)
        self.streamer.flush_step(0.0)

    # ---- control ------------------------------------------------------------------------------------

    def take_roster(self, roster: Roster, now: float) -> None:
        """A node that nobody names any more is left."""
        named = self.rosters.heard(roster, now)
        if self.status.entry.colocated:
            return
        known = {peer.address for peer in self.rooms.peers()}
        for address in sorted(named):
            self.act(self.rooms.add_peer(address, now), now)
        for address in sorted(known - named):
            self.act(self.rooms.remove_peer(address, now), now)

    def assert_peer_death(self, link: bytes, message: AssertPeerDeath, now: float) -> None:
        incarnation = message.incarnation
        if (address := self.rooms.ready_address(incarnation)) is not None:
            success, text = False, f"{incarnation} is alive: it answers at {address}"
        else:
            num_pages = self.rooms.quarantined_pages().get(incarnation, 0)
            self.act(self.rooms.peer_death_proven(incarnation, now), now)
            success, text = True, f"{num_pages} pages of {incarnation} were in quarantine; they settle"
        self.send(link, CallReply(call_id=message.call_id, success=success, message=text))

    def pong(self, message: Ping) -> Pong:
        refused = {peer.address: peer.reason for peer in self.rooms.peers() if peer.is_refused}
        return self.status.pong(
            message.call_id,
            self.load(),
            ready_peers=tuple(self.rooms.ready_peers()),
            refused_peers=refused,
            quarantined_pages=self.rooms.quarantined_pages(),
            is_draining=self.is_draining or not self.control.has_its_memory,
            unix_s=self.clock.unix_now(),
        )

    def reply(self, result: ControlResult[LoadedModel], now: float) -> None:
        if result.swap is not None:
            # Idle: nothing reads the weights, nothing is locked. What the old ones computed is worth nothing
            # now, and every pair shakes hands again under the new version.
            identity = self.swap(result.swap)
            self.pages.drop_cache()
            reason = f"weights are {identity.weight_version} now"
            self.act(self.rooms.set_identity(identity, reason, now), now)
        if (announced := result.announced) is not None:  # memory comes or goes: idle too
            self.pages.drop_cache()
            reason = "memory is released or resumed"
            self.act(self.rooms.set_identity(announced.identity, reason, now, announced.regions), now)
        for link, message in result.replies:
            self.send(link, message)

    def check_invariants(self) -> None:
        """Idle: nothing may be held but the cache and quarantine.

        A violation ends the process, loudly: it is a bug.
        """
        rooms = [room for room in self.allocator.quarantined_rooms() if self.rooms.state_of(room) is not None]
        check_idle(self.allocator, [self.cache], states={"open": self.requests.keys()}, open_rooms=rooms)
        self.pages.check_promises([])
        self.pins.check()

    def in_state(self, state: RequestState) -> list[DecodeRequest]:
        return [request for request in self.requests.values() if request.state is state]

    def load(self) -> NodeLoad:
        waiting = self.in_state(RequestState.WAITING)
        prefilling = self.in_state(RequestState.LOCAL_PREFILL)
        return self.load_inquirer.load(
            pages=self.allocator.counts(),
            num_locked_pages=self.cache.num_locked,
            num_evictable_pages=self.cache.num_evictable,
            num_pinned_pages=self.cache.num_pinned,
            num_running_reqs=len(self.in_state(RequestState.RUNNING)) + len(prefilling),
            num_waiting_reqs=len(waiting) + len(self.in_state(RequestState.HANDOFF)),
            num_queued_tokens=sum(
                request.num_prefill_tokens - request.num_prefilled for request in (*waiting, *prefilling)
            ),
        )

    def num_in_states(self) -> dict[str, int]:
        return {state.value: len(self.in_state(state)) for state in RequestState}

    def observe(self) -> None:
        self.metrics.observe_faults(
            num_contained=PROCESS_FAULTS.num_faults, num_malformed=self.receiver.num_malformed
        )
        self.metrics.observe_pages(self.allocator.counts())
        self.metrics.observe_sessions(num_sessions=len(self.pins), num_pinned_pages=self.cache.num_pinned)
        self.metrics.observe_quarantine(self.rooms.quarantined_pages())
        self.metrics.observe_crossed_rooms(self.rooms.num_crossed)
        self.metrics.observe_queues(
            num_decode_prealloc=len(self.in_state(RequestState.WAITING)),
            num_decode_transfer=len(self.in_state(RequestState.HANDOFF)),
        )

    def request_state(self, message: GetRequestState, now: float) -> RequestStateReply:
        waits_for = {
            RequestState.WAITING: "KV pages and places in the batch",
            RequestState.HANDOFF: "the prefill node",
            RequestState.LOCAL_PREFILL: "its prompt's chunks",
            RequestState.RUNNING: "the next step",
        }
        for request in self.requests.values():
            if request.message.request_id == message.request_id:
                return RequestStateReply(
                    call_id=message.call_id,
                    state=request.state.value,
                    age_s=now - request.state_since_s,
                    waits_for=waits_for[request.state],
                    details={
                        "attempt": request.message.attempt,
                        "num_prompt_tokens": len(request.message.prompt_ids),
                        "num_cached_tokens": request.num_cached,
                        "num_output_tokens": sum(s.num_output_tokens for s in request.sequences),
                    },
                )
        return RequestStateReply(call_id=message.call_id)
