"""The metrics once more under the names of another server, for dashboards and autoscalers that know those.

Names and labels as of vLLM 0.33 and SGLang 0.5.23. Only what means the same has an alias: a metric with
another unit, or of another moment, has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

MetricsCompat: TypeAlias = Literal["none", "vllm", "sglang"]
METRICS_COMPATS: tuple[MetricsCompat, ...] = get_args(MetricsCompat)


@dataclass(frozen=True, slots=True)
class _Alias:
    """Of a family of ours, counters without ``_total``.

    `where`: the samples that count, by their labels, which the alias then lacks; `without`: labels it lacks
    too. Samples that differ in nothing else are added up. `extra`: labels that it has in addition.
    """

    name: str
    where: Mapping[str, str] = field(default_factory=dict)
    without: frozenset[str] = frozenset()
    extra: Mapping[str, str] = field(default_factory=dict)


_SAME_SUFFIX = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "prompt_tokens",
    "generation_tokens",
)
_VLLM: Mapping[str, tuple[_Alias, ...]] = {
    **{f"pd_{suffix}": (_Alias(f"vllm:{suffix}"),) for suffix in _SAME_SUFFIX},
    "pd_router_requests_running": (_Alias("vllm:num_requests_running"),),
    "pd_router_requests_queued": (_Alias("vllm:num_requests_waiting"),),
    "pd_num_running_reqs": (_Alias("vllm:num_requests_running"),),
    "pd_num_queue_reqs": (_Alias("vllm:num_requests_waiting"),),
    "pd_kv_cache_usage_perc": (_Alias("vllm:kv_cache_usage_perc"),),
    "pd_prefix_cache_queries": (_Alias("vllm:prefix_cache_queries"),),
    "pd_prefix_cache_hits": (_Alias("vllm:prefix_cache_hits"),),
    "pd_num_retracted_requests": (_Alias("vllm:num_preemptions"),),
    "pd_request_success": (_Alias("vllm:request_success"),),
    "pd_request_prompt_tokens": (_Alias("vllm:request_prompt_tokens"),),
    "pd_request_generation_tokens": (_Alias("vllm:request_generation_tokens"),),
}
_SGLANG: Mapping[str, tuple[_Alias, ...]] = {
    **{f"pd_{suffix}": (_Alias(f"sglang:{suffix}"),) for suffix in _SAME_SUFFIX},
    "pd_router_requests_running": (_Alias("sglang:num_running_reqs"),),
    "pd_router_requests_queued": (_Alias("sglang:num_queue_reqs"),),
    "pd_router_requests": (
        _Alias("sglang:num_requests", without=frozenset({"outcome"})),
        _Alias("sglang:num_aborted_requests", where={"outcome": "aborted"}),
    ),
    "pd_request_stage_seconds": (
        _Alias("sglang:per_stage_req_latency_seconds"),
        _Alias("sglang:queue_time_seconds", where={"stage": "queue"}),
    ),
    "pd_num_running_reqs": (_Alias("sglang:num_running_reqs"),),
    "pd_num_queue_reqs": (_Alias("sglang:num_queue_reqs"),),
    "pd_num_prefill_inflight_queue_reqs": (_Alias("sglang:num_prefill_inflight_queue_reqs"),),
    "pd_num_decode_prealloc_queue_reqs": (_Alias("sglang:num_decode_prealloc_queue_reqs"),),
    "pd_num_decode_transfer_queue_reqs": (_Alias("sglang:num_decode_transfer_queue_reqs"),),
    "pd_token_usage": (_Alias("sglang:token_usage"),),
    "pd_cache_hit_rate": (_Alias("sglang:cache_hit_rate"),),
    "pd_prefix_cache_hits": (_Alias("sglang:cached_tokens", extra={"cache_source": "device"}),),
    "pd_num_retracted_requests": (_Alias("sglang:num_retracted_requests"),),
}
_DIALECTS: Mapping[MetricsCompat, Mapping[str, tuple[_Alias, ...]]] = {
    "none": {},
    "vllm": _VLLM,
    "sglang": _SGLANG,
}


class _WithAliases(Collector):
    def __init__(self, inner: Collector, compat: MetricsCompat) -> None:
        self._inner = inner
        self._compat = compat

    def collect(self) -> Iterable[Metric]:
        table = _DIALECTS[self._compat]
        for family in self._inner.collect():
            yield family
            for alias in table.get(family.name, ()):
                yield _aliased(family, alias, self._compat)


def exposition(metrics: Collector, compat: MetricsCompat = "none") -> str:
    """The text of a scrape: `metrics`, and their aliases behind them."""
    return generate_latest(_WithAliases(metrics, compat)).decode()


def _aliased(family: Metric, alias: _Alias, compat: MetricsCompat) -> Metric:
    sums: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    dropped = alias.without | alias.where.keys()
    for sample in family.samples:
        if sample.name.endswith("_created") or not alias.where.items() <= sample.labels.items():
            continue
        name = alias.name + sample.name.removeprefix(family.name)
        labels = _common_labels(sample.labels, compat) | dict(alias.extra)
        labels |= {label: value for label, value in sample.labels.items() if label not in dropped | {"role"}}
        key = (name, frozenset(labels.items()))
        sums[key] = sums.get(key, 0.0) + sample.value
    result = Metric(alias.name, family.documentation, family.type)
    result.samples = [Sample(name, dict(labels), value) for (name, labels), value in sums.items()]
    return result


def _common_labels(labels: Mapping[str, str], compat: MetricsCompat) -> dict[str, str]:
    """What every metric of that server has, and ours have under another name or not at all."""
    if compat == "vllm":
        return {"engine": "0"}
    role = labels.get("role", "")
    return {"engine_type": "unified" if role == "router" else role, "tp_rank": "0", "pp_rank": "0"}
