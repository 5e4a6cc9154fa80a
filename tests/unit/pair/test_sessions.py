"""A session's pages on the decode node: they stay for its next turn, and block nobody."""

from __future__ import annotations

from typing import Any

from pdserve.messages.node import CallReply, FlushCache
from pdserve.messages.operation import CloseSession

from .cluster import PAGE_SIZE, Pair, expected_tokens, prompt_of

SESSION: dict[str, Any] = {"session_id": "s", "session_timeout_s": 1000.0}


def turn(pair: Pair, request_id: str, prompt: tuple[int, ...], **options: Any) -> tuple[int, ...]:  # noqa: ANN401
    """Runs one request to its end; the conversation with it."""
    pair.start(request_id, prompt, max_tokens=4, **options)
    pair.finish()
    pair.check_answer(request_id, prompt, 4)
    return (*prompt, *expected_tokens(prompt, 4))


def test_the_next_turn_finds_its_pages_when_others_filled_the_pool_since() -> None:
    for session, is_kept in ((SESSION, True), ({}, False)):
        pair = Pair(decode_pages=12, prefill_pages=64, local_prefill_threshold=0)
        talk = turn(pair, "a", prompt_of(16), **session)
        for seed in range(1, 4):
            turn(pair, f"other-{seed}", prompt_of(24, seed))
        before = pair.decode.report.load(pair.now).num_cached_prompt_tokens
        turn(pair, "b", (*talk, 5, 6, 7), **session)
        after = pair.decode.report.load(pair.now).num_cached_prompt_tokens
        assert after - before == (16 if is_kept else 0)


def test_who_needs_the_pages_gets_them() -> None:
    pair = Pair(decode_pages=12, prefill_pages=64, session_cache_fraction=1.0)
    turn(pair, "a", prompt_of(36), **SESSION)
    assert pair.decode.cache.num_pinned == 9
    turn(pair, "b", prompt_of(40, 1))
    assert pair.decode.cache.num_pinned == 0
    assert len(pair.decode.pins) == 0


def test_a_bound_keeps_sessions_from_pinning_all() -> None:
    pair = Pair(decode_pages=16, prefill_pages=64)
    turn(pair, "a", prompt_of(12), session_id="s", session_timeout_s=1000.0)
    turn(pair, "b", prompt_of(24, 1), session_id="t", session_timeout_s=1000.0)
    assert "s" not in pair.decode.pins, "both together are over half of the pool"
    assert pair.decode.cache.num_pinned == 6


def test_closing_lets_go_and_may_come_late_or_twice() -> None:
    pair = Pair()
    turn(pair, "a", prompt_of(16), **SESSION)
    texts = []
    for call_id in (1, 2):
        pair.to_decode(CloseSession(call_id=call_id, session_id="s"))
        reply = pair.last_reply(pair.decode)
        assert isinstance(reply, CallReply)
        assert (reply.call_id, reply.success) == (call_id, True)
        texts.append(reply.message)
    assert texts == ["its pages are let go", "it held no pages"]
    assert pair.decode.cache.num_pinned == 0
    pair.to_prefill(CloseSession(call_id=3, session_id="s"))
    assert pair.last_reply(pair.prefill) == CallReply(
        call_id=3, success=True, message="a prefill node holds no session"
    )


def test_a_session_that_is_idle_for_too_long_is_let_go() -> None:
    pair = Pair()
    turn(pair, "a", prompt_of(16), session_id="s", session_timeout_s=30.0)
    pair.advance(20.0)
    assert pair.decode.cache.num_pinned == 4
    assert pair.decode.loop.next_deadline() <= pair.now + 10.0, "the loop wakes for it"
    pair.advance(10.0)
    assert pair.decode.cache.num_pinned == 0
    assert pair.decode.cache.num_pages >= 4, "they are kept as any others"


def test_a_flush_drops_them() -> None:
    pair = Pair()
    turn(pair, "a", prompt_of(16), **SESSION)
    pair.to_decode(FlushCache(call_id=1))
    reply = pair.last_reply(pair.decode)
    assert isinstance(reply, CallReply)
    assert reply.success
    assert (pair.decode.cache.num_pages, len(pair.decode.pins)) == (0, 0)
    turn(pair, "b", prompt_of(16), **SESSION)
    assert pair.decode.cache.num_pinned == (16 + 3) // PAGE_SIZE


def test_without_a_cache_nothing_is_pinned() -> None:
    pair = Pair(decode_has_cache=False)
    turn(pair, "a", prompt_of(16), **SESSION)
    assert (pair.decode.cache.num_pinned, len(pair.decode.pins)) == (0, 0)
