"""Numbers to text and JSON, in the shape and with the keys of `vllm bench serve`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .metrics import DEFINITIONS, Metric, Summary, SummaryOptions
from .paired import median_ratios, ratios
from .records import CountSource, MeasuredRequest, Outcome

TITLE = " Serving Benchmark Result "
LABEL_WIDTH = 40
VALUE_WIDTH = 10
SINGLE_WIDTH = LABEL_WIDTH + VALUE_WIDTH
TEXT_WIDTH = 100
MAX_ERRORS_SHOWN = 10

METRIC_NAMES: Mapping[Metric, tuple[str, str]] = {
    Metric.TTFT: ("TTFT", "Time to First Token"),
    Metric.TPOT: ("TPOT", "Time per Output Token (excl. 1st token)"),
    Metric.ITL: ("ITL", "Inter-token Latency"),
    Metric.SECOND_TOKEN: ("TTST", "Second-token Gap"),
    Metric.E2EL: ("E2EL", "End-to-end Latency"),
    Metric.CHUNK_GAP: ("CGAP", "Inter-chunk Gap"),
    Metric.TTFT_FROM_SCHEDULE: ("TTFT from schedule", "Time to First Token from Schedule"),
    Metric.E2EL_FROM_SCHEDULE: ("E2EL from schedule", "End-to-end Latency from Schedule"),
    Metric.CLIENT_QUEUE: ("client queue", "Client-side Queueing"),
    Metric.SEND_DELAY: ("send delay", "Client Send Delay"),
    Metric.REFUSAL: ("time to refusal", "Time to Refusal"),
}


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What the configuration adds to a table and a result."""

    max_concurrency: int | None
    request_rate: float | None
    """Requests a second; None when no rate was configured."""
    metrics: tuple[Metric, ...]
    """Which to print."""


@dataclass(frozen=True, slots=True)
class _Row:
    label: str
    value: float | int | str | None


@dataclass(frozen=True, slots=True)
class _Section:
    title: str
    rows: list[_Row]


def render(summary: Summary, info: RunInfo) -> str:
    """One server's table."""
    lines = [f"{TITLE:=^{SINGLE_WIDTH}}"]
    for section in _sections(summary, info):
        if section.title:
            lines.append(f"{section.title:-^{SINGLE_WIDTH}}")
        lines += [f"{row.label:<{LABEL_WIDTH}} {_format(row.value):<{VALUE_WIDTH}}" for row in section.rows]
    lines.append("=" * SINGLE_WIDTH)
    return "\n".join(lines)


def render_pair(
    labels: tuple[str, str],
    pooled: tuple[Summary, Summary],
    rounds: tuple[Sequence[Summary], Sequence[Summary]],
    info: RunInfo,
) -> str:
    """Two servers side by side: both values, their ratio, and the median of the rounds' ratios."""
    sections = _sections(pooled[0], info)
    ours, baseline = (_values(summary, info) for summary in pooled)
    pooled_ratios = ratios(ours, baseline)
    round_ratios = median_ratios(*([_values(summary, info) for summary in of_target] for of_target in rounds))
    column = max(VALUE_WIDTH, *(len(label) for label in labels)) + 1
    width = LABEL_WIDTH + 1 + 2 * column + 2 * (VALUE_WIDTH + 1)
    ratio_title = f"ratio of {labels[0]} to {labels[1]}; `by round` is the median of the rounds' ratios"
    lines = [
        f"{TITLE:=^{width}}",
        f"{'':<{LABEL_WIDTH}} {labels[0]:>{column}}{labels[1]:>{column}}{'ratio':>11}{'by round':>11}",
    ]
    for section in sections:
        if section.title:
            lines.append(f"{section.title:-^{width}}")
        for row in section.rows:
            cells = [
                f"{_format(row.value):>{column}}",
                f"{_format(baseline.get(row.label)):>{column}}",
                f"{_format_ratio(pooled_ratios.get(row.label)):>11}",
                f"{_format_ratio(round_ratios.get(row.label)):>11}",
            ]
            lines.append(f"{row.label:<{LABEL_WIDTH}} {''.join(cells)}")
    lines += ["=" * width, ratio_title]
    return "\n".join(lines)


