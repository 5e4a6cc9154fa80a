"""What clients of this server see, counted where they see it: at the chunk that is about to be sent.

Token counters equal the sums of the clients' ``usage`` exactly. Time to first token ends with the first chunk
that holds a token; a later chunk of k tokens that comes `gap` seconds after the one before gives the
inter-token latency gap / k, k times. Answers that are not streamed have neither.
"""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections.abc import Hashable

from prometheus_client import CollectorRegistry, Counter, Histogram

from ..text.timelines import LENGTH_BUCKETS

_LABELS = ("model_name", "role")
_ITL_BUCKETS_S = (
    *(0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0),
)
_TTFT_BUCKETS_S = (
    *(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0),
)
_E2E_BUCKETS_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class HttpMetrics:
    def __init__(self, registry: CollectorRegistry, model_name: str, role: str = "router") -> None:
        self._labels = {"model_name": model_name, "role": role}
        self._success = Counter(
            "pd_request_success",
            "Choices that were answered to the end.",
            (*_LABELS, "finished_reason"),
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "pd_prompt_tokens", "Prompt tokens of answered requests.", _LABELS, registry=registry
        ).labels(**self._labels)
        self.generation_tokens = Counter(
            "pd_generation_tokens", "Generated tokens given to clients.", _LABELS, registry=registry
        ).labels(**self._labels)
        self.ttft = Histogram(
            "pd_time_to_first_token_seconds",
            "From the request's arrival to its first chunk with a token.",
            _LABELS,
            registry=registry,
            buckets=_TTFT_BUCKETS_S,
        ).labels(**self._labels)
        self.itl = Histogram(
            "pd_inter_token_latency_seconds",
            "Gap between chunks over the later chunk's tokens, once per token.",
            _LABELS,
            registry=registry,
            buckets=_ITL_BUCKETS_S,
        ).labels(**self._labels)
        self.tpot = Histogram(
            "pd_request_time_per_output_token_seconds",
            "Of a choice: first to last chunk over its tokens behind the first chunk.",
            _LABELS,
            registry=registry,
            buckets=_ITL_BUCKETS_S,
        ).labels(**self._labels)
        self.output_tokens = Histogram(
            "pd_request_generation_tokens",
            "Generated tokens of a choice that was answered to its end.",
            _LABELS,
            registry=registry,
            buckets=LENGTH_BUCKETS,
        ).labels(**self._labels)
        self.e2e = Histogram(
            "pd_e2e_request_latency_seconds",
            "From the request's arrival to the end of its answer.",
            _LABELS,
            registry=registry,
            buckets=_E2E_BUCKETS_S,
        ).labels(**self._labels)

    def choice_finished(self, reason: str) -> None:
        self._success.labels(**self._labels, finished_reason=reason).inc()


class RequestMeter:
    """One HTTP request's share of the metrics; made at its arrival."""

    def __init__(self, metrics: HttpMetrics, *, streamed: bool) -> None:
        self._metrics = metrics
        self._streamed = streamed
        self._arrival_s = time.perf_counter()
        self._first_chunk_s: dict[Hashable, tuple[float, int]] = {}  # choice -> when it went out, its tokens
        self._last_chunk_s: dict[Hashable, float] = {}  # choice -> when its latest chunk went out
        self._num_tokens: Counts[Hashable] = Counts()  # of each choice

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._arrival_s

    def add_chunk(self, choice: Hashable, num_tokens: int, finish_reason: str | None) -> None:
        """Count what is about to be sent of one choice."""
        if num_tokens:
            self._metrics.generation_tokens.inc(num_tokens)
            self._num_tokens[choice] += num_tokens
            if self._streamed:
                self._observe_latency(choice, num_tokens)
        if finish_reason is not None:
            self._metrics.choice_finished(finish_reason)
            self._metrics.output_tokens.observe(self._num_tokens[choice])
            self._observe_pace(choice)

    def answered(self, num_prompt_tokens: int) -> None:
        """The whole answer is about to be complete."""
        self._metrics.prompt_tokens.inc(num_prompt_tokens)
        self._metrics.e2e.observe(self.elapsed_s())

    def _observe_pace(self, choice: Hashable) -> None:
        if choice not in self._first_chunk_s:
            return
        first_s, num_first = self._first_chunk_s[choice]
        if num_later := self._num_tokens[choice] - num_first:
            self._metrics.tpot.observe((self._last_chunk_s[choice] - first_s) / num_later)

    def _observe_latency(self, choice: Hashable, num_tokens: int) -> None:
        now_s = time.perf_counter()
        previous_s = self._last_chunk_s.get(choice)
        if previous_s is not None:
            for _ in range(num_tokens):
                self._metrics.itl.observe((now_s - previous_s) / num_tokens)
        elif not self._last_chunk_s:
            self._metrics.ttft.observe(now_s - self._arrival_s)
        self._first_chunk_s.setdefault(choice, (now_s, num_tokens))
        self._last_chunk_s[choice] = now_s
