"""Aliases of metrics: same values, the other server's names and labels, nothing of ours missing."""

from __future__ import annotations

from typing import get_args

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from pdserve.runtime.metric_aliases import MetricsCompat, exposition

LABELS = {"model_name": "tiny", "role": "router"}


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    names = tuple(LABELS)
    Gauge("pd_router_requests_queued", "Queued.", names, registry=registry).labels(**LABELS).set(3)
    requests = Counter("pd_router_requests", "Requests.", (*names, "outcome"), registry=registry)
    for outcome, count in (("finished", 5), ("aborted", 2)):
        requests.labels(**LABELS, outcome=outcome).inc(count)
    ttft = Histogram("pd_time_to_first_token_seconds", "TTFT.", names, buckets=(0.1, 1.0), registry=registry)
    ttft.labels(**LABELS).observe(0.5)
    stages = Histogram("pd_request_stage_seconds", "S.", (*names, "stage"), buckets=(1.0,), registry=registry)
    for stage in ("queue", "wire"):
        stages.labels(**LABELS, stage=stage).observe(0.25)
    return registry


def scrape(
    registry: CollectorRegistry, compat: MetricsCompat
) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(exposition(registry, compat))
        for sample in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def test_without_a_dialect_there_are_no_others(registry: CollectorRegistry) -> None:
    assert all(name.startswith("pd_") for name, _ in scrape(registry, "none"))


@pytest.mark.parametrize("compat", get_args(MetricsCompat))
def test_our_own_stay(registry: CollectorRegistry, compat: MetricsCompat) -> None:
    assert scrape(registry, "none").items() <= scrape(registry, compat).items()


def test_vllm(registry: CollectorRegistry) -> None:
    values = scrape(registry, "vllm")
    labels = {"model_name": "tiny", "engine": "0"}
    assert values[key("vllm:num_requests_waiting", **labels)] == 3
    assert values[key("vllm:time_to_first_token_seconds_bucket", **labels, le="0.1")] == 0
    assert values[key("vllm:time_to_first_token_seconds_bucket", **labels, le="1.0")] == 1
    assert values[key("vllm:time_to_first_token_seconds_sum", **labels)] == 0.5


def test_sglang_counts_all_outcomes_and_picks_one_stage(registry: CollectorRegistry) -> None:
    values = scrape(registry, "sglang")
    labels = {"model_name": "tiny", "engine_type": "unified", "tp_rank": "0", "pp_rank": "0"}
    assert values[key("sglang:num_requests_total", **labels)] == 7
    assert values[key("sglang:num_aborted_requests_total", **labels)] == 2
    assert values[key("sglang:queue_time_seconds_count", **labels)] == 1
    assert values[key("sglang:per_stage_req_latency_seconds_count", **labels, stage="wire")] == 1
