"""Weights of a whole cluster that come over the wire, and questions about them."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import psutil
import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from pdserve import Engine
from pdserve.bench.local_cluster import LocalCluster
from pdserve.docs.examples.trainer_group import TrainerGroup
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.tests.cluster.helpers import greedy_ids, in_background, random_ids, request, wait_until
from pdserve.tests.trainer import free_port

PROMPT = random_ids(42, 50)
NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def send(url: str, tensors: dict[str, Tensor] | bytes, **query: str) -> tuple[int, str]:
    """The status and the body of the answer."""
    body = tensors if isinstance(tensors, bytes) else save(tensors)
    route = f"{url}/update_weights_from_tensor?{urlencode(query)}"
    headers = {"Content-Type": "application/octet-stream"}
    try:
        with urlopen(Request(route, data=body, headers=headers), timeout=120) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def changed_tensors(original: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some, so different that no answer stays the same."""
    by = torch.linspace(-1, 1, len(original[NORM])).to(original[NORM].dtype)
    return {UP: original[UP].flip(0).contiguous(), NORM: original[NORM] * by}


def checks(cluster: LocalCluster) -> Any:  # noqa: ANN401, JSON
    reply = request(cluster.url, "/check_weights", {})
    assert reply.status == 200, reply.text
    return reply.json


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    return load_file(SHIPPED_MODEL / "model.safetensors")


@pytest.fixture
def updatable(cluster: LocalCluster) -> Iterator[LocalCluster]:
    """The cluster of all tests; it serves its first weights again afterwards."""
    before = checks(cluster)["message"]
    yield cluster
    body = {"model_path": str(SHIPPED_MODEL), "weight_version": "default"}
    assert request(cluster.url, "/update_weights_from_disk", body).status == 200
    assert checks(cluster)["message"] == before


def test_some_tensors_change_answers_and_the_same_ones_change_them_back(
    updatable: LocalCluster, original: dict[str, Tensor]
) -> None:
    url = updatable.url
    old_ids, old = greedy_ids(url, PROMPT, 12), checks(updatable)
    changed = changed_tensors(original)
    status, text = send(url, changed, weight_version="step-1")
    assert status == 200, text
    assert greedy_ids(url, PROMPT, 12) != old_ids
    assert {worker["weight_version"] for worker in updatable.workers()} == {"step-1"}
    new = checks(updatable)
    for url_of_node, node in new["nodes"].items():
        before = old["nodes"][url_of_node]["tensors"]
        assert {name for name in before if before[name] != node["tensors"][name]} == {UP, NORM}
        assert node["weight_version"] == "step-1"
    head = request(url, "/get_weights_by_name", {"name": NORM, "truncate_size": 3}).json
    assert head == pytest.approx(changed[NORM][:3].float().tolist())

    assert send(url, {name: original[name] for name in changed})[0] == 200
    assert greedy_ids(url, PROMPT, 12) == old_ids
    assert checks(updatable)["message"] == old["message"]


def test_an_engine_updates_reads_checks_and_frees(
    updatable: LocalCluster, original: dict[str, Tensor]
) -> None:
    old_ids = greedy_ids(updatable.url, PROMPT, 12)
    changed = changed_tensors(original)
    with Engine(url=updatable.url) as engine:
        before = engine.check_weights()
        assert before["success"]
        assert engine.update_weights_from_tensor(changed, weight_version="step-1").success
        assert engine.get_weights_by_name(NORM, 3) == pytest.approx(changed[NORM][:3].tolist())
        assert engine.check_weights()["message"] != before["message"]
        assert greedy_ids(updatable.url, PROMPT, 12) != old_ids
        wrong = engine.update_weights_from_tensor({"no.such.weight": torch.zeros(2)})
        assert not wrong.success
        assert "no.such.weight" in wrong.message
        assert not engine.update_weights_from_ipc("no-such-file").success
        handle = base64.b64encode(bytes(64)).decode()
        memory = {"gpu": {"device_uuid": "GPU-none", "handle": handle}}
        spec = {"names": [NORM], "dtypes": ["float32"], "shapes": [list(original[NORM].shape)]}
        no_gpu = engine.update_weights_from_gpu({**memory, **spec})
        assert (no_gpu.success, "GPU" in no_gpu.message) == (False, True), no_gpu.message
        assert not engine.destroy_weights_update_group("nobody").success
        assert engine.release_memory_occupation(["kv_cache"]).success
        assert not engine.release_memory_occupation(["kv_cache"]).success
        back = {name: original[name] for name in changed}
        assert engine.update_weights_from_tensor(back, weight_version="step-2").success
        assert engine.resume_memory_occupation(["kv_cache"]).success
        assert engine.check_weights()["message"] == before["message"]
    assert greedy_ids(updatable.url, PROMPT, 12) == old_ids


