"""A decode node that prefills locally: no peer, chunks beside decode rows, the same answers."""

from __future__ import annotations

import pytest

from pdserve.messages.node import AbortRequests, Roster
from pdserve.messages.sampling import TokenLogprob

from .cluster import Pair, expected_tokens, prompt_of


@pytest.fixture
def pair() -> Pair:
    return Pair(is_colocated=True, chunk_tokens=8, max_running=4)


def rows_of_batches(pair: Pair) -> list[list[tuple[str | int, int, int]]]:
    return [[(row.row_id, row.start, row.end) for row in batch.rows] for batch in pair.decode.engine.batches]


def test_chunks_ride_along_with_decode_rows(pair: Pair) -> None:
    pair.start("a", prompt_of(6), max_tokens=5)
    pair.compute()
    pair.start("b", prompt_of(12, seed=1), max_tokens=3)
    pair.finish()
    assert rows_of_batches(pair) == [
        [("a", 0, 6)],
        [("a", 6, 7)],
        [("a", 7, 8), ("b", 0, 7)],  # the budget of 8 counts decode rows
        [("a", 8, 9), ("b", 7, 12)],
        [("a", 9, 10), ("b", 12, 13)],
        [("b", 13, 14)],
    ]
    pair.check_answer("a", prompt_of(6), 5)
    pair.check_answer("b", prompt_of(12, seed=1), 3)


@pytest.mark.parametrize("num_tokens", [1, 4, 7, 8, 9, 17])
def test_the_answers_are_those_of_a_hand_off(pair: Pair, num_tokens: int) -> None:
    apart = Pair(chunk_tokens=8)
    options = {"choices": (0, 1), "max_tokens": 7, "num_logprobs": 0, "num_prompt_logprobs": 0}
    options["logprob_token_ids"] = (9, 3)
    for each in (pair, apart):
        each.start("a", prompt_of(num_tokens), **options)
        each.finish()
    here, there = pair.stream("a"), apart.stream("a")
    assert (here.tokens, here.finishes) == (there.tokens, there.finishes)
    assert here.prompt_logprobs == there.prompt_logprobs
    assert here.logprobs == there.logprobs
    told = [*here.prompt_logprobs[1:], *here.logprobs[0], *here.logprobs[1]]
    assert {logprob and logprob.named for logprob in told} == {((9, -9.0), (3, -3.0))}
    assert pair.decode.report.load(pair.now).num_prompt_tokens_computed == num_tokens


def test_prompt_logprobs_of_several_chunks(pair: Pair) -> None:
    prompt = prompt_of(20)
    pair.start("a", prompt, num_prompt_logprobs=0, prompt_logprobs_start=5)
    pair.finish()
    assert pair.stream("a").prompt_logprobs == tuple(TokenLogprob(prompt[p], -float(p)) for p in range(5, 20))


def test_a_first_token_may_be_the_last(pair: Pair) -> None:
    pair.start("a", prompt_of(9), max_tokens=1)
    pair.finish()
    pair.check_answer("a", prompt_of(9), 1)
    assert len(pair.decode.engine.batches) == 2


@pytest.mark.parametrize("num_forwards", [0, 1])
@pytest.mark.parametrize("how", ["cancel", "abort", "client gone"])
def test_an_end_while_chunks_run(pair: Pair, num_forwards: int, how: str) -> None:
    pair.start("a", prompt_of(20), choices=(0, 1))
    for _ in range(num_forwards):
        pair.compute()
    if how == "cancel":
        pair.cancel("a")
    elif how == "abort":
        pair.to_decode(AbortRequests(call_id=1, request_id="a"))
        assert pair.stream("a").reasons == {0: "abort", 1: "abort"}
    else:
        pair.decode.server.gone.add(b"router")
    if how != "client gone":
        assert pair.state("a") == ""
        assert pair.decode.allocator.counts().private == 5, "a forward still writes them"
    pair.finish()


def test_a_deadline_while_chunks_run(pair: Pair) -> None:
    pair.start("a", prompt_of(20), deadline_s=1.0)
    pair.advance(2.0)
    failure = pair.stream("a").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("deadline", False)
    pair.finish()


def test_the_first_choice_may_end_before_the_fork(pair: Pair) -> None:
    prompt = prompt_of(10)
    pair.start("a", prompt, choices=(0, 1), stop_token_ids=(expected_tokens(prompt, 1)[0],), max_tokens=5)
    pair.finish()
    assert pair.stream("a").reasons == {0: "stop", 1: "length"}
    pair.check_answer("a", prompt, 5, choice=1)


def test_it_connects_to_nobody(pair: Pair) -> None:
    pair.to_decode(Roster(router_id="router", nodes=(pair.prefill.status.entry,)))
    assert pair.decode.rooms.peers() == []
