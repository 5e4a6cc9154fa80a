"""New weights from disk on every node, or on none, while requests come and go."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.process import end
from pdserve.tests.cluster.helpers import (
    CHAT,
    COMPLETIONS,
    GREEDY,
    Body,
    Reply,
    Stream,
    greedy_ids,
    in_background,
    random_ids,
    request,
    slowed,
    stream_all,
    wait_until,
)
from pdserve.tests.cluster.reference import Reference
from pdserve.tests.trainer import free_port

UPDATE = "/update_weights_from_disk"
PROMPT = random_ids(40, 50)  # three whole pages: what is cached of it must not outlive its weights


def update(url: str, model: Path, **fields: object) -> Reply:
    return request(url, UPDATE, {"model_path": str(model), **fields})


def weight_version(cluster: LocalCluster) -> str:
    return str(cluster.get("/get_weight_version")["weight_version"])


def copy_of_shipped_model(directory: Path) -> Path:
    shutil.copytree(SHIPPED_MODEL, directory)
    return directory


@pytest.fixture(scope="module")
def perturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with every weight moved a little."""
    directory = copy_of_shipped_model(tmp_path_factory.mktemp("weights") / "perturbed")
    generator = torch.Generator().manual_seed(0)
    file = directory / "model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        noise = torch.randn(weight.shape, generator=generator) * 0.1 * weight.float().std(correction=0)
        weights[name] = (weight.float() + noise).to(weight.dtype)
    save_file(weights, file, metadata={"format": "pt"})
    return directory


@pytest.fixture
def updatable(cluster: LocalCluster) -> Iterator[LocalCluster]:
    """The cluster of all tests; it serves its first weights again afterwards."""
    yield cluster
    if weight_version(cluster) != "default":
        reply = update(cluster.url, SHIPPED_MODEL, weight_version="default")
        assert reply.status == 200, reply.text


def test_answers_change_and_change_back(updatable: LocalCluster, perturbed: Path) -> None:
    old_ids = greedy_ids(updatable.url, PROMPT, 16)
    reply = update(updatable.url, perturbed)
    assert reply.status == 200, reply.text
    assert reply.json["success"]
    assert weight_version(updatable).startswith("perturbed@")
    body: Body = {"prompt": PROMPT, "max_tokens": 16, "logprobs": 0, "return_token_ids": True, **GREEDY}
    answer = updatable.post(COMPLETIONS, body)
    (choice,) = answer["choices"]
    new_ids = choice["token_ids"]
    assert new_ids != old_ids
    rows = Reference(perturbed).logprobs([*PROMPT, *new_ids])[len(PROMPT) - 1 : -1]
    assert new_ids == rows.argmax(-1).tolist()
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(rows.max(-1).values.tolist(), abs=1e-4)

    assert update(updatable.url, SHIPPED_MODEL, weight_version="default").status == 200
    assert greedy_ids(updatable.url, PROMPT, 16) == old_ids


def test_every_answer_names_its_weights(updatable: LocalCluster, perturbed: Path) -> None:
    assert update(updatable.url, perturbed, weight_version="step-7").status == 200
    small: Body = {"max_tokens": 2, **GREEDY}
    messages = [{"role": "user", "content": "Add."}]
    native: Body = {"text": "def", "sampling_params": {"max_new_tokens": 2}}
    assert updatable.post(COMPLETIONS, {"prompt": "def", **small})["weight_version"] == "step-7"
    assert updatable.post(CHAT, {"messages": messages, **small})["weight_version"] == "step-7"
    assert updatable.post("/generate", native)["meta_info"]["weight_version"] == "step-7"
    assert stream_all(updatable.url, [{"prompt": "def", **small}])[0].weight_version == "step-7"
    assert updatable.get("/model_info")["weight_version"] == "step-7"
    assert updatable.get("/server_info")["weight_version"] == "step-7"
    assert {worker["weight_version"] for worker in updatable.workers()} == {"step-7"}

    ids = greedy_ids(updatable.url, PROMPT, 8)
    assert updatable.post("/update_weight_version", {"new_version": "step-7b"})["new_version"] == "step-7b"
    assert updatable.post(COMPLETIONS, {"prompt": "def", **small})["weight_version"] == "step-7b"
    assert greedy_ids(updatable.url, PROMPT, 8) == ids


def test_running_streams_end_on_their_weights_and_new_requests_wait(
    updatable: LocalCluster, perturbed: Path
) -> None:
    url = updatable.url
    long: Body = {"prompt": random_ids(41, 30), "max_tokens": 150, **GREEDY}
    new: Body = {"prompt": PROMPT, "max_tokens": 16, **GREEDY}
    (undisturbed,) = stream_all(url, [long])
    (old,) = stream_all(url, [new])

    with slowed(url):
        running = Stream(url, long)
        running.wait_for_tokens(5)
        is_updated, result = in_background(lambda: update(url, perturbed, weight_version="later"))
        probe = {**new, "request_id": "probe"}
        wait_until(lambda: waits_in_router(url, Stream(url, probe)), 10.0, "the hold")
        names = [f"waits-{number}" for number in range(3)]
        waiting = [Stream(url, {**new, "request_id": name}) for name in names]
        wait_until(lambda: all(state(url, name) == "queued" for name in names), 10.0, "held requests")
        assert not running.is_over, "the stream was over before the update began"
        assert not is_updated()

        answer = running.answer()
        assert answer.is_proper, answer
        assert answer.token_ids == undisturbed.token_ids
        assert answer.weight_version == "default"
        assert result().status == 200, result().text
    for stream in waiting:
        answer = stream.answer()
        assert answer.is_proper, answer
        assert answer.weight_version == "later"
        assert answer.token_ids != old.token_ids