def test_tensors_may_lie_in_shared_memory(updatable: LocalCluster, original: dict[str, Tensor]) -> None:
    name = f"pdserve-test-{os.getpid()}"
    file = Path("/dev/shm") / name
    missing = request(updatable.url, "/update_weights_from_ipc", {"name": name})
    assert (missing.status, f"no file {file}" in missing.text) == (400, True)
    old_ids = greedy_ids(updatable.url, PROMPT, 12)
    file.write_bytes(save(changed_tensors(original)))
    try:
        reply = request(updatable.url, "/update_weights_from_ipc", {"name": name, "weight_version": "shm"})
    finally:
        file.unlink()
    assert reply.status == 200, reply.text
    assert greedy_ids(updatable.url, PROMPT, 12) != old_ids
    assert request(updatable.url, "/get_weight_version").json["weight_version"] == "shm"


def test_all_tensors_have_the_fingerprint_of_their_checkpoint(
    updatable: LocalCluster, original: dict[str, Tensor]
) -> None:
    before = {worker["model_fingerprint"] for worker in updatable.workers()}
    assert send(updatable.url, {NORM: original[NORM]})[0] == 200
    assert {worker["model_fingerprint"] for worker in updatable.workers()} != before
    assert send(updatable.url, original)[0] == 200
    assert {worker["model_fingerprint"] for worker in updatable.workers()} == before


def describe(tensors: dict[str, Tensor]) -> dict[str, object]:
    return {
        "names": list(tensors),
        "dtypes": [str(tensor.dtype) for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
    }


def test_a_trainer_broadcasts_to_all_nodes_and_one_that_does_not_is_not_waited_for(
    updatable: LocalCluster, original: dict[str, Tensor]
) -> None:
    url, port = updatable.url, free_port()
    old_ids = greedy_ids(url, PROMPT, 12)
    num_nodes = len(updatable.workers())
    body = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "group_name": "e2e"}
    wrong = request(url, "/init_weights_update_group", {**body, "world_size": num_nodes})
    assert (wrong.status, "world_size" in wrong.json["message"]) == (400, True)
    _, joined = in_background(
        lambda: request(url, "/init_weights_update_group", {**body, "world_size": 1 + num_nodes})
    )
    trainer = TrainerGroup("e2e", port, 1 + num_nodes)
    assert sorted(joined().json["ranks"].values()) == list(range(1, 1 + num_nodes))

    route = "/update_weights_from_distributed"
    changed = changed_tensors(original)
    for version, tensors, extra in (
        ("d-1", changed, {}),
        ("d-2", {name: original[name] for name in changed}, {"load_format": "flattened_bucket"}),
    ):
        told = {**describe(tensors), **extra, "group_name": "e2e", "weight_version": version}
        _, updated = in_background(lambda told=told: request(url, route, told))  # type: ignore[misc]
        trainer.send(list(tensors.values()), is_one_bucket=bool(extra))
        assert updated().status == 200, updated().text
        assert (greedy_ids(url, PROMPT, 12) == old_ids) == (version == "d-2")
        assert {worker["weight_version"] for worker in updatable.workers()} == {version}

    late = request(url, route, {**describe(changed), "group_name": "e2e", "timeout": 0.5})
    assert (late.status, "the old weights serve on" in late.json["message"]) == (400, True), late.text
    assert greedy_ids(url, PROMPT, 12) == old_ids
    trainer.close()
    assert request(url, "/destroy_weights_update_group", {"group_name": "e2e"}).status == 200
    assert request(url, "/destroy_weights_update_group", {"group_name": "e2e"}).status == 400


