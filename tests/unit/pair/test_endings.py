"""Every way in which a request ends early, in every state: what the client sees, and when pages come back."""

from __future__ import annotations

from typing import Any

import pytest

from pdserve.messages.node import (
    AbortRequests,
    CallReply,
    CancelRequest,
    GetRequestState,
    RequestStateReply,
)
from pdserve.transfer.decode_rooms import RoomState

from .cluster import SETTLE_S, Pair, expected_tokens, prompt_of

PROMPT = prompt_of(14)
STATES = [
    "waiting",
    "handed to a queue",
    "computing",
    "writing",
    "after the first token",
    "running",
]


def bring_to(pair: Pair, state: str, request_id: str = "a", **options: Any) -> None:  # noqa: ANN401
    """A request of two chunks, up to this state; the writes up to here have started."""
    pair.backend.has_started = True
    if state == "waiting":
        pair.start("other", prompt_of(9, seed=9), max_tokens=120)  # takes all of decode's pages
        assert pair.decode.capacity().pages == 0
        pair.start(request_id, PROMPT, max_tokens=8, **options)
        assert pair.state(request_id) == "waiting"
        return
    if state == "handed to a queue":
        pair.prefill.allocator.allocate_private("test", 30)
    pair.generate(request_id, PROMPT, max_tokens=8, **options)
    if state == "handed to a queue":
        for _ in range(3):  # `settle` would find that "test" is no job
            pair.step()
        assert pair.prefill.engine.batches == []
        return
    pair.settle()
    if state == "computing":
        return
    pair.compute()  # one chunk is done, and on the wire
    if state == "writing":
        return
    pair.compute()
    assert pair.tokens(request_id) == expected_tokens(PROMPT, 1)
    if state == "after the first token":
        return
    pair.write()
    assert pair.state(request_id) == "running"
    assert len(pair.decode.engine.queued) == 1


def end_wait(pair: Pair, state: str) -> None:
    """What `bring_to` took goes back."""
    if state == "handed to a queue":
        pair.prefill.allocator.free_private("test")
    if state == "waiting":
        pair.cancel("other")


@pytest.fixture
def pair() -> Pair:
    return Pair(chunk_tokens=8, conservativeness=11.0)  # all of a request's growth is counted


@pytest.mark.parametrize("state", STATES)
def test_a_cancelled_request_leaves_nothing_behind(pair: Pair, state: str) -> None:
    bring_to(pair, state)
    num_tokens = len(pair.tokens("a"))
    pair.decode.server.deliver(b"router", CancelRequest(request_id="a", attempt=1))
    pair.step()
    assert pair.state("a") == ""
    end_wait(pair, state)
    pair.finish()
    stream = pair.stream("a")
    assert len(stream.tokens.get(0, [])) == num_tokens, "the client wants no more, and gets no more"
    assert (stream.finishes, stream.failure) == ({}, None)


@pytest.mark.parametrize("state", STATES)
def test_an_aborted_request_ends_with_what_it_has(pair: Pair, state: str) -> None:
    bring_to(pair, state)
    num_tokens = len(pair.tokens("a"))
    pair.decode.server.deliver(b"admin", AbortRequests(call_id=7, request_id="a"))
    pair.step()
    end_wait(pair, state)
    pair.finish()
    stream = pair.stream("a")
    assert stream.reasons == {0: "abort"}
    assert stream.tokens == {0: expected_tokens(PROMPT, num_tokens)}
    reply = pair.last_reply(pair.decode, b"admin")
    assert reply == CallReply(call_id=7, success=True, message="1 requests aborted")


@pytest.mark.parametrize("state", STATES)
def test_f10_an_attempt_is_aborted_with_what_was_not_sent_yet(pair: Pair, state: str) -> None:
    bring_to(pair, state, stream_interval=16)
    pair.decode.server.deliver(b"router", CancelRequest(request_id="a", attempt=1, aborts=True))
    end_wait(pair, state)
    pair.finish()
    stream = pair.stream("a")
    assert stream.reasons == {0: "abort"}
    assert stream.tokens.get(0, []) == expected_tokens(PROMPT, len(stream.tokens.get(0, [])))


