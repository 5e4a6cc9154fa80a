"""Sends what waits to pairs of nodes, first what goes first: the one place where attempts begin.

Values and ``now`` in; what is to be done goes to `out`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..messages.timeline import SpanDates
from ..runtime.config import Routing
from .admission import Ticket
from .attempts import RequestRecord
from .events import Action, Dispatch
from .members import Members
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
from .prefix_estimates import PrefixEstimates
from .registry import NodeRecord
from .requests import Requests, lost
from .sessions import SessionTable

PREFILL_CREDIT_TOKENS = 16_384  # queued on one prefill node before requests wait here


class Dispatcher:
    def __init__(
        self,
        routing: Routing,
        *,
        requests: Requests,
        members: Members,
        prefixes: PrefixEstimates,
        sessions: SessionTable,
        dates: SpanDates,
        out: list[Action],
    ) -> None:
        self._routing = routing
        self._requests = requests
        self._queue = requests.queue
        self._ledger = requests.ledger
        self._members = members
        self._nodes = members.registry
        self._prefixes = prefixes
        self._sessions = sessions
        self._dates = dates
        self._out = out

    def dispatch(self, now: float) -> None:
        """Send what may go; the first that finds no room keeps its place for it."""
        pairs = self._nodes.ready_pairs()
        num_kv_tokens = self._nodes.num_kv_tokens()
        for ticket in self._queue.due(now):
            record = self._requests.get(ticket.request_id)
            if record is None:  # it failed for good in this very loop
                continue
            decision: PairingDecision = NoPair()
            if pairs:  # else the whole queue is gone through, which must take no time
                with self._requests.contained("dispatch", ticket.request_id, now):
                    record.settle_length(num_kv_tokens)
                    decision = self._choose(ticket, record, pairs, now)
            match decision:
                case Chosen():
                    with self._requests.contained("dispatch", ticket.request_id, now):
                        self._start_attempt(record, ticket, decision, now)
                case NoRoom(waits_for):
                    ticket.unpaired_since = None
                    ticket.waits_for = waits_for
                    return
                case NoPair():
                    ticket.waits_for = "a ready pair of nodes"
                    if ticket.unpaired_since is None:
                        ticket.unpaired_since = now

    # ---- the choice of a pair -------------------------------------------------------------------

    def _choose(
        self,
        ticket: Ticket,
        record: RequestRecord,
        pairs: Sequence[tuple[NodeRecord, NodeRecord]],
        now: float,
    ) -> PairingDecision:
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
            record.num_tokens(ticket.choices),
            candidates,
            prefill_credit_tokens=PREFILL_CREDIT_TOKENS,
            avoid=ticket.avoid,
            forced=self._queue.is_overdue(ticket, now),
        )

    def _prefill_view(self, node: NodeRecord, record: RequestRecord) -> PrefillView:
        return PrefillView(
            incarnation=node.incarnation,
            num_queued_tokens=self._ledger.queued_tokens(node.incarnation),
            num_cached_tokens=self._prefixes.num_cached(node, record),
            is_full=self._ledger.is_full(node.incarnation),
            last_used=self._ledger.last_used(node.incarnation),
        )

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
            num_cached_tokens=self._prefixes.num_cached(node, record),
            last_used=self._ledger.last_used(node.incarnation),
        )

    # ---- the attempt ----------------------------------------------------------------------------

    def _start_attempt(self, record: RequestRecord, ticket: Ticket, chosen: Chosen, now: float) -> None:
        decode = self._nodes.get(chosen.pair.decode)
        choices = ticket.choices if decode is None else record.at_once(ticket.choices, decode.load)
        attempt = record.open_attempt(choices, chosen, now)
        self._queue.take(ticket, now)
        if rest := ticket.choices[len(choices) :]:  # more than the node has places or pages for: in turns
            self._queue.again(
                record.request_id, rest, record.spec.priority, arrived_at=record.arrived_at, now=now
            )
        attempt.sent_s = now  # or a little later: `Sent` tells
        self._ledger.open(attempt)
        if record.spec.session is not None:
            self._sessions.moved(record.spec.session.session_id, attempt.pair.decode)
        self._prefixes.prompt_sent(attempt, record)
        routing = self._routing
        message = record.message(
            attempt,
            choices,
            weight_version="" if decode is None else decode.entry.weight_version,
            now=now,
            stream_interval=routing.stream_interval if record.spec.stream else routing.force_stream_interval,
        )
        record.info.spans.append(self._dates.span("queue", ticket.queued_at, now))
        if self._members.is_connected(attempt.pair.decode):
            self._out.append(Dispatch(attempt, message))
        else:
            self._requests.fail_attempt(lost(attempt, "the link to the decode node is down"), now)