def test_retracted_requests_go_on_and_say_which_weights_made_which_tokens(
    updatable: LocalCluster, original: dict[str, Tensor]
) -> None:
    url = updatable.url
    sampling = {"max_new_tokens": 120, "temperature": 0.0, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True}
    undisturbed = request(url, "/generate", body).json
    assert "weight_versions" not in undisturbed["meta_info"]
    is_over, answered = in_background(lambda: request(url, "/generate", {**body, "rid": "retracted"}))
    wait_until(lambda: num_tokens(url, "retracted") >= 10, 30.0, "some tokens")
    status, text = send(url, changed_tensors(original), weight_version="step-2", mode="retract")
    assert status == 200, text
    assert not is_over(), "the request was over before the update"
    answer = answered().json
    first, second = answer["meta_info"]["weight_versions"]
    assert (first["weight_version"], first["start"]) == ("default", 0)
    assert second["weight_version"] == "step-2"
    start = second["start"]
    assert answer["output_ids"][:start] == undisturbed["output_ids"][:start]
    assert len(answer["output_ids"]) == 120
    # From there on the new weights continue what the old ones began.
    go_on = {**body, "input_ids": PROMPT + answer["output_ids"][:start]}
    go_on["sampling_params"] = {**sampling, "max_new_tokens": 120 - start}
    continued = request(url, "/generate", go_on).json
    assert continued["output_ids"] == answer["output_ids"][start:]


def num_tokens(url: str, request_id: str) -> int:
    reply = request(url, f"/requests/{request_id}")
    is_known = reply.status == 200 and "choices" in reply.json  # a node may know it before it is the router's
    return int(reply.json["choices"][0]["num_tokens"]) if is_known else 0


def rss_bytes(cluster: LocalCluster) -> dict[str, int]:
    """Of each scheduler, by its node's URL."""
    infos = {worker["url"]: request(worker["url"], "/server_info").json for worker in cluster.workers()}
    return {
        url: psutil.Process(rank["pid"]).memory_info().rss
        for url, info in infos.items()
        for rank in info["ranks"]
    }


def test_released_memory_goes_back_to_the_host_and_answers_are_the_same_afterwards(
    updatable: LocalCluster,
) -> None:
    url = updatable.url
    old_ids, old = greedy_ids(url, PROMPT, 12), checks(updatable)["message"]
    refused = request(url, "/resume_memory_occupation", {"tags": ["weights"]})
    assert (refused.status, "not released: weights" in refused.text) == (400, True)
    before = rss_bytes(updatable)
    released = request(url, "/release_memory_occupation", {})
    assert released.status == 200, released.text
    meanwhile = rss_bytes(updatable)
    num_weight_bytes = (SHIPPED_MODEL / "model.safetensors").stat().st_size
    for node, rss in meanwhile.items():
        assert rss < before[node] - num_weight_bytes, f"{node}: {before[node]} bytes before, {rss} bytes now"
    again = request(url, "/release_memory_occupation", {"tags": ["kv_cache"]})
    assert (again.status, "released already: kv_cache" in again.text) == (400, True)
    is_over, waiting = in_background(lambda: greedy_ids(url, PROMPT, 12))
    incarnations = {worker["incarnation"] for worker in updatable.workers()}
    for tag in ("kv_cache", "cuda_graph"):
        assert request(url, "/resume_memory_occupation", {"tags": [tag]}).status == 200
        assert not is_over()
    again = request(url, "/resume_memory_occupation", {"tags": ["graphs"]})
    assert (again.status, "not released: graphs" in again.text) == (400, True)
    resumed = request(url, "/resume_memory_occupation", {"tags": ["weights"]})
    assert resumed.status == 200, resumed.text
    assert not incarnations & {worker["incarnation"] for worker in updatable.workers()}
    assert waiting() == old_ids
    assert greedy_ids(url, PROMPT, 12) == old_ids
    assert checks(updatable)["message"] == old
    assert request(url, "/resume_memory_occupation", {}).status == 400


def test_wrong_tensors_are_refused_by_name_and_nothing_changes(
    updatable: LocalCluster, original: dict[str, Tensor]
) -> None:
    before = checks(updatable)["message"]
    wrong = {"model.layers.7.other": torch.zeros(1), NORM: torch.zeros(3), UP: original[UP] * 2}
    status, message = send(updatable.url, wrong)
    assert status == 400
    assert "model.layers.7.other is no tensor of this" in message
    assert f"{NORM} has shape [3]" in message
    assert "the old weights serve on" in message
    status, message = send(updatable.url, b"\x80\x04pickled tensors")
    assert (status, "safetensors" in message) == (400, True)
    assert checks(updatable)["message"] == before
    unknown = request(updatable.url, "/get_weights_by_name", {"name": "model.other"})
    assert (unknown.status, "has no tensor 'model.other'" in unknown.text) == (400, True)
