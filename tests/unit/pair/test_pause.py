"""Pause and continue on both nodes: what becomes of requests, rooms are served, deadlines wait."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pdserve.messages.node import CallReply
from pdserve.messages.operation import ContinueGeneration, PauseGeneration
from pdserve.messages.weights import CommitWeights, FromDisk, PrepareWeights
from pdserve.runtime.pause_gate import PauseMode

from .cluster import DecodeNode, Pair, PrefillNode, expected_tokens, prompt_of

ADMIN = b"admin"
PROMPT = prompt_of(14)


def tell(pair: Pair, node: PrefillNode | DecodeNode, message: PauseGeneration | ContinueGeneration) -> str:
    send = pair.to_decode if node is pair.decode else pair.to_prefill
    send(message, ADMIN)
    reply = pair.last_reply(node, ADMIN)
    assert isinstance(reply, CallReply)
    assert reply.success
    return reply.message


def pause(pair: Pair, mode: PauseMode) -> None:
    for node in (pair.prefill, pair.decode):
        assert tell(pair, node, PauseGeneration(call_id=1, mode=mode)) == "paused"


def resume(pair: Pair) -> None:
    for node in (pair.prefill, pair.decode):
        assert tell(pair, node, ContinueGeneration(call_id=2)) == "continued"


def in_prefill(pair: Pair) -> None:
    """One chunk is done, another runs."""
    pair.compute(pair.prefill)


def in_transfer(pair: Pair) -> None:
    """The first token is here, pages are on the wire."""
    while not pair.stream("a").tokens:
        pair.compute(pair.prefill)


def in_decode(pair: Pair) -> None:
    in_transfer(pair)
    pair.write()
    pair.compute(pair.decode)


STAGES = [in_prefill, in_transfer, in_decode]


@pytest.mark.parametrize("reach", STAGES)
def test_in_place_nothing_is_computed_and_nothing_is_lost(reach: Callable[[Pair], None]) -> None:
    pair = Pair()
    pair.start("a", PROMPT, deadline_s=20.0)
    reach(pair)
    pause(pair, "in_place")
    pair.run()  # what was on the engines and on the wire ends
    num_batches = [len(node.engine.batches) for node in (pair.prefill, pair.decode)]
    num_tokens = len(pair.stream("a").tokens.get(0, ()))
    pair.advance(60.0)
    assert [len(node.engine.batches) for node in (pair.prefill, pair.decode)] == num_batches
    assert len(pair.stream("a").tokens.get(0, ())) == num_tokens < 4
    assert pair.stream("a").failure is None, "its deadline was 20 s"
    resume(pair)
    pair.finish()
    pair.check_answer("a", PROMPT, 4)


def test_rooms_are_served_while_paused() -> None:
    pair = Pair()
    pair.start("a", PROMPT)
    in_transfer(pair)
    pause(pair, "in_place")
    assert pair.state("a") == "handoff"
    pair.write()
    assert pair.state("a") == "running", "the hand-off ended in the pause"
    assert pair.stream("a").failure is None
    resume(pair)
    pair.finish()
    pair.check_answer("a", PROMPT, 4)


def test_a_deadline_goes_on_where_it_was() -> None:
    pair = Pair()
    pair.start("a", prompt_of(40), deadline_s=20.0)
    in_prefill(pair)
    pause(pair, "in_place")
    pair.run()
    pair.advance(60.0)
    resume(pair)
    (room,) = pair.prefill.rooms._rooms.values()
    (request,) = pair.decode.requests
    for deadline in (room.deadline, request.deadline_s):
        assert 0.0 < deadline - pair.now <= 20.0, "no second of the pause counts, and none is given"
    pair.now += 21.0
    pair.settle()
    failure = pair.stream("a").failure
    assert failure is not None
    assert failure.code == "deadline"
    pair.finish()


@pytest.mark.parametrize("reach", STAGES)
def test_retracted_requests_fail_at_no_cost_and_can_be_tried_again(reach: Callable[[Pair], None]) -> None:
    pair = Pair()
    pair.start("a", PROMPT)
    reach(pair)
    kept = tuple(pair.stream("a").tokens.get(0, ()))
    pause(pair, "retract")
    failure = pair.stream("a").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("paused", True)
    pair.run()
    assert pair.decode.scheduler.is_idle
    assert pair.prefill.scheduler.is_idle
    pair.start("a", PROMPT, attempt=2, output_ids=kept)
    pair.run()
    assert not pair.stream("a", 2, base=len(kept)).tokens, "a new attempt waits for the end of the pause"
    resume(pair)
    pair.finish()
    assert (*kept, *pair.stream("a", 2, base=len(kept)).tokens[0]) == tuple(expected_tokens(PROMPT, 4))


@pytest.mark.parametrize("reach", STAGES)
def test_aborted_requests_end(reach: Callable[[Pair], None]) -> None:
    pair = Pair()
    pair.start("a", PROMPT)
    reach(pair)
    pause(pair, "abort")
    assert pair.stream("a").reasons == {0: "abort"}
    pair.run()
    resume(pair)
    pair.finish()


def test_prefill_alone_retracts_and_aborts_too() -> None:
    for mode, expected in (("retract", "paused"), ("abort", None)):
        pair = Pair()
        pair.start("a", PROMPT)
        in_prefill(pair)
        tell(pair, pair.prefill, PauseGeneration(call_id=1, mode=mode))  # type: ignore[arg-type]
        stream = pair.stream("a")
        assert (stream.failure and stream.failure.code) == expected
        assert stream.reasons == ({} if expected else {0: "abort"})
        assert tell(pair, pair.prefill, ContinueGeneration(call_id=2)) == "continued"
        pair.finish()


def test_weights_are_swapped_in_a_pause_that_retracted_all() -> None:
    pair = Pair()
    pair.start("a", PROMPT)
    in_decode(pair)
    pause(pair, "retract")
    pair.run()
    for node, send in ((pair.prefill, pair.to_prefill), (pair.decode, pair.to_decode)):
        send(
            PrepareWeights(
                call_id=3, update_id="u", source=FromDisk(model_path="weights-2"), weight_version="v2"
            ),
            ADMIN,
        )
        pair.compute(node)
        send(CommitWeights(call_id=4, update_id="u"), ADMIN)
        reply = pair.last_reply(node, ADMIN)
        assert isinstance(reply, CallReply)
        assert (reply.call_id, reply.success) == (4, True)
    resume(pair)
    pair.advance(1.0)
    pair.finish()


def test_twice_is_no_error() -> None:
    pair = Pair()
    pause(pair, "in_place")
    pause(pair, "retract")
    resume(pair)
    assert tell(pair, pair.decode, ContinueGeneration(call_id=3)) == "it was not paused"
    pair.start("a", PROMPT)
    pair.finish()
    pair.check_answer("a", PROMPT, 4)