def test_f10_what_was_not_sent_comes_with_the_abort(pair: Pair) -> None:
    pair.start("a", PROMPT, max_tokens=12, stream_interval=16)
    for _ in range(2):
        pair.compute()
    pair.write()
    for _ in range(5):
        pair.compute()
    assert len(pair.stream("a").tokens[0]) == 1, "behind the first one, they go out sixteen at once"
    pair.decode.server.deliver(b"router", CancelRequest(request_id="a", attempt=1, aborts=True))
    pair.finish()
    assert pair.stream("a").reasons == {0: "abort"}
    assert pair.stream("a").tokens == {0: expected_tokens(PROMPT, 6)}


@pytest.mark.parametrize("state", STATES)
def test_a_client_that_left_is_found_out_or_tells(pair: Pair, state: str) -> None:
    """Its socket is gone: the first message that cannot be sent ends all that it asked for."""
    bring_to(pair, state)
    pair.decode.server.gone.add(b"router")
    if state == "handed to a queue":
        end_wait(pair, state)
    pair.finish()
    assert len(pair.decode.engine.batches) <= 2, "no step more than the one that found out"


@pytest.mark.parametrize(
    ("state", "retriable"),
    [
        ("waiting", False),
        ("handed to a queue", True),
        ("computing", True),
        ("writing", True),
        ("after the first token", True),
        ("running", False),
    ],
)
def test_a_deadline_ends_a_request_in_every_state(pair: Pair, state: str, retriable: bool) -> None:
    bring_to(pair, state, deadline_s=5.0)
    if state == "handed to a queue":
        for _ in range(55):  # the page taken by the test belongs to nobody: no invariant checks
            pair.now += 0.1
            pair.step()
    else:
        pair.advance(6.0)
    failure = pair.stream("a").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("deadline", retriable)
    end_wait(pair, state)
    pair.finish()


def test_one_choice_may_be_cancelled_alone(pair: Pair) -> None:
    pair.start("a", PROMPT, max_tokens=6, choices=(0, 1, 2))
    pair.compute()
    pair.cancel("a", 0)  # before its first token; it would have owned the prompt's pages
    pair.compute()
    pair.write()
    pair.compute()
    pair.cancel("a", 2)  # with a forward in flight
    pair.finish()
    stream = pair.stream("a")
    assert stream.reasons == {1: "length"}
    assert 0 not in stream.tokens
    assert stream.tokens[2] == expected_tokens(PROMPT, 2, 2)
    pair.check_answer("a", PROMPT, 6, 1)


@pytest.mark.parametrize("is_colocated", [False, True])
@pytest.mark.parametrize("choice", [0, 1])
def test_one_choice_may_be_cancelled_while_its_request_waits(is_colocated: bool, choice: int) -> None:
    pair = Pair(decode_pages=8, is_colocated=is_colocated)
    pair.start("first", prompt_of(20, seed=1), max_tokens=12)
    pair.start("a", PROMPT, max_tokens=6, choices=(0, 1))
    assert pair.state("a") == "waiting"
    pair.cancel("a", choice)
    pair.finish()
    assert pair.stream("a").reasons == {1 - choice: "length"}
    pair.check_answer("a", PROMPT, 6, 1 - choice)


def test_cancelling_the_last_choice_ends_the_hand_off(pair: Pair) -> None:
    pair.start("a", PROMPT, choices=(0, 1))
    pair.cancel("a", 0)
    assert pair.state("a") == "handoff"
    pair.cancel("a", 1)
    assert pair.state("a") == ""
    pair.finish()
    assert pair.stream("a").tokens == {}


def test_late_and_unknown_cancels_are_no_error(pair: Pair) -> None:
    pair.start("a", PROMPT)
    pair.run()
    pair.cancel("a")
    pair.cancel("a")
    pair.cancel("unknown", 1)
    pair.finish()


def test_abort_all_leaves_other_rooms_of_nobody(pair: Pair) -> None:
    pair.start("running", prompt_of(6, seed=1), max_tokens=20)
    for _ in range(2):
        pair.backend.finish()
        pair.compute(pair.prefill)
    pair.backend.finish()
    pair.start("handoff", PROMPT)
    pair.to_decode(AbortRequests(call_id=1, all_requests=True), b"admin")
    for name in ("running", "handoff"):
        assert pair.stream(name).reasons == {0: "abort"}
    pair.finish()
    assert pair.last_reply(pair.decode, b"admin") == CallReply(
        call_id=1, success=True, message="2 requests aborted"
    )