def render_definitions(sources: Mapping[CountSource, int]) -> str:
    """What each number means, and where the token counts of chunks came from in this run."""
    origin = ", ".join(f"{source} ({num} requests)" for source, num in sorted(sources.items()))
    entries = {**DEFINITIONS, "tokens of a chunk": f"known from: {origin or 'nothing, no request was good'}"}
    indent = max(map(len, entries)) + 4
    paragraphs = [
        textwrap.fill(
            text,
            width=TEXT_WIDTH,
            initial_indent=f"  {name:<{indent - 2}}",
            subsequent_indent=" " * indent,
        )
        for name, text in entries.items()
    ]
    return "\n".join(["Definitions", *paragraphs])


def render_errors(records: Sequence[MeasuredRequest]) -> str:
    """The first errors, one a line."""
    failed = [record for record in records if not record.ok]
    lines = [
        f"  request {record.index}: {record.outcome}: {record.error}" for record in failed[:MAX_ERRORS_SHOWN]
    ]
    if len(failed) > MAX_ERRORS_SHOWN:
        lines.append(f"  and {len(failed) - MAX_ERRORS_SHOWN} more")
    return "\n".join([f"{len(failed)} requests failed:", *lines])


def result_fields(summary: Summary, options: SummaryOptions) -> dict[str, Any]:
    """The numbers of a summary under vLLM's keys, and ours beside them."""
    fields: dict[str, Any] = {
        "duration": summary.duration_s,
        "completed": summary.completed,
        "failed": summary.failed,
        "total_input_tokens": summary.total_input_tokens,
        "total_output_tokens": summary.total_output_tokens,
        "request_throughput": summary.request_throughput,
        "request_goodput": summary.request_goodput,
        "slo_attainment": summary.slo_attainment,
        "output_throughput": summary.output_throughput,
        "total_token_throughput": summary.total_token_throughput,
        "max_output_tokens_per_s": summary.max_output_tokens_per_s,
        "max_concurrent_requests": summary.max_concurrent_requests,
        "tokens_per_chunk": summary.tokens_per_chunk,
        "max_loop_lag_ms": summary.max_loop_lag_ms,
        "p99_loop_lag_ms": summary.p99_loop_lag_ms,
        "max_send_delay_ms": summary.max_send_delay_ms,
    }
    for metric in Metric:
        stat = summary.stats.get(metric)
        fields[f"mean_{metric}_ms"] = stat.mean if stat else None
        fields[f"median_{metric}_ms"] = stat.median if stat else None
        fields[f"std_{metric}_ms"] = stat.std if stat else None
        for percentile in options.percentiles:
            fields[f"p{percentile:g}_{metric}_ms"] = stat.percentiles[percentile] if stat else None
    return fields | {
        "outcomes": {str(outcome): summary.outcomes.get(outcome, 0) for outcome in Outcome},
        "token_count_sources": {str(source): num for source, num in summary.count_sources.items()},
        "timeline_ms": {
            span.name: {"mean": span.mean_ms, "p99": span.p99_ms, "num_requests": span.num_requests}
            for span in summary.spans
        },
        "valid": not summary.invalid_reasons,
        "invalid_reasons": list(summary.invalid_reasons),
    }


def detailed_fields(records: Sequence[MeasuredRequest]) -> dict[str, list[Any]]:
    """Lists with one entry a request, in seconds; times on the client's monotonic clock.

    As in vLLM's result, what a failed request lacks is 0, an empty list or an empty string.
    """
    return {
        "input_lens": [record.num_prompt_tokens for record in records],
        "output_lens": [record.num_output_tokens if record.ok else 0 for record in records],
        "ttfts": [record.ttft_s or 0.0 for record in records],
        "itls": [record.itls_s for record in records],
        "latencies": [record.e2e_s or 0.0 for record in records],
        "start_times": [record.sent_s for record in records],
        "queue_times": [record.queue_s for record in records],
        "generated_texts": [record.text for record in records],
        "errors": [record.error for record in records],
        "outcome_of_request": [str(record.outcome) for record in records],
        "statuses": [record.status for record in records],
        "finish_reasons": [record.finish_reason for record in records],
        "due_times": [record.due_s for record in records],
        "end_times": [record.ended_s for record in records],
        "chunk_times": [[chunk.at_s for chunk in record.chunks] for record in records],
        "chunk_tokens": [[chunk.num_tokens for chunk in record.chunks] for record in records],
        "spans": [[[span.name, span.duration_s] for span in record.spans] for record in records],
    }


