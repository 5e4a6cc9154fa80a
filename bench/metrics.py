"""Records to numbers. Pure: the same records give the same summary.

`DEFINITIONS` says what each number is and is printed with the table. Latency numbers cover good requests
only (`Outcome.OK`); the outcomes of the others are shown beside them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from ..runtime.errors import StartupError
from .records import CountSource, MeasuredRequest, Outcome

MS = 1e3


class Metric(StrEnum):
    """A latency that is reported as mean, median, standard deviation and percentiles, in milliseconds."""

    TTFT = "ttft"
    TPOT = "tpot"
    ITL = "itl"
    SECOND_TOKEN = "time_to_second_token"
    E2EL = "e2el"
    CHUNK_GAP = "chunk_gap"
    TTFT_FROM_SCHEDULE = "ttft_from_schedule"
    E2EL_FROM_SCHEDULE = "e2el_from_schedule"
    CLIENT_QUEUE = "client_queue_time"
    SEND_DELAY = "send_delay"
    REFUSAL = "time_to_refusal"


DEFINITIONS: Mapping[str, str] = {
    "good request": (
        "status 200, at least one token, a finish_reason, [DONE], a clean end of the body, the right token "
        "counts; all latencies and throughputs are of good requests"
    ),
    "sent": "handed to the HTTP client; what follows includes connecting when no connection is idle",
    "TTFT": "sent -> first chunk that carries a token",
    "TPOT": "(last token - first token) / (output tokens - 1), one sample a request",
    "ITL": (
        "gap between successive chunks that carry tokens; a chunk of k tokens gives gap/k, k times; "
        "one sample a token after the first chunk"
    ),
    "TTST": "second-token gap: first token -> second token (0 if both come in one chunk)",
    "E2EL": "sent -> last token",
    "CGAP": "the gaps of ITL without dividing by k, one sample a chunk",
    "from schedule": "the same latency from the time the arrival process set, not from sending",
    "client queue": "due -> let go by --max-concurrency",
    "send delay": "let go -> sent: the client's own lateness",
    "goodput": (
        "good requests per second that meet every --goodput limit: TTFT, mean ITL of the request, TPOT, E2EL "
        "(ITL and TPOT of a one-token answer are 0)"
    ),
    "time to refusal": (
        "sent -> the end of an answer of status 429 or 503; like all times it has the client's own lateness "
        "in it, see the event-loop lag"
    ),
    "throughput": "of good requests, over the time from the first one due to the last end, rounds added up",
}

SLO_METRICS = (Metric.TTFT, Metric.ITL, Metric.TPOT, Metric.E2EL)


@dataclass(frozen=True, slots=True)
class Stat:
    """One metric's distribution, in milliseconds."""

    num_samples: int
    mean: float
    median: float
    std: float
    percentiles: Mapping[float, float]


