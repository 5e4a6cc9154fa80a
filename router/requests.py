"""The requests of a router that have not ended: their records, their places in the queue, their attempts.

Life cycle of a request here:

1. *Queued*: `arrive` gives it a place in the admission queue, or refuses it with 429.
2. *Dispatched* (`dispatcher.py`): a pair of nodes is chosen, and one attempt at all its choices is opened.
3. *Streaming*: every TokenOutput of the current attempt at exactly the next position is kept and delivered.
4. An attempt that fails retriably, or whose decode node is lost, puts its unfinished choices back in the
   queue, before all new requests, with the ids that were kept.
5. *Ended*: every choice has finished, or the request failed for good, or its reader left. Whatever still
   works on it is told to stop.

Every unfinished choice is in one ticket of the queue or in one open attempt of the ledger. Values and ``now``
in; what is to be done goes to `out`.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import assert_never

from ..api.generation import ModelCard, UpdateMode
from ..messages.node import AttemptFailed, CancelRequest, ResendFrom, TokenOutput, TokenOutputs
from ..messages.timeline import SpanDates
from ..runtime.containment import Containment
from ..runtime.errors import RequestError
from .admission import AdmissionQueue
from .attempts import COST_NO_ATTEMPT, RequestRecord, Retry
from .events import Action, Arrival, Deliver, End, Fail
from .ledger import Attempt, Ledger
from .members import Members
from .metrics import RouterCounters
from .options import RouterOptions
from .prefix_estimates import PrefixEstimates


class Requests:
    """`lead_s`: how far a node's clock, by its incarnation, is ahead of ours."""

    def __init__(
        self,
        options: RouterOptions,
        *,
        model: ModelCard,
        members: Members,
        prefixes: PrefixEstimates,
        dates: SpanDates,
        lead_s: Callable[[str], float],
        out: list[Action],
    ) -> None:
        routing = options.routing
        self.queue = AdmissionQueue(
            max_new=routing.max_queued_requests,
            patience_s=options.timing.gate_patience_s,
            max_wait_s=min(routing.max_queue_wait or math.inf, routing.request_timeout),
        )
        self.ledger = Ledger()
        self.counters = RouterCounters()
        self.containment = Containment()
        self.is_shut_down = False
        self._routing = routing
        self._timing = options.timing
        self._model = model
        self._members = members
        self._prefixes = prefixes
        self._dates = dates
        self._lead_s = lead_s
        self._out = out
        self._records: dict[str, RequestRecord] = {}
        self._attempt_numbers = itertools.count(1)  # one row for all requests: none is used twice

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[RequestRecord]:
        """The set may change meanwhile."""
        return iter(list(self._records.values()))

    def get(self, request_id: str) -> RequestRecord | None:
        return self._records.get(request_id)

    @property
    def num_running(self) -> int:
        """Those that were dispatched, and those that wait for a new attempt."""
        return len(self._records) - self.queue.num_new

    # ---- they come ------------------------------------------------------------------------------

    def check_wait(self, client: str, now: float) -> None:
        """Raises RequestError 429 when one that comes now would wait for its first token for too long."""
        try:
            self.queue.check_wait(client, now)
        except RequestError:
            self.counters.requests["refused"] += 1
            raise

    def arrive(self, arrival: Arrival, now: float) -> None:
        """Raises RequestError when it is refused."""
        spec, routing = arrival.spec, self._routing
        if self.is_shut_down:
            raise unavailable("the router is shutting down", code="shutting_down")
        if spec.request_id in self._records:
            raise RequestError(
                f"a request with the id {spec.request_id!r} is running",
                status=409,
                code="duplicate_request_id",
            )
        try:
            self.queue.offer(spec.request_id, spec.work.choices, spec.priority, now, arrival.client)
        except RequestError:
            self.counters.requests["refused"] += 1
            raise
        self._records[spec.request_id] = RequestRecord(
            spec,
            arrival.info,
            arrived_at=now,
            deadline=now + (routing.request_timeout if spec.timeout_s is None else spec.timeout_s),
            max_attempts=routing.max_attempts,
            resend_interval_s=self._timing.resend_interval_s,
            eos_token_ids=self._model.eos_token_ids,
            max_model_len=self._model.max_model_len,
            dates=self._dates,
            clock_lead_s=self._lead_s,
            attempt_numbers=self._attempt_numbers,
        )

    # ---- what decode nodes say ------------------------------------------------------------------

    def sent(self, request_id: str, number: int, now: float) -> None:
        """The message that opens this attempt."""
        attempt = self.ledger.get(request_id, number)
        if attempt is not None:
            attempt.sent_s = now
            spans = self._records[request_id].info.spans
            spans.append(self._dates.span("pairing", attempt.since, now))

    def take(self, message: TokenOutputs, now: float) -> bool:
        """Whether nodes have room for more by it: a prompt is prefilled, or a choice has ended."""
        makes_room = False
        for output in message.outputs:
            with self.contained("tokens", output.request_id, now):
                makes_room |= self._take(output, now)
        return makes_room

    def _take(self, output: TokenOutput, now: float) -> bool:
        attempt = self.ledger.get(output.request_id, output.attempt)
        if attempt is None:  # late: of an attempt that failed, or of a request that ended
            return False
        record = self._records[output.request_id]
        taken = record.on_tokens(output, now)
        if taken is None:
            return False
        if isinstance(taken, ResendFrom):
            self.counters.num_resends += 1
            self._members.send(attempt.pair.decode, taken)
            return False
        self.counters.num_tokens += len(taken.token_ids)
        self._out.append(Deliver(output.request_id, taken))
        is_first = attempt.awaits_first_token
        if is_first:
            self.queue.answered(output.request_id, now)
            attempt.since = now
            self.ledger.first_token(attempt)
        if taken.finish_reason is None:
            return is_first
        self._prefixes.answer_ended(attempt, record, taken.choice)
        if not attempt.open_choices:
            self._close_attempt(attempt, "ok")
        if record.done:
            self._end(record, now)
        return True

    def attempt_failed(self, failure: AttemptFailed, now: float) -> None:
        with self.contained("attempt_failed", failure.request_id, now):
            self.fail_attempt(failure, now)

    def fail_attempt(self, failure: AttemptFailed, now: float) -> None:
        """Queue what is to be tried again."""
        attempt = self.ledger.get(failure.request_id, failure.attempt)
        if attempt is None:
            return
        record = self._records[failure.request_id]
        self._close_attempt(attempt, failure.code)
        if attempt.awaits_first_token:
            record.info.spans.append(self._dates.span("failed_attempt", attempt.sent_s, now))
        if failure.code == "busy":
            self.ledger.full(attempt.pair.prefill or attempt.pair.decode)
        elif failure.code in ("not_ready", "version_skew", "peer_lost", "shutting_down"):
            self._members.registry.not_connected(attempt.pair.prefill, attempt.pair.decode)
        try:
            ended = record.on_failed(failure)
        except RequestError as error:
            self.fail(record, error, now)
            return
        for delta in ended.closed:
            self._out.append(Deliver(record.request_id, delta))
        for retry in ended.retries:
            self.queue.again(
                record.request_id,
                retry.choices,
                record.spec.priority,
                arrived_at=record.arrived_at,
                now=now,
                delay_s=self._delay_s(failure, retry),
                avoid=retry.avoid,
            )
        if record.done:
            self._end(record, now)

    def _delay_s(self, failure: AttemptFailed, retry: Retry) -> float:
        """None after a first failure; then longer each time, so that what ails a pair may pass."""
        if failure.code in COST_NO_ATTEMPT:
            doublings = min(retry.num_free_failures - 1, 10)
            return min(self._timing.max_busy_delay_s, self._timing.busy_delay_s * 2.0**doublings)
        return self._timing.retry_delay_s * (retry.num_failures - 1)

    def decode_suspected(self, incarnation: str, why: str, now: float) -> None:
        """What the node works on is tried elsewhere, and it is told to stop.

        The loss of a prefill node is told by the decode nodes that wait for it.
        """
        for attempt in self.ledger.on_decode(incarnation):
            self._send_cancel(attempt)
            self.fail_attempt(lost(attempt, why), now)

    # ---- how they end ---------------------------------------------------------------------------

    def _end(self, record: RequestRecord, now: float) -> None:
        self._remove(record, now)
        self.counters.requests["aborted" if record.is_aborting else "finished"] += 1
        self._out.append(End(record.request_id))

    def fail(self, record: RequestRecord, error: RequestError, now: float) -> None:
        self._stop(record, now)
        self.counters.requests["failed"] += 1
        self._out.append(Fail(record.request_id, error))

    def reader_left(self, request_id: str, now: float) -> None:
        if (record := self._records.get(request_id)) is not None:
            self._stop(record, now)
            self.counters.requests["cancelled"] += 1
            self._out.append(End(request_id))

    def stop_choice(self, request_id: str, index: int, now: float) -> None:
        record = self._records.get(request_id)
        if record is None:
            return
        attempt = record.stop_choice(index)
        if attempt is None:
            self.queue.remove_choice(request_id, index)
        else:
            self._send_cancel(attempt, (index,))
            if not attempt.open_choices:
                self._close_attempt(attempt, "ok")
        if record.done:
            self._end(record, now)

    def abort(self, request_ids: Iterable[str], now: float) -> None:
        """Nothing is begun for them any more, and nodes are told to send what they have and stop. Each ends
        when they have done so, or else when the grace is over."""
        for request_id in request_ids:
            record = self._records.get(request_id)
            if record is None or record.is_aborting:
                continue
            self.queue.remove_request(request_id, now)
            for attempt in record.live_attempts():
                cancel = CancelRequest(request_id=request_id, attempt=attempt.number, aborts=True)
                self._members.send(attempt.pair.decode, cancel)
            for delta in record.begin_abort(now + self._timing.abort_grace_s):
                self._out.append(Deliver(request_id, delta))
            if record.done:
                self._end(record, now)

    def expire(self, now: float) -> None:
        """Those for which no pair of nodes was ready for too long, and those whose time is over."""
        for ticket in self.queue.starved(now, self._timing.no_pair_timeout_s):
            record = self._records.get(ticket.request_id)
            if record is not None:
                self.fail(record, self._no_pair_error(record), now)
        for record in self:
            if now >= record.abort_by:
                self._end_aborted(record, now)
            elif now >= record.deadline:
                self.fail(record, self._deadline_error(record), now)

    def _end_aborted(self, record: RequestRecord, now: float) -> None:
        """Without what nodes have yet to send of it."""
        self._stop(record, now)
        for delta in record.abort():
            self._out.append(Deliver(record.request_id, delta))
        self.counters.requests["aborted"] += 1
        self._out.append(End(record.request_id))

    def shut_down(self, now: float) -> None:
        self.is_shut_down = True
        for record in self:
            self.fail(record, unavailable("the router is shutting down", code="shutting_down"), now)

    def _stop(self, record: RequestRecord, now: float) -> None:
        """Every node that works on it is told."""
        self._remove(record, now)
        for attempt in record.live_attempts():
            self._send_cancel(attempt)
            self._close_attempt(attempt, "cancelled")

    def _remove(self, record: RequestRecord, now: float) -> None:
        del self._records[record.request_id]
        self.queue.remove_request(record.request_id, now)

    def _send_cancel(self, attempt: Attempt, choices: tuple[int, ...] = ()) -> None:
        cancel = CancelRequest(request_id=attempt.request_id, attempt=attempt.number, choices=choices)
        self._members.send(attempt.pair.decode, cancel)

    def _close_attempt(self, attempt: Attempt, code: str) -> None:
        if self.ledger.close(attempt):
            self.counters.attempts[code] += 1

    def contained(self, kind: str, request_id: str, now: float) -> AbstractContextManager[None]:
        """What raises in it ends this request, and nothing else."""

        def give_up(why: str) -> None:
            if (record := self._records.get(request_id)) is not None:
                error_type = "server_error"
                error = RequestError(why, status=500, code="internal_error", error_type=error_type)
                self.fail(record, error, now)

        return self.containment.around(kind, give_up)

    def _no_pair_error(self, record: RequestRecord) -> RequestError:
        nodes = self._members.registry
        reason = nodes.explain_no_pair()
        if nodes.ready_pairs():
            reason = f"no pair of nodes serves weight version {record.pinned_weight_version} any more"
        return unavailable(reason, code="no_ready_pair", retry_after_s=self._timing.no_pair_timeout_s)

    def _deadline_error(self, record: RequestRecord) -> RequestError:
        if record.info.num_attempts == 0:
            tickets = self.queue.of_request(record.request_id)
            waits_for = tickets[0].waits_for if tickets else ""
            return unavailable(
                f"the request waited for {waits_for or 'its turn'} until its deadline", code="queue_timeout"
            )
        return RequestError(
            f"the request did not end within its {record.deadline - record.arrived_at:g} s",
            status=504,
            code="deadline_exceeded",
            error_type="timeout_error",
        )

    # ---- other weights --------------------------------------------------------------------------

    def hold(self, mode: UpdateMode, now: float) -> None:
        """New ones wait, and running ones end, or go on later with other weights."""
        self.queue.hold(all_tickets=mode == "retract")
        match mode:
            case "wait":
                # What a pause has retracted goes on with whatever weights there are when it ends.
                if self.queue.holds_all:
                    for record in self._records.values():
                        if not record.live_attempts():
                            record.continue_with_other_weights()
            case "abort":  # one that was never dispatched has not begun: new weights may serve it
                begun = [record.request_id for record in self if record.info.num_attempts]
                self.abort(begun, now)
            case "retract":
                self._retract_all(now)
            case _:
                assert_never(mode)

    def _retract_all(self, now: float) -> None:
        """What runs stops where it is, and goes on from its kept tokens when requests go on."""
        for attempt in list(self.ledger):
            self._records[attempt.request_id].continue_with_other_weights()
            self._send_cancel(attempt)
            self.fail_attempt(_retracted(attempt), now)
        for record in self._records.values():
            record.continue_with_other_weights()

    @property
    def num_working(self) -> int:
        """Those that nodes work on, those included that will be sent again while new ones are held."""
        if self.queue.holds_all:
            return len({attempt.request_id for attempt in self.ledger})
        return self.num_running

    # ---- what must hold -------------------------------------------------------------------------

    def violations(self) -> list[str]:
        """What is wrong between records, queue and ledger: every unfinished choice is in one place."""
        found = [
            f"{ticket.request_id}: queued but not kept"
            for ticket in self.queue
            if ticket.request_id not in self._records
        ]
        found += [
            f"{attempt.request_id}: attempt {attempt.number} is open for nothing"
            for attempt in self.ledger
            if attempt.request_id not in self._records or not attempt.open_choices
        ]
        nodes = self._members.registry
        heard = {node.incarnation for node in nodes if nodes.healthy(node)}
        found += [
            f"{attempt.request_id}: attempt {attempt.number} is on a node that is silent"
            for attempt in self.ledger
            if attempt.pair.decode not in heard
        ]
        for request_id, record in self._records.items():
            queued = Counter(i for ticket in self.queue.of_request(request_id) for i in ticket.choices)
            for choice in record.choices:
                attempt = choice.attempt
                is_open = attempt is not None and self.ledger.get(request_id, attempt.number) is attempt
                if is_open + queued[choice.index] != (not choice.finished):
                    found.append(f"{request_id}: choice {choice.index} is in no place, or in two")
        if self.queue.num_new != sum(ticket.is_new for ticket in self.queue):
            found.append("the queue's count of new requests is wrong")
        return found


def lost(attempt: Attempt, reason: str) -> AttemptFailed:
    """Nothing more is heard of it from its decode node."""
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


def unavailable(message: str, *, code: str, retry_after_s: float = 1.0) -> RequestError:
    return RequestError(
        message, status=503, code=code, error_type="service_unavailable", retry_after_s=retry_after_s
    )
