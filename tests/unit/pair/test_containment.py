"""A fault in handling one message, or in making a batch of one row, ends that request on both nodes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pdserve.engine.schedule_batch import ScheduleBatch
from pdserve.messages.node import CallReply, GetRequestState
from pdserve.messages.peer import PeerToDecode, PeerWelcome
from pdserve.runtime.errors import BrokenInvariantError
from pdserve.runtime.timing import UNSCALED

from .cluster import Pair, prompt_of

BAD, GOOD = prompt_of(10, seed=1), prompt_of(10)


def raising(error: Exception) -> Callable[..., Any]:
    def method(*_: object, **__: object) -> None:
        raise error

    return method


def fails_alone(pair: Pair, code: str, *, retriable: bool) -> None:
    failure = pair.stream("bad").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == (code, retriable)
    assert "KeyError" in failure.reason
    for containment in (*pair.prefill.containments, *pair.decode.containments):
        containment.num_faults = 0
    pair.start("good", GOOD)
    pair.finish()
    pair.check_answer("good", GOOD, 4)


@pytest.mark.parametrize(
    "place",
    ["waiting._outputs.open", "waiting._impossible", "pages.need", "handoffs.is_ready"],
)
def test_a_request_that_decode_fails_to_accept(pair_of_checks: Pair, place: str) -> None:
    pair = pair_of_checks
    *parts, method = place.split(".")
    part: Any = pair.decode
    for name in parts:
        part = getattr(part, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, method, raising(KeyError("x")))
        pair.generate("bad", BAD)
        pair.decode.loop.step(pair.clock.now)
    fails_alone(pair, "invalid", retriable=False)


@pytest.mark.parametrize("place", ["scheduler._has_room", "jobs.impossible"])
def test_a_request_that_prefill_fails_to_accept(pair_of_checks: Pair, place: str) -> None:
    pair = pair_of_checks
    part, method = place.split(".")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(getattr(pair.prefill, part), method, raising(KeyError("x")))
        patch.setattr(pair.prefill, "check", lambda: None)
        pair.start("bad", BAD)
    fails_alone(pair, "invalid", retriable=False)


def test_a_first_token_that_decode_fails_to_take(pair_of_checks: Pair) -> None:
    pair = pair_of_checks
    pair.start("bad", BAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair.decode.handoffs, "_take_first_token", raising(KeyError("x")))
        patch.setattr(pair.decode, "check", lambda: None)
        pair.run()
    fails_alone(pair, "transfer_failed", retriable=True)


def test_a_welcome_that_decode_fails_to_take(pair_of_checks: Pair) -> None:
    """The peer goes on answering pings: the epoch ends at once, or it would wait for a second welcome."""
    pair = pair_of_checks
    on_message = pair.decode.rooms.on_message

    def faulty(address: str, message: PeerToDecode, now: float) -> Any:  # noqa: ANN401
        if isinstance(message, PeerWelcome):
            raise KeyError("x")
        return on_message(address, message, now)

    pair.network.cut()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair.decode.rooms, "on_message", faulty)
        patch.setattr(pair.decode, "check", lambda: None)
        pair.advance(0.5)
    (peer,) = pair.decode.rooms.peers()
    assert "peer_welcome failed here: KeyError: 'x'" in peer.reason
    for containment in pair.decode.containments:
        containment.num_faults = 0
    pair.advance(UNSCALED.max_peer_retry_s)
    pair.start("after", GOOD)
    pair.finish()
    pair.check_answer("after", GOOD, 4)


def test_a_question_that_raises_is_answered(pair_of_checks: Pair) -> None:
    pair = pair_of_checks
    for node, ask in ((pair.prefill, pair.to_prefill), (pair.decode, pair.to_decode)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(node.report, "find", raising(ValueError("no")))
            patch.setattr(node, "check", lambda: None)
            ask(GetRequestState(call_id=7, request_id="r"))
        reply = pair.last_reply(node)
        assert isinstance(reply, CallReply)
        assert (reply.call_id, reply.success) == (7, False)
        assert "get_request_state failed here: ValueError: no" in reply.message
        for containment in node.containments:
            containment.num_faults = 0


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_row_of_which_no_batch_can_be_made(pair_of_checks: Pair, role: str) -> None:
    """As a value did that no tensor holds. The others of the batch go on."""
    pair = pair_of_checks
    node = pair.prefill if role == "prefill" else pair.decode
    computing: Any = pair.prefill.jobs if role == "prefill" else pair.decode.running
    build = computing._build

    def faulty(batch: ScheduleBatch) -> Any:  # noqa: ANN401
        if any(tuple(row.token_ids[:10]) == tuple(BAD) for row in batch.rows):
            raise KeyError("x")
        return build(batch)

    computing._build = faulty
    node.check = lambda: None  # type: ignore[method-assign]
    pair.generate("bad", BAD)
    pair.start("beside", GOOD)
    pair.finish()
    pair.check_answer("beside", GOOD, 4)
    fails_alone(pair, "invalid", retriable=False)


def test_a_broken_invariant_ends_the_process(pair_of_checks: Pair) -> None:
    pair = pair_of_checks
    pair.decode.waiting.accept = raising(BrokenInvariantError("two owners"))  # type: ignore[method-assign]
    with pytest.raises(BrokenInvariantError):
        pair.start("bad", BAD)


@pytest.fixture
def pair_of_checks() -> Pair:
    """Both nodes check themselves whenever they settle, but for the time that a test breaks one."""
    return Pair()
