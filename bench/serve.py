"""`pdserve bench serve`: one run, from flags to report."""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from tokenizers import Tokenizer

from ..runtime.errors import StartupError
from . import datasets, report
from .client import BodyOptions, Client, Endpoint, PreparedRequest, prepare
from .datasets import Sample, TraceExpander, Vocabulary
from .load import LoadRun, Release, arrival_offsets_s, run_load
from .metrics import DEFINITIONS, Summary, SummaryOptions, summarize
from .options import Options, Target, add_arguments, parse_options
from .paired import blocks, median_ratios, ratios, turns
from .progress import Progress
from .records import CountSource, MeasuredRequest
from .tokenizer import as_text, load_tokenizer, vocabulary_of

__all__ = ["add_arguments", "main", "bench"]


def main(args: argparse.Namespace) -> int:
    """Runs the benchmark; 0 when at least one request of every server was good."""
    return uvloop.run(bench(parse_options(args)))


@dataclass(frozen=True, slots=True)
class Workload:
    """The same for every server: what is sent, and when."""

    samples: Sequence[Sample]
    warmups: Sequence[Sample]
    offsets_s: Sequence[float]


@dataclass(slots=True)
class Measurement:
    """What one server did, round by round."""

    target: Target
    client: Client
    model: str
    requests: Sequence[PreparedRequest]
    warmups: list[MeasuredRequest]
    rounds: list[LoadRun[MeasuredRequest]]

    @property
    def records(self) -> list[MeasuredRequest]:
        return [record for run in self.rounds for record in run.results]

    def summary(self, options: SummaryOptions) -> Summary:
        """All rounds pooled. Durations add up; a peak is the highest of any round: no second spans two."""
        pooled = summarize(
            self.records,
            sum(run.duration_s for run in self.rounds),
            [lag_s for run in self.rounds for lag_s in run.loop_lags_s],
            options,
        )
        of_rounds = self.round_summaries(options)
        return replace(
            pooled,
            max_output_tokens_per_s=max(summary.max_output_tokens_per_s for summary in of_rounds),
            max_concurrent_requests=max(summary.max_concurrent_requests for summary in of_rounds),
        )

    def round_summaries(self, options: SummaryOptions) -> list[Summary]:
        return [summarize(run.results, run.duration_s, run.loop_lags_s, options) for run in self.rounds]


async def bench(options: Options) -> int:
    """Measures, prints and saves."""
    with ExitStack() as stack:
        clients = [
            stack.enter_context(Client(target.base_url, options.endpoint, options.timeout_s, options.api_key))
            for target in options.targets
        ]
        workload = await build_workload(options, clients[0])
        measurements = [
            await prepare_target(options, target, client, workload)
            for target, client in zip(options.targets, clients, strict=True)
        ]
        gc.collect()
        gc.freeze()
        try:
            for measurement in measurements:
                await warm_up(measurement, workload, options)
            await measure(measurements, workload, options)
        finally:
            gc.unfreeze()
    print_report(measurements, options)
    if options.save_result:
        path = result_path(options, measurements[0].model, datetime.now())
        save(path, result(measurements, options, datetime.now()))
        print(f"Result written to {path}")
    return 0 if all(any(record.ok for record in m.records) for m in measurements) else 1


