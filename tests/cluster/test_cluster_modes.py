"""Other backends and shapes of a cluster answer the same; what operators look at; keys; ports; imports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.bench.local_cluster import LocalCluster
from pdserve.tests.cluster.helpers import (
    COMPLETIONS,
    GREEDY,
    Body,
    Stream,
    clean_cluster,
    greedy_ids,
    random_ids,
    request,
    slowed,
    stream_all,
    wait_until,
)

FLAGS = ["--deterministic", "--poison-reserved-pages", "--chunked-prefill-size", "64"]
KEYS = ("first-key", "second-key")
PROMPTS = [random_ids(80 + length, length) for length in (1, 16, 40, 200)]


@pytest.fixture(scope="module")
def expected(shared_cluster: LocalCluster) -> list[list[int]]:
    """What the cluster over Mooncake answers."""
    return [greedy_ids(shared_cluster.url, prompt, 24) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def guarded_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guarded") / "log"


@pytest.fixture(scope="module")
def guarded(guarded_log: Path) -> Iterator[LocalCluster]:
    """Over shared memory, with API keys."""
    keys = [word for key in KEYS for word in ("--api-key", key)]
    flags = [*FLAGS, "--transfer-backend", "shm", *keys]
    with clean_cluster(flags, guarded_log) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def colocated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with clean_cluster([*FLAGS, "--colocated"], tmp_path_factory.mktemp("colocated") / "log") as cluster:
        yield cluster


# ---- the same answers -------------------------------------------------------------------------------


def test_shared_memory_answers_the_same(guarded: LocalCluster, expected: list[list[int]]) -> None:
    headers = {"Authorization": f"Bearer {KEYS[1]}"}
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        body = {"prompt": prompt, "max_tokens": 24, "return_token_ids": True, **GREEDY}
        reply = request(guarded.url, COMPLETIONS, body, headers=headers)
        assert reply.status == 200, reply.text
        assert reply.json["choices"][0]["token_ids"] == ids
    info = request(guarded.url, "/server_info", headers=headers).json
    assert info["prefill"][0]["config"]["transfer_backend"] == "shm"


def test_colocated_answers_the_same(
    shared_cluster: LocalCluster, colocated: LocalCluster, expected: list[list[int]]
) -> None:
    """Ids and logprobs, bit for bit."""
    assert [worker["role"] for worker in colocated.workers()] == ["decode"]
    assert [greedy_ids(colocated.url, prompt, 24) for prompt in PROMPTS] == expected
    body: Body = {"max_tokens": 24, **GREEDY}
    bodies: list[Body] = [{"prompt": prompt, "n": 2, "logprobs": 1, **body} for prompt in PROMPTS]
    answers = stream_all(colocated.url, bodies)
    assert [answer.token_ids for answer in answers] == [{0: ids, 1: ids} for ids in expected]
    over_two_nodes = stream_all(shared_cluster.url, bodies)
    assert [answer.logprobs for answer in answers] == [answer.logprobs for answer in over_two_nodes]
    colocated.wait_idle(timeout_s=10.0)
    colocated.flush()


def test_usage_is_truthful_on_a_colocated_node(colocated: LocalCluster) -> None:
    body: Body = {"prompt": random_ids(6, 90), "max_tokens": 4, **GREEDY}

    def num_cached() -> int:
        usage = colocated.post(COMPLETIONS, body)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [num_cached() for _ in range(2)] == [0, 80]
    colocated.flush()
    assert num_cached() == 0


# ---- keys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/models", "/workers", "/flush_cache", "/server_info"])
def test_without_a_key_nothing_is_told(guarded: LocalCluster, path: str) -> None:
    body = {"prompt": [5], "max_tokens": 1} if path == COMPLETIONS else None
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEYS[0]}"}):
        reply = request(guarded.url, path, body, headers=headers)
        assert reply.status == 401, (path, headers)
        assert reply.json["error"]["type"] == "authentication_error"
        assert reply.headers["www-authenticate"] == "Bearer"
    for key in KEYS:
        assert request(guarded.url, path, body, headers={"Authorization": f"Bearer {key}"}).status == 200


def test_probes_need_no_key(guarded: LocalCluster) -> None:
    for path in ("/health", "/ready", "/metrics"):
        assert request(guarded.url, path).status == 200, path


def test_nodes_ask_for_the_key_too(guarded: LocalCluster) -> None:
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    for worker in request(guarded.url, "/workers", headers=headers).json["workers"]:
        assert request(worker["url"], "/server_info").status == 401
        assert request(worker["url"], "/server_info", headers=headers).status == 200


# ---- what operators look at -------------------------------------------------------------------------


def test_the_state_of_a_running_request(cluster: LocalCluster) -> None:
    body: Body = {"prompt": [5, 6, 7], "max_tokens": 1000, "request_id": "watched", "n": 2, **GREEDY}
    assert request(cluster.url, "/requests/watched").status == 404
    stream = Stream(cluster.url, body)
    stream.wait_for_tokens(10)
    state = cluster.get("/requests/watched")
    assert state["state"] == "streaming"
    assert 0 < state["age_s"] <= state["total_age_s"] < 600
    assert 0 < state["remaining_s"] < 600
    assert state["num_attempts"] == 1
    assert [choice["index"] for choice in state["choices"]] == [0, 1]
    assert all(choice["num_tokens"] >= 1 and not choice["finished"] for choice in state["choices"])
    prefill, decode = cluster.workers("prefill")[0]["url"], cluster.workers("decode")[0]["url"]
    assert {(choice["prefill"], choice["decode"]) for choice in state["choices"]} == {(prefill, decode)}
    assert state["nodes"].keys() == {decode}
    on_node = state["nodes"][decode]
    assert (on_node["state"], on_node["waits_for"]) == ("running", "the next step")
    assert on_node["age_s"] > 0

    # Aborting ends it as a stream that is complete, and says so.
    reply = request(cluster.url, "/abort_request", {"rid": "watched"})
    assert (reply.status, reply.json["success"]) == (200, True)
    answer = stream.answer()
    assert answer.is_proper, answer
    assert answer.finish_reasons == {0: "abort", 1: "abort"}
    assert 0 < len(answer.token_ids[0]) < 1000
    assert cluster.get("/requests/watched")["state"] == "ended"
    assert request(cluster.url, "/abort_request", {"rid": "watched"}).status == 200  # idempotent


def test_f8_more_choices_than_the_batch_has_places(cluster: LocalCluster) -> None:
    body: Body = {
        "prompt": [5, 6, 7],
        "max_tokens": 3,
        "seed": 8,
        "ignore_eos": True,
        "return_token_ids": True,
    }

    def choices(n: int) -> list[list[int]]:
        answer = cluster.post(COMPLETIONS, {**body, "n": n})
        assert answer["usage"]["completion_tokens"] == 3 * n
        assert [choice["index"] for choice in answer["choices"]] == list(range(n))
        return [choice["token_ids"] for choice in answer["choices"]]

    many = choices(100)
    assert many[:2] == choices(2)
    assert len({tuple(ids) for ids in many[64:]}) > 1
    answer = Stream(cluster.url, {**body, "n": 100}).answer()
    assert [answer.token_ids[index] for index in range(100)] == many


def test_abort_all(cluster: LocalCluster) -> None:
    bodies: list[Body] = [{"prompt": [5 + i], "max_tokens": 1500, **GREEDY} for i in range(4)]
    streams = [Stream(cluster.url, body) for body in bodies]
    for stream in streams:
        stream.wait_for_tokens(2)
    assert request(cluster.url, "/abort_request", {"abort_all": True}).status == 200
    assert [stream.answer().finish_reasons for stream in streams] == [{0: "abort"}] * 4


def test_flush_waits_for_what_runs(cluster: LocalCluster) -> None:
    prompt = random_ids(90, 100)
    greedy_ids(cluster.url, prompt, 2)

    def num_cached() -> int:
        answer = cluster.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 1, **GREEDY})
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert num_cached() == 96
    with slowed(cluster.url):
        stream = Stream(cluster.url, {"prompt": [5, 6], "max_tokens": 60, **GREEDY})
        stream.wait_for_tokens(2)
        assert request(cluster.url, "/flush_cache?timeout=60", {}).status == 200
    wait_until(lambda: stream.is_over, 5.0, "the stream, which the flush waited for")
    assert stream.answer().is_proper
    assert num_cached() == 0
    assert request(cluster.url, "/flush_cache?timeout=much").status == 400


def test_health_generate(cluster: LocalCluster) -> None:
    reply = request(cluster.url, "/health_generate")
    assert (reply.status, reply.json["status"]) == (200, "ok")
    assert reply.json["latency_s"] > 0


# ---- imports ----------------------------------------------------------------------------------------


def test_the_router_imports_neither_torch_nor_transformers() -> None:
    modules = "pdserve.router.main, pdserve.front.main, pdserve.bench.serve"
    check = f"import {modules}, sys; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", check], check=True, timeout=60)
