"""What the router counts, in Prometheus' terms. Read at scrape time; counting costs one addition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..runtime.containment import PROCESS_FAULTS

ROLE = "router"


@dataclass(slots=True)
class RouterCounters:
    attempts: Counter[str] = field(
        default_factory=Counter
    )  # how each ended: "ok", "cancelled", a FailureCode
    requests: Counter[str] = field(default_factory=Counter)  # "finished", "failed", "refused", "cancelled"
    num_tokens: int = 0
    num_resends: int = 0


@dataclass(frozen=True, slots=True)
class RouterGauges:
    num_queued: int
    num_running: int
    workers: Counter[tuple[str, str]]  # (role, state)


class RouterCollector(Collector):
    def __init__(self, model_name: str, counters: RouterCounters, gauges: Callable[[], RouterGauges]) -> None:
        self._model_name = model_name
        self._counters = counters
        self._gauges = gauges

    def describe(self) -> Iterable[Metric]:
        """Nothing to look up while being registered."""
        return ()

    def collect(self) -> Iterable[Metric]:
        gauges = self._gauges()
        yield self._gauge("pd_router_requests_queued", "Attempts waiting in the router", gauges.num_queued)
        yield self._gauge("pd_router_requests_running", "Requests that were dispatched", gauges.num_running)
        workers = GaugeMetricFamily("pd_router_workers", "Nodes", labels=["model_name", "role", "state"])
        for (role, state), count in sorted(gauges.workers.items()):
            workers.add_metric([self._model_name, role, state], count)
        yield workers
        yield self._by("pd_router_attempts", "Attempts by how they ended", "code", self._counters.attempts)
        yield self._by("pd_router_requests", "Requests by how they ended", "outcome", self._counters.requests)
        yield self._counter("pd_router_tokens", "Tokens relayed", self._counters.num_tokens)
        yield self._counter(
            "pd_contained_faults",
            "Messages and jobs that failed here, and nothing else with them",
            PROCESS_FAULTS.num_faults,
        )
        yield self._counter("pd_router_resends", "Gaps asked for again", self._counters.num_resends)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name", "role"])
        family.add_metric([self._model_name, ROLE], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name", "role"])
        family.add_metric([self._model_name, ROLE], value)
        return family

    def _by(self, name: str, text: str, label: str, counts: Counter[str]) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name", "role", label])
        for value, count in sorted(counts.items()):
            family.add_metric([self._model_name, ROLE, value], count)
        return family