@dataclass(frozen=True, slots=True)
class SpanStat:
    """One named span of the server's timeline; spans of one name in one request are added up first."""

    name: str
    num_requests: int
    mean_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Everything that is reported of one run. Rates are per second of `duration_s`."""

    duration_s: float
    num_requests: int
    outcomes: Mapping[Outcome, int]
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    request_goodput: float | None
    """None without `--goodput`."""
    slo_attainment: float | None
    """The share of all requests, failed ones too, that are good and meet every limit."""
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    tokens_per_chunk: float | None
    count_sources: Mapping[CountSource, int]
    stats: Mapping[Metric, Stat]
    """Only metrics that have samples."""
    spans: tuple[SpanStat, ...]
    max_loop_lag_ms: float
    p99_loop_lag_ms: float
    max_send_delay_ms: float
    invalid_reasons: tuple[str, ...]
    """Why the client, not the server, may have made these numbers; empty when the run is valid."""

    @property
    def completed(self) -> int:
        return self.outcomes.get(Outcome.OK, 0)

    @property
    def failed(self) -> int:
        return self.num_requests - self.completed


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryOptions:
    percentiles: tuple[float, ...]
    slos_ms: Mapping[Metric, float]
    open_loop: bool
    """Whether requests were due by an arrival process, so that latency from schedule means something."""
    max_client_delay_ms: float


def parse_goodput(pairs: Sequence[str]) -> dict[Metric, float]:
    """`["ttft:500", "itl:50"]` to limits in milliseconds."""
    names = ", ".join(SLO_METRICS)
    limits: dict[Metric, float] = {}
    for pair in pairs:
        name, colon, value = pair.partition(":")
        if not colon or name not in SLO_METRICS:
            raise StartupError(f"--goodput {pair}: write METRIC:MILLISECONDS, METRIC one of {names}")
        if name in limits:
            raise StartupError(f"--goodput gives {name} twice")
        try:
            limit_ms = float(value)
        except ValueError as error:
            raise StartupError(f"--goodput {pair}: {value!r} is not a number of milliseconds") from error
        if not 0 <= limit_ms < float("inf"):
            raise StartupError(f"--goodput {pair}: the limit must be zero or more milliseconds")
        limits[Metric(name)] = limit_ms
    return limits


def meets(record: MeasuredRequest, slos_ms: Mapping[Metric, float]) -> bool:
    """Whether a request is good and within every limit."""
    return record.ok and all(_slo_value_ms(record, metric) <= limit for metric, limit in slos_ms.items())


def _slo_value_ms(record: MeasuredRequest, metric: Metric) -> float:
    values_s = {
        Metric.TTFT: record.ttft_s,
        Metric.ITL: record.mean_itl_s,
        Metric.TPOT: record.tpot_s,
        Metric.E2EL: record.e2e_s,
    }
    return (values_s[metric] or 0.0) * MS


def summarize(
    records: Sequence[MeasuredRequest],
    duration_s: float,
    loop_lags_s: Sequence[float],
    options: SummaryOptions,
) -> Summary:
    good = [record for record in records if record.ok]
    num_input = sum(record.num_prompt_tokens for record in good)
    num_output = sum(record.num_output_tokens for record in good)
    num_meeting = sum(meets(record, options.slos_ms) for record in good)
    num_chunks = sum(len(record.chunks) for record in good)
    num_chunk_tokens = sum(chunk.num_tokens for record in good for chunk in record.chunks)
    send_delays_ms = [record.send_delay_s * MS for record in records]
    lags_ms = [lag_s * MS for lag_s in loop_lags_s]
    return Summary(
        duration_s=duration_s,
        num_requests=len(records),
        outcomes=Counter(record.outcome for record in records),
        total_input_tokens=num_input,
        total_output_tokens=num_output,
        request_throughput=len(good) / duration_s,
        request_goodput=num_meeting / duration_s if options.slos_ms else None,
        slo_attainment=num_meeting / len(records) if options.slos_ms and records else None,
        output_throughput=num_output / duration_s,
        total_token_throughput=(num_input + num_output) / duration_s,
        max_output_tokens_per_s=peak_tokens_per_s(good),
        max_concurrent_requests=peak_concurrency(good),
        tokens_per_chunk=num_chunk_tokens / num_chunks if num_chunks else None,
        count_sources=Counter(record.count_source for record in good),
        stats={
            metric: stat_ms(samples_s, options.percentiles)
            for metric, samples_s in samples_of(records, options.open_loop).items()
            if samples_s
        },
        spans=span_stats(good),
        max_loop_lag_ms=max(lags_ms, default=0.0),
        p99_loop_lag_ms=_p99(lags_ms),
        max_send_delay_ms=max(send_delays_ms, default=0.0),
        invalid_reasons=_invalid_reasons(send_delays_ms, lags_ms, options),
    )


def samples_of(records: Sequence[MeasuredRequest], open_loop: bool) -> dict[Metric, list[float]]:
    """Samples in seconds of every metric, in the order of the requests: of good ones, but time to refusal."""
    good = [record for record in records if record.ok]
    samples: dict[Metric, list[float]] = {
        Metric.TTFT: [value for record in good if (value := record.ttft_s) is not None],
        Metric.TPOT: [value for record in good if (value := record.tpot_s) is not None],
        Metric.ITL: [gap for record in good for gap in record.itls_s],
        Metric.SECOND_TOKEN: [value for record in good if (value := record.second_token_gap_s) is not None],
        Metric.E2EL: [value for record in good if (value := record.e2e_s) is not None],
        Metric.CHUNK_GAP: [gap for record in good for gap in record.chunk_gaps_s],
        Metric.CLIENT_QUEUE: [record.queue_s for record in good],
        Metric.SEND_DELAY: [record.send_delay_s for record in good],
        Metric.REFUSAL: [value for record in records if (value := record.refusal_s) is not None],
    }
    if open_loop:
        samples[Metric.TTFT_FROM_SCHEDULE] = [
            at_s - record.due_s for record in good if (at_s := record.first_token_s) is not None
        ]
        samples[Metric.E2EL_FROM_SCHEDULE] = [
            at_s - record.due_s for record in good if (at_s := record.last_token_s) is not None
        ]
    return samples


def stat_ms(samples_s: Sequence[float], percentiles: Sequence[float]) -> Stat:
    """Percentiles interpolate linearly between samples; `std` is that of the population, as numpy's."""
    values = np.asarray(samples_s) * MS
    return Stat(
        num_samples=len(values),
        mean=float(values.mean()),
        median=float(np.median(values)),
        std=float(values.std()),
        percentiles={p: float(np.percentile(values, p)) for p in percentiles},
    )


