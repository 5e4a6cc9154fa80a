"""Nodes are killed and frozen under load: no stream is lost, no token is missing, repeated or another one,
and no logprob differs in a bit.

Two prefill and two decode nodes; `pdserve up` starts a killed one again.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pdserve import Engine
from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.tests.cluster.helpers import (
    COMPLETIONS,
    GREEDY,
    Body,
    Stream,
    all_paired,
    clean_cluster,
    fronts_of,
    frozen,
    greedy_ids,
    in_background,
    kill_nodes,
    metric,
    num_busy,
    num_quarantined,
    random_ids,
    request,
    scheduler_process,
    slowed,
    stream_all,
    wait_until,
)

FLAGS = ["--deterministic", "--poison-reserved-pages", "--chunked-prefill-size", "16"]
NODES = ["--num-prefill", "2", "--num-decode", "2", "--num-threads", "1"]
LEASE_S = 5.0
RESTART_S = 60.0  # a whole node on a loaded machine
SAMPLED: Body = {"temperature": 0.8, "seed": 11, "ignore_eos": True}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    log_path = tmp_path_factory.mktemp("faults") / "log"
    with clean_cluster([str(SHIPPED_MODEL), *FLAGS, *NODES], log_path) as cluster:
        yield cluster


@pytest.fixture
def nodes(started: LocalCluster) -> Iterator[LocalCluster]:
    """Four nodes, all paired, idle, nothing cached. Afterwards nothing is left on them but quarantine.

    Pages that a killed node might still have written stay in quarantine until its death is proven.
    """
    wait_until(lambda: all_paired(started, 2, 2), RESTART_S, "four nodes, all paired")
    assert request(started.url, "/flush_cache?timeout=30").status == 200
    yield started
    wait_until(lambda: num_busy(started) == 0, 20.0, "nodes without work")


def node_with(cluster: LocalCluster, request_id: str, state: str) -> str:
    """The URL of the node on which this request is in this state; empty while there is none."""
    reply = request(cluster.url, f"/requests/{request_id}")
    if reply.status != 200:
        return ""
    return next((url for url, node in reply.json["nodes"].items() if node["state"] == state), "")


def failed_attempts(cluster: LocalCluster) -> float:
    text = cluster.get("/metrics")
    failures = ("peer_lost", "not_ready", "transfer_failed")
    return sum(metric(text, "pd_router_attempts_total", code=code) for code in failures)


def named(bodies: list[Body], name: str) -> list[Body]:
    return [{**body, "request_id": f"{name}-{number}"} for number, body in enumerate(bodies)]


def test_prefill_node_killed_during_prefill(nodes: LocalCluster) -> None:
    bodies: list[Body] = [
        {"prompt": random_ids(1, 600), "max_tokens": 30, **GREEDY},
        {"prompt": random_ids(2, 450), "max_tokens": 30, "n": 2, **SAMPLED},
        {"prompt": random_ids(3, 500), "max_tokens": 30, "logprobs": 2, **SAMPLED},
        {"prompt": random_ids(4, 550), "max_tokens": 30, "n": 2, **GREEDY},
    ]
    undisturbed = stream_all(nodes.url, bodies)
    assert request(nodes.url, "/flush_cache?timeout=30").status == 200

    failed_before, quarantined_before = failed_attempts(nodes), num_quarantined(nodes)
    streams = [Stream(nodes.url, body) for body in named(bodies, "prefill-dies")]
    victim = wait_until(
        lambda: node_with(nodes, "prefill-dies-0", "computing"), 30.0, "a prompt that is being computed"
    )
    kill_nodes(nodes, [victim], with_fronts=True)
    wait_until(
        lambda: victim not in [worker["url"] for worker in nodes.workers()],
        LEASE_S + 1.0,
        "the killed node to leave /workers",
    )
    answers = [stream.answer() for stream in streams]
    for answer, before in zip(answers, undisturbed, strict=True):
        assert answer.is_proper, answer
        assert answer.token_ids == before.token_ids
        assert answer.texts == before.texts
        assert answer.logprobs == before.logprobs
    assert failed_attempts(nodes) > failed_before
    wait_until(lambda: num_quarantined(nodes) == quarantined_before, 30.0, "the proof of its death")
    wait_until(lambda: all_paired(nodes, 2, 2), RESTART_S, "the killed node to be back")
    assert victim not in [worker["url"] for worker in nodes.workers()]


def test_decode_node_killed_in_mid_stream(nodes: LocalCluster) -> None:
    penalties: Body = {"frequency_penalty": 0.4, "presence_penalty": 0.3, "repetition_penalty": 1.1}
    kinds: list[Body] = [
        {**GREEDY, "n": 2},
        {**SAMPLED, "n": 2},
        {**GREEDY, "logprobs": 1},
        {**SAMPLED, "logprobs": 0},
        {**SAMPLED, **penalties},
        {**SAMPLED, "ignore_eos": False, "min_tokens": 50, "logit_bias": {"0": 4.0}},
    ]
    bodies = [
        {"prompt": random_ids(10 + number, 20 + 15 * number), "max_tokens": 100, **kind}
        for number, kind in enumerate(kinds)
    ]
    undisturbed = stream_all(nodes.url, bodies)

    failed_before = failed_attempts(nodes)
    with slowed(nodes.url):
        streams = [Stream(nodes.url, body) for body in named(bodies, "decode-dies")]
        for stream in streams:
            stream.wait_for_tokens(5)
        victim = node_with(nodes, "decode-dies-0", "running")
        assert victim, "the stream was over before a node could be killed"
    kill_nodes(nodes, [victim])
    answers = [stream.answer() for stream in streams]
    for answer, before in zip(answers, undisturbed, strict=True):
        assert answer.is_proper, answer
        assert answer.token_ids == before.token_ids
        assert answer.texts == before.texts
        assert answer.finish_reasons == before.finish_reasons
        assert answer.logprobs == before.logprobs
        for choice, logprobs in before.logprobs.items():
            assert len(logprobs) == len(answer.token_ids[choice])
    assert failed_attempts(nodes) > failed_before
    wait_until(
        lambda: victim not in [worker["url"] for worker in nodes.workers()],
        LEASE_S + 1.0,
        "the killed node to leave /workers",
    )


def test_a_session_goes_on_when_its_decode_node_dies(nodes: LocalCluster) -> None:
    first, new = random_ids(97, 40), random_ids(98, 5)
    sampling = {"max_new_tokens": 24, **GREEDY}
    with Engine(url=nodes.url) as engine:
        params = {"id": engine.open_session()}
        begun = engine.generate(input_ids=first, rid="a", session_params=params, sampling_params=sampling)
        kill_nodes(nodes, [f"http://{params['id'].rpartition('@')[2]}"])
        params["rid"] = "a"
        answer = engine.generate(input_ids=new, rid="b", session_params=params, sampling_params=sampling)
    assert answer["output_ids"] == greedy_ids(nodes.url, [*first, *begun["output_ids"], *new], 24)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_front_killed_in_mid_stream(nodes: LocalCluster, number: signal.Signals) -> None:
    """It carries no stream: its scheduler starts another one, and nothing is computed again."""
    wait_until(lambda: all_paired(nodes, 2, 2), RESTART_S, "the nodes that were killed before")
    body: Body = {"prompt": random_ids(30, 40), "max_tokens": 60, **SAMPLED}
    (undisturbed,) = stream_all(nodes.url, [body])
    incarnations = {worker["url"]: worker["incarnation"] for worker in nodes.workers()}

    failed_before = failed_attempts(nodes)
    with slowed(nodes.url):
        stream = Stream(nodes.url, {**body, "request_id": f"front-dies-{number}"})
        stream.wait_for_tokens(5)
        victim = node_with(nodes, f"front-dies-{number}", "running")
        assert victim, "the stream was over before a front could be killed"
        scheduler = scheduler_process(nodes, victim)
        (front,) = fronts_of(scheduler)
        front.send_signal(number)
    answer = stream.answer()
    assert answer.is_proper, answer
    assert answer.token_ids == undisturbed.token_ids
    assert failed_attempts(nodes) == failed_before
    wait_until(lambda: front not in fronts_of(scheduler), 10.0, "its end")
    assert request(victim, "/server_info").status == 200, "who asks meanwhile waits for the next front"
    assert scheduler_process(nodes, victim).pid == scheduler.pid
    assert {worker["url"]: worker["incarnation"] for worker in nodes.workers()} == incarnations


def test_prefill_node_frozen_during_hand_off(nodes: LocalCluster) -> None:
    body: Body = {"prompt": random_ids(20, 800), "max_tokens": 20, "logprobs": 1, **SAMPLED}
    (undisturbed,) = stream_all(nodes.url, [body])
    assert request(nodes.url, "/flush_cache?timeout=30").status == 200
    quarantined_before = num_quarantined(nodes)

    stream = Stream(nodes.url, {**body, "request_id": "frozen"})
    url = wait_until(lambda: node_with(nodes, "frozen", "computing"), 30.0, "a prompt that is being computed")
    process = scheduler_process(nodes, url)
    with frozen(process):
        frozen_at = time.monotonic()
        answer = stream.answer()
        assert answer.is_proper, answer
        assert (answer.token_ids, answer.logprobs) == (undisturbed.token_ids, undisturbed.logprobs)
        wait_until(lambda: num_quarantined(nodes) > quarantined_before, 5.0, "pages in quarantine")
        time.sleep(max(0.0, frozen_at + 4.0 - time.monotonic()))
        assert num_quarantined(nodes) > quarantined_before, "the frozen node might still write"
    wait_until(lambda: num_quarantined(nodes) == quarantined_before, 30.0, "the node to drain its room")
    wait_until(lambda: all_paired(nodes, 2, 2), 30.0, "the node to be used again")
    assert scheduler_process(nodes, url).pid == process.pid
    assert greedy_ids(nodes.url, body["prompt"], 5) == greedy_ids(nodes.url, body["prompt"], 5)


def test_no_node_of_a_role_is_left(nodes: LocalCluster) -> None:
    """While prefill is gone, decode does its work; without decode all requests fail."""
    long: Body = {"prompt": random_ids(30, 40), "max_tokens": 1500, "n": 4, **GREEDY}
    new: Body = {"prompt": random_ids(31, 40), "max_tokens": 8, **GREEDY}
    expected = greedy_ids(nodes.url, new["prompt"], 8)
    with frozen(psutil.Process(nodes.pid)):  # so that nobody starts them again
        stream = Stream(nodes.url, long)
        stream.wait_for_tokens(8)
        kill_nodes(nodes, [worker["url"] for worker in nodes.workers("prefill")])
        stream.wait_for_tokens(stream.num_tokens + 40)
        assert greedy_ids(nodes.url, new["prompt"], 8) == expected
        assert request(nodes.url, "/ready").status == 200
        assert not stream.is_over
        kill_nodes(nodes, [worker["url"] for worker in nodes.workers("decode")])

        wait_until(lambda: request(nodes.url, "/ready").status == 503, 10.0, "/ready to say no")
        reply = request(nodes.url, COMPLETIONS, new)
        assert reply.status == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json["error"]["code"] == "no_ready_pair"
        cut = stream.answer()
        assert cut.error is not None
        assert cut.is_cut
        assert not cut.is_done
        assert not cut.finish_reasons
    wait_until(lambda: all_paired(nodes, 2, 2), RESTART_S, "all nodes to be back")
    assert greedy_ids(nodes.url, new["prompt"], 8) == expected


def test_nodes_that_died_after_an_update_read_the_weights_of_those_that_lived(nodes: LocalCluster) -> None:
    """Only some tensors were sent, so nobody but a node that serves has all of them."""
    prompt = random_ids(40, 40)
    norm = load_file(SHIPPED_MODEL / "model.safetensors")["model.norm.weight"]
    by = torch.linspace(-1, 1, len(norm)).to(norm.dtype)
    with Engine(url=nodes.url) as engine:
        updated = engine.update_weights_from_tensor({"model.norm.weight": norm * by}, weight_version="step-1")
        assert updated.success, updated.message
        expected, checksums = greedy_ids(nodes.url, prompt, 12), engine.check_weights()["message"]
        fingerprints = {worker["model_fingerprint"] for worker in nodes.workers()}
        died = [nodes.workers(role)[0]["url"] for role in ("prefill", "decode")]
        before = {worker["incarnation"] for worker in nodes.workers()}
        kill_nodes(nodes, died, with_fronts=True)

        def are_back() -> bool:
            lived = before & {worker["incarnation"] for worker in nodes.workers()}
            return len(lived) == 2 and all_paired(nodes, 2, 2)

        wait_until(are_back, RESTART_S, "four nodes, all paired, two of them started again")
        assert {worker["weight_version"] for worker in nodes.workers()} == {"step-1"}
        assert {worker["model_fingerprint"] for worker in nodes.workers()} == fingerprints
        again = engine.check_weights()
        assert (again["success"], again["message"]) == (True, checksums)
    assert all(greedy_ids(nodes.url, prompt, 12) == expected for _ in range(4)), "whichever pair it is"


def test_a_node_that_died_while_memory_was_released_keeps_nobody_from_resuming(nodes: LocalCluster) -> None:
    prompt = random_ids(41, 40)
    expected = greedy_ids(nodes.url, prompt, 12)
    version = nodes.workers()[0]["weight_version"]
    with Engine(url=nodes.url) as engine:
        released = engine.release_memory_occupation()
        assert released.success, released.message
        is_over, answer = in_background(lambda: greedy_ids(nodes.url, prompt, 12))
        before = {worker["incarnation"] for worker in nodes.workers()}
        kill_nodes(nodes, [nodes.workers("decode")[0]["url"]], with_fronts=True)

        def is_back() -> bool:
            workers = nodes.workers()
            new = [worker for worker in workers if worker["incarnation"] not in before]
            return len(workers) == 4 and len(new) == 1 and new[0]["is_healthy"]

        wait_until(is_back, RESTART_S, "the killed node")
        assert not is_over(), "requests are held"
        resumed = engine.resume_memory_occupation()
        assert resumed.success, resumed.message
        assert answer() == expected
        again = engine.resume_memory_occupation()
        assert (again.success, again.message) == (False, "not released: weights, kv_cache, graphs")
    wait_until(lambda: all_paired(nodes, 2, 2), RESTART_S, "four nodes, all paired")
    assert {worker["weight_version"] for worker in nodes.workers()} == {version}
