"""Whole runs against fake servers: what is sent, in which order, what is printed and what is saved."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from pdserve.bench import cli, serve
from pdserve.bench.client import Client, Endpoint
from pdserve.bench.load import LoadRun
from pdserve.bench.metrics import SummaryOptions
from pdserve.bench.options import Target, add_arguments, parse_options
from pdserve.bench.records import MeasuredRequest
from pdserve.runtime.errors import StartupError

if TYPE_CHECKING:
    from .conftest import FakeServer

VLLM_KEYS = {
    *("date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts"),
    *("request_rate", "burstiness", "max_concurrency", "duration", "completed", "failed"),
    *("total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput"),
    *("output_throughput", "total_token_throughput", "max_output_tokens_per_s", "max_concurrent_requests"),
    *(
        f"{stat}_{metric}_ms"
        for stat in ("mean", "median", "std", "p90", "p99")
        for metric in ("ttft", "tpot", "itl", "e2el")
    ),
}
VLLM_DETAILED_KEYS = {
    *("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times"),
    *("generated_texts", "errors"),
}


async def run(url: str, *words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    small = ("--num-prompts", "6", "--random-input-len", "4", "--random-output-len", "5", "--disable-tqdm")
    lenient = ("--max-client-delay-ms", "10000")
    args = parser.parse_args(["--base-url", url, *small, *lenient, *words])
    return await serve.bench(parse_options(args))


async def run_and_load(path: Path, url: str, *words: str) -> dict[str, Any]:
    words = (*words, "--result-dir", str(path), "--result-filename", "r.json")
    assert await run(url, *words) == 0
    document = json.loads((path / "r.json").read_text())
    assert isinstance(document, dict)
    return document


async def test_json_has_vllms_keys(fake_server: FakeServer, tmp_path: Path) -> None:
    result = await run_and_load(tmp_path, fake_server.url, "--metadata", "tp=2", "--seed", "5")
    assert set(result) >= VLLM_KEYS
    assert not set(result) & VLLM_DETAILED_KEYS
    assert (result["completed"], result["failed"], result["num_warmups"]) == (6, 0, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (24, 30)
    assert (result["warmup_input_tokens"], result["warmup_output_tokens"]) == (4, 5)
    assert (result["request_rate"], result["model_id"], result["tp"]) == ("inf", "fake/model", "2")
    assert (result["endpoint_type"], result["request_goodput"]) == ("openai", None)
    assert result["token_count_sources"] == {"continuous_usage": 6}
    assert result["valid"] is True
    assert "ITL" in result["definitions"]
    assert result["mean_time_to_second_token_ms"] >= 0.0


async def test_detailed_lists_have_one_entry_a_request(fake_server: FakeServer, tmp_path: Path) -> None:
    fake_server.tokens_per_chunk = 2
    result = await run_and_load(tmp_path, fake_server.url, "--save-detailed", "--token-ids")
    assert set(result) >= VLLM_KEYS | VLLM_DETAILED_KEYS
    for key in VLLM_DETAILED_KEYS | {
        "outcome_of_request",
        "chunk_times",
        "chunk_tokens",
        "due_times",
        "spans",
    }:
        assert len(result[key]) == 6, key
    assert result["chunk_tokens"] == [[2, 2, 1]] * 6
    assert [len(itls) for itls in result["itls"]] == [3] * 6
    assert result["generated_texts"] == ["t0 t1 t2 t3 t4 "] * 6
    assert result["errors"] == [""] * 6


async def test_printed_table(fake_server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--request-rate", "500", "--goodput", "ttft:10000", "itl:10000", "--timeline")
    assert await run(fake_server.url, *words) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert "Successful requests:                     6         " in lines
    assert "Total generated tokens:                  30        " in lines
    assert "---------------Time to First Token----------------" in lines
    assert "---------------Inter-token Latency----------------" in lines
    for label in (
        *("Mean TTFT (ms):", "Median TPOT (ms):", "P90 ITL (ms):", "P99 E2EL (ms):", "Mean TTST (ms):"),
        *("Request goodput (req/s):", "P99 TTFT from schedule (ms):", "Max send delay (ms):"),
        *("Max event-loop lag (ms):", "count_mismatch:", "Definitions", "continuous_usage (6 requests)"),
    ):
        assert label in printed, label
    assert "Requests within goodput limits (%):      100.00    " in lines
    assert "Mean prefill (ms):                       20.00     " in lines
    assert "Mean wire (ms):                          3.00      " in lines
    assert all(body["timeline"] is True for body in fake_server.bodies)


async def test_same_seed_same_prompts_and_warmups_apart(fake_server: FakeServer) -> None:
    assert await run(fake_server.url, "--max-concurrency", "1", "--warmup", "2") == 0
    assert await run(fake_server.url, "--max-concurrency", "1", "--warmup", "2") == 0
    prompts = [tuple(body["prompt"]) for body in fake_server.bodies]
    assert prompts[:8] == prompts[8:]
    assert len(set(prompts[:8])) == 8
    assert fake_server.peak_running == 1


async def test_two_servers_take_turns_with_the_same_prompts(
    fake_server: FakeServer,
    second_server: FakeServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    journal: list[str] = []
    fake_server.journal = second_server.journal = journal
    fake_server.name, second_server.name = "A", "B"
    second_server.model = "other"
    words = ("--baseline-url", second_server.url, "--rounds", "3", "--label", "pd", "--save-detailed")
    result = await run_and_load(tmp_path, fake_server.url, *words, "--max-concurrency", "1", "--seed", "2")
    assert journal == ["A", "B", *("AABBBBAAAABB")]
    prompts_a = [body["prompt"] for body in fake_server.bodies]
    assert prompts_a == [body["prompt"] for body in second_server.bodies]
    assert {body["model"] for body in second_server.bodies} == {"other"}
    baseline = result["baseline"]
    assert (result["label"], baseline["label"], baseline["model_id"]) == ("pd", "baseline", "other")
    assert (result["completed"], baseline["completed"]) == (6, 6)
    assert len(baseline["ttfts"]) == 6
    assert result["ratios"]["completed"] == result["median_round_ratios"]["completed"] == 1.0
    assert result["ratios"]["mean_ttft_ms"] == pytest.approx(
        result["mean_ttft_ms"] / baseline["mean_ttft_ms"]
    )
    assert result["median_round_ratios"]["median_itl_ms"] > 0
    printed = capsys.readouterr().out
    header = printed.splitlines()[1].split()
    assert header == ["pd", "baseline", "ratio", "by", "round"]
    rows = [line.split() for line in printed.splitlines()]
    assert ["Successful", "requests:", "6", "6", "1.000", "1.000"] in rows
    assert ["Run", "valid:", "yes", "yes", "-", "-"] in rows


async def test_the_time_to_a_refusal_is_told(
    fake_server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_server.inject("status_503")
    words = ("--warmup", "0", "--result-filename", str(tmp_path / "r.json"))
    assert await run(fake_server.url, *words) == 1
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["median_time_to_refusal_ms"] > 0
    assert result["median_e2el_ms"] is None
    assert "Refused requests:                        6         " in capsys.readouterr().out.splitlines()


async def test_rounds_are_pooled_but_their_peaks_are_not(make_record: Callable[..., MeasuredRequest]) -> None:
    rounds = [
        LoadRun([make_record([(0.1, 1), (0.2, 1)], due_s=start_s, index=number)], 0.5, [0.001])
        for number, start_s in enumerate((10.0, 10.4, 10.7))
    ]
    target = Target("A", "http://a")
    with Client(target.base_url, Endpoint.COMPLETIONS, 1.0) as client:
        measurement = serve.Measurement(target, client, "m", [], [], rounds)
        options = SummaryOptions(percentiles=(), slos_ms={}, open_loop=False, max_client_delay_ms=10.0)
        summary = measurement.summary(options)
    assert [record.index for record in measurement.records] == [0, 1, 2]
    assert (summary.completed, summary.duration_s, summary.request_throughput) == (3, 1.5, 2.0)
    assert (summary.max_output_tokens_per_s, summary.max_concurrent_requests) == (2.0, 1)


async def test_failures_are_named_and_do_not_enter_latencies(
    fake_server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_server.fault = type(fake_server.fault).EARLY_END
    words = ("--warmup", "0", "--result-filename", str(tmp_path / "r.json"), "--save-detailed")
    assert await run(fake_server.url, *words) == 1
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["completed"], result["failed"], result["mean_ttft_ms"]) == (0, 6, None)
    assert result["outcomes"]["truncated"] == 6
    assert result["output_lens"] == [0] * 6
    captured = capsys.readouterr()
    assert "truncated: the stream ended without [DONE]" in captured.out
    assert "truncated:                               6" in captured.out


async def test_a_failing_warm_up_stops_the_run(fake_server: FakeServer) -> None:
    fake_server.inject("status_503")
    with pytest.raises(StartupError, match=r"warm-up of .* failed: http_5xx: HTTP 503: no decode node"):
        await run(fake_server.url)


async def test_random_prompts_need_a_vocabulary(fake_server: FakeServer) -> None:
    fake_server.vocab_size = None
    with pytest.raises(StartupError, match="--vocab-size"):
        await run(fake_server.url)
    assert await run(fake_server.url, "--vocab-size", "3", "--random-input-len", "50") == 0
    assert {token_id for body in fake_server.bodies for token_id in body["prompt"]} == {0, 1, 2}


async def test_random_prompts_over_chat_are_text(fake_server: FakeServer, tmp_path: Path) -> None:
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    words = ("--endpoint", "/v1/chat/completions", "--tokenizer", str(tmp_path))
    result = await run_and_load(tmp_path, fake_server.url, *words)
    assert (result["endpoint_type"], result["completed"]) == ("openai-chat", 6)
    assert result["total_input_tokens"] == 24
    text = fake_server.bodies[0]["messages"][0]["content"]
    assert set(text.split()) <= {"a", "b"}


async def test_a_trace_is_replayed(fake_server: FakeServer, tmp_path: Path) -> None:
    lines = [
        {"timestamp": 10 * number, "input_length": 6, "output_length": 2, "hash_ids": [1, number]}
        for number in range(3)
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--dataset-path", str(file), "--trace-block-size", "4", "--replay-timestamps", "--save-detailed")
    result = await run_and_load(tmp_path, fake_server.url, *words)
    assert result["input_lens"] == [6, 6, 6]
    due = [at - result["due_times"][0] for at in result["due_times"]]
    assert due == pytest.approx([0.0, 0.01, 0.02], abs=1e-6)
    assert len({tuple(body["prompt"][:4]) for body in fake_server.bodies}) == 1


async def test_more_rounds_than_samples(fake_server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text('{"prompt": [1], "output_len": 2}\n')
    words = ("--dataset-path", str(file), "--baseline-url", fake_server.url)
    with pytest.raises(StartupError, match="--rounds 4 is more than the 1 samples"):
        await run(fake_server.url, *words)


async def test_default_file_name(fake_server: FakeServer, tmp_path: Path) -> None:
    words = (
        "--save-result",
        "--result-dir",
        str(tmp_path / "new"),
        "--label",
        "mine",
        "--max-concurrency",
        "2",
    )
    assert await run(fake_server.url, *words) == 0
    (file,) = (tmp_path / "new").iterdir()
    assert file.name.startswith("mine-infqps-concurrency2-model-")


async def test_command_line(fake_server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(
        ["bench", "serve", "--base-url", fake_server.url, "--num-prompts", "2", "--random-input-len", "3"]
    )
    assert await asyncio.to_thread(cli.run, args) == 0
    captured = capsys.readouterr()
    assert "Successful requests:                     2" in captured.out
    assert "2/2" in captured.err
