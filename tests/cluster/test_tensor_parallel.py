"""Nodes of several ranks: the same answers, and what happens when a rank dies or freezes."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.tests.cluster.helpers import (
    GREEDY,
    Body,
    Stream,
    all_paired,
    clean_cluster,
    frozen,
    greedy_ids,
    is_alive,
    num_busy,
    random_ids,
    request,
    slowed,
    stream_all,
    wait_until,
)
from pdserve.tests.cluster.reference import Reference
from pdserve.tests.scripts import load_script

FLAGS = ["--deterministic", "--poison-reserved-pages", "--chunked-prefill-size", "16"]
FLAGS += ["--tp", "2", "--num-decode", "2", "--num-threads", "2"]
RESTART_S = 240.0  # two processes that import torch, on a loaded machine
PROMPT = random_ids(3, 50)


@pytest.fixture(scope="module")
def same_answers() -> ModuleType:
    return load_script("same_answers")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("prefill", "decode", "backend"), [(1, 2, "mooncake"), pytest.param(2, 1, "shm", marks=pytest.mark.slow)]
)
def test_sizes_that_differ_answer_as_transformers_does(
    same_answers: ModuleType, prefill: int, decode: int, backend: str, tmp_path: Path
) -> None:
    tally = same_answers.run_tensor_parallel(prefill, decode, 2, backend, tmp_path, quick=True)
    assert tally.failures == ()
    assert tally.num_requests > 25
    assert tally.num_tokens > 25 * 20


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalCluster, Path]]:
    log_path = tmp_path_factory.mktemp("ranks") / "log"
    with clean_cluster([str(SHIPPED_MODEL), *FLAGS], log_path) as cluster:
        yield cluster, log_path


@pytest.fixture
def nodes(started: tuple[LocalCluster, Path]) -> Iterator[LocalCluster]:
    """All paired, idle, nothing cached. Afterwards nothing is left but quarantine: of pages that a killed
    node might still have written."""
    cluster = started[0]
    wait_until(lambda: all_paired(cluster, 1, 2), RESTART_S, "three nodes, all paired")
    yield cluster
    wait_until(lambda: num_busy(cluster) == 0, 20.0, "nodes without work")


def ranks(url: str) -> list[psutil.Process]:
    """The processes of a node, rank 0 first."""
    reply = request(url, "/server_info")
    assert reply.status == 200, reply.text
    info = reply.json
    assert info["tensor_parallel_size"] == info["tp_size"] == len(info["ranks"]) == 2
    return [psutil.Process(rank["pid"]) for rank in info["ranks"]]


def test_new_weights_are_on_every_rank_or_on_none(nodes: LocalCluster, tmp_path: Path) -> None:
    def ids() -> list[int]:
        return greedy_ids(nodes.url, PROMPT, 8)

    def update(model: Path, version: str) -> int:
        body = {"model_path": str(model), "weight_version": version}
        return request(nodes.url, "/update_weights_from_disk", body).status

    old = ids()
    assert update(tmp_path, "none") == 400
    assert ids() == old
    moved = tmp_path / "moved"
    shutil.copytree(SHIPPED_MODEL, moved)
    weights = load_file(moved / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        by = torch.randn(weight.shape, generator=noise) * 0.1 * weight.float().std(correction=0)
        weights[name] = (weight.float() + by).to(weight.dtype)
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert update(moved, "moved") == 200
    new = ids()
    logprobs = Reference(moved).logprobs([*PROMPT, *new])[len(PROMPT) - 1 : -1]
    assert new == logprobs.argmax(-1).tolist()
    assert new != old
    # With the version of the start, as a node has that is started again.
    assert update(SHIPPED_MODEL, "default") == 200
    assert ids() == old


def check(cluster: LocalCluster) -> str:
    """One checksum, of all nodes."""
    reply = request(cluster.url, "/check_weights", {})
    assert reply.status == 200, reply.text
    message: str = reply.json["message"]
    return message


@pytest.mark.timeout(600)
def test_every_rank_gives_its_memory_back_or_none_does(nodes: LocalCluster) -> None:
    ids, sums = greedy_ids(nodes.url, PROMPT, 8), check(nodes)
    processes = [process for worker in nodes.workers() for process in ranks(worker["url"])]
    assert len(processes) == 6

    rank1 = processes[-1]
    limit = rank1.rlimit(psutil.RLIMIT_FSIZE)
    rank1.rlimit(psutil.RLIMIT_FSIZE, (4096, limit[1]))  # as good as a full disk
    refused = request(nodes.url, "/release_memory_occupation", {})
    rank1.rlimit(psutil.RLIMIT_FSIZE, limit)
    assert refused.status == 400, refused.text
    assert "TP rank 1: weights cannot be kept" in refused.text
    wait_until(lambda: all_paired(nodes, 1, 2), RESTART_S, "all nodes to have their memory again")
    assert (greedy_ids(nodes.url, PROMPT, 8), check(nodes)) == (ids, sums)

    before = [process.memory_info().rss for process in processes]
    released = request(nodes.url, "/release_memory_occupation", {})
    assert released.status == 200, released.text
    num_weight_bytes = (SHIPPED_MODEL / "model.safetensors").stat().st_size
    for process, rss in zip(processes, before, strict=True):
        now = process.memory_info().rss
        # A rank has half of the weights; half of that may stay with the allocator.
        assert now < rss - num_weight_bytes / 4, f"{process}: {rss} bytes before, {now} now"
    for worker in nodes.workers():
        reply = request(worker["url"], "/check_weights", {})
        assert (reply.status, "the memory of the weights is released" in reply.text) == (400, True)
    assert request(nodes.url, "/resume_memory_occupation", {"tags": ["kv_cache", "graphs"]}).status == 200
    incarnations = {worker["incarnation"] for worker in nodes.workers()}
    resumed = request(nodes.url, "/resume_memory_occupation", {"tags": ["weights"]})
    assert resumed.status == 200, resumed.text
    assert not incarnations & {worker["incarnation"] for worker in nodes.workers()}
    assert (greedy_ids(nodes.url, PROMPT, 8), check(nodes)) == (ids, sums)


@pytest.mark.timeout(600)
def test_a_profile_shows_every_rank(nodes: LocalCluster, tmp_path: Path) -> None:
    begun = request(nodes.url, "/start_profile", {"output_dir": str(tmp_path), "activities": ["CPU"]})
    assert begun.status == 200, begun.text
    greedy_ids(nodes.url, random_ids(5, 70), 8)  # a prompt that is cached nowhere, so prefill computes
    ended = request(nodes.url, "/stop_profile", {})
    assert ended.status == 200, ended.text
    (prefill,) = nodes.workers("prefill")
    traces = ended.json["traces"]
    assert traces.keys() == {worker["url"] for worker in nodes.workers()}
    assert ["-rank1-" in path for path in traces[prefill["url"]]] == [False, True]
    document = json.loads(gzip.decompress(Path(ended.json["merged"]).read_bytes()))
    steps_of: dict[int, set[str]] = {}
    for event in document["traceEvents"]:
        if event.get("cat") == "user_annotation" and "step" in event["name"]:
            steps_of.setdefault(event["pid"], set()).add(event["name"].partition(":")[0])
    names = {
        event["args"]["name"]: steps_of[event["pid"]]
        for event in document["traceEvents"]
        if event.get("name") == "process_name" and event["pid"] in steps_of
    }
    own = names[f"prefill {prefill['url']}"]
    assert own == names[f"prefill {prefill['url']}, TP rank 1"], "every rank recorded the same forwards"
    assert own


@pytest.mark.timeout(600)
def test_a_rank_that_is_killed_ends_its_node_and_the_answer_goes_on_elsewhere(
    started: tuple[LocalCluster, Path], nodes: LocalCluster
) -> None:
    body: Body = {"prompt": PROMPT, "max_tokens": 100, **GREEDY}
    (undisturbed,) = stream_all(nodes.url, [body])
    with slowed(nodes.url):
        stream = Stream(nodes.url, {**body, "request_id": "rank-dies"})
        stream.wait_for_tokens(5)
        states = request(nodes.url, "/requests/rank-dies").json["nodes"]
        (url,) = (url for url, node in states.items() if node["state"] == "running")
        rank0, rank1 = ranks(url)
    rank1.kill()
    answer = stream.answer()
    assert answer.is_proper, answer
    assert answer.token_ids == undisturbed.token_ids
    wait_until(lambda: not is_alive(rank0), 20.0, "the node to end")
    assert f"TP rank 1 (pid {rank1.pid}) was ended by SIGKILL; the node ends" in started[1].read_text()


@pytest.mark.timeout(600)
def test_a_frozen_rank_is_a_hang_and_ends_its_node(
    started: tuple[LocalCluster, Path], nodes: LocalCluster
) -> None:
    expected = greedy_ids(nodes.url, PROMPT, 8)
    (prefill,) = nodes.workers("prefill")
    rank0, rank1 = ranks(prefill["url"])
    with frozen(rank1):
        stream = Stream(nodes.url, {"prompt": random_ids(4, 70), "max_tokens": 8, **GREEDY})
        wait_until(lambda: not is_alive(rank0), 60.0, "the hang to be seen")
        wait_until(lambda: not is_alive(rank1), 10.0, "the frozen rank to be killed")
    assert "a TP rank does not answer; the node ends" in started[1].read_text()
    answer = stream.answer()
    assert answer.is_proper or answer.error is not None
    wait_until(lambda: all_paired(nodes, 1, 2), RESTART_S, "the node to be there again")
    assert greedy_ids(nodes.url, PROMPT, 8) == expected


@pytest.mark.timeout(600)
def test_ranks_do_not_outlive_a_scheduler_that_is_killed(nodes: LocalCluster) -> None:
    (prefill,) = nodes.workers("prefill")
    rank0, rank1 = ranks(prefill["url"])
    with frozen(rank1):
        rank0.kill()
        wait_until(lambda: not is_alive(rank1), 10.0, "the rank to be killed with rank 0, frozen as it is")
    wait_until(lambda: all_paired(nodes, 1, 2), RESTART_S, "the node to be there again")
