"""The flags of `pdserve bench serve`, checked once into a frozen `Options`.

Names and defaults follow `vllm bench serve` where both have the flag.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import StartupError
from . import datasets
from .client import Endpoint
from .datasets import RandomLengths
from .metrics import Metric, parse_goodput

PRINTED_METRICS = (Metric.TTFT, Metric.TPOT, Metric.ITL, Metric.SECOND_TOKEN, Metric.E2EL)


@dataclass(frozen=True, slots=True)
class Target:
    """A server under test."""

    label: str
    base_url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    targets: tuple[Target, ...]
    """One, or two when there is a baseline (the second)."""
    num_rounds: int
    model: str | None
    api_key: str | None
    endpoint: Endpoint
    timeout_s: float
    temperature: float | None
    ignore_eos: bool
    continuous_usage: bool
    token_ids: bool
    timeline: bool
    extra_body: Mapping[str, Any]

    dataset_path: Path | None
    """None draws random samples."""
    is_trace: bool
    """Whether the file is a trace of lengths and block hashes rather than prompts."""
    random_lengths: RandomLengths
    default_output_len: int | None
    trace_block_size: int
    tokenizer: Path | None
    vocab_size: int | None
    num_prompts: int
    num_warmups: int
    seed: int

    request_rate: float
    """Requests a second; infinite for all at once."""
    burstiness: float
    max_concurrency: int | None
    replay_speed: float | None
    """Follow the trace's own timestamps, this many times as fast."""

    percentile_metrics: tuple[Metric, ...]
    percentiles: tuple[float, ...]
    slos_ms: Mapping[Metric, float]
    max_client_delay_ms: float
    disable_tqdm: bool
    save_result: bool
    save_detailed: bool
    result_dir: Path
    result_filename: str | None
    metadata: Mapping[str, str]

    @property
    def open_loop(self) -> bool:
        return self.replay_speed is not None or math.isfinite(self.request_rate)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `pdserve bench serve`."""
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", default="http://127.0.0.1:8000", help="the server to measure")
    server.add_argument("--label", help="its name in the report (default: its URL, or A with a baseline)")
    server.add_argument(
        "--baseline-url",
        help="a second server, measured in turn with the first; for `pdserve up --colocated` give both "
        "the same dtype, chunk, page size and prefill threads, and no prefix cache",
    )
    server.add_argument("--baseline-label", help="its name in the report (default: baseline)")
    server.add_argument(
        "--rounds", type=int, default=4, help="with a baseline: rounds the prompts are cut into"
    )
    server.add_argument("--model", help="model name to ask for (default: the first of /v1/models)")
    server.add_argument("--api-key", help="sent as a bearer token")
    server.add_argument(
        "--endpoint", choices=[str(endpoint) for endpoint in Endpoint], default=str(Endpoint.COMPLETIONS)
    )
    server.add_argument("--timeout", type=float, default=600.0, help="seconds until a request is given up")

    body = parser.add_argument_group("request body")
    body.add_argument("--temperature", type=float, default=0.0, help="a negative value sends none")
    body.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="ask for exactly the output length (default: yes, but no for prompts in a file)",
    )
    body.add_argument(
        "--continuous-usage",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for token counts on each chunk (stream_options.continuous_usage_stats)",
    )
    body.add_argument(
        "--token-ids", action="store_true", help="ask for the ids of each chunk's tokens (return_token_ids)"
    )
    body.add_argument(
        "--timeline", action="store_true", help="ask a pdserve server for each request's timeline"
    )
    body.add_argument("--extra-body", default="{}", metavar="JSON", help="more fields of the request body")

    data = parser.add_argument_group("dataset")
    data.add_argument("--dataset-name", choices=["random", "file"], help="default: file with --dataset-path")
    data.add_argument("--dataset-path", type=Path, help="JSONL of prompts, or a Mooncake trace")
    data.add_argument("--num-prompts", type=int, default=1000)
    data.add_argument(
        "--warmup", "--num-warmups", dest="num_warmups", type=int, default=1, help="unmeasured requests first"
    )
    data.add_argument("--seed", type=int, default=0)
    data.add_argument("--random-input-len", type=int, default=1024, help="tokens")
    data.add_argument("--random-output-len", type=int, default=128, help="tokens")
    data.add_argument(
        "--random-range-ratio", type=float, default=0.0, help="lengths vary by ± this share; 0 to below 1"
    )
    data.add_argument("--random-prefix-len", type=int, default=0, help="tokens that all prompts start with")
    data.add_argument("--output-len", type=int, help="for lines of a file that name no output length")
    data.add_argument("--trace-block-size", type=int, default=512, help="tokens of one trace hash id")
    data.add_argument(
        "--tokenizer", type=Path, help="model directory with tokenizer.json: vocabulary, and text for chat"
    )
    data.add_argument("--vocab-size", type=int, help="draw random token ids below this")

    load = parser.add_argument_group("load")
    load.add_argument("--request-rate", type=float, default=math.inf, help="requests a second, or inf")
    load.add_argument(
        "--burstiness", type=float, default=1.0, help="1 is Poisson, below 1 burstier, above 1 more even"
    )
    load.add_argument(
        "--max-concurrency", type=int, help="requests running at once (closed loop at rate inf)"
    )
    load.add_argument("--replay-timestamps", action="store_true", help="send when the trace says")
    load.add_argument("--replay-speed", type=float, default=1.0, help="times as fast as the trace")

    report = parser.add_argument_group("report")
    report.add_argument(
        "--goodput", nargs="+", default=[], metavar="METRIC:MS", help="limits of ttft, itl, tpot, e2el"
    )
    report.add_argument(
        "--percentile-metrics",
        default=",".join(PRINTED_METRICS),
        help="metrics to print, comma separated (JSON has all)",
    )
    report.add_argument("--metric-percentiles", default="90,99", help="comma separated")
    report.add_argument(
        "--max-client-delay-ms",
        type=float,
        default=10.0,
        help="the run is marked invalid when the client's own p99 delay is above",
    )
    report.add_argument("--disable-tqdm", action="store_true", help="no live progress line")
    report.add_argument("--save-result", action="store_true", help="write the JSON result")
    report.add_argument("--save-detailed", action="store_true", help="with the lists of every request")
    report.add_argument("--result-dir", type=Path, default=Path())
    report.add_argument("--result-filename", help="implies --save-result")
    report.add_argument("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="kept in the result")


def parse_options(args: argparse.Namespace) -> Options:
    """Options from parsed flags; StartupError names the flag that is wrong."""
    for flag in ("num_prompts", "rounds", "random_input_len", "random_output_len", "trace_block_size"):
        _require(getattr(args, flag) >= 1, flag, "must be at least 1")
    for flag in ("max_concurrency", "vocab_size", "output_len"):
        value = getattr(args, flag)
        _require(value is None or value >= 1, flag, "must be at least 1")
    for flag in ("request_rate", "burstiness", "timeout", "replay_speed", "max_client_delay_ms"):
        _require(getattr(args, flag) > 0, flag, "must be above 0")
    for flag in ("num_warmups", "seed", "random_prefix_len"):
        _require(getattr(args, flag) >= 0, flag, "must not be negative")
    _require(0 <= args.random_range_ratio < 1, "random_range_ratio", "must be in [0, 1)")
    _require(math.isfinite(args.burstiness), "burstiness", "must be finite")
    from_file = args.dataset_path is not None
    if args.dataset_name == "file":
        _require(from_file, "dataset_name", "file needs --dataset-path")
    if args.dataset_name == "random":
        _require(not from_file, "dataset_path", "is for --dataset-name file")
    if args.replay_timestamps:
        _require(from_file, "replay_timestamps", "needs --dataset-path")
        _require(math.isinf(args.request_rate), "replay_timestamps", "and --request-rate exclude each other")
    is_trace = from_file and datasets.is_trace(args.dataset_path)
    targets = _targets(args)
    num_rounds = args.rounds if len(targets) > 1 else 1
    _require(num_rounds <= args.num_prompts, "rounds", "must not be more than --num-prompts")
    return Options(
        targets=targets,
        num_rounds=num_rounds,
        model=args.model,
        api_key=args.api_key,
        endpoint=Endpoint(args.endpoint),
        timeout_s=args.timeout,
        temperature=args.temperature if args.temperature >= 0 else None,
        ignore_eos=is_trace or not from_file if args.ignore_eos is None else args.ignore_eos,
        continuous_usage=args.continuous_usage,
        token_ids=args.token_ids,
        timeline=args.timeline,
        extra_body=_parse_extra_body(args.extra_body),
        dataset_path=args.dataset_path,
        is_trace=is_trace,
        random_lengths=RandomLengths(
            input=args.random_input_len,
            output=args.random_output_len,
            prefix=args.random_prefix_len,
            range_ratio=args.random_range_ratio,
        ),
        default_output_len=args.output_len,
        trace_block_size=args.trace_block_size,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        num_prompts=args.num_prompts,
        num_warmups=args.num_warmups,
        seed=args.seed,
        request_rate=args.request_rate,
        burstiness=args.burstiness,
        max_concurrency=args.max_concurrency,
        replay_speed=args.replay_speed if args.replay_timestamps else None,
        percentile_metrics=_parse_metrics(args.percentile_metrics),
        percentiles=_parse_percentiles(args.metric_percentiles),
        slos_ms=parse_goodput(args.goodput),
        max_client_delay_ms=args.max_client_delay_ms,
        disable_tqdm=args.disable_tqdm,
        save_result=args.save_result or args.save_detailed or args.result_filename is not None,
        save_detailed=args.save_detailed,
        result_dir=args.result_dir,
        result_filename=args.result_filename,
        metadata=_parse_metadata(args.metadata),
    )


def _require(condition: bool, flag: str, message: str) -> None:
    if not condition:
        raise StartupError(f"--{flag.replace('_', '-')} {message}")


def _targets(args: argparse.Namespace) -> tuple[Target, ...]:
    base_url = _server_root(args.base_url, "base_url")
    if args.baseline_url is None:
        _require(args.baseline_label is None, "baseline_label", "needs --baseline-url")
        return (Target(args.label or base_url, base_url),)
    baseline = Target(args.baseline_label or "baseline", _server_root(args.baseline_url, "baseline_url"))
    target = Target(args.label or "A", base_url)
    _require(target.label != baseline.label, "label", "and --baseline-label must differ")
    return target, baseline


def _server_root(url: str, flag: str) -> str:
    """The URL that endpoints are appended to: `http://host:8000` for `http://host:8000/v1/` too."""
    _require(url.startswith(("http://", "https://")), flag, f"{url} must start with http:// or https://")
    return url.rstrip("/").removesuffix("/v1")


def _parse_extra_body(text: str) -> dict[str, Any]:
    try:
        extra_body = json.loads(text)
    except json.JSONDecodeError as error:
        raise StartupError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(extra_body, dict):
        raise StartupError("--extra-body must be a JSON object")
    return extra_body


def _parse_metadata(pairs: list[str]) -> dict[str, str]:
    metadata = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise StartupError(f"--metadata {pair}: write KEY=VALUE")
        metadata[key.strip()] = value.strip()
    return metadata


def _parse_metrics(text: str) -> tuple[Metric, ...]:
    metrics = []
    for name in text.split(","):
        try:
            metrics.append(Metric(name.strip()))
        except ValueError as error:
            raise StartupError(f"--percentile-metrics {name}: not one of {', '.join(Metric)}") from error
    return tuple(metrics)


def _parse_percentiles(text: str) -> tuple[float, ...]:
    percentiles = []
    for word in text.split(","):
        try:
            percentile = float(word)
        except ValueError as error:
            raise StartupError(f"--metric-percentiles {word}: not a number") from error
        if not 0 <= percentile <= 100:
            raise StartupError(f"--metric-percentiles {word}: must be in [0, 100]")
        percentiles.append(percentile)
    return tuple(percentiles)
