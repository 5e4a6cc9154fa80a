"""The router's decisions: which requests wait, where they run, what becomes of them when nodes come and go.

`RouterState.handle` takes what has happened and the time, and returns what is to be done, in order. It has no
clock, no socket and no loop: `service.py` carries it out over asyncio and zmq, the simulation and tests over
lists. Its parts own what they name; this file says who of them hears of what.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import assert_never
from urllib.parse import urlsplit

from ..api.generation import ModelCard
from ..messages.node import AttemptFailed, NodeEntry, TokenOutputs
from ..messages.timeline import SpanDates
from ..runtime.containment import nobody_waits
from ..runtime.pause_gate import PauseGate
from ..runtime.peer_clock import PeerClocks
from .dispatcher import Dispatcher
from .events import (
    Abort,
    Action,
    Arrival,
    CachesDropped,
    ChoiceStopped,
    Event,
    Found,
    Hold,
    LinkLost,
    LinkRefused,
    Listen,
    Log,
    NodesMove,
    NodesStandStill,
    NotFound,
    Pause,
    PauseArrivals,
    Pinged,
    PingUnanswered,
    Ponged,
    RareEvent,
    ReaderLeft,
    Registered,
    Release,
    Resume,
    Sent,
    ShutDown,
    TakenOut,
    Tick,
)
from .members import Members
from .metrics import RouterCounters
from .options import RouterOptions
from .prefix_estimates import PrefixEstimates
from .registry import NodeChanged, NodeEvent, NodeJoined, NodeLost, NodeRegistry, NodeRestarted, NodeSilent
from .requests import Requests, unavailable
from .sessions import SessionTable

BUSY_TICK_S = 0.02  # while something is queued
IDLE_TICK_S = 0.2
STALL_S = 1.0  # a tick later than this says that the router itself stood still


class RouterState:
    def __init__(
        self,
        options: RouterOptions,
        *,
        model: ModelCard,
        router_id: str,
        static_urls: Sequence[str] = (),
        unix_minus_monotonic_s: float = 0.0,
    ) -> None:
        self.router_id = router_id
        self.due_at = -math.inf  # whoever drives this says `Tick` then
        self._out: list[Action] = []
        self._dates = SpanDates(unix_minus_monotonic_s)
        self._node_clocks = PeerClocks()  # by incarnation
        self._members = Members(
            options.timing, model=model, router_id=router_id, static_urls=static_urls, out=self._out
        )
        self._prefixes = PrefixEstimates(self._members.registry)
        self.sessions = SessionTable(
            max_sessions=options.routing.max_sessions, idle_timeout_s=options.routing.session_timeout
        )
        self.requests = Requests(
            options,
            model=model,
            members=self._members,
            prefixes=self._prefixes,
            dates=self._dates,
            lead_s=self._node_clocks.lead_s,
            out=self._out,
        )
        self._dispatcher = Dispatcher(
            options.routing,
            requests=self.requests,
            members=self._members,
            prefixes=self._prefixes,
            sessions=self.sessions,
            dates=self._dates,
            out=self._out,
        )
        self._pause = PauseGate()
        self._last_tick_at = math.inf
        self._tick_at = -math.inf

    # ---- what is asked of it --------------------------------------------------------------------

    @property
    def nodes(self) -> NodeRegistry:
        return self._members.registry

    @property
    def counters(self) -> RouterCounters:
        return self.requests.counters

    @property
    def pause_mode(self) -> str:
        """Empty while nothing is paused."""
        return self._pause.mode

    def why_refused(self, entry: NodeEntry) -> str:
        """Why a node that has registered is not known; empty when it is."""
        return self._members.why_refused(entry)

    def lead_s(self, incarnation: str) -> float:
        """How far the node's clock is ahead of ours."""
        return self._node_clocks.lead_s(incarnation)

    def open_session(self, session_id: str, capacity: int, idle_timeout_s: float | None, now: float) -> str:
        """At the decode node that has the fewest; its first turn goes there. Raises RequestError."""
        decodes = {decode.incarnation: decode for _, decode in self.nodes.ready_pairs()}
        if not decodes:
            raise unavailable(self.nodes.explain_no_pair(), code="no_ready_pair")
        home = min(
            decodes.values(),
            key=lambda node: (
                self.sessions.num_at(node.incarnation),
                self.requests.ledger.num_active(node.incarnation),
                node.incarnation,
            ),
        )
        return self.sessions.open(
            session_id,
            home=home.incarnation,
            address=urlsplit(home.entry.url).netloc,
            capacity=capacity,
            idle_timeout_s=idle_timeout_s,
            now=now,
        )

    def violations(self) -> list[str]:
        """What is wrong between the parts; empty when all that must hold does."""
        known = {node.incarnation for node in self.nodes}
        found = self.requests.violations()
        if known != set(self.requests.ledger.nodes()):
            found.append("there are estimates of other nodes than are known")
        found += [
            f"a node that is not known is connected: {incarnation}"
            for incarnation in self._members.connected()
            if incarnation not in known
        ]
        return found

    # ---- what happens ---------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        """`now`: monotonic seconds, never less than before. Raises RequestError when the request of an
        `Arrival`, or the node of a `Registered`, is refused: then nothing has happened."""
        if self._happens(event, now) and self.requests.queue:
            self._dispatcher.dispatch(now)
            self._tick_at = min(self._tick_at, now + BUSY_TICK_S)
        self.due_at = min(self._tick_at, self._members.due_at)
        actions = self._out[:]
        self._out.clear()
        return actions

    def _happens(self, event: Event, now: float) -> bool:
        """Whether something that waits may go now and could not before. It is looked for once an event: each
        time the whole queue may be gone through."""
        match event:
            case TokenOutputs():
                return self.requests.take(event, now)
            case Arrival():
                self.requests.arrive(event, now)
            case Sent(request_id, attempt):
                self.requests.sent(request_id, attempt, now)
                return False
            case AttemptFailed():
                self.requests.attempt_failed(event, now)
            case ChoiceStopped(request_id, choice):
                self.requests.stop_choice(request_id, choice, now)
            case ReaderLeft(request_id):
                self.requests.reader_left(request_id, now)
            case Tick():
                self._tick(now)
            case Pinged(incarnation):
                self.requests.ledger.ping(incarnation)
                self._node_clocks.pinged(incarnation, 0, self._dates.unix_s(now))  # one at a time
                return False
            case Ponged():
                with self.requests.containment.around(f"the pong of {event.incarnation}", nobody_waits):
                    self._ponged(event, now)
                self._members.rest(event.incarnation, now)
            case _:
                self._is_told(event, now)
        return True

    def _is_told(self, event: RareEvent, now: float) -> None:
        members, queue = self._members, self.requests.queue
        match event:
            case Registered(entry, by_hand):
                self._apply(members.register(entry, now, by_hand=by_hand), now)
            case TakenOut(url):
                self.nodes.take_out(url)
                self._forget_idle_leavers(now)
            case Found(url, entry):
                self._apply(members.found(url, entry, now), now)
            case NotFound(url, reason):
                members.not_found(url, reason, now)
            case LinkRefused(incarnation, reason):
                members.link_refused(incarnation, reason)
            case LinkLost(incarnation, reason):
                self._apply(members.link_lost(incarnation, reason, now), now)
            case PingUnanswered(incarnation, reason):
                self._apply(members.ping_unanswered(incarnation, reason, now), now)
            case Abort(request_ids):
                self.requests.abort(request_ids, now)
            case PauseArrivals():
                queue.pause(new_only=True)
            case Pause(mode):
                queue.pause()
                self._pause.pause(mode, now)
            case Resume():
                self._move_deadlines(now)
                self._pause.resume()
                queue.resume()
            case Hold(mode):
                self.requests.hold(mode, now)
            case Release():
                queue.release()
            case CachesDropped():
                self._prefixes.clear()
            case NodesStandStill():
                members.stand_still(now)
            case NodesMove():
                members.move(now)
            case Listen(is_on):
                members.listen(now, is_on=is_on)
            case ShutDown():
                self.requests.shut_down(now)
            case _:
                assert_never(event)

    # ---- time -----------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        late_s = now - self._last_tick_at
        self._last_tick_at = now
        if late_s > STALL_S:
            self.nodes.excuse(late_s, now)
        self._move_deadlines(now)
        self._apply(self._members.expire(now), now)
        self._forget_idle_leavers(now)
        self._members.tick(now)
        self.requests.queue.serve_with(self.nodes.num_prefilling(), now)
        self.requests.expire(now)
        self._expire_sessions(now)
        self._tick_at = now + IDLE_TICK_S

    def _move_deadlines(self, now: float) -> None:
        """None runs out while nothing is computed on purpose."""
        if stood_s := self._pause.stood_still_s(now):
            for record in self.requests:
                record.deadline += stood_s

    def _expire_sessions(self, now: float) -> None:
        holds = [record.spec.session for record in self.requests]
        for session_id in self.sessions.expire(now, {hold.session_id for hold in holds if hold}):
            self._out.append(Log(logging.INFO, f"session {session_id} was idle for too long"))

    # ---- nodes ----------------------------------------------------------------------------------

    def _ponged(self, event: Ponged, now: float) -> None:
        incarnation, pong = event.incarnation, event.pong
        self._apply(self.nodes.pong(incarnation, pong, now), now)
        if pong.entry.incarnation == incarnation:
            self._node_clocks.answered(incarnation, 0, self._dates.unix_s(now), pong.unix_s)
            self.requests.ledger.pong(incarnation, pong.load)

    def _forget_idle_leavers(self, now: float) -> None:
        self._apply(self._members.idle_leavers(self.requests.ledger.is_working), now)

    def _apply(self, events: Sequence[NodeEvent], now: float) -> None:
        for event in events:
            self._move_requests(event, now)  # which tells the old one to stop while it is still connected
            self._members.follow(event, now)
        if any(not isinstance(event, NodeSilent) for event in events):
            self._members.push_roster(now)

    def _move_requests(self, event: NodeEvent, now: float) -> None:
        match event:
            case NodeJoined(entry):
                self.requests.ledger.add_node(entry.incarnation)
            case NodeChanged(old, new):
                if old.weight_version != new.weight_version:
                    self._prefixes.forget(new.incarnation)
            case NodeRestarted(old, new):
                self._suspect(old.incarnation, f"decode node {old.url}: it was started again", now)
                self._forget_node(old.incarnation)
                self.requests.ledger.add_node(new.incarnation)
            case NodeLost(entry, reason):
                self._suspect(entry.incarnation, f"decode node {entry.url}: {reason}", now)
                self._forget_node(entry.incarnation)
            case NodeSilent(entry, reason):
                self._suspect(entry.incarnation, f"decode node {entry.url}: {reason}", now)

    def _suspect(self, incarnation: str, why: str, now: float) -> None:
        self.requests.decode_suspected(incarnation, why, now)

    def _forget_node(self, incarnation: str) -> None:
        self._prefixes.forget(incarnation)
        self._node_clocks.forget(incarnation)
        self.requests.ledger.forget_node(incarnation)
