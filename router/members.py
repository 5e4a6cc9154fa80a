"""The router's side of every node: who is known, who is connected, who is pinged when, who hears the roster.

Values and ``now`` in; what is to be done goes to `out`, what has happened to nodes is returned: what that
means for requests is not known here. A link is opened for every node that is known, and tried again when it
is lost. A ping may be answered late; the registry judges silence meanwhile. When none is answered for a whole
lease, the connection itself may be dead though the node is well (a network that forgot it tells nobody): it
is given up, and the next tick opens another.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ..api.generation import ModelCard
from ..messages.node import ClientToNode, NodeEntry, Roster
from ..runtime.errors import RequestError
from ..runtime.logs import Complaints
from ..runtime.timing import Timing
from .events import Action, CloseLink, Log, LookUp, OpenLink, Ping, Send
from .registry import (
    MAX_NODES,
    NodeChanged,
    NodeEvent,
    NodeJoined,
    NodeLost,
    NodeRegistry,
    NodeRestarted,
    NodeSilent,
    other_files,
    why_unfit,
)

UNREADY_PING_INTERVAL_S = 0.2  # while no pair is ready, so that the first one is noticed soon
AWAITED_PING_INTERVAL_S = 0.05  # while something waits for what nodes will say of themselves


@dataclass(slots=True)
class _Link:
    ping_at: float = math.inf  # the next one; infinity while one is under way


@dataclass(slots=True)
class _StaticNode:
    """A URL that is asked for its node whenever none that answers pings is known there."""

    url: str
    incarnation: str = ""  # of who was found there last
    ask_at: float = -math.inf  # infinity while it is being asked


class Members:
    def __init__(
        self,
        timing: Timing,
        *,
        model: ModelCard,
        router_id: str,
        static_urls: Sequence[str],
        out: list[Action],
    ) -> None:
        self.registry = NodeRegistry(
            lease_s=timing.lease_s,
            pong_timeout_s=timing.pong_timeout_s,
            prefill_wait_s=timing.prefill_wait_s,
        )
        self.due_at = -math.inf  # `tick` has something to do then
        self._timing = timing
        self._model = model
        self._router_id = router_id
        self._out = out
        self._links: dict[str, _Link] = {}  # by incarnation
        self._connect_not_before: dict[str, float] = {}
        self._static = {url: _StaticNode(url) for url in static_urls}
        self._complaints = Complaints()  # about static URLs
        self._roster_at = 0.0
        self._num_listeners = 0  # for what nodes will say of themselves
        self._still_since: float | None = None  # nodes stand still on purpose

    # ---- what is asked --------------------------------------------------------------------------

    def connected(self) -> Collection[str]:
        return self._links.keys()

    def is_connected(self, incarnation: str) -> bool:
        return incarnation in self._links

    def why_refused(self, entry: NodeEntry) -> str:
        """Why a node that has registered is not known; empty when it is."""
        if reason := why_unfit(self._model, entry):
            return f"this node does not fit: {reason}"
        if self.registry.was_removed(entry.incarnation):
            return "this node was taken out; restart it, or register its URL by hand"
        return ""

    def send(self, incarnation: str, message: ClientToNode) -> None:
        """Nothing to a node that is not connected."""
        if incarnation in self._links:
            self._out.append(Send(incarnation, message))

    # ---- nodes come and go ----------------------------------------------------------------------

    def register(self, entry: NodeEntry, now: float, *, by_hand: bool) -> list[NodeEvent]:
        """Raises RequestError when there are too many nodes."""
        if self._is_unfit(entry, now):
            return []
        if not self.registry.has_room(entry):
            raise RequestError(
                f"This router has {MAX_NODES} nodes, as many as it takes.",
                status=503,
                code="too_many_nodes",
                error_type="service_unavailable",
            )
        return self.registry.register(entry, now, by_hand=by_hand)

    def found(self, url: str, entry: NodeEntry, now: float) -> list[NodeEvent]:
        """At a static URL."""
        self._ask_again(url, now)
        if self._is_unfit(entry, now) or not self.registry.has_room(entry):
            return []
        self._complaints.forget(url)
        self._static[url].incarnation = entry.incarnation
        return self.registry.register(entry, now)

    def not_found(self, url: str, reason: str, now: float) -> None:
        self._ask_again(url, now)
        if self._complaints.is_due(url, "silent", now):
            self._warn(f"{reason}; it is asked again and again")

    def _ask_again(self, url: str, now: float) -> None:
        static = self._static[url]
        static.incarnation, static.ask_at = "", now + self._timing.entry_interval_s
        self.due_at = min(self.due_at, static.ask_at)

    def _is_unfit(self, entry: NodeEntry, now: float) -> bool:
        reason = why_unfit(self._model, entry)
        if reason and self.registry.refuse(entry, reason, now):
            self._warn(f"{entry.role} node does not fit: {entry.url}: {reason}")
        return bool(reason)

    def idle_leavers(self, is_working: Callable[[str], bool]) -> list[NodeEvent]:
        leavers = [node.incarnation for node in self.registry if node.leaving]
        return [
            event
            for incarnation in leavers
            if not is_working(incarnation)
            for event in self.registry.forget(incarnation)
        ]

    def expire(self, now: float) -> list[NodeEvent]:
        return self.registry.expire(now) if self._still_since is None else []

    def link_refused(self, incarnation: str, reason: str) -> None:
        self._links.pop(incarnation, None)
        self._warn(f"{self.registry.url_of(incarnation)}: {reason}")

    def link_lost(self, incarnation: str, reason: str, now: float) -> list[NodeEvent]:
        if incarnation not in self._links:
            return []
        self._close(incarnation)
        return self.registry.link_lost(incarnation, reason, now)

    def follow(self, event: NodeEvent, now: float) -> None:
        """Links and the log follow what has happened."""
        match event:
            case NodeJoined(entry):
                self._note(f"{entry.role} node joined: {entry.url} ({entry.incarnation})")
                self._warn_of_other_files(entry)
                self._open(entry, now)
            case NodeRestarted(old, new):
                self._note(f"{new.role} node restarted: {new.url} ({new.incarnation})")
                self._warn_of_other_files(new)
                self._close(old.incarnation)
                self._open(new, now)
            case NodeLost(entry, reason):
                self._warn(f"{entry.role} node lost: {entry.url}: {reason}")
                self._close(entry.incarnation)
            case NodeSilent(entry, reason):
                self._warn(f"{entry.role} node suspected: {entry.url}: {reason}")
            case NodeChanged(_, new):
                self._note(f"{new.role} node changed: {new.url}, weights {new.weight_version}")

    def _open(self, entry: NodeEntry, now: float) -> None:
        incarnation = entry.incarnation
        if now < self._connect_not_before.get(incarnation, now):
            return
        self._connect_not_before[incarnation] = now + self._timing.ping_interval_s
        self._links[incarnation] = _Link()
        self._out.append(OpenLink(incarnation, entry.zmq_address))
        self.send(incarnation, self._roster())
        self._out.append(Ping(incarnation))

    def _close(self, incarnation: str) -> None:
        if self.registry.get(incarnation) is None:
            self._connect_not_before.pop(incarnation, None)
        if self._links.pop(incarnation, None) is not None:
            self._out.append(CloseLink(incarnation))

    # ---- pings ----------------------------------------------------------------------------------

    def ping_unanswered(self, incarnation: str, reason: str, now: float) -> list[NodeEvent]:
        if self._still_since is None:
            return self.link_lost(incarnation, reason, now)
        self.rest(incarnation, now)
        return []

    def rest(self, incarnation: str, now: float) -> None:
        """Until the next ping."""
        link = self._links.get(incarnation)
        if link is None:
            return
        interval_s = self._timing.ping_interval_s
        if self._num_listeners:
            interval_s = min(AWAITED_PING_INTERVAL_S, interval_s)
        elif not self.registry.ready_pairs():
            interval_s = min(UNREADY_PING_INTERVAL_S, interval_s)
        link.ping_at = now + interval_s
        self.due_at = min(self.due_at, link.ping_at)

    def listen(self, now: float, *, is_on: bool) -> None:
        """While somebody does, nodes are asked at once and often what they are."""
        self._num_listeners += 1 if is_on else -1
        if is_on:
            for link in self._links.values():
                if link.ping_at < math.inf:
                    link.ping_at = now
            self._ping_who_is_due(now)

    def _ping_who_is_due(self, now: float) -> None:
        for incarnation, link in self._links.items():
            if link.ping_at <= now:
                link.ping_at = math.inf
                self._out.append(Ping(incarnation))

    def stand_still(self, now: float) -> None:
        """No node is suspected until `move`."""
        self._still_since = now

    def move(self, now: float) -> None:
        if self._still_since is not None:
            self.registry.excuse(now - self._still_since, now)
            self._still_since = None

    # ---- time -----------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        for node in self.registry:
            if node.incarnation not in self._links:
                self._open(node.entry, now)
        if now >= self._roster_at:
            self.push_roster(now)
        for static in self._static.values():
            if static.ask_at <= now:
                self._look_up(static, now)
        self._ping_who_is_due(now)
        dues = [link.ping_at for link in self._links.values()]
        self.due_at = min((*dues, *(static.ask_at for static in self._static.values())), default=math.inf)

    def _look_up(self, static: _StaticNode, now: float) -> None:
        known = self.registry.get(static.incarnation)
        if known is not None and self.registry.healthy(known):
            static.ask_at = now + self._timing.entry_interval_s
        else:
            static.ask_at = math.inf
            self._out.append(LookUp(static.url))

    # ---- roster ---------------------------------------------------------------------------------

    def _roster(self) -> Roster:
        return Roster(router_id=self._router_id, nodes=tuple(node.entry for node in self.registry))

    def push_roster(self, now: float) -> None:
        """Every node is told of every node."""
        self._roster_at = now + self._timing.roster_interval_s
        roster = self._roster()
        for incarnation in self._links:
            self.send(incarnation, roster)

    # ---- the log --------------------------------------------------------------------------------

    def _note(self, text: str) -> None:
        self._out.append(Log(logging.INFO, text))

    def _warn(self, text: str) -> None:
        self._out.append(Log(logging.WARNING, text))

    def _warn_of_other_files(self, entry: NodeEntry) -> None:
        if names := other_files(self._model, entry):
            self._warn(
                f"{entry.role} node {entry.url} differs from this router in {' and '.join(names)}: prompts, "
                "or the default sampling, may not be those of its model; start both with the same files"
            )
