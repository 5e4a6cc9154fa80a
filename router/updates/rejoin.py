"""Brings nodes that were started again to the weights of the cluster: they read them from another node.

A node starts with its checkpoint on disk. Once the cluster has served an update, nobody pairs with such a
node, so it is idle, and nothing but this would give it work before the next update. What was forced on one
node (`is_of_cluster`) stays there: that node does not come back by itself, and no other one follows it.
"""

from __future__ import annotations

import asyncio
import logging

from ...links.node_calls import NodeCalls
from ...messages.node import NodeEntry
from ...messages.weights import FromPeer, is_of_cluster
from ...runtime.timing import Timing
from ..registry import NodeRecord
from ..service import RouterService
from .rollout import commit_all, failures, prepare_all

log = logging.getLogger(__name__)


class WeightRejoin:
    """One node at a time. Two routers may try the same one: the node refuses the second."""

    def __init__(self, timing: Timing, service: RouterService) -> None:
        self._timing = timing
        self._service = service
        self._registry = service.state.nodes
        self._links = service.links
        self._task: asyncio.Task[None] | None = None
        self._not_before: dict[str, float] = {}  # by incarnation, of nodes that serve other weights
        self._last_update = ""

    def committed(self, update_id: str) -> None:
        """The router's own last one, which goes before those that it only sees."""
        self._last_update = update_id

    async def settled(self) -> None:
        """No node is on its way any more."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def bring_all(self) -> None:
        """Every late node has been tried: an update of some tensors needs nodes that begin alike."""
        tried: set[str] = set()
        await self.settled()
        while nodes := [node for node in self._late(self._served()) if node.incarnation not in tried]:
            tried.add(nodes[0].incarnation)
            self._begin(nodes[0])
            await self.settled()

    def tick(self, now: float) -> None:
        """Begin with one node, where one needs it."""
        if self._task is not None and not self._task.done():
            return
        late = self._late(self._served())
        wait_s = self._timing.weight_rejoin_s  # an update that is being committed reaches it by itself
        self._not_before = {
            node.incarnation: self._not_before.get(node.incarnation, now + wait_s) for node in late
        }
        due = [node for node in late if now >= self._not_before[node.incarnation]]
        if due and self._begin(due[0]):
            self._not_before[due[0].incarnation] = now + self._timing.weight_rejoin_retry_s

    def _begin(self, late: NodeRecord) -> bool:
        """False: it is not connected, or no node that takes work serves them."""
        served, links = self._served(), self._links()
        sources = [node for node in self._registry if node.entry.update_id == served and node.takes_work]
        if late.entry.url not in links or not sources:
            return False
        # A prefill node's loop has less to do with the tokens of others than a decode node's.
        source = min(sources, key=lambda node: (node.entry.role != "prefill", node.entry.url))
        self._task = self._service.spawn(self._bring(late.entry, links[late.entry.url], source.entry))
        return True

    def _late(self, served: str) -> list[NodeRecord]:
        return [node for node in self._registry if served and self._is_late(node, served)]

    def _served(self) -> str:
        """The update that the cluster serves; none, or empty while two are there and it could be either."""
        updates = {node.entry.update_id for node in self._registry if is_of_cluster(node.entry.update_id)}
        if self._last_update in updates:
            return self._last_update
        return updates.pop() if len(updates) == 1 else ""

    def _is_late(self, node: NodeRecord, served: str) -> bool:
        update_id = node.entry.update_id
        return node.takes_work and update_id != served and (not update_id or is_of_cluster(update_id))

    async def _bring(self, late: NodeEntry, link: NodeCalls, source: NodeEntry) -> None:
        links = {late.url: link}
        answers = await prepare_all(
            links,
            source.update_id,
            FromPeer(
                zmq_address=source.zmq_address,
                update_id=source.update_id,
                fingerprint=source.model_fingerprint,
            ),
            source.weight_version,
        )
        if not failures(answers):
            answers = await commit_all(links, source.update_id, self._timing.weight_commit_s)
        # Nothing is discarded: it may be another router's, and what nobody commits ends with its lease.
        if reasons := failures(answers):
            log.warning("weights %s: not yet on %s", source.weight_version, reasons)
        else:
            log.info("%s has read weights %s from %s", late.url, source.weight_version, source.url)
