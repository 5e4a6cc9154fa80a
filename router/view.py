"""What operators, clients and dashboards see of the cluster and of its requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

import msgspec
from prometheus_client import CollectorRegistry

from ..api.generation import ModelCard, WorkerStatus
from ..links.node_calls import NodeCalls, NodeUnavailableError
from ..runtime.metric_aliases import exposition
from .cluster import Cluster
from .metrics import RouterCollector, RouterCounters, RouterGauges
from .options import RouterOptions
from .registry import NodeRecord


class RouterRequests(Protocol):
    """What is told of those who run requests."""

    is_draining: bool

    @property
    def num_queued(self) -> int: ...

    @property
    def num_running(self) -> int: ...

    @property
    def num_sessions(self) -> int: ...

    @property
    def pause_mode(self) -> str: ...

    def own_state(self, request_id: str) -> dict[str, Any] | None: ...


class RouterView:
    """Implements `ClusterView` of `pdserve.api.generation`."""

    def __init__(
        self,
        options: RouterOptions,
        *,
        model: ModelCard,
        router_id: str,
        cluster: Cluster,
        requests: RouterRequests,
        counters: RouterCounters,
        metrics_registry: CollectorRegistry,
        clock: Callable[[], float],
    ) -> None:
        self._options = options
        self._model = model
        self._router_id = router_id
        self._cluster = cluster
        self._nodes = cluster.registry
        self._requests = requests
        self._metrics_registry = metrics_registry
        self._clock = clock
        metrics_registry.register(RouterCollector(model.name, counters, self._gauges))

    def readiness(self) -> tuple[bool, str]:
        if self._requests.is_draining:
            return False, "the router is shutting down"
        if not self._nodes.ready_pairs():
            return False, self._nodes.explain_no_pair()
        return True, ""

    def workers(self) -> list[WorkerStatus]:
        now = self._clock()
        ready = {node.incarnation for pair in self._nodes.ready_pairs() for node in pair}
        return [
            WorkerStatus(
                entry=node.entry,
                healthy=self._nodes.healthy(node),
                ready=node.incarnation in ready,
                lease_s=max(0.0, node.lease_until - now),
                load=node.load,
                ready_peers=tuple(sorted(node.ready_peers)),
                refused_peers=dict(node.refused_peers),
                quarantined_pages=dict(node.quarantined_pages),
            )
            for node in self._nodes
        ]

    def weight_version(self) -> str:
        """Of the nodes that serve; of any known node while none is ready; empty when there is none."""
        for _, decode in self._nodes.ready_pairs():
            return decode.entry.weight_version
        return next((node.entry.weight_version for node in self._nodes), "")

    async def request_state(self, request_id: str) -> dict[str, Any] | None:
        own = self._requests.own_state(request_id)
        nodes: dict[str, Any] = {}

        async def ask(url: str, link: NodeCalls) -> None:
            with contextlib.suppress(NodeUnavailableError):
                reply = await link.request_state(request_id, self._options.timing.node_call_s)
                if reply.state:
                    nodes[url] = {
                        "state": reply.state,
                        "age_s": reply.age_s,
                        "waits_for": reply.waits_for,
                        "details": reply.details,
                    }

        await asyncio.gather(*(ask(url, link) for url, link in self._cluster.links().items()))
        if own is None and not nodes:
            return None
        return {"request_id": request_id, **(own or {"state": "not of this router"}), "nodes": nodes}

    async def server_info(self) -> dict[str, Any]:
        links = self._cluster.links()
        nodes = list(self._nodes)
        infos = await asyncio.gather(*(self._node_info(node, links.get(node.entry.url)) for node in nodes))
        by_role: dict[str, list[dict[str, Any]]] = {"prefill": [], "decode": []}
        for node, info in zip(nodes, infos, strict=True):
            by_role[node.entry.role].append(info)
        return {
            "model_path": self._model.path,
            "served_model_name": self._model.name,
            "weight_version": self.weight_version(),
            "router": {
                "router_id": self._router_id,
                **asdict(self._options),
                "pause": self._requests.pause_mode,
                "num_queued": self._requests.num_queued,
                "num_running": self._requests.num_running,
                "num_sessions": self._requests.num_sessions,
            },
            **by_role,
        }

    async def _node_info(self, node: NodeRecord, link: NodeCalls | None) -> dict[str, Any]:
        load = msgspec.to_builtins(node.load)
        info = {"url": node.entry.url, "entry": msgspec.to_builtins(node.entry), "internal_states": [load]}
        if link is None:
            return info
        try:
            reply = await link.server_info(self._options.timing.node_call_s)
        except NodeUnavailableError as error:
            return {**info, "error": str(error)}
        return {
            **info,
            "model": msgspec.to_builtins(reply.model),
            "config": reply.config,
            "internal_states": [msgspec.to_builtins(reply.load)],
        }

    async def metrics_text(self) -> str:
        return exposition(self._metrics_registry, self._options.metrics_compat)

    def _gauges(self) -> RouterGauges:
        ready = {node.incarnation for pair in self._nodes.ready_pairs() for node in pair}
        workers: Counter[tuple[str, str]] = Counter()
        for node in self._nodes:
            workers[node.entry.role, self._worker_state(node, node.incarnation in ready)] += 1
        return RouterGauges(
            num_queued=self._requests.num_queued, num_running=self._requests.num_running, workers=workers
        )

    def _worker_state(self, node: NodeRecord, is_ready: bool) -> str:
        if not self._nodes.healthy(node):
            return "silent"
        if not node.takes_work:
            return "draining"
        return "ready" if is_ready else "unpaired"