async def build_workload(options: Options, client: Client) -> Workload:
    """Draws samples and arrival times from the seed; asks the server at most for its vocabulary size."""
    sample_seed, warmup_seed, arrival_seed = np.random.SeedSequence(options.seed).spawn(3)
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer is not None else None
    path = options.dataset_path
    if path is None:
        vocabulary = await _vocabulary(options, tokenizer, client)
        samples, warmups = (
            datasets.random_samples(num, options.random_lengths, vocabulary, np.random.default_rng(seed))
            for num, seed in ((options.num_prompts, sample_seed), (options.num_warmups, warmup_seed))
        )
    else:
        expander = None
        if options.is_trace:
            vocabulary = await _vocabulary(options, tokenizer, client)
            expander = TraceExpander(vocabulary, options.trace_block_size, options.seed)
        samples = datasets.file_samples(path, options.num_prompts, options.default_output_len, expander)
        warmups = [samples[number % len(samples)] for number in range(options.num_warmups)]
    if len(samples) < options.num_rounds:
        raise StartupError(f"--rounds {options.num_rounds} is more than the {len(samples)} samples of {path}")
    offsets_s = (
        arrival_offsets_s(
            len(samples), options.request_rate, options.burstiness, np.random.default_rng(arrival_seed)
        )
        if options.replay_speed is None
        else datasets.replay_offsets_s(samples, options.replay_speed)
    )
    if options.endpoint is Endpoint.CHAT and tokenizer is not None:
        samples, warmups = as_text(samples, tokenizer), as_text(warmups, tokenizer)
    return Workload(samples, warmups, offsets_s)


async def _vocabulary(options: Options, tokenizer: Tokenizer | None, client: Client) -> Vocabulary:
    if options.vocab_size is not None:
        return Vocabulary(options.vocab_size)
    if tokenizer is not None:
        return vocabulary_of(tokenizer)
    size = await client.vocab_size()
    if size is None:
        raise StartupError("the server's /model_info gives no vocab_size; give --vocab-size or --tokenizer")
    return Vocabulary(size)


async def prepare_target(options: Options, target: Target, client: Client, workload: Workload) -> Measurement:
    model = options.model or await client.first_model()
    body = body_options(options, model)
    requests = [prepare(sample, body) for sample in workload.samples]
    return Measurement(target, client, model, requests, [], [])


def body_options(options: Options, model: str) -> BodyOptions:
    return BodyOptions(
        model=model,
        endpoint=options.endpoint,
        temperature=options.temperature,
        ignore_eos=options.ignore_eos,
        continuous_usage=options.continuous_usage,
        token_ids=options.token_ids,
        timeline=options.timeline,
        extra_body=options.extra_body,
    )


async def warm_up(measurement: Measurement, workload: Workload, options: Options) -> None:
    """Sends the unmeasured requests; a failure stops the run before it measures errors."""
    body = body_options(options, measurement.model)
    requests = [prepare(sample, body) for sample in workload.warmups]

    async def send(release: Release) -> MeasuredRequest:
        return await measurement.client.send(requests[release.index], release)

    run = await run_load([0.0] * len(requests), send, options.max_concurrency or 1)
    for record in run.results:
        if not record.ok:
            raise StartupError(
                f"warm-up of {measurement.target.base_url} failed: {record.outcome}: {record.error}"
            )
    measurement.warmups += run.results


async def measure(measurements: Sequence[Measurement], workload: Workload, options: Options) -> None:
    """Runs every round on every server, in turn."""
    round_blocks = blocks(len(workload.samples), options.num_rounds)
    num_requests = len(workload.samples) * len(measurements)
    with Progress(num_requests, disabled=options.disable_tqdm) as progress:
        for number, turn in turns(len(measurements), options.num_rounds):
            run = await _run_block(
                measurements[turn], round_blocks[number], workload.offsets_s, options, progress
            )
            measurements[turn].rounds.append(run)


async def _run_block(
    measurement: Measurement,
    block: range,
    offsets_s: Sequence[float],
    options: Options,
    progress: Progress,
) -> LoadRun[MeasuredRequest]:
    async def send(release: Release) -> MeasuredRequest:
        progress.sent()
        index = block[release.index]
        in_run = Release(index, release.due_s, release.released_s)
        record = await measurement.client.send(measurement.requests[index], in_run)
        progress.finished(record)
        return record

    start_s = offsets_s[block.start]
    return await run_load([offsets_s[index] - start_s for index in block], send, options.max_concurrency)


def summary_options(options: Options) -> SummaryOptions:
    return SummaryOptions(
        percentiles=options.percentiles,
        slos_ms=options.slos_ms,
        open_loop=options.open_loop,
        max_client_delay_ms=options.max_client_delay_ms,
    )


