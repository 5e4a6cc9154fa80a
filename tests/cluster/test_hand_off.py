"""It really is a hand-off: the pages that decode reads are those that prefill wrote."""

from __future__ import annotations

import pytest

from pdserve.bench.local_cluster import LocalCluster
from pdserve.messages.timeline import FIRST_TOKEN_STAGES, OVERLAPPING, SECOND_TOKEN_STAGES
from pdserve.tests.cluster.helpers import metric

PAGE_SIZE = 16


def total(cluster: LocalCluster, role: str, name: str) -> float:
    """The sum of a metric over the nodes of a role."""
    return sum(metric(cluster.get("/metrics", base=worker["url"]), name) for worker in cluster.workers(role))


@pytest.mark.parametrize("num_prompt_tokens", [1, 15, 16, 17, 64, 65, 300])
def test_every_page_travels_and_decode_computes_no_prompt(
    cluster: LocalCluster, num_prompt_tokens: int
) -> None:
    cluster.flush()  # decode keeps what it was sent before
    layout = cluster.get("/server_info", base=cluster.workers("decode")[0]["url"])["kv_layout"]
    bytes_before = total(cluster, "prefill", "pd_kv_transfer_bytes_total")
    computed_before = total(cluster, "decode", "pd_computed_prompt_tokens_total")
    answer = cluster.post(
        "/v1/completions",
        {
            "prompt": [(7 * i) % 4000 + 1 for i in range(num_prompt_tokens)],
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
            "timeline": True,
        },
    )
    assert answer["usage"]["completion_tokens"] == 8
    num_pages = -(-num_prompt_tokens // PAGE_SIZE)
    handoff = next(span for span in answer["timeline"]["spans"] if span["name"] == "handoff")
    assert handoff["num_bytes"] == num_pages * layout["page_bytes"]
    moved = total(cluster, "prefill", "pd_kv_transfer_bytes_total") - bytes_before
    assert moved == num_pages * layout["page_bytes"]
    assert total(cluster, "decode", "pd_computed_prompt_tokens_total") == computed_before


def test_timeline_names_every_stage(cluster: LocalCluster) -> None:
    answer = cluster.post(
        "/v1/completions", {"prompt": "def f(", "max_tokens": 4, "timeline": True, "seed": 1}
    )
    timeline = answer["timeline"]
    names = {span["name"] for span in timeline["spans"]}
    # A stage that took no time at all is named too; only a failed attempt is not in every timeline.
    assert names == {*FIRST_TOKEN_STAGES, *SECOND_TOKEN_STAGES, *OVERLAPPING} - {"failed_attempt"}
    assert 0 <= timeline["unaccounted_s"] < timeline["ttft_s"]
    kept = cluster.get(f"/requests/{answer['id']}")
    assert (kept["state"], kept["timeline"]) == ("ended", timeline)