def state(url: str, request_id: str) -> str:
    reply = request(url, f"/requests/{request_id}")
    return str(reply.json["state"]) if reply.status == 200 else ""


def waits_in_router(url: str, probe: Stream) -> bool:
    """Whether this request is held; if it is not, it has come before the hold and ends soon."""
    wait_until(lambda: probe.is_over or state(url, "probe") == "queued", 10.0, "the probe's fate")
    return not probe.is_over


def truncated_weights(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def other_shape(model: Path) -> None:
    """Says what the served model says, but one tensor has another shape."""
    file = model / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("mlp.up_proj.weight"))
    save_file({**weights, name: weights[name][:-8].contiguous()}, file, metadata={"format": "pt"})


def other_model(model: Path) -> None:
    """A checkpoint in itself, with fewer layers."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


@pytest.mark.parametrize("spoil", [truncated_weights, no_weights, other_shape, other_model, no_config])
def test_wrong_checkpoint_is_refused(
    updatable: LocalCluster, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    model = copy_of_shipped_model(tmp_path / "model")
    spoil(model)
    check_refused(updatable, model)


def test_what_is_no_folder_is_refused(updatable: LocalCluster, tmp_path: Path) -> None:
    check_refused(updatable, tmp_path / "nowhere")
    check_refused(updatable, SHIPPED_MODEL / "model.safetensors")


def check_refused(cluster: LocalCluster, model: Path) -> None:
    """400 with a reason, and the old weights serve on."""
    before = greedy_ids(cluster.url, PROMPT, 8)
    reply = update(cluster.url, model)
    assert reply.status == 400, reply.text
    assert not reply.json["success"]
    assert str(model) in reply.json["message"]
    assert "Traceback" not in reply.json["message"]
    assert weight_version(cluster) == "default"
    assert greedy_ids(cluster.url, PROMPT, 8) == before


def test_bad_requests(updatable: LocalCluster) -> None:
    assert request(updatable.url, UPDATE, {}).status == 400
    assert request(updatable.url, UPDATE, {"model_path": 5}).status == 400


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_one_node_alone_is_refused_without_force(updatable: LocalCluster, perturbed: Path, role: str) -> None:
    reply = update(updatable.workers(role)[0]["url"], perturbed)
    assert reply.status == 400
    assert "force" in reply.json["message"]
    assert weight_version(updatable) == "default"


@pytest.fixture
def second_router(updatable: LocalCluster) -> Iterator[str]:
    port = free_port()
    flags = [word for worker in updatable.workers() for word in (f"--{worker['role']}", worker["url"])]
    command = ["router", "--model", str(SHIPPED_MODEL), "--port", str(port), *flags]
    process = subprocess.Popen([sys.executable, "-P", "-m", "pdserve", *command])
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_ready(url), 30.0, "the second router")
        yield url
    finally:
        end(process, grace_s=30.0)


def is_ready(url: str) -> bool:
    try:
        return request(url, "/readiness").status == 200
    except OSError:
        return False


def test_two_routers_that_update_at_once_end_on_one_version(
    updatable: LocalCluster, second_router: str
) -> None:
    """Whoever is driven out says so at once: its requests do not wait for what will not come. Where each came
    first on another node, neither goes through."""
    urls = (updatable.url, second_router)
    served = weight_version(updatable)
    num_rounds_won = 0

    def versions() -> set[tuple[str, str]]:
        workers = [worker for url in urls for worker in request(url, "/workers").json["workers"]]
        return {(worker["weight_version"], worker["model_fingerprint"]) for worker in workers}

    for number, delay_s in enumerate((0.0, 0.03, 0.06, 0.09, 0.12)):
        names = [f"{router}-{number}" for router in ("first", "second")]
        first = in_background(
            lambda name=names[0]: update(urls[0], SHIPPED_MODEL, weight_version=name)  # type: ignore[misc]
        )[1]
        time.sleep(delay_s)
        replies = [update(urls[1], SHIPPED_MODEL, weight_version=names[1]), first()]
        is_won = any(reply.status == 200 for reply in replies)
        num_rounds_won += is_won
        if not is_won:
            assert all("the old weights serve on" in reply.json["message"] for reply in replies), replies
        wait_until(lambda: len(versions()) == 1, 20.0, "one version")
        before, served = served, versions().pop()[0]
        assert served in (names if is_won else [before])
        assert greedy_ids(urls[0], PROMPT, 4) == greedy_ids(urls[1], PROMPT, 4)
    assert num_rounds_won > 0
