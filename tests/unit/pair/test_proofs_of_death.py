"""Pages that a prefill node might still write come back when its death is proven, and by nothing less."""

from __future__ import annotations

import pytest

from pdserve.messages.node import AssertPeerDeath, CallReply, Ping, Pong

from .cluster import SETTLE_S, Pair, prompt_of

ADMIN = b"admin"
LONG_S = 60.0


def lose_prefill(pair: Pair) -> None:
    """In mid-hand-off, with writes that have started: nothing comes from it any more."""
    pair.backend.has_started = True
    pair.start("a", prompt_of(10))
    pair.compute(pair.prefill)
    pair.network.holds_to_prefill = pair.network.holds_to_decode = True
    pair.network.cut()
    pair.settle()
    assert pair.stream("a").failure is not None
    assert pair.decode.allocator.counts().quarantined == 3


def assert_death(pair: Pair, incarnation: str = "prefill-1") -> CallReply:
    pair.to_decode(AssertPeerDeath(call_id=1, incarnation=incarnation), ADMIN)
    reply = pair.last_reply(pair.decode, ADMIN)
    assert isinstance(reply, CallReply)
    return reply


def test_no_time_ends_the_quarantine() -> None:
    pair = Pair()
    lose_prefill(pair)
    pair.advance(LONG_S)
    assert pair.decode.allocator.counts().quarantined == 3
    assert pair.decode.death_probe.suspects == {"prefill-1": ("prefill:1",)}


@pytest.mark.parametrize("proof", ["assertion", "refusal"])
def test_a_proof_lets_the_pages_settle(proof: str) -> None:
    pair = Pair()
    lose_prefill(pair)
    if proof == "assertion":
        reply = assert_death(pair)
        assert (reply.success, "3 pages" in reply.message) == (True, True)
    else:
        pair.decode.death_probe.proven.append("prefill-1")
        pair.settle()
    assert pair.decode.death_probe.suspects == {}
    pair.advance(SETTLE_S - 0.5)
    pair.backend.finish()  # what was on its way may land until here
    assert pair.decode.allocator.counts().quarantined == 3
    pair.advance(2.0)  # the rest of it, in ticks that count for a little less than they last
    assert pair.decode.allocator.num_free == 32
    assert pair.decode.rooms.is_idle


def test_the_death_of_another_proves_nothing() -> None:
    pair = Pair()
    lose_prefill(pair)
    assert assert_death(pair, "prefill-2").success
    pair.decode.death_probe.proven.append("prefill-2")
    pair.advance(LONG_S)
    assert pair.decode.allocator.counts().quarantined == 3


def test_who_answers_is_not_dead() -> None:
    pair = Pair()
    pair.backend.has_started = True
    pair.start("a", prompt_of(10))
    pair.compute(pair.prefill)
    pair.cancel("a")
    assert pair.decode.allocator.counts().quarantined == 3
    assert pair.decode.death_probe.suspects == {}
    reply = assert_death(pair)
    assert (reply.success, "is alive" in reply.message) == (False, True)
    pair.advance(LONG_S)
    assert pair.decode.allocator.counts().quarantined == 3
    pair.finish()


def test_quarantined_pages_are_shown_by_peer() -> None:
    pair = Pair()
    lose_prefill(pair)
    pair.to_decode(Ping(call_id=1), ADMIN)
    pong = pair.last_reply(pair.decode, ADMIN)
    assert isinstance(pong, Pong)
    assert pong.quarantined_pages == {"prefill-1": 3}
    pair.decode.report.observe()
    sample = 'pd_quarantined_pages{model_name="model",peer="prefill-1",role="decode"} 3.0'
    assert sample in pair.decode.metrics.render()
    assert_death(pair)
    pair.advance(5.0)
    pair.decode.report.observe()
    assert "pd_quarantined_pages{" not in pair.decode.metrics.render()
