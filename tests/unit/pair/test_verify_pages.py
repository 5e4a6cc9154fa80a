"""A page that arrived other than it was sent fails its room, and nothing else."""

from __future__ import annotations

import pytest

from pdserve.runtime.config import VerifyPages

from .cluster import Pair, expected_tokens, prompt_of

PROMPT = prompt_of(90)  # 23 pages
NUM_PAGES = 23


def metric(pair: Pair, name: str) -> float:
    lines = pair.decode.metrics.render().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name}_total{{"))


@pytest.mark.parametrize(("mode", "num_verified"), [("off", 0), ("sample", 3), ("all", NUM_PAGES)])
def test_what_arrives_as_it_was_sent_is_served(mode: VerifyPages, num_verified: int) -> None:
    pair = Pair(verify_pages=mode)
    pair.start("a", PROMPT)
    pair.finish()
    assert pair.tokens("a") == expected_tokens(PROMPT, 4)
    assert (metric(pair, "pd_verified_pages"), metric(pair, "pd_corrupt_pages")) == (num_verified, 0)
    pair.start("b", PROMPT)  # pages of the prefix cache are verified like others
    pair.finish()
    assert pair.tokens("b") == expected_tokens(PROMPT, 4)


def test_a_corrupt_page_fails_its_room_retriably() -> None:
    pair = Pair(verify_pages="all")
    pair.decode.digests.is_held = True
    pair.start("a", PROMPT)
    pair.start("b", prompt_of(20, seed=1))
    pair.run()
    (_, pages_a), _ = pair.decode.digests.jobs
    assert len(pages_a) == NUM_PAGES
    pair.decode.pool.write(pages_a[7], 2, 1)
    pair.decode.digests.is_held = False
    pair.settle()
    failure = pair.stream("a").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("transfer_failed", True)
    assert "1 of 23 verified KV pages arrived corrupt" in failure.reason
    assert pair.tokens("a") == expected_tokens(PROMPT, 1), "the first token was prefill's own, and is right"
    pair.start("a", PROMPT, attempt=2, output_ids=expected_tokens(PROMPT, 1))
    pair.finish()
    assert pair.stream("a", 2, base=1).tokens[0] == expected_tokens(PROMPT, 4)[1:]
    assert pair.tokens("b") == expected_tokens(prompt_of(20, seed=1), 4)
    assert metric(pair, "pd_corrupt_pages") == 1


def test_digests_that_prefill_did_not_send_are_no_proof() -> None:
    pair = Pair(verify_pages="all")
    pair.prefill.digests.is_held = True
    pair.start("a", PROMPT)
    pair.run()
    assert pair.state("a") == "handoff", "it is not done before its digests are"
    pair.prefill.digests.is_held = False
    pair.finish()
    assert pair.tokens("a") == expected_tokens(PROMPT, 4)


def test_a_request_may_be_cancelled_while_its_pages_are_compared() -> None:
    pair = Pair(verify_pages="all")
    pair.decode.digests.is_held = True
    pair.start("a", PROMPT, choices=(0, 1))
    pair.run()
    pair.cancel("a", 0)
    assert pair.decode.allocator.counts().exposed == NUM_PAGES
    pair.cancel("a", 1)
    assert pair.decode.allocator.num_free == 32, "every write is in place: nothing to wait for"
    pair.decode.digests.is_held = False
    pair.finish()


def test_one_choice_may_go_while_the_pages_are_compared() -> None:
    pair = Pair(verify_pages="all")
    pair.decode.digests.is_held = True
    pair.start("a", PROMPT[:30], choices=(0, 1))
    pair.run()
    pair.cancel("a", 0)
    pair.decode.digests.is_held = False
    pair.finish()
    assert pair.tokens("a", 1) == expected_tokens(PROMPT[:30], 4, 1)


def test_prefill_fails_while_digests_are_made() -> None:
    pair = Pair(verify_pages="all")
    pair.prefill.digests.is_held = True
    pair.start("a", PROMPT)
    pair.compute(pair.prefill)
    pair.backend.fail(1)
    pair.settle()
    assert pair.stream("a").failure is not None
    pair.prefill.digests.is_held = False
    pair.finish()
