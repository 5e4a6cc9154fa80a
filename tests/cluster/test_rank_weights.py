"""A node of two ranks hands out whole tensors: by name, as a checkpoint, and to another node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.direct_http import open_url
from pdserve.tests.cluster.helpers import clean_cluster, greedy_ids, random_ids, request

FLAGS = ["--dtype", "float32", "--poison-reserved-pages", "--num-threads", "1"]
PROMPT = random_ids(7, 40)
DOWN, UP, NORM = (
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight",
)


@pytest.fixture
def unequal(tmp_path: Path) -> Iterator[LocalCluster]:
    """Prefill has one rank, decode two."""
    config = tmp_path / "config.yaml"
    config.write_text("prefill: {tp: 1}\ndecode: {tp: 2}\n")
    arguments = [str(SHIPPED_MODEL), *FLAGS, "--config", str(config)]
    with clean_cluster(arguments, tmp_path / "log") as cluster:
        yield cluster


def update(url: str, tensors: dict[str, Tensor], version: str) -> None:
    route = f"{url}/update_weights_from_tensor?weight_version={version}&force=true"
    headers = {"Content-Type": "application/octet-stream"}
    with open_url(Request(route, save(tensors), headers), 120.0) as answer:
        assert answer.status == 200


def ask(url: str, path: str, /, **body: object) -> Any:  # noqa: ANN401, JSON
    reply = request(url, path, body)
    assert reply.status == 200, reply.text
    return reply.json


def sums(cluster: LocalCluster) -> dict[str, dict[str, str]]:
    """The checksum of each tensor, by role."""
    nodes = request(cluster.url, "/check_weights", {}).json["nodes"]
    return {worker["role"]: nodes[worker["url"]]["tensors"] for worker in cluster.workers()}


@pytest.mark.timeout(600)
def test_what_two_ranks_serve_is_read_saved_and_pulled_as_a_whole(
    unequal: LocalCluster, tmp_path: Path
) -> None:
    url = unequal.url
    prefill, decode = (unequal.workers(role)[0]["url"] for role in ("prefill", "decode"))
    old_ids = greedy_ids(url, PROMPT, 12)
    original = load_file(SHIPPED_MODEL / "model.safetensors")
    by = torch.linspace(0.5, 1.5, len(original[NORM])).to(original[NORM].dtype)
    changed = {UP: original[UP].flip(0).contiguous(), NORM: original[NORM] * by}
    update(url, changed, "v2")
    ids, expected = greedy_ids(url, PROMPT, 12), sums(unequal)
    assert ids != old_ids
    assert expected["prefill"] == expected["decode"]

    for name in (UP, DOWN, NORM):  # by both, or it is a 400
        head = ask(url, "/get_weights_by_name", name=name, truncate_size=2)
        assert head == changed.get(name, original[name])[:2].float().tolist()

    saved = tmp_path / "saved"
    ask(decode, "/save_sharded_model", path=str(saved), max_size=2_000_000)
    ask(url, "/update_weights_from_disk", model_path=str(SHIPPED_MODEL))
    assert greedy_ids(url, PROMPT, 12) == old_ids
    ask(url, "/update_weights_from_disk", model_path=str(saved), weight_version="v3")
    assert greedy_ids(url, PROMPT, 12) == ids
    assert sums(unequal) == expected

    update(prefill, {NORM: original[NORM]}, "v4")
    apart = sums(unequal)
    assert apart["decode"] == expected["decode"] != apart["prefill"]
    ask(url, "/update_weights_from_peer", peer=decode, weight_version="v5")  # decode pulls from itself
    assert sums(unequal) == expected
    assert greedy_ids(url, PROMPT, 12) == ids

    ask(url, "/update_weight_version", new_version="v6")
    assert {worker["weight_version"] for worker in unequal.workers()} == {"v6"}
    assert sums(unequal) == expected
    assert greedy_ids(url, PROMPT, 12) == ids
    unequal.wait_idle(timeout_s=15.0)