def _sections(summary: Summary, info: RunInfo) -> list[_Section]:
    sections = [_Section("", _overview(summary, info))]
    sections += [
        _Section(METRIC_NAMES[metric][1], _stat_rows(summary, metric))
        for metric in info.metrics
        if metric in summary.stats
    ]
    scheduled = [
        row
        for metric in (Metric.TTFT_FROM_SCHEDULE, Metric.E2EL_FROM_SCHEDULE)
        if metric in summary.stats and metric not in info.metrics
        for row in _stat_rows(summary, metric)
    ]
    if scheduled:
        sections.append(_Section("From Schedule", scheduled))
    if Metric.REFUSAL in summary.stats and Metric.REFUSAL not in info.metrics:
        sections.append(_refusals(summary))
    sections.append(_Section("Client", _client_rows(summary, info)))
    if summary.spans:
        rows = [_Row(f"Mean {span.name} (ms):", span.mean_ms) for span in summary.spans]
        sections.append(_Section("Server Timeline (sum a request)", rows))
    sections.append(
        _Section("Outcomes", [_Row(f"{outcome}:", summary.outcomes.get(outcome, 0)) for outcome in Outcome])
    )
    return sections


def _overview(summary: Summary, info: RunInfo) -> list[_Row]:
    rows = [
        _Row("Successful requests:", summary.completed),
        _Row("Failed requests:", summary.failed),
    ]
    if info.max_concurrency is not None:
        rows.append(_Row("Maximum request concurrency:", info.max_concurrency))
    if info.request_rate is not None:
        rows.append(_Row("Request rate configured (RPS):", float(info.request_rate)))
    rows += [
        _Row("Benchmark duration (s):", summary.duration_s),
        _Row("Total input tokens:", summary.total_input_tokens),
        _Row("Total generated tokens:", summary.total_output_tokens),
        _Row("Request throughput (req/s):", summary.request_throughput),
    ]
    if summary.request_goodput is not None:
        attainment = None if summary.slo_attainment is None else summary.slo_attainment * 100
        rows += [
            _Row("Request goodput (req/s):", summary.request_goodput),
            _Row("Requests within goodput limits (%):", attainment),
        ]
    return [
        *rows,
        _Row("Output token throughput (tok/s):", summary.output_throughput),
        _Row("Peak output token throughput (tok/s):", summary.max_output_tokens_per_s),
        _Row("Peak concurrent requests:", float(summary.max_concurrent_requests)),
        _Row("Total token throughput (tok/s):", summary.total_token_throughput),
        _Row("Tokens per chunk:", summary.tokens_per_chunk),
    ]


def _stat_rows(summary: Summary, metric: Metric) -> list[_Row]:
    name = METRIC_NAMES[metric][0]
    stat = summary.stats[metric]
    return [
        _Row(f"Mean {name} (ms):", stat.mean),
        _Row(f"Median {name} (ms):", stat.median),
        *(_Row(f"P{percentile:g} {name} (ms):", value) for percentile, value in stat.percentiles.items()),
    ]


def _refusals(summary: Summary) -> _Section:
    title = METRIC_NAMES[Metric.REFUSAL][1]
    num_refused = summary.stats[Metric.REFUSAL].num_samples
    return _Section(title, [_Row("Refused requests:", num_refused), *_stat_rows(summary, Metric.REFUSAL)])


def _client_rows(summary: Summary, info: RunInfo) -> list[_Row]:
    rows = []
    if info.max_concurrency is not None and Metric.CLIENT_QUEUE in summary.stats:
        rows.append(_Row("Mean client queue (ms):", summary.stats[Metric.CLIENT_QUEUE].mean))
    return [
        *rows,
        _Row("Max send delay (ms):", summary.max_send_delay_ms),
        _Row("P99 event-loop lag (ms):", summary.p99_loop_lag_ms),
        _Row("Max event-loop lag (ms):", summary.max_loop_lag_ms),
        _Row("Run valid:", "no" if summary.invalid_reasons else "yes"),
    ]


def _values(summary: Summary, info: RunInfo) -> dict[str, float | int | str | None]:
    return {row.label: row.value for section in _sections(summary, info) for row in section.rows}


def _format(value: float | int | str | None) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.2f}"
        case _:
            return str(value)


def _format_ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"
