"""The router: one asyncio shell around the pure parts.

Life cycle of a request here:

1. *Queued*: `generate` takes a place in the admission queue, or refuses with 429.
2. *Dispatched*: a pair of nodes is chosen, and one attempt at all its choices goes to the decode node.
3. *Streaming*: every TokenOutput of the current attempt at exactly the next position is kept and relayed.
4. An attempt that fails retriably, or whose decode node is lost, puts its unfinished choices back in the
   queue, before all new requests, with the ids that were kept.
5. *Ended*: every choice has finished, or the request failed for good, or its reader left. Whatever still
   works on it is told to stop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, assert_never
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry

from ..api.generation import (
    AdminReply,
    GenerateSpec,
    ModelCard,
    SessionTurn,
    TurnParams,
    UpdateMode,
)
from ..links.entry_lookup import EntryLookup
from ..links.node_calls import StreamMessage
from ..messages.node import (
    AttemptFailed,
    CancelRequest,
    NodeEntry,
    Pong,
    ResendFrom,
    TokenOutput,
    TokenOutputs,
)
from ..messages.operation import CloseSession, ContinueGeneration, PauseGeneration
from ..messages.timeline import SpanClock
from ..runtime.containment import Containment
from ..runtime.errors import RequestError
from ..runtime.pause_gate import PauseGate, PauseMode
from ..runtime.peer_clock import PeerClocks
from .admission import AdmissionQueue, Ticket
from .attempts import COST_NO_ATTEMPT, RequestRecord, Retry
from .cluster import Cluster
from .connector import Connector
from .generation import RoutedGeneration
from .ledger import Attempt, Ledger
from .metrics import RouterCounters
from .operator import ClusterOperator
from .options import RouterOptions
from .pairing import (
    Chosen,
    DecodeView,
    NoPair,
    NoRoom,
    PairingDecision,
    PrefillView,
    ReadyPair,
    choose_pair,
)
from .prefix_index import DEFAULT_MAX_PAGES, PrefixIndex
from .registry import NodeChanged, NodeEvent, NodeJoined, NodeLost, NodeRecord, NodeRestarted, NodeSilent
from .sessions import SessionTable
from .updates.coordinator import WeightUpdates
from .updates.rollout import Traffic, ask_all
from .view import RouterView
from .waiting import until

log = logging.getLogger(__name__)

BUSY_TICK_S = 0.02
IDLE_TICK_S = 0.2
STALL_S = 1.0  # a tick later than this says that the router itself stood still


class RouterService:
    """Implements `Generator`, `Sessions`, `Control` and `Membership` of `pdserve.api.generation`.

    Make it in a running loop.
    """

    def __init__(
        self,
        options: RouterOptions,
        *,
        model: ModelCard,
        connect: Connector,
        lookup: EntryLookup,
        static_urls: Sequence[str] = (),
        metrics_registry: CollectorRegistry | None = None,
        clock: Callable[[], float] = time.monotonic,
        unix_minus_monotonic_s: float = 0.0,
    ) -> None:
        self.router_id = uuid.uuid4().hex
        self.counters = RouterCounters()
        self._options = options
        self._model = model
        self._lookup = lookup
        self._clock = clock
        self._span_clock = SpanClock(clock, unix_minus_monotonic_s)
        self._node_clocks = PeerClocks()  # by incarnation
        self._cluster = Cluster(
            options,
            model=model,
            router_id=self.router_id,
            connect=connect,
            lookup=lookup,
            static_urls=static_urls,
            clock=clock,
            handler=self,
        )
        self._nodes = self._cluster.registry
        self.operator = ClusterOperator(self._cluster, self._node_clocks.lead_s, options.timing)
        self._queue = AdmissionQueue(
            max_new=options.max_queued_requests,
            patience_s=options.timing.gate_patience_s,
            max_wait_s=min(options.max_queue_wait_s or math.inf, options.request_timeout_s),
        )
        self._ledger = Ledger()
        self._sessions = SessionTable(
            max_sessions=options.max_sessions, idle_timeout_s=options.session_timeout_s
        )
        self._prefixes = PrefixIndex()
        self._generations: dict[str, RoutedGeneration] = {}
        self._attempt_numbers = itertools.count(1)  # one row for all requests: none is used twice
        self.is_draining = False
        self.containment = Containment()
        self._pause = PauseGate()
        self.weights = WeightUpdates(
            options,
            registry=self._nodes,
            links=self._cluster.links,
            lookup=lookup,
            spawn=self._cluster.spawn,
            traffic=Traffic(
                hold=self._hold_for_weights,
                release=self._release_held,
                num_running=self._num_working,
                forget_prefixes=self._prefixes.clear,
            ),
            hears=self._cluster.hears,
            clock=clock,
        )
        self._last_tick_at = clock()
        self.view = RouterView(
            options,
            model=model,
            router_id=self.router_id,
            cluster=self._cluster,
            requests=self,
            counters=self.counters,
            metrics_registry=metrics_registry or CollectorRegistry(),
            clock=clock,
        )

    # ---- process life ---------------------------------------------------------------------------

    async def start(self) -> None:
        self._cluster.start()
        self._cluster.spawn(self._run())

    @property
    def crashed(self) -> asyncio.Future[None]:
        """Gets the exception of a background task that failed: the process must end."""
        return self._cluster.crashed

    async def drain(self, deadline_s: float) -> bool:
        """Accept nothing more and let what was accepted end. False when some had not ended in time."""
        self.is_draining = True
        return await self._until(lambda: not self._generations, deadline_s)

    async def close(self) -> None:
        self.is_draining = True
        for generation in list(self._generations.values()):
            self._fail(generation, _unavailable("the router is shutting down", code="shutting_down"))
        await self._cluster.close()

    async def _run(self) -> None:
        while True:
            self.tick()
            await asyncio.sleep(BUSY_TICK_S if self._queue else IDLE_TICK_S)

    def tick(self) -> None:
        """Everything that happens by time alone."""
        now = self._clock()
        late_s = now - self._last_tick_at
        self._last_tick_at = now
        if late_s > STALL_S:
            self._nodes.excuse(late_s, now)
        self._move_deadlines(now)
        self._cluster.tick(now, expire=not self.weights.is_rolling_out)
        self._queue.serve_with(self._nodes.num_prefilling(), now)
        self.weights.tick(now)
        self._expire_requests(now)
        self._expire_sessions(now)
        self._dispatch(now)

    def _move_deadlines(self, now: float) -> None:
        """None runs out while nothing is computed on purpose."""
        if stood_s := self._pause.stood_still_s(now):
            for generation in self._generations.values():
                generation.record.deadline += stood_s

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        return await until(condition, timeout_s, self._clock)

    # ---- Generator ------------------------------------------------------------------------------

    def check_wait(self, client: str) -> None:
        try:
            self._queue.check_wait(client, self._clock())
        except RequestError:
            self.counters.requests["refused"] += 1
            raise

    async def generate(self, spec: GenerateSpec, client: str = "") -> RoutedGeneration:
        """Returns once the request is dispatched. Raises RequestError when it is refused or cannot be."""
        now = self._clock()
        if self.is_draining:
            raise _unavailable("the router is shutting down", code="shutting_down")
        if spec.request_id in self._generations:
            raise RequestError(
                f"a request with the id {spec.request_id!r} is running",
                status=409,
                code="duplicate_request_id",
            )
        timeout_s = self._options.request_timeout_s if spec.timeout_s is None else spec.timeout_s
        record = RequestRecord(
            spec,
            arrived_at=now,
            deadline=now + timeout_s,
            max_attempts=self._options.max_attempts,
            resend_interval_s=self._options.timing.resend_interval_s,
            eos_token_ids=self._model.eos_token_ids,
            max_model_len=self._model.max_model_len,
            clock=self._span_clock,
            clock_lead_s=self._node_clocks.lead_s,
            attempt_numbers=self._attempt_numbers,
        )
        try:
            self._queue.offer(spec.request_id, spec.work.choices, spec.priority, now, client)
        except RequestError:
            self.counters.requests["refused"] += 1
            raise
        generation = RoutedGeneration(record, on_stop_choice=self._stop_choice, on_cancel=self._cancel)
        self._generations[spec.request_id] = generation
        self._dispatch(now)
        try:
            await generation.dispatched
        except asyncio.CancelledError:
            self._cancel(generation)
            raise
        return generation

    # ---- Sessions -------------------------------------------------------------------------------

    def open_session(self, session_id: str, capacity: int, idle_timeout_s: float | None) -> str:
        """At the decode node that has the fewest; its first turn goes there."""
        decodes = {decode.incarnation: decode for _, decode in self._nodes.ready_pairs()}
        if not decodes:
            raise _unavailable(self._nodes.explain_no_pair(), code="no_ready_pair")
        home = min(
            decodes.values(),
            key=lambda node: (
                self._sessions.num_at(node.incarnation),
                self._ledger.num_active(node.incarnation),
                node.incarnation,
            ),
        )
        return self._sessions.open(
            session_id,
            home=home.incarnation,
            address=urlsplit(home.entry.url).netloc,
            capacity=capacity,
            idle_timeout_s=idle_timeout_s,
            now=self._clock(),
        )

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    async def close_session(self, session_id: str) -> AdminReply:
        """A decode node that does not hear it lets go when the session was idle for too long."""
        if not self._sessions.close(session_id):
            return AdminReply(False, f"there is no session {session_id!r}")
        await self.operator.operate(CloseSession(session_id=session_id))
        return AdminReply(True, "closed")

    def begin_turn(self, params: TurnParams, request_id: str, new_ids: tuple[int, ...]) -> SessionTurn:
        return self._sessions.begin(params, request_id, new_ids, self._clock())

    def finish_turn(self, turn: SessionTurn, output_ids: tuple[int, ...]) -> None:
        self._sessions.finish(turn, output_ids, self._clock())

    def _expire_sessions(self, now: float) -> None:
        sessions = [generation.record.spec.session for generation in self._generations.values()]
        for session_id in self._sessions.expire(now, {each.session_id for each in sessions if each}):
            log.info("session %s was idle for too long", session_id)

    # ---- dispatch -------------------------------------------------------------------------------

    def _dispatch(self, now: float) -> None:
        """Send what may go, first what goes first; the first that finds no room keeps its place for it."""
        if not self._queue:
            return
        pairs = self._nodes.ready_pairs()
        num_kv_tokens = self._nodes.num_kv_tokens()
        for ticket in self._queue.due(now):
            generation = self._generations.get(ticket.request_id)
            if generation is None:  # it failed for good in this very loop
                continue
            turn = self._clock()
            decision: PairingDecision = NoPair()
            if pairs:  # else the whole queue is gone through, which must take no time
                with self._contained("dispatch", ticket.request_id):
                    generation.record.settle_length(num_kv_tokens)
                    decision = self._choose(ticket, generation.record, pairs, now)
            match decision:
                case Chosen():
                    with self._contained("dispatch", ticket.request_id):
                        self._start_attempt(generation, ticket, decision, turn, now)
                case NoRoom(waits_for):
                    ticket.unpaired_since = None
                    ticket.waits_for = waits_for
                    return
                case NoPair():
                    ticket.waits_for = "a ready pair of nodes"
                    if ticket.unpaired_since is None:
                        ticket.unpaired_since = now

    def _choose(
        self,
        ticket: Ticket,
        record: RequestRecord,
        pairs: Sequence[tuple[NodeRecord, NodeRecord]],
        now: float,
    ) -> PairingDecision:
        num_tokens = record.num_tokens(ticket.choices)
        pinned = record.pinned_weight_version
        prefills: dict[str, PrefillView] = {}
        decodes: dict[str, DecodeView] = {}
        candidates = []
        for prefill, decode in pairs:
            if pinned and decode.entry.weight_version != pinned:
                continue
            if prefill.incarnation not in prefills:
                prefills[prefill.incarnation] = self._prefill_view(prefill, record)
            if decode.incarnation not in decodes:
                decodes[decode.incarnation] = self._decode_view(decode, record, ticket.choices)
            candidates.append(ReadyPair(prefills[prefill.incarnation], decodes[decode.incarnation]))
        if record.spec.session is not None:
            home = self._sessions.home(record.spec.session.session_id)
            if not record.has_failed_on(home, ticket.choices):
                candidates = [each for each in candidates if each.decode.incarnation == home] or candidates
        return choose_pair(
            num_tokens,
            candidates,
            prefill_credit_tokens=self._options.prefill_credit_tokens,
            avoid=ticket.avoid,
            forced=self._queue.is_overdue(ticket, now),
        )

    def _prefill_view(self, node: NodeRecord, record: RequestRecord) -> PrefillView:
        return PrefillView(
            incarnation=node.incarnation,
            num_queued_tokens=self._ledger.queued_tokens(node.incarnation),
            num_cached_tokens=self._num_cached(node, record),
            is_full=self._ledger.is_full(node.incarnation),
            last_used=self._ledger.last_used(node.incarnation),
        )

    def _num_cached(self, node: NodeRecord, record: RequestRecord) -> int:
        """Prompt tokens that the node need not be sent or compute, as far as is known here."""
        page_size = node.load.page_size
        if not page_size:
            return 0
        hashes = record.page_hashes(page_size)
        num_pages = self._prefixes.num_cached_pages(node.incarnation, hashes)
        return record.num_usable_cached(page_size * num_pages)

    def _decode_view(self, node: NodeRecord, record: RequestRecord, choices: tuple[int, ...]) -> DecodeView:
        num_tokens = record.num_tokens(choices)
        page_size = node.load.page_size or num_tokens
        choices = record.at_once(choices, node.load)
        num_growth_pages = max(len(choices), -(-record.num_growth_tokens(choices) // page_size))
        return DecodeView(
            incarnation=node.incarnation,
            num_active=self._ledger.num_active(node.incarnation),
            max_active=node.load.max_running_requests,
            num_free_pages=self._ledger.num_free_pages(node.incarnation),
            num_total_pages=node.load.num_total_pages,
            num_wanted_pages=-(-num_tokens // page_size) + num_growth_pages,
            num_cached_tokens=self._num_cached(node, record),
            last_used=self._ledger.last_used(node.incarnation),
        )

    def _start_attempt(
        self, generation: RoutedGeneration, ticket: Ticket, chosen: Chosen, turn: float, now: float
    ) -> None:
        record = generation.record
        decode = self._nodes.get(chosen.pair.decode)
        choices = ticket.choices if decode is None else record.at_once(ticket.choices, decode.load)
        attempt = record.open_attempt(choices, chosen, now)
        self._queue.take(ticket, now)
        if rest := ticket.choices[len(choices) :]:  # more than the node has places or pages for: in turns
            self._queue.again(
                record.request_id, rest, record.spec.priority, arrived_at=record.arrived_at, now=now
            )
        self._ledger.open(attempt)
        generation.mark_dispatched()
        if record.spec.session is not None:
            self._sessions.moved(record.spec.session.session_id, attempt.pair.decode)
        self._remember_prefix(attempt, record)
        options = self._options
        interval = options.stream_interval if record.spec.stream else options.force_stream_interval
        message = record.message(
            attempt,
            choices,
            weight_version="" if decode is None else decode.entry.weight_version,
            now=now,
            stream_interval=interval,
        )
        attempt.sent_s = self._clock()
        record.info.spans.append(self._span_clock.span("queue", ticket.queued_at, turn))
        record.info.spans.append(self._span_clock.span("pairing", turn, attempt.sent_s))
        if not self._cluster.send(attempt.pair.decode, message):
            self._fail_attempt(_lost(attempt, "the link to the decode node is down"), now)

    def _remember_prefix(self, attempt: Attempt, record: RequestRecord) -> None:
        """Both nodes are about to hold the prompt."""
        for incarnation in {attempt.pair.prefill, attempt.pair.decode}:
            node = self._nodes.get(incarnation)
            if node is not None and node.load.page_size:
                self._prefixes.record(
                    incarnation,
                    record.page_hashes(node.load.page_size),
                    node.load.num_total_pages or DEFAULT_MAX_PAGES,
                )

    def _remember_answer(self, attempt: Attempt, record: RequestRecord, choice: int) -> None:
        """The decode node keeps what it generated, for the next turn."""
        node = self._nodes.get(attempt.pair.decode)
        if node is not None and node.load.page_size:
            self._prefixes.record(
                node.incarnation,
                record.answer_hashes(choice, node.load.page_size),
                node.load.num_total_pages or DEFAULT_MAX_PAGES,
            )

    def _expire_requests(self, now: float) -> None:
        for ticket in self._queue.starved(now, self._options.timing.no_pair_timeout_s):
            generation = self._generations.get(ticket.request_id)
            if generation is not None:
                self._fail(generation, self._no_pair_error(generation.record))
        for generation in list(self._generations.values()):
            if now >= generation.record.abort_by:
                self._abort_at_once(generation)
            elif now >= generation.record.deadline:
                self._fail(generation, self._deadline_error(generation.record))

    def _no_pair_error(self, record: RequestRecord) -> RequestError:
        reason = self._nodes.explain_no_pair()
        if self._nodes.ready_pairs():
            reason = f"no pair of nodes serves weight version {record.pinned_weight_version} any more"
        return _unavailable(
            reason, code="no_ready_pair", retry_after_s=self._options.timing.no_pair_timeout_s
        )

    def _deadline_error(self, record: RequestRecord) -> RequestError:
        if record.info.num_attempts == 0:
            tickets = self._queue.of_request(record.request_id)
            waits_for = tickets[0].waits_for if tickets else ""
            return _unavailable(
                f"the request waited for {waits_for or 'its turn'} until its deadline", code="queue_timeout"
            )
        return RequestError(
            f"the request did not end within its {record.deadline - record.arrived_at:g} s",
            status=504,
            code="deadline_exceeded",
            error_type="timeout_error",
        )

    # ---- what nodes say -------------------------------------------------------------------------

    def on_stream(self, message: StreamMessage) -> None:
        now = self._clock()
        if isinstance(message, TokenOutputs):
            makes_room = False
            for output in message.outputs:
                with self._contained("tokens", output.request_id):
                    makes_room |= self._on_tokens(output, now)
            if makes_room:  # once for all of them: each time the whole queue may be looked through
                self._dispatch(now)
        else:
            with self._contained("attempt_failed", message.request_id):
                self._fail_attempt(message, now)
            self._dispatch(now)

    def _contained(self, kind: str, request_id: str) -> AbstractContextManager[None]:
        """What raises in it ends this request, and nothing else."""

        def give_up(why: str) -> None:
            if (generation := self._generations.get(request_id)) is not None:
                error_type = "server_error"
                self._fail(
                    generation, RequestError(why, status=500, code="internal_error", error_type=error_type)
                )

        return self.containment.around(kind, give_up)

    def _on_tokens(self, output: TokenOutput, now: float) -> bool:
        """Whether a node has room for more by it: a prompt is prefilled, or a choice has ended."""
        attempt = self._ledger.get(output.request_id, output.attempt)
        if attempt is None:  # late: of an attempt that failed, or of a request that ended
            return False
        generation = self._generations[output.request_id]
        taken = generation.record.on_tokens(output, now)
        if taken is None:
            return False
        if isinstance(taken, ResendFrom):
            self.counters.num_resends += 1
            self._cluster.send(attempt.pair.decode, taken)
            return False
        self.counters.num_tokens += len(taken.token_ids)
        generation.push(taken)
        is_first = attempt.awaits_first_token
        if is_first:
            self._queue.answered(output.request_id, now)
            attempt.since = now
            self._ledger.first_token(attempt)
        if taken.finish_reason is None:
            return is_first
        self._remember_answer(attempt, generation.record, taken.choice)
        if not attempt.open_choices:
            self._close_attempt(attempt, "ok")
        if generation.record.done:
            self._end(generation)
        return True

    def _fail_attempt(self, failure: AttemptFailed, now: float) -> None:
        """Queue what is to be tried again; whoever calls dispatches."""
        attempt = self._ledger.get(failure.request_id, failure.attempt)
        if attempt is None:
            return
        self._close_attempt(attempt, failure.code)
        if attempt.awaits_first_token:
            lost = self._span_clock.span("failed_attempt", attempt.sent_s, now)
            self._generations[failure.request_id].record.info.spans.append(lost)
        if failure.code == "busy":
            self._ledger.full(attempt.pair.prefill or attempt.pair.decode)
        elif failure.code in ("not_ready", "version_skew", "peer_lost", "shutting_down"):
            self._nodes.not_connected(attempt.pair.prefill, attempt.pair.decode)
        generation = self._generations[failure.request_id]
        record = generation.record
        try:
            ended = record.on_failed(failure)
        except RequestError as error:
            self._fail(generation, error)
            return
        for delta in ended.closed:
            generation.push(delta)
        for retry in ended.retries:
            self._queue.again(
                record.request_id,
                retry.choices,
                record.spec.priority,
                arrived_at=record.arrived_at,
                now=now,
                delay_s=self._delay_s(failure, retry),
                avoid=retry.avoid,
            )
        if record.done:
            self._end(generation)

    def _delay_s(self, failure: AttemptFailed, retry: Retry) -> float:
        """None after a first failure; then longer each time, so that what ails a pair may pass."""
        if failure.code in COST_NO_ATTEMPT:
            doublings = min(retry.num_free_failures - 1, 10)
            return min(
                self._options.timing.max_busy_delay_s, self._options.timing.busy_delay_s * 2.0**doublings
            )
        return self._options.timing.retry_delay_s * (retry.num_failures - 1)

    def is_working(self, incarnation: str) -> bool:
        return self._ledger.is_working(incarnation)

    def on_ping(self, incarnation: str) -> None:
        self._ledger.ping(incarnation)
        self._node_clocks.pinged(incarnation, 0, self._span_clock.unix_s(self._clock()))  # one at a time

    def on_pong(self, incarnation: str, pong: Pong) -> None:
        if pong.entry.incarnation == incarnation:
            now = self._clock()
            self._node_clocks.answered(incarnation, 0, self._span_clock.unix_s(now), pong.unix_s)
            self._ledger.pong(incarnation, pong.load)
            self._dispatch(now)

    def on_node_event(self, event: NodeEvent) -> None:
        match event:
            case NodeJoined(entry):
                self._ledger.add_node(entry.incarnation)
            case NodeChanged(old, new):
                if old.weight_version != new.weight_version:
                    self._prefixes.forget(new.incarnation)
            case NodeRestarted(old, new):
                self._node_gone(old, "it was started again")
                self._ledger.add_node(new.incarnation)
            case NodeLost(entry, reason):
                self._node_gone(entry, reason)
            case NodeSilent(entry, reason):
                self._move_attempts(entry, reason)

    def _node_gone(self, entry: NodeEntry, reason: str) -> None:
        self._move_attempts(entry, reason)
        self._prefixes.forget(entry.incarnation)
        self._node_clocks.forget(entry.incarnation)
        self._ledger.forget_node(entry.incarnation)

    def _move_attempts(self, entry: NodeEntry, reason: str) -> None:
        """A decode node is suspected: what it works on is tried elsewhere, and it is told to stop.

        The loss of a prefill node is told by the decode nodes that wait for it.
        """
        now = self._clock()
        for attempt in self._ledger.on_decode(entry.incarnation):
            self._send_cancel(attempt)
            self._fail_attempt(_lost(attempt, f"decode node {entry.url}: {reason}"), now)
        self._dispatch(now)

    # ---- how requests end -----------------------------------------------------------------------

    def _end(self, generation: RoutedGeneration) -> None:
        request_id = generation.record.request_id
        del self._generations[request_id]
        self._queue.remove_request(request_id, self._clock())
        self.counters.requests["aborted" if generation.record.is_aborting else "finished"] += 1
        generation.end()

    def _fail(self, generation: RoutedGeneration, error: RequestError) -> None:
        if self._forget(generation):
            self.counters.requests["failed"] += 1
            generation.fail(error)

    def _cancel(self, generation: RoutedGeneration) -> None:
        if self._forget(generation):
            self.counters.requests["cancelled"] += 1
            self._dispatch(self._clock())

    def _forget(self, generation: RoutedGeneration) -> bool:
        """Leave the queue and stop every node that works on it. False if the request has ended before."""
        record = generation.record
        if self._generations.get(record.request_id) is not generation:
            return False
        del self._generations[record.request_id]
        self._queue.remove_request(record.request_id, self._clock())
        for attempt in record.live_attempts():
            self._send_cancel(attempt)
            self._close_attempt(attempt, "cancelled")
        return True

    def _stop_choice(self, generation: RoutedGeneration, index: int) -> None:
        record = generation.record
        if self._generations.get(record.request_id) is not generation:
            return
        attempt = record.stop_choice(index)
        if attempt is None:
            self._queue.remove_choice(record.request_id, index)
        else:
            self._send_cancel(attempt, (index,))
            if not attempt.open_choices:
                self._close_attempt(attempt, "ok")
        if record.done:
            self._end(generation)
        self._dispatch(self._clock())

    def _send_cancel(self, attempt: Attempt, choices: tuple[int, ...] = ()) -> None:
        cancel = CancelRequest(request_id=attempt.request_id, attempt=attempt.number, choices=choices)
        self._cluster.send(attempt.pair.decode, cancel)

    def _close_attempt(self, attempt: Attempt, code: str) -> None:
        if self._ledger.close(attempt):
            self.counters.attempts[code] += 1

    def violations(self) -> list[str]:
        """What is wrong between requests, queue and ledger: every unfinished choice is in one place."""
        found = [
            f"{ticket.request_id}: queued but not kept"
            for ticket in self._queue
            if ticket.request_id not in self._generations
        ]
        found += [
            f"{attempt.request_id}: attempt {attempt.number} is open for nothing"
            for attempt in self._ledger
            if attempt.request_id not in self._generations or not attempt.open_choices
        ]
        for request_id, generation in self._generations.items():
            queued = Counter(i for ticket in self._queue.of_request(request_id) for i in ticket.choices)
            for choice in generation.record.choices:
                attempt = choice.attempt
                is_open = attempt is not None and self._ledger.get(request_id, attempt.number) is attempt
                if is_open + queued[choice.index] != (not choice.finished):
                    found.append(f"{request_id}: choice {choice.index} is in no place, or in two")
        if self._queue.num_new != sum(ticket.is_new for ticket in self._queue):
            found.append("the queue's count of new requests is wrong")
        return found

    # ---- Control and Membership -----------------------------------------------------------------

    async def register_worker(self, url: str, entry: NodeEntry | None) -> AdminReply:
        return await self._cluster.register(url, entry)

    async def remove_worker(self, url: str) -> AdminReply:
        return self._cluster.remove(url)

    async def flush_cache(self, timeout_s: float) -> AdminReply:
        answers = await ask_all(self._cluster.links(), lambda link: link.flush_cache(timeout_s))
        self._prefixes.clear()
        if not answers:
            return AdminReply(False, "no node is connected")
        return AdminReply(all(answer.success for answer in answers), "; ".join(map(str, answers)))

    async def abort_requests(self, request_id: str, all_requests: bool) -> AdminReply:
        """Ours end with finish reason "abort", behind all tokens that nodes have of them; nodes are asked by
        id too, others may have sent them the request.

        A request that is not known (any more) is no error.
        """
        aborted = [
            generation
            for generation in list(self._generations.values())
            if all_requests or generation.record.request_id == request_id
        ]
        for generation in aborted:
            self._abort(generation)
        answers = await ask_all(
            self._cluster.links(), lambda link: link.abort(request_id, all_requests=all_requests)
        )
        await self._until(
            lambda: all(self._generations.get(each.record.request_id) is not each for each in aborted),
            2 * self._options.timing.abort_grace_s,
        )
        if aborted or all_requests or any(answer.success for answer in answers):
            return AdminReply(True, f"{len(aborted)} requests of this router aborted")
        return AdminReply(True, f"no request {request_id!r} is known")

    async def pause_generation(self, mode: PauseMode, *, drains: bool) -> AdminReply:
        """On all nodes, and nothing is dispatched, until `continue_generation`. `drains`: running requests
        end before, and only new ones wait."""
        if self.weights.is_running():
            return AdminReply(False, "a weight update is running, which needs the nodes at work")
        if drains:
            self._queue.pause(new_only=True)
            if not await self._until(lambda: self.num_running == 0, self._options.timing.weight_drain_s):
                self._queue.resume()
                return AdminReply(False, f"{self.num_running} requests were still running; not paused")
        self._queue.pause()
        self._pause.pause(mode, self._clock())
        if mode == "abort":
            await self.abort_requests("", True)
        return await self.operator.operate(PauseGeneration(mode=mode))

    async def continue_generation(self) -> AdminReply:
        """The nodes first, so that what is dispatched then finds none paused."""
        reply = await self.operator.operate(ContinueGeneration())
        now = self._clock()
        self._move_deadlines(now)
        self._pause.resume()
        self._queue.resume()
        self._dispatch(now)
        return reply

    async def assert_peer_death(self, incarnation: str) -> AdminReply:
        """All decode nodes must have heard it, but one that is silent: it may still find out by itself."""
        node = self._nodes.get(incarnation)
        if node is not None and self._nodes.healthy(node):
            return AdminReply(False, f"{incarnation} is alive: it answers at {node.entry.url}")
        urls = {node.entry.url for node in self._nodes if node.entry.role == "decode"}
        links = {url: link for url, link in self._cluster.links().items() if url in urls}
        answers = await ask_all(
            links, lambda link: link.assert_peer_death(incarnation, self._options.timing.node_call_s)
        )
        if not urls:
            return AdminReply(False, "no decode node is registered")
        if missing := urls - links.keys():
            return AdminReply(False, f"these decode nodes are not connected: {', '.join(sorted(missing))}")
        return AdminReply(all(answer.success for answer in answers), "; ".join(map(str, answers)))

    def _abort(self, generation: RoutedGeneration) -> None:
        """Nothing is begun for it any more, and nodes are told to send what they have and stop. It ends when
        they have done so, or else when the grace is over."""
        record = generation.record
        if record.is_aborting:
            return
        self._queue.remove_request(record.request_id, self._clock())
        for attempt in record.live_attempts():
            cancel = CancelRequest(request_id=attempt.request_id, attempt=attempt.number, aborts=True)
            self._cluster.send(attempt.pair.decode, cancel)
        for delta in record.begin_abort(self._clock() + self._options.timing.abort_grace_s):
            generation.push(delta)
        if record.done:
            self._end(generation)

    def _abort_at_once(self, generation: RoutedGeneration) -> None:
        if self._forget(generation):
            self.counters.requests["aborted"] += 1
            for delta in generation.record.abort():
                generation.push(delta)
            generation.end()

    def _hold_for_weights(self, mode: UpdateMode) -> None:
        self._queue.hold(all_tickets=mode == "retract")
        match mode:
            case "wait":
                # What a pause has retracted goes on with whatever weights there are when it ends.
                if self._queue.holds_all:
                    for generation in self._generations.values():
                        if not generation.record.live_attempts():
                            generation.record.continue_with_other_weights()
            case "abort":
                for generation in list(self._generations.values()):
                    if generation.dispatched.done():  # one that waits has not begun: new weights may serve it
                        self._abort(generation)
            case "retract":
                self._retract_all()
            case _:
                assert_never(mode)

    def _retract_all(self) -> None:
        """What runs stops where it is, and goes on from its kept tokens when requests go on."""
        now = self._clock()
        for attempt in list(self._ledger):
            self._generations[attempt.request_id].record.continue_with_other_weights()
            self._send_cancel(attempt)
            self._fail_attempt(_retracted(attempt), now)
        for generation in self._generations.values():
            generation.record.continue_with_other_weights()

    def _num_working(self) -> int:
        """Requests that nodes work on, those included that will be sent again while new ones are held."""
        if self._queue.holds_all:
            return len({attempt.request_id for attempt in self._ledger})
        return self.num_running

    def _release_held(self) -> None:
        self._queue.release()
        self._dispatch(self._clock())

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def pause_mode(self) -> str:
        return self._pause.mode

    @property
    def num_running(self) -> int:
        """Requests that were dispatched and have not ended, those that wait for a new attempt included."""
        return len(self._generations) - self._queue.num_new

    def own_state(self, request_id: str) -> dict[str, Any] | None:
        """Where a request of this router is, in words; None: it has none of this id."""
        generation = self._generations.get(request_id)
        if generation is None:
            return None
        now = self._clock()
        record = generation.record
        tickets = self._queue.of_request(request_id)
        state, since, waits_for = "streaming", record.arrived_at, ""
        if attempts := record.live_attempts():
            waiting = [attempt for attempt in attempts if attempt.awaits_first_token]
            since = (waiting or attempts)[0].since
            if waiting:
                state = "dispatched"
                waits_for = f"the first token from {self._nodes.url_of(waiting[0].pair.decode)}"
        elif tickets:
            state, since, waits_for = "queued", tickets[0].queued_at, tickets[0].waits_for or "its turn"
        return {
            "state": state,
            "age_s": now - since,
            "waits_for": waits_for,
            "total_age_s": now - record.arrived_at,
            "remaining_s": record.deadline - now,
            "num_attempts": record.info.num_attempts,
            "choices": [self._choice_state(record, index) for index in range(len(record.choices))],
        }

    def _choice_state(self, record: RequestRecord, index: int) -> dict[str, Any]:
        choice = record.choices[index]
        pair = choice.attempt.pair if choice.attempt is not None else None
        return {
            "index": index,
            "num_tokens": len(choice.kept_ids),
            "finished": choice.finished,
            "num_failures": choice.num_failures,
            "attempt": choice.attempt.number if choice.attempt is not None else None,
            "prefill": self._nodes.url_of(pair.prefill) if pair is not None and pair.prefill else None,
            "decode": self._nodes.url_of(pair.decode) if pair is not None else None,
        }


def _lost(attempt: Attempt, reason: str) -> AttemptFailed:
    return AttemptFailed(
        request_id=attempt.request_id,
        attempt=attempt.number,
        code="peer_lost",
        reason=reason,
        retriable=True,
    )


def _retracted(attempt: Attempt) -> AttemptFailed:
    return AttemptFailed(
        request_id=attempt.request_id,
        attempt=attempt.number,
        code="version_skew",
        reason="weights change",
        retriable=True,
    )


def _unavailable(message: str, *, code: str, retry_after_s: float = 1.0) -> RequestError:
    return RequestError(
        message, status=503, code=code, error_type="service_unavailable", retry_after_s=retry_after_s
    )
