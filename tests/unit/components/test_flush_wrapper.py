"""FlushWrapper: who is flushed at once, who waits, who is refused."""

from __future__ import annotations

import math

import pytest

from pdserve.components.flush_wrapper import FlushDecision, FlushNow, FlushRefused, FlushWrapper
from pdserve.messages.node import CallReply, FlushCache


def refusal(decision: FlushDecision | None) -> tuple[bytes, int, str]:
    """Client, call and message of a refusal."""
    assert isinstance(decision, FlushRefused)
    assert not decision.reply.success
    return decision.client, decision.reply.call_id, decision.reply.message


@pytest.mark.parametrize("timeout_s", [0.0, 5.0])
def test_an_idle_node_flushes_at_once(timeout_s: float) -> None:
    flush = FlushWrapper()
    decision = flush.handle(FlushCache(call_id=7, timeout_s=timeout_s), b"c", 0.0, idle=True)
    assert decision == FlushNow(client=b"c", call_id=7)
    assert flush.deadline == math.inf
    assert flush.poll(100.0, idle=True) is None


@pytest.mark.parametrize("timeout_s", [0.0, -1.0])
def test_a_busy_node_refuses_at_once_without_a_timeout(timeout_s: float) -> None:
    flush = FlushWrapper()
    decision = flush.handle(FlushCache(call_id=7, timeout_s=timeout_s), b"c", 0.0, idle=False)
    assert refusal(decision) == (b"c", 7, "The node is not idle, and no timeout was given.")
    assert flush.poll(100.0, idle=True) is None


def test_a_pending_flush_waits_until_idle() -> None:
    flush = FlushWrapper()
    assert flush.handle(FlushCache(call_id=7, timeout_s=5.0), b"c", 100.0, idle=False) is None
    assert flush.deadline == 105.0
    assert flush.poll(104.9, idle=False) is None
    assert flush.poll(104.9, idle=True) == FlushNow(client=b"c", call_id=7)
    assert flush.poll(104.9, idle=True) is None


def test_a_short_timeout_waits_too() -> None:
    flush = FlushWrapper()
    assert flush.handle(FlushCache(call_id=7, timeout_s=0.5), b"c", 100.0, idle=False) is None
    assert flush.poll(100.4, idle=False) is None
    assert isinstance(flush.poll(100.5, idle=False), FlushRefused)


def test_a_pending_flush_times_out_once() -> None:
    flush = FlushWrapper()
    flush.handle(FlushCache(call_id=7, timeout_s=5.0), b"c", 100.0, idle=False)
    assert refusal(flush.poll(105.0, idle=False)) == (b"c", 7, "Timed out waiting for idle state.")
    assert flush.poll(106.0, idle=False) is None
    assert flush.poll(106.0, idle=True) is None
    assert flush.deadline == math.inf


def test_idle_at_the_deadline_flushes() -> None:
    flush = FlushWrapper()
    flush.handle(FlushCache(call_id=7, timeout_s=5.0), b"c", 100.0, idle=False)
    assert flush.poll(105.0, idle=True) == FlushNow(client=b"c", call_id=7)


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("timeout_s", [0.0, 5.0])
def test_a_second_one_is_refused_and_the_first_goes_on(idle: bool, timeout_s: float) -> None:
    flush = FlushWrapper()
    flush.handle(FlushCache(call_id=7, timeout_s=5.0), b"first", 100.0, idle=False)
    decision = flush.handle(FlushCache(call_id=8, timeout_s=timeout_s), b"second", 101.0, idle=idle)
    assert refusal(decision) == (b"second", 8, "Another flush_cache is already in progress.")
    assert flush.poll(102.0, idle=True) == FlushNow(client=b"first", call_id=7)
    assert flush.handle(FlushCache(call_id=9, timeout_s=5.0), b"second", 103.0, idle=False) is None


def test_the_answer_says_whether_the_cache_was_dropped() -> None:
    flush = FlushNow(client=b"c", call_id=7)
    assert flush.reply(flushed=True) == CallReply(call_id=7, success=True, message="Cache flushed.")
    refused = flush.reply(flushed=False)
    assert not refused.success
    assert "in use" in refused.message
