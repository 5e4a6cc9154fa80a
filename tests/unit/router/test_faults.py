"""Random faults: whatever nodes do, every stream is the one right stream, or ends with an error."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from pdserve.api.generation import GenerateSpec
from pdserve.runtime.errors import RequestError

Bench = Any  # of conftest.py, which pytest's importlib mode does not let tests import
FAULTS = ("kill", "restart", "freeze", "busy", "fail", "reset", "stop short")


def hurt(rng: random.Random, nodes: list[Any]) -> None:
    """One fault at one node, and another node is well again."""
    node = rng.choice(nodes)
    match rng.choice(FAULTS):
        case "kill":
            node.die()
        case "restart":
            node.die()
            incarnation = f"{node.entry.incarnation}+"
            node.entry = msgspec.structs.replace(node.entry, incarnation=incarnation)
            node.alive = True
        case "freeze":
            node.answers_pings = False
        case "busy":
            node.fail_with += ["busy"] * rng.randrange(4)
        case "fail":
            node.fail_with += [rng.choice(["transfer_failed", "peer_lost"])]
        case "reset":
            for link in list(node.links):
                link.reset("connection lost")
        case "stop short":
            node.tokens_per_attempt = rng.randrange(4)
    heal(rng.choice(nodes))


def heal(node: Any) -> None:  # noqa: ANN401 (a FakeNode)
    node.answers_pings, node.alive, node.tokens_per_attempt = True, True, None


@pytest.mark.parametrize("seed", range(6))
async def test_every_stream_is_right_under_faults(
    bench: Bench,
    spec: Callable[..., GenerateSpec],
    expected: Callable[[tuple[int, ...], int, int], list[int]],
    seed: int,
) -> None:
    rng = random.Random(seed)
    for name in "pq":
        bench.prefill(name)
    decodes = [bench.decode(name, peers=("p-1", "q-1")) for name in "def"]
    for node in decodes:
        node.pace_s = 0.002
    bench.static_urls = tuple(bench.net.nodes)
    await bench.start(
        max_attempts=8, pong_timeout_s=0.05, lease_s=0.2, busy_delay_s=0.001, request_timeout_s=20.0
    )
    await bench.ready(5)
    outcomes: Counter[str] = Counter()

    async def one(i: int) -> None:
        prompt, num_choices = (i, seed), 1 + i % 3
        leaves_after = i % 7 if i % 5 == 0 else None
        ids: dict[int, list[int]] = {choice: [] for choice in range(num_choices)}
        try:
            generation = await bench.service.generate(spec(f"r{i}", prompt, 25, num_choices))
            async for delta in generation:
                ids[delta.choice].extend(delta.token_ids)
                if leaves_after is not None and len(ids[0]) > leaves_after:
                    generation.cancel()
                    outcomes["left"] += 1
                    break
            else:
                outcomes["ended"] += 1
                assert all(len(tokens) == 25 for tokens in ids.values())
        except RequestError as error:
            outcomes[f"failed {error.status}"] += 1
        for choice, tokens in ids.items():
            assert tokens == expected(prompt, choice, len(tokens))

    async def torment() -> None:
        while True:
            hurt(rng, decodes)
            await asyncio.sleep(0.01)

    tormentor = asyncio.create_task(torment())
    pending = []
    for i in range(60):
        pending.append(asyncio.create_task(one(i)))
        await asyncio.sleep(0.002)
    for _ in range(100):
        assert bench.service.violations() == []
        await asyncio.sleep(0.005)
    tormentor.cancel()
    for node in decodes:
        heal(node)
    # What hangs on a node that stopped short would wait for its deadline: lose those links.
    for node in decodes:
        for link in list(node.links):
            link.reset("connection lost")
    async with asyncio.timeout(30):
        await asyncio.gather(*pending)
    assert set(outcomes) <= {"ended", "left", "failed 503"}
    assert (outcomes.total(), outcomes["ended"] > 30) == (60, True)
    assert bench.service.counters.attempts["peer_lost"] > 10
    assert bench.service.num_running == 0