def peak_tokens_per_s(good: Sequence[MeasuredRequest]) -> float:
    """Most tokens in one second, seconds counted from the first request's sending."""
    if not good:
        return 0.0
    start_s = min(record.sent_s for record in good)
    per_second: Counter[int] = Counter()
    for record in good:
        for chunk in record.chunks:
            per_second[int(chunk.at_s - start_s)] += chunk.num_tokens
    return float(max(per_second.values()))


def peak_concurrency(good: Sequence[MeasuredRequest]) -> int:
    """Most requests between sending and last token at one instant; one that ends as another starts is out."""
    edges = [(record.sent_s, 1) for record in good]
    edges += [(at_s, -1) for record in good if (at_s := record.last_token_s) is not None]
    running = peak = 0
    for _, step in sorted(edges):
        running += step
        peak = max(peak, running)
    return peak


def span_stats(good: Sequence[MeasuredRequest]) -> tuple[SpanStat, ...]:
    """In the order in which the names first appear."""
    per_name: dict[str, list[float]] = {}
    for record in good:
        sums_s: defaultdict[str, float] = defaultdict(float)
        for span in record.spans:
            sums_s[span.name] += span.duration_s
        for name, duration_s in sums_s.items():
            per_name.setdefault(name, []).append(duration_s * MS)
    return tuple(
        SpanStat(name, len(values), sum(values) / len(values), _p99(values))
        for name, values in per_name.items()
    )


def _p99(values: Sequence[float]) -> float:
    return float(np.percentile(values, 99)) if values else 0.0


def _invalid_reasons(
    send_delays_ms: Sequence[float], lags_ms: Sequence[float], options: SummaryOptions
) -> tuple[str, ...]:
    """Send delay is judged in open loop only: a burst due at one instant is sent one by one."""
    limit_ms = options.max_client_delay_ms
    reasons = []
    if options.open_loop and (delay_ms := _p99(send_delays_ms)) > limit_ms:
        reasons.append(f"p99 send delay {delay_ms:.1f} ms > {limit_ms:g} ms")
    if (lag_ms := _p99(lags_ms)) > limit_ms:
        reasons.append(f"p99 event-loop lag {lag_ms:.1f} ms > {limit_ms:g} ms")
    return tuple(reasons)
