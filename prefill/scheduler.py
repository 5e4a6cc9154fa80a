"""The prefill binary's loop.

Life cycle of a request here; the job of a room is in exactly one state:

1. **Waiting**: a PrefillRequest opened its room. It waits for *all* pages of its prompt, oldest first; what
   the prefix cache holds is locked, the rest is allocated.
2. **Computing**: chunk by chunk, several prompts in one forward. Cached pages are on the wire before the
   first chunk runs, and each chunk's whole pages as soon as it is done, while the next one computes.
3. **Sending**: the last chunk's forward sampled the first token, which leaves at once; the prompt's pages
   join the prefix cache; the last pages are on the wire.
4. Gone: every write is in place (HandoffDone), or the room failed or was aborted. Its pages are unlocked; a
   forward that still writes into them is waited for.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias, assert_never

import msgspec

from ..components import request_limits
from ..components.invariant_checker import IdleCheck, check_idle
from ..components.load_inquirer import LoadInquirer
from ..components.loaded_model import LoadedModel
from ..components.loop_times import LoopTimes
from ..components.metrics_reporter import MetricsReporter
from ..components.node_control import ControlCall, ControlResult, NodeControl
from ..components.node_status import NodeStatus
from ..components.page_allocator import PageAllocator
from ..components.prefix_cache import PrefixCache
from ..components.request_receiver import RequestReceiver, refusals
from ..components.weight_updater import Prepared
from ..engine.engine_thread import EngineThread, JobResult
from ..engine.forward_batch import ForwardBatch, ForwardOutput, RowOutput
from ..engine.job_thread import JobThread
from ..engine.schedule_batch import ScheduleBatch, ScheduledRow
from ..messages.kv_layout import KVLayout
from ..messages.malformed import head_of
from ..messages.node import (
    AbortRequests,
    AssertPeerDeath,
    CallReply,
    CancelRequest,
    ClientToNode,
    GenerateRequest,
    GetRequestState,
    NodeLoad,
    Ping,
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
    AbortRoom,
    ContactPong,
    HandoffDone,
    PeerHello,
    PeerIdentity,
    PeerPing,
    PeerPong,
    PeerToPrefill,
    PrefillRequest,
    RoomBusy,
    RoomFailed,
    RoomId,
    SampledFirstToken,
)
from ..messages.timeline import SpanClock, covered_s
from ..messages.weights import (
    PrepareWeights,
)
from ..runtime.config import HIDDEN_STATES_FLAG
from ..runtime.containment import PROCESS_FAULTS, Containment, nobody_waits
from ..runtime.pause_gate import PauseGate
from ..transfer.actions import (
    AdmitRoom,
    CancelWrites,
    DisconnectPeer,
    MeetPeer,
    PrefillAction,
    ReleaseRoom,
    SendToDecode,
    SubmitWrite,
)
from ..transfer.backends.base import Mover, WriteState
from ..transfer.page_digests import Digests, DigestWorker
from ..transfer.prefill_rooms import PrefillRooms
from .batching import next_chunks
from .job import JobState, PrefillJob
from .last_chunk import LastChunk
from .limits import PrefillLimits

ToPrefill: TypeAlias = ClientToNode | PeerToPrefill
_log = logging.getLogger(__name__)

# One forward runs while the next one waits behind it: chunks need nothing of each other's results, so the
# engine never pauses for the loop.
_MAX_FORWARDS = 2
_STUCK_S = 1.0
_LOADING_S = 120.0


class PrefillScheduler:
    """Composed of named parts; decides nothing that one of them could decide."""

    def __init__(
        self,
        *,
        receiver: RequestReceiver[ToPrefill],
        send: Callable[[bytes, msgspec.Struct], bool],
        rooms: PrefillRooms,
        movers: Sequence[Mover],
        digests: DigestWorker,
        allocator: PageAllocator,
        cache: PrefixCache | None,
        engine: EngineThread,
        side_jobs: JobThread,
        build: Callable[[ScheduleBatch], ForwardBatch],
        control: NodeControl[LoadedModel],
        swap: Callable[[Prepared[LoadedModel]], PeerIdentity],
        status: NodeStatus,
        layout: KVLayout,
        load_inquirer: LoadInquirer,
        metrics: MetricsReporter,
        loop_times: LoopTimes,
        limits: PrefillLimits,
        unix_minus_monotonic_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.receiver = receiver
        self.send = send
        self.rooms = rooms
        self.movers = movers  # of each rank
        self.digests = digests
        self.allocator = allocator
        self.cache = cache
        self.engine = engine
        self.side_jobs = side_jobs
        self.build = build
        self.control = control
        self.swap = swap
        self.status = status
        self.layout = layout
        self.load_inquirer = load_inquirer
        self.metrics = metrics
        self.loop_times = loop_times
        self.limits = limits
        self.last_chunk = LastChunk(layout.page_size, layout.page_bytes // layout.page_size)
        self.clock = SpanClock(clock, unix_minus_monotonic_s)
        self.jobs: dict[RoomId, PrefillJob] = {}  # every job, in order of arrival
        self.forwards: deque[list[tuple[PrefillJob, ScheduledRow]]] = deque()  # on the engine thread
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
        for mover in self.movers:
            for result in mover.poll():
                if result.state is WriteState.FAILED:
                    self.metrics.count_failed_write()
                self.act(self.rooms.on_write_result(result, now), now)
        for done in self.digests.poll():
            self.take_digests(done, now)
        for finished in self.engine.poll():
            if isinstance(finished, JobResult):
                self.finish_job(finished, now)
            else:
                self.apply(finished, now)
        for job in self.side_jobs.poll():
            self.finish_job(job, now)
            self.act(self.rooms.announce_busy(now, now), now)
        self.act(self.rooms.tick(now), now)
        if not self.gate.is_paused:
            self.admit_waiting(now)
            self.launch_forwards(now)
        self.reply(self.control.poll(now, idle=self.is_idle, is_drained=True), now)
        if self.idle_check.is_due(now, idle=self.is_idle):
            self.check_invariants()

    def next_deadline(self) -> float:
        """When `step` is due although nothing happens; infinity if nothing is waited for."""
        return min(
            self.rooms.next_deadline(),
            self.control.deadline or math.inf,
            self.idle_check.deadline or math.inf,
        )

    @property
    def is_idle(self) -> bool:
        """Covers every queue of this binary: no job and no room that still writes.

        A job that is over stays until its last forward is done, so no forward runs without one.
        """
        return not self.jobs and self.rooms.is_idle

    def handle(self, link: bytes, message: ToPrefill, now: float) -> None:
        match message:
            case PeerHello() | PeerPing() | ContactPong() | PrefillRequest() | AbortRoom():
                if isinstance(message, PeerHello):
                    self.control.heard({message.identity.update_id})
                self.act(self.rooms.on_message(link, message, now, queue_has_room=self.has_room(now)), now)
            case Ping():
                pong = self.status.pong(
                    message.call_id,
                    self.load(now),
                    ready_peers=(),
                    refused_peers={},
                    is_draining=self.is_draining or not self.control.has_its_memory,
                    unix_s=self.clock.unix_now(),
                )
                self.send(link, pong)
            case _ if isinstance(message, ControlCall):
                if isinstance(message, PrepareWeights):
                    # Reading a checkpoint can hold the interpreter's lock for long stretches.
                    self.act(self.rooms.announce_busy(now + _LOADING_S, now), now)
                self.observe()
                result = self.control.handle(
                    link,
                    message,
                    now,
                    load=self.load(now),
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
            case GetRequestState():
                self.send(link, self.request_state(message, now))
            case CloseSession():
                text = "a prefill node holds no session"
                self.send(link, CallReply(call_id=message.call_id, success=True, message=text))
            case AssertPeerDeath():
                text = "a prefill node holds nothing for fear of its peers"
                self.send(link, CallReply(call_id=message.call_id, success=True, message=text))
            case AbortRequests():
                self.abort(link, message, now)
            case Roster():  # decode nodes connect to us, not the other way round
                self.control.heard({node.update_id for node in message.nodes})
            case GenerateRequest() | CancelRequest() | ResendFrom():
                for answer in refusals(head_of(message), "this is a prefill node"):
                    self.send(link, answer)
            case _:
                assert_never(message)

    def contained(self, link: bytes, message: ToPrefill, now: float) -> AbstractContextManager[None]:
        """What raises in handling it ends what it was about, and nothing else."""

        def give_up(why: str) -> None:
            if isinstance(message, PrefillRequest) and self.rooms.is_open(message.room):
                self.act(self.rooms.fail_room(message.room, "invalid", why, retriable=False), now)
                return
            for answer in refusals(head_of(message), why):
                self.send(link, answer)

        return self.containment.around(str(message.__struct_config__.tag), give_up)

    def finish_job(self, job: JobResult, now: float) -> None:
        with self.containment.around(f"the end of {job.name!r}", nobody_waits):
            self.reply(self.control.finish_job(job), now)

    def act(self, actions: list[PrefillAction], now: float) -> None:
        for action in actions:
            match action:
                case SendToDecode():
                    message = action.message
                    if isinstance(message, PeerPong):
                        unix_s = self.clock.unix_now()
                        message = msgspec.structs.replace(message, unix_s=unix_s)
                    self.send(action.link, message)
                    self.count(action)
                case MeetPeer():
                    self.movers[action.rank].first_contact(action.handle, action.region)
                case SubmitWrite():
                    self.movers[action.rank].submit(action.handle, action.region, action.run)
                    self.metrics.count_run()
                case CancelWrites():
                    for mover in self.movers:
                        mover.cancel(action.handles)
                case DisconnectPeer():
                    self.movers[action.rank].disconnect(action.region)
                case AdmitRoom():
                    self.accept(action.request, now)
                case ReleaseRoom():
                    self.release(action)
                case _:
                    assert_never(action)

    # ---- 1 to 2: waiting for pages ------------------------------------------------------------------

    def has_room(self, now: float) -> bool:
        """Whether a new room may open. Not while the transfer engine hangs in a call: others can take it."""
        num_waiting = sum(job.state is JobState.WAITING for job in self.jobs.values())
        is_stuck = any(mover.stuck_s(now) > _STUCK_S for mover in self.movers)
        takes_work = not self.is_draining and self.control.takes_work
        return num_waiting < self.limits.max_waiting and not is_stuck and takes_work

    def accept(self, request: PrefillRequest, now: float) -> None:
        arrived = self.clock.now()
        token_ids = (*request.prompt_ids, *request.output_ids)
        job = PrefillJob(message=request, token_ids=token_ids, state_since_s=arrived, reached_s=arrived)
        self.jobs[request.room] = job
        if (reason := self.impossible(job)) is not None:
            self.act(self.rooms.fail_room(job.room, "invalid", reason, retriable=False), now)

    def impossible(self, job: PrefillJob) -> str | None:
        """Why this prompt can never be computed here; None if it can."""
        num_pages = self.layout.pages_for(job.num_tokens)
        if num_pages > self.allocator.num_pages:
            return f"the prompt needs {num_pages} KV pages, the prefill node has {self.allocator.num_pages}"
        if job.message.sampling.hidden_states == "all" and not self.limits.returns_hidden_states:
            return f"the prefill node was started without {HIDDEN_STATES_FLAG}"
        return request_limits.refusal(job.token_ids, job.message.sampling, self.status.model)

    def admit_waiting(self, now: float) -> None:
        """Oldest first; who does not get all of its pages lets nobody pass, or long prompts would starve."""
        for job in list(self.jobs.values()):
            if job.state is not JobState.WAITING:
                continue
            if not self.take_pages(job, self.layout.pages_for(job.num_tokens)):
                return
            job.enter(JobState.COMPUTING, now)
            self.load_inquirer.count_prompt(num_cached=job.num_cached)
            # What is cached needs no forward: it travels while the first chunk computes.
            self.send_pages(job, now)

    def take_pages(self, job: PrefillJob, num_pages: int) -> bool:
        """Locks the cached prefix and allocates the rest; all or nothing."""
        cached: list[int] = []
        if self.cache is not None:
            job.match = self.cache.match(
                job.token_ids, max_tokens=job.reusable_tokens, namespace=job.message.cache_salt
            )
            self.cache.lock(job.match)
            cached = job.match.pages
            num_missing = num_pages - len(cached) - self.allocator.num_free
            if 0 < num_missing <= self.cache.num_evictable:  # else the rest of the cache would go for nothing
                self.cache.evict(num_missing)
        own = self.allocator.allocate_private(job.room, num_pages - len(cached))
        if own is None:
            self.unlock(job)
            return False
        job.pages = [*cached, *own]
        job.num_cached = job.num_computed = job.num_scheduled = len(cached) * self.layout.page_size
        return True

    # ---- 2: computing -------------------------------------------------------------------------------

    def launch_forwards(self, now: float) -> None:
        while len(self.forwards) < _MAX_FORWARDS:
            chunks = next_chunks(
                self.jobs.values(), self.limits.max_batch_tokens, self.limits.max_batch_rows, self.last_chunk
            )
            if not chunks:
                return
            try:
                batch = self.build(ScheduleBatch(rows=tuple(row for _, row in chunks)))
            except Exception:  # which of them is at fault says each one alone
                if not self.give_up_faulty(chunks, now):
                    raise
                continue
            self.engine.submit(batch)
            submitted = self.clock.now()
            self.forwards.append(chunks)
            for job, row in chunks:
                job.submitted_s.append(submitted)
                job.num_scheduled += row.num_tokens
                job.num_forwards += 1

    def give_up_faulty(self, chunks: Iterable[tuple[PrefillJob, ScheduledRow]], now: float) -> bool:
        """Fails the prompts of which no batch can be made. False: there is none."""
        num_before = self.containment.num_faults
        for job, row in chunks:

            def give_up(why: str, job: PrefillJob = job) -> None:
                self.act(self.rooms.fail_room(job.room, "invalid", why, retriable=False), now)

            with self.containment.around("a chunk", give_up):
                self.build(ScheduleBatch(rows=(row,)))
        return self.containment.num_faults > num_before

    def apply(self, output: ForwardOutput, now: float) -> None:
        """A forward is done: its whole pages may travel, and who reached the end has a first token."""
        chunks = self.forwards.popleft()
        step_s = output.finished - output.started
        self.metrics.count_step("prefill", step_s)
        self.last_chunk.measured_forward(sum(row.num_tokens for _, row in chunks), step_s)
        for (job, row), result in zip(chunks, output.rows, strict=True):
            job.num_forwards -= 1
            job.num_computed += row.num_tokens
            self.note_chunk(job, row, output)
            self.load_inquirer.count_prompt(num_computed=row.num_tokens)
            if job.is_over:
                self.free_if_unused(job)
                continue
            if row.prompt_logprobs_from == 0 and row.start == 0:
                job.prompt_logprobs.append(None)  # nothing precedes the first token
            job.prompt_logprobs += result.prompt_logprobs
            job.prompt_hidden_states.append(result.prompt_hidden_states)
            if result.tokens:
                self.enter_sending(job, result, now)
            self.send_pages(job, now)

    def send_pages(self, job: PrefillJob, now: float) -> None:
        """Every whole page that is computed and was not sent before; in the end the last one too."""
        is_last = job.state is JobState.SENDING
        if not (is_last or self.limits.overlaps_transfer):
            return
        pages = job.pages if is_last else job.pages[: job.num_computed // self.layout.page_size]
        wanted = [index for index in job.message.digest_pages if job.num_digested <= index < len(pages)]
        job.num_digested = max(job.num_digested, len(pages))
        if wanted:
            self.digests.submit((job.room, tuple(wanted)), [pages[index] for index in wanted])
        self.act(self.rooms.pages_ready(job.room, 0, pages, self.clock.now()), now)

    def take_digests(self, done: Digests, now: float) -> None:
        """Of a room that failed meanwhile they are worth nothing: its pages may be others' by now."""
        room, indices = done.key
        if done.error:
            self.act(self.rooms.fail_room(room, "transfer_failed", done.error, retriable=True), now)
            return
        self.act(self.rooms.digests_ready(room, dict(zip(indices, done.digests, strict=True)), now), now)

    def note_chunk(self, job: PrefillJob, row: ScheduledRow, output: ForwardOutput) -> None:
        """What it waited for since its chunk before, and the chunk itself, as the engine measured it."""
        submitted = job.submitted_s.popleft()
        if submitted > job.reached_s:
            job.spans.append(self.clock.span("prefill_queue", job.reached_s, submitted))
            job.reached_s = submitted
        job.spans.append(self.clock.span("engine_queue", job.reached_s, output.started))
        chunk = self.clock.span("prefill_chunk", output.started, output.finished, num_tokens=row.num_tokens)
        job.spans.append(chunk)
        job.reached_s = output.finished

    # ---- 3: sending ---------------------------------------------------------------------------------

    def enter_sending(self, job: PrefillJob, result: RowOutput, now: float) -> None:
        job.enter(JobState.SENDING, now)
        self.load_inquirer.count_generated(len(result.tokens))
        self.insert_into_cache(job)
        tokens = tuple(
            SampledFirstToken(sampled.choice, sampled.token_id, sampled.logprob) for sampled in result.tokens
        )
        sent = self.clock.span("first_token", job.reached_s, self.clock.now())
        first_token = self.rooms.first_token(
            job.room,
            tokens,
            now,
            prompt_logprobs=tuple(job.prompt_logprobs),
            prompt_hidden_states=b"".join(job.prompt_hidden_states),
            hidden_state=result.hidden_state,
            num_cached_tokens=job.num_cached,
            spans=(*job.spans, sent),
        )
        self.act(first_token, now)

    def insert_into_cache(self, job: PrefillJob) -> None:
        """Hand the whole pages to the tree, and keep them locked there until the last one has travelled."""
        if self.cache is None:
            return
        before = job.match
        job.match = self.cache.insert(job.token_ids, job.pages, job.room, job.message.cache_salt).match
        self.cache.lock(job.match)
        if before is not None:
            self.cache.unlock(before)

    # ---- 4: gone ------------------------------------------------------------------------------------

    def release(self, action: ReleaseRoom) -> None:
        job = self.jobs[action.room]
        job.is_over = True
        if not action.completed:
            _log.info(
                "request %s: room %d ended: %s", job.message.request_id, job.room.counter, action.reason
            )
            self.metrics.count_room("aborted" if action.is_aborted else "failed")
        self.free_if_unused(job)

    def free_if_unused(self, job: PrefillJob) -> None:
        """Pages go back once no forward can write into them any more."""
        if job.num_forwards == 0:
            self.unlock(job)
            self.allocator.free_private(job.room)
            del self.jobs[job.room]

    def unlock(self, job: PrefillJob) -> None:
        if self.cache is not None and job.match is not None:
            self.cache.unlock(job.match)
            job.match = None

    # ---- control ------------------------------------------------------------------------------------

    def reply(self, result: ControlResult[LoadedModel], now: float) -> None:
        if result.swap is not None:
            # Idle: nothing reads the weights, nothing is locked. What the old ones computed is worth nothing
            # now, and every pair shakes hands again under the new version.
            identity = self.swap(result.swap)
            self.drop_cache()
            self.act(self.rooms.set_identity(identity, f"weights are {identity.weight_version} now"), now)
        if (announced := result.announced) is not None:  # memory comes or goes: idle too
            self.drop_cache()
            self.act(self.rooms.set_identity(announced.identity, "memory is released or resumed"), now)
        for link, message in result.replies:
            self.send(link, message)

    def abort(self, link: bytes, message: AbortRequests, now: float) -> None:
        """Their rooms end; decode, which leads, ends the requests."""
        num_aborted = self.abort_jobs("" if message.all_requests else message.request_id, now)
        text = f"{num_aborted} requests aborted"
        self.send(link, CallReply(call_id=message.call_id, success=True, message=text))

    def abort_jobs(self, request_id: str, now: float) -> int:
        """Of one request, or all without an id."""
        aborted = [
            job
            for job in self.jobs.values()
            if not job.is_over and (not request_id or job.message.request_id == request_id)
        ]
        for job in aborted:
            self.act(self.rooms.fail_room(job.room, "aborted", "aborted on prefill", retriable=False), now)
        return len(aborted)

    def pause(self, link: bytes, message: PauseGeneration, now: float) -> None:
        self.gate.pause(message.mode, now)
        match message.mode:
            case "abort":
                self.abort_jobs("", now)
            case "retract":
                self.act(self.rooms.fail_all("paused", "the prefill node is paused"), now)
            case "in_place":
                pass
            case _:
                assert_never(message.mode)
        self.send(link, CallReply(call_id=message.call_id, success=True, message="paused"))

    def move_deadlines(self, by_s: float) -> None:
        if by_s:
            self.rooms.extend_deadlines(by_s)

    def check_invariants(self) -> None:
        """Idle: nothing may be held but the cache. A violation ends the process, loudly: it is a bug."""
        caches = [] if self.cache is None else [self.cache]
        check_idle(self.allocator, caches, states={"open": self.jobs.keys()})

    def drop_cache(self) -> bool:
        return self.cache is None or self.cache.reset()

    def load(self, now: float) -> NodeLoad:
        jobs = self.jobs.values()
        return self.load_inquirer.load(
            pages=self.allocator.counts(),
            num_locked_pages=self.cache.num_locked if self.cache else 0,
            num_evictable_pages=self.cache.num_evictable if self.cache else 0,
            num_running_reqs=sum(job.state is not JobState.WAITING for job in jobs),
            num_waiting_reqs=sum(job.state is JobState.WAITING for job in jobs),
            num_queued_tokens=sum(job.num_tokens - job.num_computed for job in jobs),
            peers=self.rooms.traffic(now),
        )

    def num_in_states(self) -> dict[str, int]:
        states = [job.state for job in self.jobs.values()]
        return {state.value: states.count(state) for state in JobState}

    def observe(self) -> None:
        self.metrics.observe_faults(
            num_contained=PROCESS_FAULTS.num_faults, num_malformed=self.receiver.num_malformed
        )
        self.metrics.observe_pages(self.allocator.counts())
        self.metrics.observe_queues(
            num_prefill_inflight=sum(job.state is JobState.SENDING for job in self.jobs.values())
        )

    def count(self, action: SendToDecode) -> None:
        match action.message:
            case HandoffDone() as done:
                wires = [span for span in done.spans if span.name == "wire"]
                busy_s = covered_s(wires, 0.0, math.inf)
                self.metrics.count_transfer(done.num_bytes, busy_s)
                self.last_chunk.measured_wire(done.num_bytes, busy_s)
                self.metrics.count_room("done")
            case RoomBusy():
                self.metrics.count_room("busy")
            case RoomFailed(code="version_skew"):
                self.metrics.count_version_refusal()
            case _:
                pass

    def request_state(self, message: GetRequestState, now: float) -> RequestStateReply:
        waits_for = {
            JobState.WAITING: "KV pages of its whole prompt",
            JobState.COMPUTING: "its prompt's chunks",
            JobState.SENDING: "its last pages to be in place on decode",
        }
        for job in self.jobs.values():
            if job.message.request_id == message.request_id:
                return RequestStateReply(
                    call_id=message.call_id,
                    state=job.state.value,
                    age_s=now - job.state_since_s,
                    waits_for=waits_for[job.state],
                    details={
                        "room": job.room.counter,
                        "num_tokens": job.num_tokens,
                        "num_cached_tokens": job.num_cached,
                        "num_computed_tokens": job.num_computed,
                    },
                )
        return RequestStateReply(call_id=message.call_id)

    def fail_open_requests(self) -> None:
        """This process ends: what is left may be tried elsewhere."""
        self.act(self.rooms.fail_all("shutting_down", "the prefill node shuts down"), 0.0)
