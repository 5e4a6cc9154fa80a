"""What decode keeps: follow-up turns, full hits, too few pages, and no prefill node at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.tests.deadline import DEADLINE_S

from .conftest import FLAGS
from .helpers import (
    COMPLETIONS,
    GREEDY,
    Body,
    Stream,
    all_paired,
    clean_cluster,
    kill_nodes,
    metric,
    num_busy,
    random_ids,
    request,
    stream_all,
    wait_until,
)

CHAT = "/v1/chat/completions"
PAGE_SIZE = 16
TINY_POOL_PAGES = 28


@dataclass(frozen=True)
class Counters:
    """Since the start of the cluster."""

    num_bytes: int  # that prefill has written
    num_rooms: int
    num_computed_on_decode: int
    num_retracted: int


def counters(cluster: LocalCluster) -> Counters:
    def text_of(role: str) -> str:
        return "\n".join(str(cluster.get("/metrics", base=w["url"])) for w in cluster.workers(role))

    prefill, decode = text_of("prefill"), text_of("decode")
    return Counters(
        num_bytes=int(metric(prefill, "pd_kv_transfer_bytes_total")),
        num_rooms=int(metric(prefill, "pd_rooms_total")),
        num_computed_on_decode=int(metric(decode, "pd_computed_prompt_tokens_total")),
        num_retracted=int(metric(decode, "pd_num_retracted_requests_total")),
    )


def page_bytes(cluster: LocalCluster) -> int:
    info = cluster.get("/server_info", base=cluster.workers("decode")[0]["url"])
    return int(info["kv_layout"]["page_bytes"])


def chat(cluster: LocalCluster, messages: list[Body], max_tokens: int) -> Body:
    body = {"messages": messages, "max_tokens": max_tokens, "return_token_ids": True, **GREEDY}
    answer: Body = cluster.post(CHAT, body)
    return answer


# The shipped model's template shows it the last message alone.
TEMPLATE = (
    "{%- for message in messages -%}{{- '# ' + message['role'] + '\\n' + message['content'] + '\\n' -}}"
    "{%- endfor -%}{{- '# assistant\\n' -}}"
)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A cluster whose decode node never prefills, and whose chats keep their history."""
    folder = tmp_path_factory.mktemp("remote")
    model = shutil.copytree(SHIPPED_MODEL, folder / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    flags = [str(model), *FLAGS, "--local-prefill-threshold", "0"]
    with clean_cluster(flags, folder / "log") as cluster:
        yield cluster


@pytest.fixture
def remote(started: LocalCluster) -> Iterator[LocalCluster]:
    """It, with nothing cached, and idle afterwards."""
    started.flush()
    yield started
    wait_until(lambda: num_busy(started) == 0, 20.0, "nodes without work")


def test_the_second_turn_of_a_chat_transfers_exactly_what_is_missing(remote: LocalCluster) -> None:
    question = "def area(width, height):\n    return width * height\n" * 6
    messages: list[Body] = [{"role": "user", "content": question}]
    before = counters(remote)
    first = chat(remote, messages, max_tokens=40)
    after_first = counters(remote)
    num_bytes = after_first.num_bytes - before.num_bytes
    num_prompt, num_output = first["usage"]["prompt_tokens"], first["usage"]["completion_tokens"]
    assert num_bytes == -(-num_prompt // PAGE_SIZE) * page_bytes(remote)

    first_ids = remote.post("/tokenize", {"messages": messages, "add_generation_prompt": True})["tokens"]
    messages += [
        {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
        {"role": "user", "content": "def perimeter(width, height):"},
    ]
    second_ids = remote.post("/tokenize", {"messages": messages, "add_generation_prompt": True})["tokens"]
    held = [*first_ids, *first["choices"][0]["token_ids"]][: num_prompt + num_output - 1]
    num_held = next((i for i, (a, b) in enumerate(zip(held, second_ids, strict=False)) if a != b), len(held))
    # Where the answer's text is tokenized in another way than it was sampled, the two part.
    assert num_held >= num_prompt
    second = chat(remote, messages, max_tokens=8)
    after_second = counters(remote)
    num_pages = -(-second["usage"]["prompt_tokens"] // PAGE_SIZE) - num_held // PAGE_SIZE
    assert after_second.num_bytes - after_first.num_bytes == num_pages * page_bytes(remote)
    assert after_second.num_bytes - after_first.num_bytes < num_bytes
    assert after_second.num_computed_on_decode == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == num_prompt // PAGE_SIZE * PAGE_SIZE


def test_a_delta_changes_no_token(remote: LocalCluster) -> None:
    bodies: list[Body] = [
        {"prompt": random_ids(seed, 150), "max_tokens": 30, "n": 1 + seed % 2, **GREEDY} for seed in range(4)
    ]
    first = stream_all(remote.url, bodies)
    follow_ups: list[Body] = [
        {**body, "prompt": [*body["prompt"], *answer.token_ids[0], *random_ids(seed, 40)]}
        for seed, (body, answer) in enumerate(zip(bodies, first, strict=True))
    ]
    before = counters(remote)
    warm = stream_all(remote.url, follow_ups)
    moved = counters(remote).num_bytes - before.num_bytes
    assert request(remote.url, "/flush_cache?timeout=30").status == 200
    cold = stream_all(remote.url, follow_ups)
    assert [answer.token_ids for answer in warm] == [answer.token_ids for answer in cold]
    # 220 tokens are 14 pages, 179 of them are held: 11.
    assert moved == 4 * 3 * page_bytes(remote)


def test_a_full_hit_moves_no_page(cluster: LocalCluster) -> None:
    cluster.flush()
    body: Body = {"prompt": random_ids(3, 101), "max_tokens": 12, "return_token_ids": True, **GREEDY}
    first = cluster.post(COMPLETIONS, body)
    before = counters(cluster)
    again = cluster.post(COMPLETIONS, body)
    after = counters(cluster)
    assert again["choices"][0]["token_ids"] == first["choices"][0]["token_ids"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 96
    assert (after.num_bytes, after.num_rooms) == (before.num_bytes, before.num_rooms)
    assert after.num_computed_on_decode - before.num_computed_on_decode == 5


def test_a_flush_empties_decode_too(cluster: LocalCluster) -> None:
    body: Body = {"prompt": random_ids(4, 70), "max_tokens": 4, **GREEDY}
    cluster.post(COMPLETIONS, body)
    (worker,) = cluster.workers("decode")
    page_states = cluster.get("/metrics", base=worker["url"])
    assert metric(page_states, "pd_num_pages", state="shared") > 0
    cluster.flush()
    page_states = cluster.get("/metrics", base=worker["url"])
    assert metric(page_states, "pd_num_pages", state="shared") == 0
    assert metric(page_states, "pd_num_pages", state="free") == metric(page_states, "pd_num_pages")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, shared_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """A cluster whose decode node has so few pages that requests take them from each other."""
    folder = tmp_path_factory.mktemp("tiny")
    config = folder / "config.yaml"
    pool_gib = TINY_POOL_PAGES * page_bytes(shared_cluster) / 2**30
    config.write_text(f"decode:\n  kv-cache-gb: {pool_gib!r}\n  schedule-conservativeness: 0.1\n")
    flags = [str(SHIPPED_MODEL), *FLAGS, "--max-model-len", "512", "--config", str(config)]
    with clean_cluster(flags, folder / "log") as cluster:
        yield cluster
        wait_until(lambda: num_busy(cluster) == 0, 20.0, "nodes without work")


def test_eight_streams_in_a_tiny_pool_equal_the_undisturbed_run(
    cluster: LocalCluster, tiny: LocalCluster
) -> None:
    bodies: list[Body] = [
        {"prompt": random_ids(seed, 20), "max_tokens": 100, **options}
        for seed, options in enumerate(4 * [GREEDY, {"temperature": 0.8, "seed": 5, "ignore_eos": True}])
    ]
    undisturbed = stream_all(cluster.url, bodies)
    streams = [Stream(tiny.url, body) for body in bodies]  # each needs 8 pages in the end
    answers = [stream.answer(timeout_s=120.0) for stream in streams]
    assert all(answer.is_proper for answer in answers), answers
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in undisturbed]
    assert counters(tiny).num_retracted > 0
    router = tiny.get("/metrics")
    assert metric(router, "pd_router_attempts_total", code="retracted") == counters(tiny).num_retracted


def test_what_can_never_fit_is_refused_at_once(tiny: LocalCluster) -> None:
    body: Body = {"prompt": random_ids(1, 30), "max_tokens": 16 * TINY_POOL_PAGES, **GREEDY}
    reply = request(tiny.url, COMPLETIONS, body)
    assert reply.status == 400
    assert "KV pages" in reply.text


def test_answers_go_on_when_the_prefill_node_is_killed(tmp_path: Path) -> None:
    """The one prefill node dies while prompts are being computed, and is not started again in time."""
    with LocalCluster([str(SHIPPED_MODEL), *FLAGS], log_path=tmp_path / "log") as cluster:
        bodies: list[Body] = [
            {"prompt": random_ids(seed, 600), "max_tokens": 20, **GREEDY} for seed in range(3)
        ]
        undisturbed = stream_all(cluster.url, bodies)
        assert request(cluster.url, "/flush_cache?timeout=30").status == 200
        before = counters(cluster)
        assert before.num_computed_on_decode == 0
        streams = [Stream(cluster.url, body) for body in bodies]
        kill_nodes(cluster, [cluster.workers("prefill")[0]["url"]], with_fronts=True)
        later = [Stream(cluster.url, {"prompt": random_ids(9, 100), "max_tokens": 5, **GREEDY})]
        answers = [stream.answer() for stream in (*streams, *later)]
        assert all(answer.is_proper for answer in answers), answers
        assert [answer.token_ids for answer in answers[:3]] == [a.token_ids for a in undisturbed]
        wait_until(lambda: all_paired(cluster, 1, 1), DEADLINE_S, "the prefill node to be back")
        assert counters(cluster).num_computed_on_decode > 0
