"""The node's Prometheus metrics, ``pd_*``, labelled by model_name and role.

Names follow promtool: base units, counters end in ``_total``. The reporter keeps a registry of its own, so
several can live in one process. Gauges and token counters come from the NodeLoad that pairing reads too;
they are as exact as that is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
)

from ..messages.node import NodeLoad, PeerTraffic, Role
from ..runtime.metric_aliases import MetricsCompat, exposition
from .page_allocator import PageCounts

RoomOutcome: TypeAlias = Literal["done", "busy", "failed", "aborted"]
StepKind: TypeAlias = Literal["prefill", "decode", "mixed"]

_LABELS = ("model_name", "role")
_STEP_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_TRANSFER_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def _num_prompt_tokens(load: NodeLoad) -> int:
    return load.num_prompt_tokens_computed + load.num_prompt_tokens_received + load.num_cached_prompt_tokens


class MetricsReporter:
    """Takes what happened, renders the exposition text. The clock and the HTTP route are elsewhere."""

    def __init__(self, model_name: str, role: Role, compat: MetricsCompat = "none") -> None:
        self._labels = (model_name, role)
        self._compat = compat
        self._registry = CollectorRegistry()
        self._last_load = NodeLoad()
        self._last_crossed_rooms = 0
        self._last_faults = (0, 0)  # contained, malformed

        self._num_running_reqs = self._gauge("pd_num_running_reqs", "Requests in the running batch.")
        self._num_queue_reqs = self._gauge("pd_num_queue_reqs", "Requests waiting on this node.")
        self._num_queued_tokens = self._gauge(
            "pd_num_queued_tokens", "Prompt tokens that were accepted and are not computed yet."
        )
        self._num_prefill_inflight = self._gauge(
            "pd_num_prefill_inflight_queue_reqs", "Prefill: requests whose pages are on the wire."
        )
        self._num_decode_prealloc = self._gauge(
            "pd_num_decode_prealloc_queue_reqs", "Decode: requests that wait for pages."
        )
        self._num_decode_transfer = self._gauge(
            "pd_num_decode_transfer_queue_reqs", "Decode: requests whose pages are being computed or written."
        )
        self._token_usage = self._gauge(
            "pd_token_usage", "Share of the KV cache that requests use, 0 to 1, evictable pages not counted."
        )
        self._kv_cache_usage = self._gauge("pd_kv_cache_usage_perc", "The same as pd_token_usage; 1 is full.")
        self._num_pages = Gauge(
            "pd_num_pages", "KV pages by state.", (*_LABELS, "state"), registry=self._registry
        )
        self._num_sessions = self._gauge("pd_num_sessions", "Decode: sessions whose pages are kept.")
        self._quarantined_pages = Gauge(
            "pd_quarantined_pages",
            "Decode: KV pages that this incarnation of a prefill node may still write.",
            (*_LABELS, "peer"),
            registry=self._registry,
        )
        self._cache_hit_rate = self._gauge(
            "pd_cache_hit_rate", "Share of prompt tokens since start that the prefix cache held, 0 to 1."
        )

        self._prompt_tokens = self._counter("pd_computed_prompt_tokens", "Prompt tokens computed.")
        self._received_tokens = self._counter(
            "pd_received_tokens", "Decode: prompt tokens whose KV came from a prefill node."
        )
        self._cached_tokens = self._counter(
            "pd_prefix_cache_hits", "Prompt tokens that the prefix cache spared."
        )
        self._looked_up_tokens = self._counter(
            "pd_prefix_cache_queries", "Prompt tokens that were looked for in the prefix cache."
        )
        self._generation_tokens = self._counter("pd_sampled_tokens", "Output tokens sampled.")
        self._num_retracted = self._counter(
            "pd_num_retracted_requests", "Decode: attempts that gave their pages back for others to go on."
        )

        self._contained_faults = self._counter(
            "pd_contained_faults", "Messages and jobs that failed here, and nothing else with them."
        )
        self._malformed_messages = self._counter(
            "pd_malformed_messages",
            "Frames that were no message of this node, or held what is out of bounds.",
        )

        self._transfer_bytes = self._counter("pd_kv_transfer_bytes", "KV bytes of finished hand-offs.")
        self._transfer_runs = self._counter(
            "pd_kv_transfer_runs", "Writes of contiguous pages; over the rooms, runs per hand-off."
        )
        self._transfer_seconds = Histogram(
            "pd_kv_transfer_seconds",
            "Time of a hand-off during which writes were outstanding.",
            _LABELS,
            buckets=_TRANSFER_BUCKETS_S,
            registry=self._registry,
        ).labels(*self._labels)
        self._transfer_speed = self._gauge(
            "pd_kv_transfer_speed_bytes_per_second", "Bytes over duration of the last hand-off."
        )
        peer_labels = (*_LABELS, "peer")
        self._peer_bytes = Counter(
            "pd_kv_peer_bytes", "Bytes in place at a decode node.", peer_labels, registry=self._registry
        )
        self._peer_busy_seconds = Counter(
            "pd_kv_peer_busy_seconds",
            "Time with writes to a decode node outstanding.",
            peer_labels,
            registry=self._registry,
        )
        self._peer_speed = Gauge(
            "pd_kv_peer_bytes_per_second",
            "Rate that writes to a decode node reached in the last seconds of such time.",
            peer_labels,
            registry=self._registry,
        )
        self._rooms = Counter("pd_rooms", "Rooms by outcome.", (*_LABELS, "outcome"), registry=self._registry)
        self._version_refusals = self._counter(
            "pd_version_refusals",
            "Attempts that came, or whose room ended, when weights had changed meanwhile.",
        )
        self._crossed_rooms = self._counter(
            "pd_crossed_rooms", "Decode: rooms that other weights than its own computed. Each has failed."
        )
        self._failed_writes = self._counter(
            "pd_failed_writes",
            "Prefill: writes and first contacts that failed. Each fails its room, not the pair.",
        )
        self._verified_pages = self._counter(
            "pd_verified_pages", "Decode: KV pages whose digests were compared."
        )
        self._corrupt_pages = self._counter(
            "pd_corrupt_pages", "Decode: KV pages that arrived other than sent."
        )
        over = (*_LABELS, "over")
        self._pulled_bytes = Counter(
            "pd_weight_pull_bytes",
            "Weights taken over from other nodes, by what they came over.",
            over,
            registry=self._registry,
        )
        self._pull_seconds = Counter(
            "pd_weight_pull_seconds", "Time of these pulls.", over, registry=self._registry
        )
        self._step_seconds = Histogram(
            "pd_step_seconds",
            "Duration of a forward step.",
            (*_LABELS, "kind"),
            buckets=_STEP_BUCKETS_S,
            registry=self._registry,
        )

    def include_process(self) -> None:
        """Prometheus' own ``process_*`` of this process too: memory, processor time, descriptors."""
        ProcessCollector(registry=self._registry)

    def observe_load(self, load: NodeLoad) -> None:
        """Take over gauges and token totals. Call it with the current load right before `render`."""
        self._num_running_reqs.set(load.num_running_reqs)
        self._num_queue_reqs.set(load.num_waiting_reqs)
        self._num_queued_tokens.set(load.num_queued_tokens)
        usage = load.num_used_pages / load.num_total_pages if load.num_total_pages else 0.0
        self._token_usage.set(usage)
        self._kv_cache_usage.set(usage)

        last, self._last_load = self._last_load, load
        self._prompt_tokens.inc(load.num_prompt_tokens_computed - last.num_prompt_tokens_computed)
        self._received_tokens.inc(load.num_prompt_tokens_received - last.num_prompt_tokens_received)
        self._cached_tokens.inc(load.num_cached_prompt_tokens - last.num_cached_prompt_tokens)
        self._generation_tokens.inc(load.num_generated_tokens - last.num_generated_tokens)
        num_prompt_tokens = _num_prompt_tokens(load)
        self._looked_up_tokens.inc(num_prompt_tokens - _num_prompt_tokens(last))
        self._cache_hit_rate.set(
            load.num_cached_prompt_tokens / num_prompt_tokens if num_prompt_tokens else 0.0
        )

        self._observe_peers(load.peers, last.peers)

    def _observe_peers(self, peers: Mapping[str, PeerTraffic], last: Mapping[str, PeerTraffic]) -> None:
        for peer in last.keys() - peers.keys():
            for metric in (self._peer_bytes, self._peer_busy_seconds, self._peer_speed):
                metric.remove(*self._labels, peer)
        for peer, traffic in peers.items():
            before = last.get(peer)
            self._peer_bytes.labels(*self._labels, peer).inc(
                traffic.num_bytes - (before.num_bytes if before else 0)
            )
            self._peer_busy_seconds.labels(*self._labels, peer).inc(
                traffic.busy_s - (before.busy_s if before else 0.0)
            )
            self._peer_speed.labels(*self._labels, peer).set(traffic.bytes_per_s)

    def observe_pages(self, pages: PageCounts) -> None:
        """Take over the pages' states."""
        self._set_pages("free", pages.free)
        self._set_pages("exposed", pages.exposed)
        self._set_pages("private", pages.private)
        self._set_pages("shared", pages.shared)
        self._set_pages("quarantined", pages.quarantined)

    def observe_sessions(self, *, num_sessions: int, num_pinned_pages: int) -> None:
        """What a decode node keeps for conversations. The pages are shared ones too."""
        self._num_sessions.set(num_sessions)
        self._set_pages("pinned", num_pinned_pages)

    def observe_quarantine(self, pages: Mapping[str, int]) -> None:
        """Take over the pages in quarantine, by incarnation of the prefill node. Peers without any go."""
        self._quarantined_pages.clear()
        for peer, num_pages in pages.items():
            self._quarantined_pages.labels(*self._labels, peer).set(num_pages)

    def observe_queues(
        self, *, num_prefill_inflight: int = 0, num_decode_prealloc: int = 0, num_decode_transfer: int = 0
    ) -> None:
        """Take over the lengths of the queues that only one of the two roles has."""
        self._num_prefill_inflight.set(num_prefill_inflight)
        self._num_decode_prealloc.set(num_decode_prealloc)
        self._num_decode_transfer.set(num_decode_transfer)

    def count_step(self, kind: StepKind, duration_s: float) -> None:
        """A forward step is done."""
        self._step_seconds.labels(*self._labels, kind).observe(duration_s)

    def count_retraction(self) -> None:
        """A running request was thrown out for want of pages."""
        self._num_retracted.inc()

    def count_transfer(self, num_bytes: int, duration_s: float) -> None:
        """A hand-off's last write is in place."""
        self._transfer_bytes.inc(num_bytes)
        self._transfer_seconds.observe(duration_s)
        if duration_s > 0:
            self._transfer_speed.set(num_bytes / duration_s)

    def count_run(self) -> None:
        """A write was submitted."""
        self._transfer_runs.inc()

    def count_room(self, outcome: RoomOutcome) -> None:
        """A room is closed."""
        self._rooms.labels(*self._labels, outcome).inc()

    def count_version_refusal(self) -> None:
        """An attempt was refused, at no cost, as it was made under other weights."""
        self._version_refusals.inc()

    def observe_crossed_rooms(self, number: int) -> None:
        """Take over how many there were since the start."""
        self._crossed_rooms.inc(number - self._last_crossed_rooms)
        self._last_crossed_rooms = number

    def observe_faults(self, *, num_contained: int, num_malformed: int) -> None:
        """Take over how many there were since the start: messages and jobs that failed alone, and frames that
        were no message."""
        self._contained_faults.inc(num_contained - self._last_faults[0])
        self._malformed_messages.inc(num_malformed - self._last_faults[1])
        self._last_faults = (num_contained, num_malformed)

    def count_failed_write(self) -> None:
        """The transfer backend gave up a write."""
        self._failed_writes.inc()

    def count_verified(self, *, num_pages: int, num_corrupt: int) -> None:
        """The digests of so many pages of a hand-off were compared."""
        self._verified_pages.inc(num_pages)
        self._corrupt_pages.inc(num_corrupt)

    def count_pull(self, over: str, num_bytes: int, duration_s: float) -> None:
        """Another node's weights are here. Called on the jobs' thread, unlike the rest: counters have
        locks."""
        self._pulled_bytes.labels(*self._labels, over).inc(num_bytes)
        self._pull_seconds.labels(*self._labels, over).inc(duration_s)

    def render(self) -> str:
        """The Prometheus text exposition of all metrics."""
        return exposition(self._registry, self._compat)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, _LABELS, registry=self._registry).labels(*self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, _LABELS, registry=self._registry).labels(*self._labels)

    def _set_pages(self, state: str, num_pages: int) -> None:
        self._num_pages.labels(*self._labels, state).set(num_pages)
