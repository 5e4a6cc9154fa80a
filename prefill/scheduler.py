"""What a prefill node does, turn by turn of the loop in `node/loop.py`.

Life cycle of a request here; the job of a room is in exactly one state:

1. **Waiting**: a PrefillRequest opened its room. It waits for *all* pages of its prompt, oldest first; what
   the prefix cache holds is locked, the rest is allocated.
2. **Computing**: chunk by chunk, several prompts in one forward. Cached pages are on the wire before the
   first chunk runs, and each chunk's whole pages as soon as it is done, while the next one computes.
3. **Sending**: the last chunk's forward sampled the first token, which leaves at once; the prompt's pages
   join the prefix cache; the last pages are on the wire.
4. Gone: every write is in place (HandoffDone), or the room failed or was aborted. Its pages are unlocked; a
   forward that still writes into them is waited for.

`jobs.py` owns the prompts and their pages, `transfer/prefill_rooms.py` the rooms; here is what goes between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeAlias, assert_never

import msgspec

from ..components.load_inquirer import LoadInquirer
from ..components.metrics_reporter import MetricsReporter
from ..components.request_receiver import refusals
from ..engine.forward_batch import ForwardOutput, RowOutput
from ..messages.malformed import head_of
from ..messages.memory_region import MemoryRegion
from ..messages.node import (
    AssertPeerDeath,
    CallReply,
    CancelRequest,
    ClientToNode,
    GenerateRequest,
    ResendFrom,
    Roster,
)
from ..messages.operation import CloseSession
from ..messages.peer import (
    AbortRoom,
    ContactPong,
    PeerHello,
    PeerIdentity,
    PeerPing,
    PeerToPrefill,
    PrefillRequest,
)
from ..messages.timeline import SpanClock
from ..node.control import NodeControl
from ..transfer.actions import AdmitRoom, PrefillAction, ReleaseRoom
from ..transfer.page_digests import Digests, DigestWorker
from ..transfer.prefill_rooms import PrefillRooms
from ..weights.loaded import LoadedModel
from .job import JobState, PrefillJob
from .jobs import PrefillJobs
from .limits import PrefillLimits
from .wire import Wire

ToPrefill: TypeAlias = ClientToNode | PeerToPrefill
PrefillMessage: TypeAlias = (  # what a prefill node alone is told, or answers in its own way
    PeerToPrefill | GenerateRequest | CancelRequest | ResendFrom | AssertPeerDeath | Roster | CloseSession
)
_log = logging.getLogger(__name__)


class PrefillScheduler:
    """A `Role`."""

    def __init__(
        self,
        *,
        jobs: PrefillJobs,
        rooms: PrefillRooms,
        wire: Wire,
        digests: DigestWorker,
        control: NodeControl[LoadedModel],
        send: Callable[[bytes, msgspec.Struct], bool],
        load_inquirer: LoadInquirer,
        metrics: MetricsReporter,
        limits: PrefillLimits,
        clock: SpanClock,
    ) -> None:
        self.is_draining = False
        self._jobs = jobs
        self._rooms = rooms
        self._wire = wire
        self._digests = digests
        self._control = control
        self._send = send
        self._load_inquirer = load_inquirer
        self._metrics = metrics
        self._limits = limits
        self._clock = clock

    # ---- the turn -----------------------------------------------------------------------------------

    def handle(self, link: bytes, message: PrefillMessage, now: float) -> None:
        match message:
            case PeerHello() | PeerPing() | ContactPong() | PrefillRequest() | AbortRoom():
                if isinstance(message, PeerHello):
                    self._control.heard({message.identity.update_id})
                has_room = self._has_room(now)
                self._act(self._rooms.on_message(link, message, now, queue_has_room=has_room), now)
            case Roster():  # decode nodes connect to us, not the other way round
                self._control.heard({node.update_id for node in message.nodes})
            case CloseSession():
                text = "a prefill node holds no session"
                self._send(link, CallReply(call_id=message.call_id, success=True, message=text))
            case AssertPeerDeath():
                text = "a prefill node holds nothing for fear of its peers"
                self._send(link, CallReply(call_id=message.call_id, success=True, message=text))
            case GenerateRequest() | CancelRequest() | ResendFrom():
                for answer in refusals(head_of(message), "this is a prefill node"):
                    self._send(link, answer)
            case _:
                assert_never(message)

    def give_up(self, link: bytes, message: msgspec.Struct, why: str, now: float) -> bool:
        del link  # the room's end goes to its decode node
        if not (isinstance(message, PrefillRequest) and self._rooms.is_open(message.room)):
            return False
        self._act(self._rooms.fail_room(message.room, "invalid", why, retriable=False), now)
        return True

    def poll(self, now: float) -> None:
        for result in self._wire.results():
            self._act(self._rooms.on_write_result(result, now), now)
        for done in self._digests.poll():
            self._take_digests(done, now)

    def apply(self, output: ForwardOutput, now: float) -> None:
        """A forward is done: its whole pages may travel, and who reached the end has a first token."""
        num_tokens, chunks = self._jobs.apply(output)
        self._metrics.count_step("prefill", output.finished - output.started)
        self._load_inquirer.count_prompt(num_computed=num_tokens)
        for chunk in chunks:
            if chunk.result.tokens:
                self._jobs.enter_sending(chunk.job, now)
                self._send_first_token(chunk.job, chunk.result, now)
            self._send_pages(chunk.job, now)

    def tick(self, now: float) -> None:
        self._act(self._rooms.tick(now), now)

    def schedule(self, now: float) -> None:
        for job in self._jobs.admit(now):
            self._load_inquirer.count_prompt(num_cached=job.prompt.num_cached)
            # What is cached needs no forward: it travels while the first chunk computes.
            self._send_pages(job, now)
        self._jobs.launch(lambda job, why: self._fail(job, why, now))

    def flush(self, now: float) -> None:
        """Nothing is kept back for the end of a turn."""

    # ---- rooms --------------------------------------------------------------------------------------

    def _act(self, actions: list[PrefillAction], now: float) -> None:
        for action in actions:
            match action:
                case AdmitRoom():
                    job = self._jobs.add(action.request)
                    if (reason := self._jobs.impossible(job)) is not None:
                        self._fail(job, reason, now)
                case ReleaseRoom():
                    self._release(action)
                case _:
                    self._wire.act(action)

    def _has_room(self, now: float) -> bool:
        """Whether a new room may open. Not while the transfer engine hangs in a call: others can take it."""
        if self.is_draining or not self._control.takes_work or self._wire.is_stuck(now):
            return False
        return self._jobs.num_in(JobState.WAITING) < self._limits.max_waiting

    def _fail(self, job: PrefillJob, why: str, now: float) -> None:
        """It can never be computed here."""
        self._act(self._rooms.fail_room(job.room, "invalid", why, retriable=False), now)

    def _send_pages(self, job: PrefillJob, now: float) -> None:
        """What was not sent before."""
        if not (pages := self._jobs.pages_to_send(job)):
            return
        wanted = [index for index in job.message.digest_pages if job.num_digested <= index < len(pages)]
        job.num_digested = max(job.num_digested, len(pages))
        if wanted:
            self._digests.submit((job.room, tuple(wanted)), [pages[index] for index in wanted])
        self._act(self._rooms.pages_ready(job.room, 0, pages, self._clock.now()), now)

    def _take_digests(self, done: Digests, now: float) -> None:
        """Of a room that failed meanwhile they are worth nothing: its pages may be others' by now."""
        room, indices = done.key
        if done.error:
            self._act(self._rooms.fail_room(room, "transfer_failed", done.error, retriable=True), now)
            return
        digests = dict(zip(indices, done.digests, strict=True))
        self._act(self._rooms.digests_ready(room, digests, now), now)

    def _send_first_token(self, job: PrefillJob, result: RowOutput, now: float) -> None:
        self._load_inquirer.count_generated(len(result.tokens))
        sent = self._clock.span("first_token", job.reached_s, self._clock.now())
        first_token = self._rooms.first_token(
            job.room,
            result.tokens,
            now,
            report=job.prompt.report(),
            spans=(*job.spans, sent),
        )
        self._act(first_token, now)

    def _release(self, action: ReleaseRoom) -> None:
        job = self._jobs.release(action.room)
        if not action.completed:
            _log.info(
                "request %s: room %d ended: %s", job.message.request_id, job.room.counter, action.reason
            )
            self._metrics.count_room("aborted" if action.is_aborted else "failed")

    # ---- what every role can do, see Role -----------------------------------------------------------

    def abort(self, request_id: str | None, now: float) -> int:
        """Their rooms end; decode, which leads, ends the requests."""
        aborted = [
            job
            for job in self._jobs
            if not job.is_over and (request_id is None or job.message.request_id == request_id)
        ]
        for job in aborted:
            failed = self._rooms.fail_room(job.room, "aborted", "aborted on prefill", retriable=False)
            self._act(failed, now)
        return len(aborted)

    def give_back(self, now: float) -> None:
        self._act(self._rooms.fail_all("paused", "the prefill node is paused"), now)

    def renew(
        self, identity: PeerIdentity, reason: str, now: float, regions: tuple[MemoryRegion, ...] | None
    ) -> None:
        del regions  # decode is told where its own memory is, not where ours
        self._jobs.drop_cache()
        self._act(self._rooms.set_identity(identity, reason), now)

    def may_be_held(self, until_s: float, now: float) -> None:
        self._act(self._rooms.announce_busy(until_s, now), now)

    def move_deadlines(self, by_s: float) -> None:
        self._rooms.extend_deadlines(by_s)

    def fail_open_requests(self) -> None:
        """This process ends: what is left may be tried elsewhere."""
        self._act(self._rooms.fail_all("shutting_down", "the prefill node shuts down"), 0.0)

    @property
    def is_idle(self) -> bool:
        """No job and no room that still writes. A job stays until its last forward is done."""
        return not self._jobs and self._rooms.is_idle

    @property
    def is_drained(self) -> bool:
        return True  # nobody writes into a prefill node's memory

    def next_deadline(self) -> float:
        return self._rooms.next_deadline()

    def check_invariants(self) -> None:
        self._jobs.check_idle()