def print_report(measurements: Sequence[Measurement], options: Options) -> None:
    info = report.RunInfo(
        max_concurrency=options.max_concurrency,
        request_rate=options.request_rate if math.isfinite(options.request_rate) else None,
        metrics=options.percentile_metrics,
    )
    per_run = summary_options(options)
    summaries = [measurement.summary(per_run) for measurement in measurements]
    match measurements:
        case [ours, baseline]:
            labels = (ours.target.label, baseline.target.label)
            rounds = (ours.round_summaries(per_run), baseline.round_summaries(per_run))
            print(report.render_pair(labels, (summaries[0], summaries[1]), rounds, info))
        case _:
            print(report.render(summaries[0], info))
    sources: Counter[CountSource] = Counter()
    for summary in summaries:
        sources.update(summary.count_sources)
    print(report.render_definitions(sources))
    for measurement, summary in zip(measurements, summaries, strict=True):
        if summary.failed:
            print(f"{measurement.target.label}: {report.render_errors(measurement.records)}")
        for reason in summary.invalid_reasons:
            print(f"{measurement.target.label}: INVALID: the client was late: {reason}")


def result(measurements: Sequence[Measurement], options: Options, now: datetime) -> dict[str, Any]:
    """The JSON result: vLLM's keys for the first server, the baseline's under `baseline`."""
    ours = target_result(measurements[0], options)
    document = dict(options.metadata) | run_fields(measurements[0].model, options, now) | ours
    if len(measurements) > 1:
        per_run = summary_options(options)
        per_round = [
            [report.result_fields(summary, per_run) for summary in measurement.round_summaries(per_run)]
            for measurement in measurements
        ]
        document["baseline"] = target_result(measurements[1], options)
        document["ratios"] = ratios(ours, document["baseline"])
        document["median_round_ratios"] = median_ratios(per_round[0], per_round[1])
    return document


def run_fields(model: str, options: Options, now: datetime) -> dict[str, Any]:
    finite_rate = math.isfinite(options.request_rate)
    return {
        "date": now.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": options.endpoint.endpoint_type,
        "backend": options.endpoint.endpoint_type,
        "tokenizer_id": str(options.tokenizer) if options.tokenizer is not None else model,
        "num_prompts": options.num_prompts,
        "request_rate": options.request_rate if finite_rate else "inf",
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        "seed": options.seed,
        "num_rounds": options.num_rounds,
        "goodput_limits_ms": {str(metric): limit for metric, limit in options.slos_ms.items()},
        "metadata": dict(options.metadata),
        "definitions": dict(DEFINITIONS),
    }


def target_result(measurement: Measurement, options: Options) -> dict[str, Any]:
    per_run = summary_options(options)
    fields: dict[str, Any] = {
        "label": measurement.target.label,
        "base_url": measurement.target.base_url,
        "model_id": measurement.model,
        "num_warmups": len(measurement.warmups),
        "warmup_input_tokens": sum(record.num_prompt_tokens for record in measurement.warmups),
        "warmup_output_tokens": sum(record.num_output_tokens for record in measurement.warmups),
    }
    fields |= report.result_fields(measurement.summary(per_run), per_run)
    return fields | (report.detailed_fields(measurement.records) if options.save_detailed else {})


def result_path(options: Options, model: str, now: datetime) -> Path:
    """vLLM's file name: `LABEL-RATEqps[-concurrencyN]-MODEL-DATE.json`."""
    if options.result_filename is not None:
        return options.result_dir / options.result_filename
    label = options.targets[0].label.split("://")[-1].replace("/", "_")
    concurrency = "" if options.max_concurrency is None else f"-concurrency{options.max_concurrency}"
    stem = f"{label}-{options.request_rate}qps{concurrency}-{model.split('/')[-1]}"
    return options.result_dir / f"{stem}-{now:%Y%m%d-%H%M%S}.json"


def save(path: Path, document: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, allow_nan=False) + "\n")
    except OSError as error:
        raise StartupError(f"the result cannot be written to {path}: {error.strerror}") from error
