"""The router's side of every node: links, heartbeats, polls of static URLs, the roster. Owns the registry.

What happens to nodes is told to one handler; what to do about requests is its business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..api.generation import AdminReply, ModelCard
from ..links.entry_lookup import EntryLookup, NoNodeError
from ..links.node_calls import NodeCalls, NodeUnavailableError, StreamMessage
from ..messages.node import ClientToNode, NodeEntry, Pong, Roster
from ..runtime.containment import Containment, nobody_waits
from ..runtime.errors import RequestError
from ..runtime.logs import Complaints
from .connector import Connector
from .options import RouterOptions
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
from .waiting import until

log = logging.getLogger(__name__)

UNREADY_PING_INTERVAL_S = 0.2  # while no pair is ready, so that the first one is noticed soon
AWAITED_PING_INTERVAL_S = 0.05  # while something waits for what nodes will say of themselves


class ClusterHandler(Protocol):
    def on_stream(self, message: StreamMessage) -> None: ...

    def on_node_event(self, event: NodeEvent) -> None: ...

    def is_working(self, incarnation: str) -> bool: ...

    def on_ping(self, incarnation: str) -> None: ...

    def on_pong(self, incarnation: str, pong: Pong) -> None: ...


@dataclass(slots=True, eq=False)
class _Connection:
    link: NodeCalls
    heartbeat: asyncio.Task[None] | None = None


class Cluster:
    def __init__(
        self,
        options: RouterOptions,
        *,
        model: ModelCard,
        router_id: str,
        connect: Connector,
        lookup: EntryLookup,
        static_urls: Sequence[str],
        clock: Callable[[], float],
        handler: ClusterHandler,
    ) -> None:
        self.registry = NodeRegistry(
            lease_s=options.timing.lease_s,
            pong_timeout_s=options.timing.pong_timeout_s,
            prefill_wait_s=options.timing.prefill_wait_s,
        )
        self._options = options
        self._model = model
        self._router_id = router_id
        self._connect = connect
        self._lookup = lookup
        self._static_urls = tuple(static_urls)
        self._clock = clock
        self._handler = handler
        self._connections: dict[str, _Connection] = {}  # by incarnation
        self._connect_not_before: dict[str, float] = {}
        self._complaints = Complaints()  # about static URLs
        self._roster_due_at = 0.0
        self._may_suspect = True  # not while nodes stand still to load weights
        self._num_waits = 0
        self._containment = Containment()
        self._is_awaited = asyncio.Event()  # something waits for what nodes say: `hears`
        self._tasks: set[asyncio.Task[None]] = set()
        self.crashed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        for url in self._static_urls:
            self.spawn(self._poll(url))

    async def close(self) -> None:
        for incarnation in list(self._connections):
            self._disconnect(incarnation)
        for task in self._tasks:
            if not task.get_name().startswith("close "):
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str | None = None) -> asyncio.Task[None]:
        """A background task; its failure is the process's failure, told by ``crashed``."""
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.critical("a task of the router failed", exc_info=error)
        if not self.crashed.done():
            self.crashed.set_exception(error)

    # ---- what the service asks ------------------------------------------------------------------

    def send(self, incarnation: str, message: ClientToNode) -> bool:
        """Whether it is on its way."""
        connection = self._connections.get(incarnation)
        if connection is None:
            return False
        try:
            connection.link.send(message)
        except NodeUnavailableError:
            return False
        return True

    def links(self) -> Mapping[str, NodeCalls]:
        """url -> link of every node that is connected."""
        return {
            node.entry.url: self._connections[node.incarnation].link
            for node in self.registry
            if node.incarnation in self._connections
        }

    async def hears(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Whether what the nodes say of themselves meets it in time; they are asked at once, and often."""
        self._num_waits += 1
        self._is_awaited.set()
        try:
            return await until(condition, timeout_s, self._clock)
        finally:
            self._num_waits -= 1
            if not self._num_waits:
                self._is_awaited.clear()

    async def register(self, url: str, entry: NodeEntry | None) -> AdminReply:
        """``entry`` None: a person names a URL; otherwise a node registers itself.

        Raises RequestError when there are too many nodes.
        """
        by_hand = entry is None
        if entry is None:
            try:
                entry = await self._lookup(url)
            except NoNodeError as error:
                return AdminReply(False, str(error))
        if reason := self._refusal(entry):
            return AdminReply(False, f"this node does not fit: {reason}")
        if not self.registry.has_room(entry):
            raise RequestError(
                f"This router has {MAX_NODES} nodes, as many as it takes.",
                status=503,
                code="too_many_nodes",
                error_type="service_unavailable",
            )
        self._apply(self.registry.register(entry, self._clock(), by_hand=by_hand))
        if self.registry.was_removed(entry.incarnation):
            return AdminReply(False, "this node was taken out; restart it, or register its URL by hand")
        return AdminReply(True)

    def _refusal(self, entry: NodeEntry) -> str:
        """Why the node is not taken; empty when it is."""
        reason = why_unfit(self._model, entry)
        if reason and self.registry.refuse(entry, reason, self._clock()):
            log.warning("%s node does not fit: %s: %s", entry.role, entry.url, reason)
        return reason

    def _warn_of_other_files(self, entry: NodeEntry) -> None:
        if names := other_files(self._model, entry):
            log.warning(
                "%s node %s differs from this router in %s: prompts, or the default sampling, may not be "
                "those of its model; start both with the same files",
                entry.role,
                entry.url,
                " and ".join(names),
            )

    def remove(self, url: str) -> AdminReply:
        """The node gets no new work, and is forgotten once what it works on has ended."""
        if not self.registry.take_out(url):
            return AdminReply(False, f"no node at {url}")
        self._forget_idle_leavers()
        return AdminReply(True)

    def _forget_idle_leavers(self) -> None:
        for node in list(self.registry):
            if node.leaving and not self._handler.is_working(node.incarnation):
                self._apply(self.registry.forget(node.incarnation))

    def tick(self, now: float, *, expire: bool) -> None:
        self._may_suspect = expire
        if expire:
            self._apply(self.registry.expire(now))
        self._forget_idle_leavers()
        for node in self.registry:
            if node.incarnation not in self._connections:
                self._open_link(node.entry, now)
        if now >= self._roster_due_at:
            self._push_roster(now)

    # ---- nodes come and go ----------------------------------------------------------------------

    def _apply(self, events: Sequence[NodeEvent]) -> None:
        now = self._clock()
        for event in events:
            match event:
                case NodeJoined(entry):
                    log.info("%s node joined: %s (%s)", entry.role, entry.url, entry.incarnation)
                    self._warn_of_other_files(entry)
                    self._open_link(entry, now)
                    self._handler.on_node_event(event)
                case NodeRestarted(old, new):
                    log.info("%s node restarted: %s (%s)", new.role, new.url, new.incarnation)
                    self._warn_of_other_files(new)
                    # The handler still reaches the old one, to cancel what it may be working on.
                    self._handler.on_node_event(event)
                    self._disconnect(old.incarnation)
                    self._open_link(new, now)
                case NodeLost(entry, reason):
                    log.warning("%s node lost: %s: %s", entry.role, entry.url, reason)
                    self._handler.on_node_event(event)
                    self._disconnect(entry.incarnation)
                case NodeSilent(entry, reason):
                    log.warning("%s node suspected: %s: %s", entry.role, entry.url, reason)
                    self._handler.on_node_event(event)
                case NodeChanged(_, new):
                    log.info("%s node changed: %s, weights %s", new.role, new.url, new.weight_version)
                    self._handler.on_node_event(event)
        if any(not isinstance(event, NodeSilent) for event in events):
            self._push_roster(now)

    def _open_link(self, entry: NodeEntry, now: float) -> None:
        incarnation = entry.incarnation
        if now < self._connect_not_before.get(incarnation, now):
            return
        self._connect_not_before[incarnation] = now + self._options.timing.ping_interval_s
        try:
            link = self._connect(
                entry.zmq_address,
                on_stream=self._handler.on_stream,
                on_lost=lambda reason: self._on_link_lost(incarnation, reason),
            )
        except NodeUnavailableError as error:
            log.warning("%s: %s", entry.url, error)
            return
        connection = _Connection(link)
        self._connections[incarnation] = connection
        connection.heartbeat = self.spawn(self._heartbeat(incarnation, link))
        self.send(incarnation, self._roster())

    def _on_link_lost(self, incarnation: str, reason: str) -> None:
        if incarnation in self._connections:
            self._disconnect(incarnation)
            self._apply(self.registry.link_lost(incarnation, reason, self._clock()))

    def _disconnect(self, incarnation: str) -> None:
        if self.registry.get(incarnation) is None:
            self._connect_not_before.pop(incarnation, None)
        connection = self._connections.pop(incarnation, None)
        if connection is None:
            return
        if connection.heartbeat is not None:
            connection.heartbeat.cancel()
        self.spawn(connection.link.close(), name=f"close {incarnation}")

    async def _heartbeat(self, incarnation: str, link: NodeCalls) -> None:
        """Until the link ends. A ping may be answered late; the registry judges silence meanwhile.

        When none comes for a whole lease, the connection itself may be dead though the node is well: a
        network that forgot it tells nobody. It is given up, and the next tick makes another.
        """
        while True:
            self._handler.on_ping(incarnation)
            try:
                pong = await link.ping(self._options.timing.lease_s)
            except NodeUnavailableError as error:
                log.debug("%s", error)
                if self._may_suspect:
                    self._on_link_lost(incarnation, str(error))
                    return
            else:
                with self._containment.around(f"the pong of {incarnation}", nobody_waits):
                    self._apply(self.registry.pong(incarnation, pong, self._clock()))
                    self._handler.on_pong(incarnation, pong)
            await self._rest_between_pings()

    async def _rest_between_pings(self) -> None:
        interval_s = self._options.timing.ping_interval_s
        if self._is_awaited.is_set():
            await asyncio.sleep(min(AWAITED_PING_INTERVAL_S, interval_s))
            return
        if not self.registry.ready_pairs():
            interval_s = min(UNREADY_PING_INTERVAL_S, interval_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_awaited.wait(), interval_s)

    async def _poll(self, url: str) -> None:
        """Look for the node at a static URL whenever none that answers pings is known there."""
        found = ""
        while True:
            known = self.registry.get(found)
            if known is None or not self.registry.healthy(known):
                with self._containment.around(f"the entry of {url}", nobody_waits):
                    found = await self._find(url)
            await asyncio.sleep(self._options.timing.entry_interval_s)

    async def _find(self, url: str) -> str:
        """The incarnation of the node at a static URL, which is registered; empty when there is none that
        may be."""
        try:
            entry = await self._lookup(url)
        except NoNodeError as error:
            if self._complaints.is_due(url, "silent", self._clock()):
                log.warning("%s; it is asked again and again", error)
            return ""
        if self._refusal(entry) or not self.registry.has_room(entry):
            return ""
        self._complaints.forget(url)
        self._apply(self.registry.register(entry, self._clock()))
        return entry.incarnation

    # ---- roster ---------------------------------------------------------------------------------

    def _roster(self) -> Roster:
        return Roster(router_id=self._router_id, nodes=tuple(node.entry for node in self.registry))

    def _push_roster(self, now: float) -> None:
        self._roster_due_at = now + self._options.timing.roster_interval_s
        roster = self._roster()
        for incarnation in list(self._connections):
            self.send(incarnation, roster)
