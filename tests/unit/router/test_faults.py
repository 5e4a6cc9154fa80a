"""Random faults: whatever nodes do, every stream is the one right stream, or ends with an error."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest

from pdserve.api.generation import ChoiceDelta, GenerateSpec

from .lab import Answer, Lab, ScriptedNode

FAULTS = ("kill", "restart", "freeze", "busy", "fail", "reset", "stop short")


def hurt(rng: random.Random, nodes: list[ScriptedNode]) -> None:
    """One fault at one node, and another node is well again."""
    node = rng.choice(nodes)
    match rng.choice(FAULTS):
        case "kill":
            node.die()
        case "restart":
            node.start_again(f"{node.entry.incarnation}+")
        case "freeze":
            node.answers_pings = False
        case "busy":
            node.fail_with += ["busy"] * rng.randrange(4)
        case "fail":
            node.fail_with += [rng.choice(["transfer_failed", "peer_lost"])]
        case "reset":
            node.reset()
        case "stop short":
            node.tokens_per_attempt = rng.randrange(4)
    heal(rng.choice(nodes))


def heal(node: ScriptedNode) -> None:
    node.answers_pings, node.alive, node.tokens_per_attempt = True, True, None


@pytest.mark.parametrize("seed", range(12))
def test_every_stream_is_right_under_faults(
    spec: Callable[..., GenerateSpec],
    expected: Callable[[tuple[int, ...], int, int], list[int]],
    seed: int,
) -> None:
    rng, lab = random.Random(seed), Lab()
    for name in "pq":
        lab.prefill(name)
    decodes = [lab.decode(name, peers=("p-1", "q-1")) for name in "def"]
    for node in decodes:
        node.pace_s = 0.002
    lab.static_urls = tuple(lab.nodes)
    lab.start(max_attempts=8, pong_timeout_s=0.05, lease_s=0.2, busy_delay_s=0.001, request_timeout=20.0)
    lab.ready(5)
    answers: list[Answer] = []
    num_left = 0

    def leave(answer: Answer, after: int, delta: ChoiceDelta) -> None:
        nonlocal num_left
        if len(answer.ids.get(0, [])) > after and not answer.is_over:
            num_left += 1
            answer.cancel()
            answer.is_over = True

    for i in range(60):
        answer = lab.generate(spec(f"r{i}", (i, seed), 25, 1 + i % 3))
        if i % 5 == 0:
            answer.on_delta = partial(leave, answer, i % 7)
        answers.append(answer)
        if i % 5 == 0:
            hurt(rng, decodes)
        lab.run(0.002)
    for number in range(100):
        assert lab.state.violations() == []
        if number % 2 == 0:
            hurt(rng, decodes)
        lab.run(0.005)
    for node in decodes:
        heal(node)
    # What hangs on a node that stopped short would wait for its deadline: lose those connections.
    for node in decodes:
        node.reset()
    lab.until(lambda: all(answer.is_over for answer in answers))
    failed = Counter(answer.error.status for answer in answers if answer.error is not None)
    assert set(failed) <= {503}
    num_ended = 0
    for i, answer in enumerate(answers):
        for choice, tokens in answer.ids.items():
            assert tokens == expected((i, seed), choice, len(tokens))
        finishes = [delta for delta in answer.deltas if delta.finish_reason is not None]
        if answer.error is None and len(finishes) == 1 + i % 3:
            num_ended += 1
            assert all(len(tokens) == 25 for tokens in answer.ids.values())
    assert num_ended + failed.total() + num_left >= 60
    assert num_ended > 30
    assert lab.state.counters.attempts["peer_lost"] > 10
    assert lab.requests.num_running == 0
    assert lab.state.violations() == []
