"""The router's metrics equal what the benchmark harness counts as a client, exactly."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.tests.cluster.helpers import GREEDY, Stream, greedy_ids, metric, request, stream_all, wait_until

DASHBOARD = Path(__file__).parents[2] / "docs" / "dashboards" / "grafana.json"
SELECTOR = re.compile(r"\b((?:pd|process)_\w+)(?:\{([^}]*)\})?")  # in PromQL: a metric, its matchers
NUM_PROMPTS = 20
OUTPUT_LEN = 16
COUNTERS = ("pd_prompt_tokens_total", "pd_generation_tokens_total", "pd_request_success_total")
HISTOGRAMS = (
    "pd_time_to_first_token_seconds",
    "pd_inter_token_latency_seconds",
    "pd_e2e_request_latency_seconds",
)
NAMES = (*COUNTERS, *(f"{name}_{part}" for name in HISTOGRAMS for part in ("count", "sum")))


def router_metrics(cluster: LocalCluster) -> dict[str, float]:
    text = cluster.get("/metrics")
    return {name: metric(text, name, role="router", model_name="tiny-python") for name in NAMES}


def since(cluster: LocalCluster, before: dict[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in router_metrics(cluster).items()}


def bench_serve(cluster: LocalCluster, directory: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "pdserve", "bench", "serve", "--base-url", cluster.url]
    command += [
        "--tokenizer",
        str(SHIPPED_MODEL),
        "--num-prompts",
        str(NUM_PROMPTS),
        "--max-concurrency",
        "4",
    ]
    command += [
        "--random-input-len",
        "40",
        "--random-output-len",
        str(OUTPUT_LEN),
        "--random-range-ratio",
        "0.5",
    ]
    command += ["--token-ids", "--save-detailed", "--disable-tqdm"]
    command += ["--result-dir", str(directory), "--result-filename", "result.json", *words]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=directory, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    result: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return result


@pytest.mark.parametrize("num_warmups", [0, 2])
def test_counters_equal_the_clients(cluster: LocalCluster, tmp_path: Path, num_warmups: int) -> None:
    before = router_metrics(cluster)
    result = bench_serve(cluster, tmp_path, "--num-warmups", str(num_warmups))
    moved = since(cluster, before)
    assert (result["completed"], result["failed"]) == (NUM_PROMPTS, 0)
    num_requests = NUM_PROMPTS + result["num_warmups"]
    num_output_tokens = result["total_output_tokens"] + result["warmup_output_tokens"]
    assert moved["pd_prompt_tokens_total"] == result["total_input_tokens"] + result["warmup_input_tokens"]
    assert moved["pd_generation_tokens_total"] == num_output_tokens
    assert moved["pd_request_success_total"] == num_requests

    means = {name: 1e3 * moved[f"{name}_sum"] / (moved[f"{name}_count"] or 1) for name in HISTOGRAMS}
    told = (
        f"router's means, ms: {means}; the client's: TTFT {result['mean_ttft_ms']}, "
        f"ITL {result['mean_itl_ms']}, E2E {result['mean_e2el_ms']}"
    )
    print(told)
    assert moved["pd_time_to_first_token_seconds_count"] == num_requests, told
    assert moved["pd_e2e_request_latency_seconds_count"] == num_requests, told
    if num_warmups == 0:  # of warm-ups the result has no lists
        num_in_first_chunks = sum(chunks[0] for chunks in result["chunk_tokens"])
        num_gaps = num_output_tokens - num_in_first_chunks
        assert moved["pd_inter_token_latency_seconds_count"] == num_gaps, told


def test_success_is_counted_by_reason_and_streamed_or_not(cluster: LocalCluster) -> None:
    first_ids = [greedy_ids(cluster.url, prompt, 1)[0] for prompt in ([5, 6], [7])]
    before = cluster.get("/metrics")

    def grown(name: str, **labels: str) -> float:
        return metric(cluster.get("/metrics"), name, **labels) - metric(before, name, **labels)

    stream_all(cluster.url, [{"prompt": [5, 6, 7], "max_tokens": 3, "n": 2, **GREEDY}])
    body = {"prompt": [[5, 6], [7]], "max_tokens": 4, "stop_token_ids": first_ids, "temperature": 0}
    assert request(cluster.url, "/v1/completions", body).json["usage"]["completion_tokens"] == 2
    assert grown("pd_request_success_total", finished_reason="length") == 2
    assert grown("pd_request_success_total", finished_reason="stop") == 2
    assert grown("pd_prompt_tokens_total", role="router") == 6
    assert grown("pd_generation_tokens_total", role="router") == 8
    assert grown("pd_time_to_first_token_seconds_count") == 1
    assert grown("pd_router_requests_total", outcome="finished") == 3


def test_a_client_that_leaves_is_no_success(cluster: LocalCluster) -> None:
    before = cluster.get("/metrics")
    stream = Stream(cluster.url, {"prompt": [5, 6, 7], "max_tokens": 1500, "request_id": "bye", **GREEDY})
    stream.wait_for_tokens(3)
    assert request(cluster.url, "/abort_request", {"rid": "bye"}).status == 200
    answer = stream.answer()
    assert answer.finish_reasons == {0: "abort"}
    assert answer.is_done
    wait_until(
        lambda: (
            metric(cluster.get("/metrics"), "pd_router_requests_total", outcome="aborted")
            == metric(before, "pd_router_requests_total", outcome="aborted") + 1
        ),
        5.0,
        "the aborted request to be counted",
    )


def test_the_dashboard_asks_for_what_a_scrape_has(cluster: LocalCluster) -> None:
    stream_all(cluster.url, [{"prompt": [5, 6, 7], "max_tokens": 3, **GREEDY}])
    assert request(cluster.url, "/v1/completions", {"prompt": [5], "max_tokens": -1}).status == 400
    workers = cluster.workers()
    pages = [cluster.get("/metrics"), *(cluster.get("/metrics", worker["url"]) for worker in workers)]
    labels: dict[str, set[str]] = {}
    for page in pages:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                labels.setdefault(sample.name, {"instance"}).update(sample.labels)  # a scrape adds `instance`

    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    targets = [target for panel in panels for target in panel["targets"]]
    assert len(panels) > 20
    for target in targets:
        selectors = SELECTOR.findall(target["expr"])
        assert selectors, target
        known = set[str]()
        for name, matchers in selectors:
            assert name in labels, target
            asked = set(re.findall(r"(\w+)\s*=~?", matchers))
            assert asked <= labels[name], target
            known |= labels[name]
        grouped = re.findall(r"\bby \(([^)]*)\)", target["expr"])
        shown = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
        assert {word.strip() for group in grouped for word in group.split(",")} | set(shown) <= known, target