def test_a_prefill_forward_keeps_its_pages_until_it_is_done(pair: Pair) -> None:
    pair.start("a", PROMPT)
    assert len(pair.prefill.engine.queued) == 2
    pair.cancel("a")
    assert pair.prefill.allocator.counts().private == 4
    assert not pair.prefill.scheduler.is_idle
    pair.compute()
    assert pair.prefill.allocator.counts().private == 4
    pair.compute()
    assert pair.prefill.allocator.num_free == 32
    assert pair.prefill.rooms.is_idle
    pair.finish()


# ---- quarantine -------------------------------------------------------------------------------------


def test_quarantined_pages_are_given_to_nobody_before_prefill_has_drained() -> None:
    pair = Pair(chunk_tokens=8, decode_pages=6)
    pair.backend.has_started = True
    pair.start("a", PROMPT)  # 4 pages of 6, and one promised
    pair.compute()
    pair.cancel("a")
    assert pair.decode.allocator.counts().quarantined == 4
    pair.start("b", prompt_of(12, seed=1), max_tokens=1)
    assert pair.state("b") == "waiting"
    pair.advance(20.0)
    assert pair.decode.allocator.counts().quarantined == 4, "no timeout frees a page"
    pair.write()  # a's pages; prefill has drained
    assert pair.state("b") == "handoff"
    pair.finish()
    pair.check_answer("b", prompt_of(12, seed=1), 1)


def test_a_failed_write_fails_the_attempt_and_its_pages_settle(pair: Pair) -> None:
    pair.start("a", PROMPT)
    pair.compute()
    pair.compute()
    assert pair.tokens("a") == expected_tokens(PROMPT, 1)
    pair.backend.fail(1)
    pair.settle()
    failure = pair.stream("a").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("transfer_failed", True)
    (room,) = pair.decode.allocator.quarantined_rooms()
    assert pair.decode.rooms.state_of(room) is RoomState.SETTLING
    pair.advance(SETTLE_S)
    pair.backend.land_late()  # the fake asserts that nobody has these pages yet
    assert pair.decode.allocator.counts().quarantined == 4
    pair.advance(1.5)
    assert pair.decode.allocator.num_free == 32
    pair.start("a", PROMPT, attempt=2, output_ids=expected_tokens(PROMPT, 1))
    pair.finish()
    assert pair.stream("a", 2, base=1).tokens == {0: expected_tokens(PROMPT, 4)[1:]}


def test_drained_after_a_failure_waits_for_the_writes_still_in_flight(pair: Pair) -> None:
    pair.backend.has_started = True
    pair.start("a", prompt_of(22))
    pair.compute()
    pair.compute()
    assert pair.backend.num_outstanding == 2
    pair.backend.fail(1)
    pair.settle()
    (room,) = pair.decode.allocator.quarantined_rooms()
    assert pair.decode.rooms.state_of(room) is RoomState.DRAINING
    pair.advance(10.0)
    assert pair.decode.rooms.state_of(room) is RoomState.DRAINING
    pair.write()
    assert pair.decode.rooms.state_of(room) is RoomState.SETTLING
    pair.backend.land_late()
    pair.finish()


def test_a_held_loop_counts_the_settling_time_from_the_start(pair: Pair) -> None:
    pair.start("a", PROMPT)
    pair.compute()
    pair.backend.fail()
    pair.settle()
    pair.now += 60.0  # both processes are frozen
    pair.settle()
    assert pair.decode.allocator.counts().quarantined == 4
    pair.backend.land_late()
    pair.advance(SETTLE_S + 1.5)
    assert pair.decode.allocator.counts().quarantined == 0
    pair.finish()


