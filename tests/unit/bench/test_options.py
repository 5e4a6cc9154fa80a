from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from pdserve.bench.client import Endpoint
from pdserve.bench.metrics import Metric
from pdserve.bench.options import Options, Target, add_arguments, parse_options
from pdserve.runtime.errors import StartupError


def parse(*words: str) -> Options:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parse_options(parser.parse_args(list(words)))


def test_defaults() -> None:
    options = parse()
    assert options.targets == (Target("http://127.0.0.1:8000", "http://127.0.0.1:8000"),)
    assert (options.num_prompts, options.num_warmups, options.num_rounds) == (1000, 1, 1)
    assert (options.random_lengths.input, options.random_lengths.output) == (1024, 128)
    assert options.endpoint is Endpoint.COMPLETIONS
    assert options.ignore_eos
    assert not options.open_loop
    assert options.percentiles == (90.0, 99.0)
    assert not options.save_result


def test_urls_may_end_in_v1() -> None:
    options = parse("--base-url", "http://a:1/v1/", "--baseline-url", "https://b/x/", "--rounds", "2")
    assert options.targets == (Target("A", "http://a:1"), Target("baseline", "https://b/x"))
    assert options.num_rounds == 2


def test_values() -> None:
    options = parse(
        *("--request-rate", "4", "--goodput", "ttft:500", "itl:50", "--extra-body", '{"top_k": 1}'),
        *("--metadata", "tp=2", "note = x=y", "--metric-percentiles", "50,99.9"),
        *("--percentile-metrics", "ttft,itl", "--temperature", "-1", "--result-filename", "r.json"),
    )
    assert options.open_loop
    assert options.slos_ms == {Metric.TTFT: 500.0, Metric.ITL: 50.0}
    assert options.extra_body == {"top_k": 1}
    assert options.metadata == {"tp": "2", "note": "x=y"}
    assert options.percentiles == (50.0, 99.9)
    assert options.percentile_metrics == (Metric.TTFT, Metric.ITL)
    assert options.temperature is None
    assert options.save_result


def test_ignore_eos_follows_the_dataset(tmp_path: Path) -> None:
    prompts, trace = tmp_path / "prompts", tmp_path / "trace"
    prompts.write_text('{"prompt": "x"}\n')
    trace.write_text('{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}\n')
    assert not parse("--dataset-path", str(prompts)).ignore_eos
    assert parse("--dataset-path", str(prompts), "--ignore-eos").ignore_eos
    assert parse("--dataset-path", str(trace)).ignore_eos
    assert not parse("--no-ignore-eos").ignore_eos
    replay = parse("--dataset-path", str(trace), "--replay-timestamps", "--replay-speed", "2")
    assert (replay.open_loop, replay.replay_speed) == (True, 2.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num-prompts", "0"), "--num-prompts must be at least 1"),
        (("--max-concurrency", "0"), "--max-concurrency must be at least 1"),
        (("--request-rate", "0"), "--request-rate must be above 0"),
        (("--request-rate", "nan"), "--request-rate must be above 0"),
        (("--burstiness", "inf"), "--burstiness must be finite"),
        (("--warmup", "-1"), "--num-warmups must not be negative"),
        (("--random-range-ratio", "1"), r"--random-range-ratio must be in \[0, 1\)"),
        (("--dataset-name", "file"), "file needs --dataset-path"),
        (("--dataset-name", "random", "--dataset-path", "x"), "--dataset-path is for"),
        (("--replay-timestamps",), "--replay-timestamps needs --dataset-path"),
        (("--base-url", "host:8000"), "must start with http://"),
        (("--baseline-label", "x"), "--baseline-label needs --baseline-url"),
        (("--baseline-url", "http://b", "--label", "baseline"), "must differ"),
        (("--baseline-url", "http://b", "--num-prompts", "3"), "--rounds must not be more"),
        (("--extra-body", "{"), "--extra-body is not JSON"),
        (("--extra-body", "[]"), "must be a JSON object"),
        (("--metadata", "novalue"), "--metadata novalue: write KEY=VALUE"),
        (("--percentile-metrics", "ttfx"), "--percentile-metrics ttfx"),
        (("--metric-percentiles", "p99"), "--metric-percentiles p99: not a number"),
        (("--metric-percentiles", "101"), "must be in"),
        (("--goodput", "ttft=5"), "--goodput"),
    ],
)
def test_unusable_flags(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        parse(*words)
