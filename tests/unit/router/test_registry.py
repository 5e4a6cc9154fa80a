"""Leases, liveness and readiness under a fake clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pdserve.messages.node import NodeEntry, NodeLoad, Pong
from pdserve.messages.weights import of_one_node
from pdserve.router.registry import (
    MAX_NODES,
    NodeChanged,
    NodeJoined,
    NodeLost,
    NodeRegistry,
    NodeRestarted,
    NodeSilent,
    other_files,
    why_unfit,
)
from pdserve.tests.unit.router.conftest import MODEL

Entry = Callable[..., NodeEntry]


@pytest.fixture
def registry() -> NodeRegistry:
    return NodeRegistry(lease_s=5.0, pong_timeout_s=2.0)


def pong(
    entry: NodeEntry, *peers: str, draining: bool = False, refused: dict[str, str] | None = None
) -> Pong:
    return Pong(
        call_id=1,
        entry=entry,
        load=NodeLoad(num_queued_tokens=7),
        ready_peers=peers,
        refused_peers=refused or {},
        draining=draining,
    )


def join(registry: NodeRegistry, entry: NodeEntry, now: float, *peers: str) -> None:
    registry.register(entry, now)
    registry.pong(entry.incarnation, pong(entry, *peers), now)


def test_a_registration_joins_then_renews(registry: NodeRegistry, entry: Entry) -> None:
    assert registry.register(entry(), 0.0) == [NodeJoined(entry())]
    assert registry.register(entry(), 4.0) == []
    assert registry.expire(9.0) == []
    assert registry.expire(9.1) == [NodeLost(entry(), "its lease ended")]
    assert len(registry) == 0


def test_a_pong_renews_the_lease_and_tells_the_load(registry: NodeRegistry, entry: Entry) -> None:
    registry.register(entry(), 0.0)
    registry.pong("d-1", pong(entry(), "p-1"), 4.0)
    node = registry.get("d-1")
    assert node is not None
    assert (node.lease_until, node.load.num_queued_tokens, node.ready_peers) == (9.0, 7, frozenset({"p-1"}))


def test_a_registered_node_is_healthy_only_while_it_answers_pings(
    registry: NodeRegistry, entry: Entry
) -> None:
    registry.register(entry(), 0.0)
    node = registry.get("d-1")
    assert node is not None
    assert not registry.healthy(node)
    registry.pong("d-1", pong(entry()), 0.5)
    assert registry.healthy(node)
    registry.register(entry(), 2.0)
    assert registry.expire(2.5) == []
    assert [type(event) for event in registry.expire(2.6)] == [NodeSilent]
    assert not registry.healthy(node)
    assert registry.expire(2.7) == []  # told once
    registry.pong("d-1", pong(entry()), 3.0)
    assert registry.healthy(node)


def test_a_lost_link_makes_a_node_silent_at_once(registry: NodeRegistry, entry: Entry) -> None:
    join(registry, entry(), 0.0)
    assert registry.link_lost("d-1", "reset", 0.1) == [NodeSilent(entry(), "reset")]
    assert registry.usable() == []
    assert registry.link_lost("d-1", "cannot connect", 0.1) == []  # told once
    assert registry.link_lost("unknown", "reset", 0.1) == []


def test_a_lost_link_leaves_half_a_lease_to_be_heard_of_again(registry: NodeRegistry, entry: Entry) -> None:
    join(registry, entry(), 0.0)
    registry.link_lost("d-1", "reset", 0.1)
    registry.register(entry(), 2.5)
    assert registry.expire(7.5) == []
    registry.link_lost("d-1", "cannot connect", 3.0)
    assert registry.expire(5.6) == [NodeLost(entry(), "its lease ended")]


def test_another_incarnation_at_the_url_is_a_restart(registry: NodeRegistry, entry: Entry) -> None:
    old, new = entry(), entry(incarnation="d-2")
    join(registry, old, 0.0, "p-1")
    assert registry.register(new, 1.0) == [NodeRestarted(old, new)]
    node = registry.at_url("http://d")
    assert node is not None
    assert (node.incarnation, node.ready_peers, registry.healthy(node)) == ("d-2", frozenset(), False)
    assert registry.register(old, 1.1) == []  # a late registration of the one before
    assert registry.get("d-1") is None


def test_another_incarnation_may_answer_at_the_address(registry: NodeRegistry, entry: Entry) -> None:
    old, new = entry(), entry(incarnation="d-2")
    join(registry, old, 0.0)
    assert registry.pong("d-1", pong(new), 1.0) == [
        NodeLost(old, "another incarnation answers at its address")
    ]
    assert registry.register(old, 1.1) == []
    assert registry.register(new, 1.2) == [NodeJoined(new)]


def test_a_process_becomes_another_incarnation_of_itself(registry: NodeRegistry, entry: Entry) -> None:
    old, new = entry(), entry(incarnation="d-1~1")
    join(registry, old, 0.0)
    assert registry.pong("d-1", pong(new), 1.0) == [NodeRestarted(old, new)]
    assert len(registry) == 1, "no moment without it"
    assert registry.register(old, 1.1) == [], "its front says the old name once more"
    registry.take_out(new.url)
    assert registry.pong("d-1~1", pong(entry(incarnation="d-1~2")), 2.0)
    node = registry.at_url("http://d")
    assert node is not None
    assert node.leaving, "an operator took it out"


def test_where_a_node_is_reached_is_known_from_its_registration(registry: NodeRegistry, entry: Entry) -> None:
    registry.register(entry(), 0.0)
    inside = entry(url="", zmq_address="tcp://0.0.0.0:5")
    assert registry.pong("d-1", pong(inside), 0.1) == []
    assert registry.at_url("http://d") is registry.get("d-1")


def test_what_a_node_serves_is_learned_from_its_pongs(registry: NodeRegistry, entry: Entry) -> None:
    old, new = entry(), entry(weight_version="v2")
    join(registry, old, 0.0)
    assert registry.pong("d-1", pong(new), 1.0) == [NodeChanged(old, new)]
    assert registry.register(old, 1.5) == []  # its front has not heard yet
    node = registry.get("d-1")
    assert node is not None
    assert node.entry == new


def test_a_node_that_is_taken_out_ends_its_work_and_stays_out(registry: NodeRegistry, entry: Entry) -> None:
    join(registry, entry(colocated=True), 0.0)
    assert registry.take_out("http://d")
    assert registry.ready_pairs() == []
    registry.pong("d-1", pong(entry(colocated=True)), 1.0)
    assert registry.ready_pairs() == []
    assert registry.forget("d-1") == [NodeLost(entry(colocated=True), "it was taken out")]
    assert registry.forget("d-1") == []
    assert not registry.take_out("http://d")
    assert registry.register(entry(), 1.0) == []
    assert registry.was_removed("d-1")
    assert registry.register(entry(), 2.0, by_hand=True) == [NodeJoined(entry())]


def test_a_leaving_node_may_be_named_again(registry: NodeRegistry, entry: Entry) -> None:
    join(registry, entry(colocated=True), 0.0)
    registry.take_out("http://d")
    assert registry.register(entry(), 1.0, by_hand=True) == []
    assert len(registry.ready_pairs()) == 1


def test_made_up_nodes_do_not_fill_the_memory(registry: NodeRegistry, entry: Entry) -> None:
    entries = [entry(url=f"http://n{i}", incarnation=f"n{i}-1") for i in range(3000)]
    for each in entries:
        if registry.has_room(each):
            registry.register(each, 0.0)
    assert len(registry) == MAX_NODES
    assert registry.has_room(entries[0]), "it renews its lease"
    assert registry.has_room(entry(url="http://n0", incarnation="n0-2")), "it was started again"
    assert not registry.has_room(entries[-1])
    registry.expire(100.0)
    assert registry.has_room(entries[-1])


def test_what_was_taken_out_is_not_remembered_for_ever(registry: NodeRegistry, entry: Entry) -> None:
    for i in range(2000):
        registry.register(entry(url="http://n", incarnation=f"n-{i}"), 0.0)
        registry.take_out("http://n")
        registry.take_out("http://n")
    assert not registry.was_removed("n-0")
    assert registry.was_removed("n-1999")
    registry.register(entry(url="http://n", incarnation="n-1999"), 0.0, by_hand=True)
    assert not registry.was_removed("n-1999")


def test_the_routers_own_stall_is_nobodys_fault(registry: NodeRegistry, entry: Entry) -> None:
    join(registry, entry(), 0.0)
    registry.excuse(30.0, 31.0)
    assert registry.expire(31.0) == []


def test_who_was_heard_during_a_stall_gets_no_credit_for_it(registry: NodeRegistry, entry: Entry) -> None:
    """New weights take minutes, and nodes answer pings meanwhile: one that hangs then is found at once."""
    join(registry, entry(), 0.0)
    registry.pong("d-1", pong(entry()), 300.0)
    registry.excuse(300.0, 300.0)
    assert [type(event) for event in registry.expire(302.1)] == [NodeSilent]
    assert [type(event) for event in registry.expire(305.1)] == [NodeLost]


@pytest.mark.parametrize(
    ("prefill_changes", "peers", "is_ready"),
    [
        ({}, ("p-1",), True),
        ({}, (), False),
        ({"weight_version": "v2"}, ("p-1",), False),
        ({"model_fingerprint": "other"}, ("p-1",), False),
        ({"model_name": "other"}, ("p-1",), False),
    ],
    ids=["ready", "not connected", "weights differ", "fingerprints differ", "models differ"],
)
def test_ready_pairs(
    registry: NodeRegistry,
    entry: Entry,
    prefill_changes: dict[str, str],
    peers: tuple[str, ...],
    is_ready: bool,
) -> None:
    join(registry, entry("prefill", "p", **prefill_changes), 0.0)
    join(registry, entry(), 0.0, *peers)
    assert bool(registry.ready_pairs()) is is_ready


def test_nodes_that_were_started_again_wait_for_the_update_that_others_serve(
    registry: NodeRegistry, entry: Entry
) -> None:
    join(registry, entry("prefill", "p"), 0.0)
    join(registry, entry(), 0.0, "p-1")
    assert len(registry.ready_pairs()) == 1
    updated = entry(name="e", weight_version="v2", model_fingerprint="new", update_id="u")
    join(registry, updated, 0.0)
    assert registry.ready_pairs() == [], "two nodes with their first weights would be a second version"
    registry.pong("e-1", pong(entry(name="e", update_id="u")), 0.5)
    assert len(registry.ready_pairs()) == 1, "an update brought the weights that the others started with"


def test_an_update_that_was_forced_on_one_node_keeps_nobody_waiting(
    registry: NodeRegistry, entry: Entry
) -> None:
    join(registry, entry("prefill", "p"), 0.0)
    join(registry, entry(), 0.0, "p-1")
    join(registry, entry(name="e", model_fingerprint="other", update_id=of_one_node("x")), 0.0, "p-1")
    assert [decode.incarnation for _, decode in registry.ready_pairs()] == ["d-1"]


def test_a_draining_node_gets_no_new_work(registry: NodeRegistry, entry: Entry) -> None:
    join(registry, entry("prefill", "p"), 0.0)
    join(registry, entry(), 0.0, "p-1")
    registry.pong("d-1", pong(entry(), "p-1", draining=True), 0.5)
    assert registry.ready_pairs() == []
    assert registry.explain_no_pair() == "every decode node is draining"


def test_a_colocated_decode_node_pairs_with_itself(registry: NodeRegistry, entry: Entry) -> None:
    join(registry, entry(colocated=True), 0.0)
    assert [(p.incarnation, d.incarnation) for p, d in registry.ready_pairs()] == [("d-1", "d-1")]


def test_not_connected_holds_until_the_next_pong(registry: NodeRegistry, entry: Entry) -> None:
    join(registry, entry("prefill", "p"), 0.0)
    join(registry, entry(), 0.0, "p-1")
    registry.not_connected("p-1", "d-1")
    assert registry.ready_pairs() == []
    registry.pong("d-1", pong(entry(), "p-1"), 1.0)
    assert len(registry.ready_pairs()) == 1


def test_what_is_missing_is_said(registry: NodeRegistry, entry: Entry) -> None:
    assert registry.explain_no_pair() == "no decode node is registered"
    registry.register(entry(), 0.0)
    assert registry.explain_no_pair() == "no prefill node is registered"
    registry.register(entry("prefill", "p"), 0.0)
    assert registry.explain_no_pair() == "no decode node answers"
    registry.pong("d-1", pong(entry()), 0.0)
    assert registry.explain_no_pair() == "no prefill node answers"
    registry.pong("p-1", pong(entry("prefill", "p")), 0.0)
    assert registry.explain_no_pair() == "no decode node has connected to a prefill node yet"
    registry.pong("d-1", pong(entry(), refused={"http://p": "page size 16, here 32"}), 0.0)
    assert registry.explain_no_pair() == "http://d refuses http://p: page size 16, here 32"
    registry.pong("d-1", pong(entry(weight_version="v2")), 0.0)
    assert registry.explain_no_pair() == "nodes serve different weight versions: v1, v2"


# ---- no prefill node is alive -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["silent", "draining", "taken out", "gone"])
def test_decode_nodes_are_left_to_themselves_when_the_last_prefill_node_is_lost(
    registry: NodeRegistry, entry: Entry, how: str
) -> None:
    join(registry, entry("prefill", "p"), 0.0)
    join(registry, entry(), 0.0, "p-1")
    registry.expire(0.1)
    assert [(p.incarnation, d.incarnation) for p, d in registry.ready_pairs()] == [("p-1", "d-1")]
    if how == "silent":
        registry.link_lost("p-1", "reset", 0.2)
    elif how == "draining":
        registry.pong("p-1", pong(entry("prefill", "p"), draining=True), 0.2)
    else:
        registry.take_out("http://p")
        if how == "gone":
            registry.forget("p-1")
    assert [(p.incarnation, d.incarnation) for p, d in registry.ready_pairs()] == [("d-1", "d-1")]


def test_a_prefill_node_that_is_alive_is_waited_for(registry: NodeRegistry, entry: Entry) -> None:
    """It may be about to connect, or be refused for a reason that someone has to see."""
    join(registry, entry("prefill", "p"), 0.0)
    join(registry, entry(), 0.0)
    registry.expire(60.0)
    registry.pong("p-1", pong(entry("prefill", "p")), 60.0)
    assert registry.ready_pairs() == []


def test_a_first_prefill_node_gets_time_to_join(entry: Entry) -> None:
    registry = NodeRegistry(lease_s=5.0, pong_timeout_s=2.0, prefill_wait_s=30.0)
    join(registry, entry(), 1.0)
    registry.expire(30.9)
    registry.pong("d-1", pong(entry()), 30.9)
    assert registry.ready_pairs() == []
    registry.register(entry(), 31.0)
    registry.pong("d-1", pong(entry()), 31.0)
    registry.expire(31.0)
    assert len(registry.ready_pairs()) == 1
    join(registry, entry("prefill", "p"), 32.0)
    assert registry.ready_pairs() == [], "not connected yet"


def test_f1_a_node_of_another_model_does_not_fit(entry: Entry) -> None:
    model = replace(MODEL, vocabulary_digest="ours")
    assert why_unfit(model, entry()) == "", "it does not say"
    fitting = {"vocab_size": 1000, "max_model_len": 1000, "vocabulary_digest": "ours"}
    assert why_unfit(model, entry(**fitting)) == ""
    assert why_unfit(model, entry(**fitting | {"vocabulary_digest": ""})) == ""
    assert why_unfit(MODEL, entry(**fitting)) == ""
    assert "999 token ids, this router's 1000;" in why_unfit(model, entry(**fitting | {"vocab_size": 999}))
    assert "other meanings" in why_unfit(model, entry(**fitting | {"vocabulary_digest": "theirs"}))


def test_f1_files_that_make_prompts_are_compared_by_name(entry: Entry) -> None:
    ours = {"tokenizer.json": "1", "chat_template.jinja": "2", "generation_config.json": "3"}
    model = replace(MODEL, text_digests=ours)
    assert other_files(model, entry()) == [], "it does not say"
    assert other_files(MODEL, entry(text_digests=ours)) == []
    assert other_files(model, entry(text_digests=ours)) == []
    theirs = {"tokenizer.json": "4", "tokenizer_config.json": "5", "chat_template.jinja": "2"}
    assert other_files(model, entry(text_digests=theirs)) == [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert why_unfit(model, entry(text_digests=theirs)) == "", "it can be worked with"


def test_m_a_node_takes_at_least_what_the_router_advertises(entry: Entry) -> None:
    assert why_unfit(MODEL, entry(max_model_len=1001)) == ""
    reason = why_unfit(MODEL, entry(max_model_len=999))
    assert reason == ("it takes 999 tokens, this router advertises 1000; start both with --max-model-len 999")


def test_f1_an_unfit_node_is_what_readiness_names_while_it_comes(
    registry: NodeRegistry, entry: Entry
) -> None:
    assert registry.refuse(entry(), "it is another", 0.0)
    assert not registry.refuse(entry(), "it is another", 4.0)
    assert registry.explain_no_pair() == "http://d does not fit: it is another"
    registry.expire(9.0)
    assert "does not fit" in registry.explain_no_pair()
    registry.expire(9.1)
    assert registry.explain_no_pair() == "no decode node is registered"
    assert registry.refuse(entry(), "it is another", 10.0), "it is news again"