# ---- the link ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_started", [False, True])
def test_a_link_lost_in_a_hand_off_is_made_again_and_asked_for_the_pages(has_started: bool) -> None:
    pair = Pair(chunk_tokens=8)
    pair.backend.has_started = has_started
    pair.start("a", PROMPT)
    pair.compute()
    pair.network.cut()
    pair.settle()
    failure = pair.stream("a").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("peer_lost", True)
    assert pair.decode.allocator.counts().quarantined == 4
    assert pair.decode.rooms.ready_peers() == {}

    pair.advance(1.0)
    (peer,) = pair.prefill.rooms.peers()
    assert peer.epoch == 2, "a new epoch"
    assert pair.decode.rooms.ready_peers() != {}
    (room,) = pair.decode.allocator.quarantined_rooms()
    expected = RoomState.DRAINING if has_started else RoomState.SETTLING
    assert pair.decode.rooms.state_of(room) is expected, "asked, and answered once nothing is outstanding"
    pair.start("b", prompt_of(9, seed=1))
    pair.finish()
    pair.check_answer("b", prompt_of(9, seed=1), 4)


def test_messages_of_the_old_epoch_are_lost_with_it(pair: Pair) -> None:
    """HandoffDone was on the wire when the link broke: prefill knows no such room any more."""
    pair.start("a", PROMPT)
    pair.compute()
    pair.compute()
    pair.network.holds_to_decode = True
    pair.write()
    assert pair.prefill.rooms.is_idle
    pair.network.cut()
    pair.network.holds_to_decode = False
    pair.settle()
    assert pair.stream("a").failure is not None
    assert pair.decode.allocator.counts().quarantined == 4
    pair.advance(1.0)
    (room,) = pair.decode.allocator.quarantined_rooms()
    assert pair.decode.rooms.state_of(room) is RoomState.SETTLING, "what became of it is not known"
    pair.finish()


def test_a_running_request_needs_its_prefill_node_no_more(pair: Pair) -> None:
    pair.start("a", PROMPT, max_tokens=10)
    pair.compute()
    pair.compute()
    pair.write()
    pair.network.cut()
    pair.finish()
    pair.check_answer("a", PROMPT, 10)


def test_a_waiting_request_is_told_when_its_prefill_node_is_gone() -> None:
    pair = Pair(max_running=1)
    pair.start("a", PROMPT, max_tokens=10)
    pair.compute()
    pair.compute()
    pair.write()
    pair.start("b", prompt_of(9, seed=1))
    assert pair.state("b") == "waiting"
    pair.network.cut()
    while pair.state("a"):
        pair.compute(pair.decode)
    failure = pair.stream("b").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("not_ready", True)
    pair.finish()


def test_a_silent_decode_node_ends_its_rooms_on_prefill(pair: Pair) -> None:
    pair.start("a", PROMPT)
    pair.network.holds_to_prefill = True
    for _ in range(120):
        pair.now += 0.1
        pair.prefill.loop.step(pair.now)
    assert pair.prefill.rooms.peers() == []
    pair.network.holds_to_prefill = False
    pair.finish()
    assert pair.stream("a").failure is not None


# ---- what people can see of it ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "on_decode", "on_prefill"),
    [
        ("waiting", "waiting", ""),
        ("computing", "handoff", "computing"),
        ("after the first token", "handoff", "sending"),
        ("running", "running", ""),
    ],
)
def test_the_state_of_a_request(pair: Pair, state: str, on_decode: str, on_prefill: str) -> None:
    bring_to(pair, state)
    pair.advance(3.0)
    for node, send, name in (
        (pair.decode, pair.to_decode, on_decode),
        (pair.prefill, pair.to_prefill, on_prefill),
    ):
        send(GetRequestState(call_id=3, request_id="a"), b"admin")
        reply = pair.last_reply(node, b"admin")
        assert isinstance(reply, RequestStateReply)
        assert reply.state == name
        if name:
            assert reply.age_s == pytest.approx(3.0)
            assert reply.waits_for
    end_wait(pair, state)
    pair.finish()


def test_shutting_down_fails_what_is_open_retriably(pair: Pair) -> None:
    bring_to(pair, "after the first token")
    pair.decode.scheduler.fail_open_requests()
    failure = pair.stream("a").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("shutting_down", True)
    assert pair.tokens("a") == expected_tokens(PROMPT, 1), "what it has goes out first"


def test_a_prefill_node_that_shuts_down_fails_its_rooms_retriably(pair: Pair) -> None:
    bring_to(pair, "computing")
    pair.prefill.scheduler.fail_open_requests()
    pair.settle()
    failure = pair.stream("a").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("shutting_down", True)
    pair.finish()
