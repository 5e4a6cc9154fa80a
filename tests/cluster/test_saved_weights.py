"""Weights that were updated are saved, served by another cluster, and pulled from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pdserve import Engine
from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.tests.cluster.helpers import greedy_ids, metric, random_ids, request

FLAGS = ["--deterministic", "--poison-reserved-pages", "--num-threads", "1"]
PROMPT = random_ids(99, 30)


def fingerprints(engine: Engine) -> set[str]:
    info = engine.get_server_info()
    return {node["entry"]["model_fingerprint"] for node in (*info["prefill"], *info["decode"])}


def pulled_bytes(cluster: LocalCluster) -> dict[str, tuple[float, float]]:
    """By node: those that it has pulled over Mooncake, and all."""
    name = "pd_weight_pull_bytes_total"
    pages = {worker["url"]: request(worker["url"], "/metrics").text for worker in cluster.workers()}
    return {url: (metric(page, name, over="mooncake/tcp"), metric(page, name)) for url, page in pages.items()}


@pytest.fixture
def pulling(cluster: LocalCluster) -> Iterator[LocalCluster]:
    """The cluster of all tests; it serves its first weights again afterwards."""
    yield cluster
    body = {"model_path": str(SHIPPED_MODEL), "weight_version": "default"}
    assert request(cluster.url, "/update_weights_from_disk", body).status == 200


def test_saved_and_pulled_weights_answer_the_same(pulling: LocalCluster, tmp_path: Path) -> None:
    with safe_open(SHIPPED_MODEL / "model.safetensors", "pt") as checkpoint:
        norm = checkpoint.get_tensor("model.norm.weight").float()
    changed = {"model.norm.weight": norm * torch.linspace(0.5, 1.5, len(norm))}
    folder = tmp_path / "saved"
    with (
        LocalCluster([str(SHIPPED_MODEL), *FLAGS], log_path=tmp_path / "one.log") as one,
        Engine(url=one.url) as first,
    ):
        before = greedy_ids(one.url, PROMPT, 24)
        assert first.update_weights_from_tensor(changed, "v2").success
        expected = greedy_ids(one.url, PROMPT, 24)
        assert expected != before
        saved = first.save_sharded_model(folder, max_size=2_000_000)
        assert saved.success, saved.message
        assert not first.save_sharded_model(folder).success
        assert not first.save_remote_model("nowhere://bucket").success
        prefill = one.workers("prefill")[0]["url"]
        sums = first.check_weights()
        with Engine(url=pulling.url) as second:
            assert greedy_ids(pulling.url, PROMPT, 24) == before
            counted = pulled_bytes(pulling)
            pulled = second.update_weights_from_peer(prefill)
            assert pulled.success, pulled.message
            for url, (over_mooncake, in_all) in pulled_bytes(pulling).items():
                num_bytes = over_mooncake - counted[url][0]
                assert num_bytes >= (SHIPPED_MODEL / "model.safetensors").stat().st_size
                assert in_all - counted[url][1] == num_bytes, "none over the link"
            assert greedy_ids(pulling.url, PROMPT, 24) == expected
            assert second.get_model_info()["weight_version"] == "v2"
            wholes = {node["whole"] for node in sums["nodes"].values()}
            assert {node["whole"] for node in second.check_weights()["nodes"].values()} == wholes
            refused = second.update_weights_from_peer("http://127.0.0.1:1")
            assert not refused.success
        served = fingerprints(first)
    with (
        LocalCluster([str(folder), *FLAGS], log_path=tmp_path / "three.log") as three,
        Engine(url=three.url) as again,
    ):
        assert greedy_ids(three.url, PROMPT, 24) == expected
        assert fingerprints(again) == served
