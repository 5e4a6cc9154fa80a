"""The pure choice of a pair."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pdserve.router.pairing import (
    Chosen,
    DecodeView,
    NoPair,
    NoRoom,
    Pair,
    PairingDecision,
    PrefillView,
    ReadyPair,
    choose_pair,
)


def prefill(
    name: str,
    *,
    num_queued_tokens: int = 0,
    num_cached_tokens: int = 0,
    is_full: bool = False,
    last_used: int = 0,
) -> PrefillView:
    return PrefillView(
        incarnation=name,
        num_queued_tokens=num_queued_tokens,
        num_cached_tokens=num_cached_tokens,
        is_full=is_full,
        last_used=last_used,
    )


def decode(
    name: str,
    *,
    num_active: int = 0,
    max_active: int = 16,
    num_free_pages: int = 100,
    num_wanted_pages: int = 10,
    num_cached_tokens: int = 0,
) -> DecodeView:
    return DecodeView(
        incarnation=name,
        num_active=num_active,
        max_active=max_active,
        num_free_pages=num_free_pages,
        num_total_pages=100,
        num_wanted_pages=num_wanted_pages,
        num_cached_tokens=num_cached_tokens,
        last_used=0,
    )


def product(prefills: list[PrefillView], decodes: list[DecodeView]) -> list[ReadyPair]:
    return [ReadyPair(p, d) for p in prefills for d in decodes]


def choose(
    candidates: list[ReadyPair], num_tokens: int = 100, *, avoid: Sequence[Pair] = (), forced: bool = False
) -> PairingDecision:
    return choose_pair(num_tokens, candidates, prefill_credit_tokens=1000, avoid=avoid, forced=forced)


def chosen(decision: PairingDecision) -> Pair:
    assert isinstance(decision, Chosen)
    return decision.pair


def test_without_a_ready_pair_there_is_none() -> None:
    assert choose([]) == NoPair()


def test_cached_tokens_weigh_against_queued_ones() -> None:
    warm = prefill("warm", num_cached_tokens=80, num_queued_tokens=50)
    cold = prefill("cold")
    assert chosen(choose(product([warm, cold], [decode("d")]))) == Pair("warm", "d")
    warm = prefill("warm", num_cached_tokens=80, num_queued_tokens=90)
    assert chosen(choose(product([warm, cold], [decode("d")]))) == Pair("cold", "d")


def test_a_full_hit_still_computes_a_token() -> None:
    decision = choose(product([prefill("p", num_cached_tokens=100)], [decode("d")]))
    assert decision == Chosen(Pair("p", "d"), num_uncached_tokens=1, num_pages=10, num_tokens_ahead=1)


def test_what_is_ahead_counts_other_prompts_too() -> None:
    decision = choose(product([prefill("p", num_queued_tokens=50, num_cached_tokens=60)], [decode("d")]))
    assert isinstance(decision, Chosen)
    assert (decision.num_uncached_tokens, decision.num_tokens_ahead) == (40, 90)


def test_a_conversation_stays_where_its_history_is() -> None:
    holds, empty = decode("holds", num_active=8, num_cached_tokens=96), decode("empty")
    assert chosen(choose(product([prefill("p")], [holds, empty]))).decode == "holds"


def test_it_moves_when_its_node_is_busier_than_the_history_is_worth() -> None:
    holds, empty = decode("holds", num_active=8, num_cached_tokens=48), decode("empty")
    assert chosen(choose(product([prefill("p")], [holds, empty]))).decode == "empty"
    full = decode("holds", num_active=8, num_cached_tokens=96, num_free_pages=5)
    assert chosen(choose(product([prefill("p")], [full, empty]))).decode == "empty"


def test_history_that_both_hold_does_not_matter() -> None:
    busy = decode("busy", num_active=8, num_cached_tokens=96)
    idle = decode("idle", num_active=4, num_cached_tokens=96)
    assert chosen(choose(product([prefill("p")], [busy, idle]))).decode == "idle"


def test_the_emptiest_decode_node_is_taken() -> None:
    busy, idle = decode("busy", num_active=8), decode("idle", num_active=4)
    assert chosen(choose(product([prefill("p")], [busy, idle]))).decode == "idle"
    larger = decode("larger", num_active=8, max_active=64)
    assert chosen(choose(product([prefill("p")], [idle, larger]))).decode == "larger"


def test_equal_batches_go_by_free_pages() -> None:
    full, empty = decode("a", num_free_pages=20, num_active=1), decode("b", num_free_pages=90, num_active=1)
    assert chosen(choose(product([prefill("p")], [full, empty]))).decode == "b"


def test_ties_go_to_the_one_used_longest_ago_then_by_name() -> None:
    recent, older = prefill("a", last_used=9), prefill("b", last_used=3)
    assert chosen(choose(product([recent, older], [decode("d")]))).prefill == "b"
    assert chosen(choose(product([prefill("b"), prefill("a")], [decode("d")]))).prefill == "a"


def test_only_given_pairs_are_chosen() -> None:
    """Prefill q would be cheaper, and decode e emptier, but they are not ready with one another."""
    candidates = [
        ReadyPair(prefill("p", num_queued_tokens=5), decode("e")),
        ReadyPair(prefill("q"), decode("d", num_active=5)),
    ]
    assert chosen(choose(candidates)) == Pair("q", "d")


def test_a_node_that_prefills_locally_competes_as_a_prefill_node() -> None:
    local = ReadyPair(prefill("d", num_queued_tokens=500), decode("d"))
    remote = ReadyPair(prefill("p"), decode("d"))
    assert chosen(choose([local])) == Pair("", "d")
    assert chosen(choose([local, remote])) == Pair("p", "d")


def test_the_pair_that_failed_is_avoided_if_another_exists() -> None:
    p, q, d = prefill("p"), prefill("q", num_queued_tokens=50), decode("d")
    assert chosen(choose(product([p], [d]), avoid=[Pair("p", "d")])) == Pair("p", "d")
    assert chosen(choose(product([p, q], [d]), avoid=[Pair("p", "d")])) == Pair("q", "d")


def test_strangers_to_a_failure_go_first() -> None:
    """Which of the two nodes was at fault is not known."""
    p, q, d, e = prefill("p"), prefill("q", num_queued_tokens=50), decode("d"), decode("e", num_active=3)
    assert chosen(choose(product([p, q], [d, e]), avoid=[Pair("p", "d")])) == Pair("q", "e")


def test_a_queue_within_the_credit_is_joined_beyond_it_is_not() -> None:
    candidates = product([prefill("p", num_queued_tokens=900)], [decode("d")])
    assert chosen(choose(candidates, num_tokens=100)) == Pair("p", "d")
    assert choose(candidates, num_tokens=101) == NoRoom("prefill credit")


def test_an_idle_prefill_node_takes_a_prompt_beyond_its_credit() -> None:
    assert chosen(choose(product([prefill("p")], [decode("d")]), num_tokens=5000)) == Pair("p", "d")


def test_a_prefill_node_that_said_busy_is_not_asked() -> None:
    full = prefill("full", num_queued_tokens=10, is_full=True)
    other = prefill("other", num_queued_tokens=500)
    assert chosen(choose(product([full, other], [decode("d")]))).prefill == "other"
    assert choose(product([full], [decode("d")])) == NoRoom("prefill credit")


@pytest.mark.parametrize(
    "changes",
    [{"num_free_pages": 9, "num_active": 1}, {"num_active": 20}],
    ids=["pages", "batch slots"],
)
def test_a_decode_node_without_room_is_not_asked(changes: dict[str, int]) -> None:
    full, other = decode("full", **changes), decode("other", num_active=10, num_free_pages=50)
    assert chosen(choose(product([prefill("p")], [full, other]))).decode == "other"
    assert choose(product([prefill("p")], [full])) == NoRoom("decode pages or batch slots")


def test_an_idle_decode_node_is_asked_for_more_than_it_shows() -> None:
    """It refuses what can never fit, with both numbers; waiting would not end."""
    assert chosen(choose(product([prefill("p")], [decode("d", num_wanted_pages=500)]))).decode == "d"


def test_the_gates_are_hints() -> None:
    full = product(
        [prefill("p", num_queued_tokens=5000, is_full=True)], [decode("d", num_active=99, num_free_pages=0)]
    )
    assert isinstance(choose(full), NoRoom)
    assert chosen(choose(full, forced=True)) == Pair("p", "d")
