"""`--deterministic`, with which these tests run: answers are equal bit for bit in any company."""

from __future__ import annotations

from random import Random

import pytest

from pdserve.bench.local_cluster import LocalCluster
from pdserve.tests.cluster.helpers import GREEDY, Body, random_ids, request, stream_all

KINDS: tuple[Body, ...] = (
    {"logprobs": 3, **GREEDY},
    {"logprobs": 1, "temperature": 0.9, "seed": 3, "ignore_eos": True},
    {"logprobs": 2, "temperature": 1.1, "seed": 4, "top_p": 0.8, "top_k": 50, "ignore_eos": True},
    {"logprobs": 0, "temperature": 0.7, "seed": 5, "repetition_penalty": 1.2, "n": 2, "ignore_eos": True},
)


def test_every_node_says_so(cluster: LocalCluster) -> None:
    for worker in cluster.workers():
        info = cluster.get("/server_info", base=worker["url"])
        assert (info["deterministic"], info["dtype"]) == (True, "float32")


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_alone_in_a_batch_and_on_a_cached_prefix(cluster: LocalCluster, seed: int) -> None:
    """Chunks are of 64 tokens, pages of 16: prompts end within, at and behind both."""
    chance = Random(seed)
    lengths = [1, 16, 64, 65, *(chance.randint(2, 200) for _ in range(4))]
    bodies: list[Body] = [
        {"prompt": random_ids(1000 * seed + index, length), "max_tokens": 12, **KINDS[index % len(KINDS)]}
        for index, length in enumerate(lengths)
    ]
    assert request(cluster.url, "/flush_cache?timeout=30").status == 200
    alone = [stream_all(cluster.url, [body])[0] for body in bodies]
    together_on_cached_prefixes = stream_all(cluster.url, bodies)
    assert request(cluster.url, "/flush_cache?timeout=30").status == 200
    chance.shuffle(order := list(range(len(bodies))))
    together = dict(zip(order, stream_all(cluster.url, [bodies[index] for index in order]), strict=True))
    for index, expected in enumerate(alone):
        for answer in (together_on_cached_prefixes[index], together[index]):
            assert answer.token_ids == expected.token_ids, index
            assert answer.texts == expected.texts, index
            assert answer.logprobs == expected.logprobs, index
            assert expected.logprobs, index
