"""What operators, clients and dashboards see of the cluster and of its requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry

from ..api.generation import ModelCard, WorkerStatus
from ..links.node_calls import NodeCalls, NodeUnavailableError
from ..runtime.metric_aliases import exposition
from .attempts import ChoiceState
from .metrics import RouterCollector, RouterGauges
from .options import RouterOptions
from .registry import NodeRecord
from .service import RouterService


class RouterView:
    """Implements `ClusterView` of `pdserve.api.generation`."""

    def __init__(
        self,
        options: RouterOptions,
        *,
        model: ModelCard,
        service: RouterService,
        metrics_registry: CollectorRegistry,
        clock: Callable[[], float],
    ) -> None:
        self._options = options
        self._model = model
        self._service = service
        self._state = service.state
        self._nodes = service.state.nodes
        self._requests = service.state.requests
        self._metrics_registry = metrics_registry
        self._clock = clock
        metrics_registry.register(RouterCollector(model.name, service.state.counters, self._gauges))

    def readiness(self) -> tuple[bool, str]:
        if self._requests.is_shut_down:
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
        own = self.own_state(request_id)
        nodes: dict[str, Any] = {}

        async def ask(url: str, link: NodeCalls) -> None:
            with contextlib.suppress(NodeUnavailableError):
                reply = await link.request_state(request_id)
                if reply.state:
                    nodes[url] = {
                        "state": reply.state,
                        "age_s": reply.age_s,
                        "waits_for": reply.waits_for,
                        "details": reply.details,
                    }

        await asyncio.gather(*(ask(url, link) for url, link in self._service.links().items()))
        if own is None and not nodes:
            return None
        return {"request_id": request_id, **(own or {"state": "not of this router"}), "nodes": nodes}

    def own_state(self, request_id: str) -> dict[str, Any] | None:
        """Where a request of this router is, in words; None: it has none of this id."""
        record = self._requests.get(request_id)
        if record is None:
            return None
        now = self._clock()
        tickets = self._requests.queue.of_request(request_id)
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
            "choices": [self._choice_state(choice) for choice in record.choices],
        }

    def _choice_state(self, choice: ChoiceState) -> dict[str, Any]:
        attempt = choice.attempt
        pair = attempt.pair if attempt is not None else None
        return {
            "index": choice.index,
            "num_tokens": len(choice.kept_ids),
            "finished": choice.finished,
            "num_failures": choice.num_failures,
            "attempt": attempt.number if attempt is not None else None,
            "prefill": self._nodes.url_of(pair.prefill) if pair is not None and pair.prefill else None,
            "decode": self._nodes.url_of(pair.decode) if pair is not None else None,
        }

    async def server_info(self) -> dict[str, Any]:
        links = self._service.links()
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
                "router_id": self._state.router_id,
                **asdict(self._options.routing),
                "metrics_compat": self._options.metrics_compat,
                "timing": asdict(self._options.timing),
                "pause": self._state.pause_mode,
                "num_queued": len(self._requests.queue),
                "num_running": self._requests.num_running,
                "num_sessions": len(self._state.sessions),
            },
            **by_role,
        }

    async def _node_info(self, node: NodeRecord, link: NodeCalls | None) -> dict[str, Any]:
        load = msgspec.to_builtins(node.load)
        info = {"url": node.entry.url, "entry": msgspec.to_builtins(node.entry), "internal_states": [load]}
        if link is None:
            return info
        try:
            reply = await link.server_info()
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
            num_queued=len(self._requests.queue), num_running=self._requests.num_running, workers=workers
        )

    def _worker_state(self, node: NodeRecord, is_ready: bool) -> str:
        if not self._nodes.healthy(node):
            return "silent"
        if not node.takes_work:
            return "draining"
        return "ready" if is_ready else "unpaired"
