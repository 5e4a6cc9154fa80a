"""What a node does besides serving: flush, weights, drain, rosters, load and metrics."""

from __future__ import annotations

import msgspec
import pytest

from pdserve.messages.node import (
    AbortRequests,
    AttemptFailed,
    CallReply,
    FlushCache,
    GenerateRequest,
    GetMetrics,
    GetServerInfo,
    MetricsReply,
    Ping,
    Pong,
    Roster,
    ServerInfoReply,
)
from pdserve.messages.operation import (
    GetInternalState,
    InternalStateReply,
    PauseGeneration,
    ProfileReply,
    SetInternalState,
    SlowDown,
    StartProfile,
    StopProfile,
)
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.weights import (
    LEASE_S,
    CommitWeights,
    DiscardWeights,
    FromDisk,
    MemoryReply,
    MemoryTag,
    PrepareWeights,
    ReleaseMemory,
    ResumeMemory,
)
from pdserve.messages.work import Work
from pdserve.tests.cluster.helpers import metric

from .cluster import ADDRESS, DecodeNode, Pair, PrefillNode, kv_of, prompt_of

ADMIN = b"admin"


def reply_of(pair: Pair, node: PrefillNode | DecodeNode, message: object) -> CallReply:
    send = pair.to_decode if node is pair.decode else pair.to_prefill
    send(message, ADMIN)  # type: ignore[arg-type]
    reply = pair.last_reply(node, ADMIN)
    assert isinstance(reply, CallReply)
    return reply


def num_replies(node: PrefillNode | DecodeNode) -> int:
    return len(node.server.sent.get(ADMIN, ()))


# ---- flush ------------------------------------------------------------------------------------------


def test_an_idle_node_flushes_at_once() -> None:
    pair = Pair()
    pair.start("a", prompt_of(12))
    pair.finish()
    assert pair.prefill.allocator.counts().shared == 3
    assert reply_of(pair, pair.prefill, FlushCache(call_id=1)).success
    assert reply_of(pair, pair.decode, FlushCache(call_id=2)).success
    assert pair.prefill.allocator.num_free == 32
    pair.start("b", prompt_of(12))
    pair.finish()
    assert pair.stream("b").num_cached_tokens == 0


def test_a_flush_with_a_timeout_waits_for_idle_and_a_second_one_is_refused() -> None:
    pair = Pair()
    pair.start("a", prompt_of(12))
    assert not reply_of(pair, pair.prefill, FlushCache(call_id=1)).success, "busy, and no timeout"
    pair.to_prefill(FlushCache(call_id=2, timeout_s=10.0), ADMIN)
    assert num_replies(pair.prefill) == 1
    second = reply_of(pair, pair.prefill, FlushCache(call_id=3, timeout_s=10.0))
    assert (second.call_id, second.success) == (3, False)
    assert "already in progress" in second.message
    pair.run()
    assert pair.last_reply(pair.prefill, ADMIN) == CallReply(
        call_id=2, success=True, message="Cache flushed."
    )
    assert pair.prefill.allocator.num_free == 32
    pair.finish()


def test_a_flush_times_out_on_a_busy_node() -> None:
    pair = Pair()
    pair.start("a", prompt_of(12))
    for node, send in ((pair.prefill, pair.to_prefill), (pair.decode, pair.to_decode)):
        send(FlushCache(call_id=2, timeout_s=1.5), ADMIN)
        assert node.loop.next_deadline() <= pair.now + 1.5
    pair.advance(2.0)
    for node in (pair.prefill, pair.decode):
        reply = pair.last_reply(node, ADMIN)
        assert isinstance(reply, CallReply)
        assert (reply.call_id, reply.success) == (2, False)
    pair.finish()
    pair.check_answer("a", prompt_of(12), 4)


# ---- weights ----------------------------------------------------------------------------------------


def prepare(pair: Pair, node: PrefillNode | DecodeNode, path: str = "weights-2") -> CallReply:
    message = PrepareWeights(call_id=1, update_id="u1", source=FromDisk(model_path=path), weight_version="v2")
    send = pair.to_decode if node is pair.decode else pair.to_prefill
    send(message, ADMIN)
    pair.compute(node)  # loading is a job of the engine thread
    reply = pair.last_reply(node, ADMIN)
    assert isinstance(reply, CallReply)
    return reply


def commit(pair: Pair, node: PrefillNode | DecodeNode) -> CallReply:
    return reply_of(pair, node, CommitWeights(call_id=2, update_id="u1"))


def test_new_weights_renew_the_handshake_and_forget_what_the_old_ones_computed() -> None:
    pair = Pair()
    prompt = prompt_of(14)
    pair.start("a", prompt)
    pair.finish()
    assert pair.stream("a").weight_version == "default"
    assert prepare(pair, pair.prefill).success
    assert commit(pair, pair.prefill).success
    assert pair.decode.rooms.ready_peers() == {}, "other weights are no pair"
    pair.start("between", prompt)
    failure = pair.stream("between").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("not_ready", True)

    assert prepare(pair, pair.decode).success
    assert commit(pair, pair.decode).success
    pair.advance(1.0)
    assert pair.decode.rooms.ready_peers() == {"prefill-1": ADDRESS}
    pair.start("b", prompt)
    pair.finish()
    pair.check_answer("b", prompt, 4)  # the engine verifies the KV of every position
    stream = pair.stream("b")
    assert (stream.weight_version, stream.num_cached_tokens) == ("v2", 0)
    page = pair.prefill.allocator.shared_pages()[0]
    assert pair.prefill.pool.pages[page][0] in kv_of(prompt, "weights-2")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_busy_node_does_not_commit_takes_no_new_work_and_swaps_when_it_is_idle(role: str) -> None:
    pair = Pair()
    node = pair.prefill if role == "prefill" else pair.decode
    pair.start("a", prompt_of(9))
    # Loading waits its turn behind the forwards that are queued.
    message = PrepareWeights(
        call_id=1, update_id="u1", source=FromDisk(model_path="weights-2"), weight_version="v2"
    )
    (pair.to_prefill if node is pair.prefill else pair.to_decode)(message, ADMIN)
    while num_replies(node) == 0:
        pair.compute(node)
    assert pair.last_reply(node, ADMIN) == CallReply(call_id=1, success=True, message="print of weights-2")
    assert commit(pair, node) == CallReply(call_id=2, success=False, message="the node is not idle")
    pair.start("late", prompt_of(9, seed=1))
    failure = pair.stream("late").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == (("busy" if role == "prefill" else "version_skew"), True)
    assert num_version_refusals(pair, pair.decode) == (role == "decode")
    pair.run()
    pair.check_answer("a", prompt_of(9), 4)
    assert pair.stream("a").weight_version == "default"
    assert (node.status.entry.weight_version, node.status.entry.update_id) == ("v2", "u1")
    assert commit(pair, node).success, "asked again it says yes"
    pair.finish()


def num_version_refusals(pair: Pair, node: PrefillNode | DecodeNode) -> float:
    (pair.to_prefill if node is pair.prefill else pair.to_decode)(GetMetrics(call_id=2), ADMIN)
    metrics = pair.last_reply(node, ADMIN)
    assert isinstance(metrics, MetricsReply)
    return metric(metrics.text, "pd_version_refusals_total")


def test_a_request_for_other_weights_is_refused_for_its_version() -> None:
    pair = Pair()
    pair.start("late", prompt_of(9), weight_version="v0")
    failure = pair.stream("late").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("version_skew", True)
    assert "wants weights 'v0', the decode node's are 'default'" in failure.reason
    assert num_version_refusals(pair, pair.decode) == 1
    pair.start("right", prompt_of(9), weight_version="default")
    pair.finish()
    pair.check_answer("right", prompt_of(9), 4)
    assert num_version_refusals(pair, pair.decode) == 1


def test_a_request_on_its_way_to_a_prefill_node_that_swaps_is_refused_for_its_version() -> None:
    pair = Pair()
    assert prepare(pair, pair.prefill).success
    pair.generate("late", prompt_of(9))
    pair.decode.loop.step(pair.now)  # its message is on the way
    pair.prefill.server.deliver(ADMIN, CommitWeights(call_id=2, update_id="u1"))
    pair.prefill.loop.step(pair.now)
    pair.settle()
    failure = pair.stream("late").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("version_skew", True)
    assert num_version_refusals(pair, pair.decode) == 1
    assert num_version_refusals(pair, pair.prefill) == 1
    assert prepare(pair, pair.decode).success
    pair.advance(5.0)
    pair.finish()


@pytest.mark.parametrize("first", ["prefill", "decode"])
@pytest.mark.parametrize("lost", ["roster", "word"])
def test_a_node_commits_what_its_peer_or_a_router_says_is_committed(first: str, lost: str) -> None:
    pair = Pair()
    nodes = (pair.prefill, pair.decode) if first == "prefill" else (pair.decode, pair.prefill)
    for node in nodes:
        assert prepare(pair, node).success
    if lost == "word":
        pair.to_decode(Roster(router_id="router", nodes=()))  # they part
    assert commit(pair, nodes[0]).success
    entry = nodes[0].status.entry
    assert entry.update_id == "u1"
    pair.advance(1.0)
    if lost == "word":
        assert nodes[1].status.weight_version == "default"
        roster = Roster(router_id="another router", nodes=(entry,))
        (pair.to_decode if nodes[1] is pair.decode else pair.to_prefill)(roster)
    assert nodes[1].status.weight_version == "v2"
    pair.to_decode(Roster(router_id="router", nodes=(pair.prefill.status.entry,)))
    pair.advance(5.0)
    pair.start("b", prompt_of(9))
    pair.finish()
    pair.check_answer("b", prompt_of(9), 4)
    assert pair.stream("b").weight_version == "v2"


def test_a_node_that_hears_of_no_commit_rolls_back() -> None:
    pair = Pair()
    for node in (pair.prefill, pair.decode):
        message = PrepareWeights(
            call_id=1, update_id="u2", source=FromDisk(model_path="weights-3"), weight_version="v3"
        )
        (pair.to_prefill if node is pair.prefill else pair.to_decode)(message, ADMIN)
        pair.compute(node)
        assert node.loop.next_deadline() <= pair.now + LEASE_S
    pair.advance(LEASE_S + 1.0)
    for node in (pair.prefill, pair.decode):
        refused = reply_of(pair, node, CommitWeights(call_id=2, update_id="u2"))
        assert (refused.success, refused.message) == (False, "update u2 is not prepared here")
        assert node.status.weight_version == "default"
    pair.finish()


def test_a_wrong_checkpoint_is_refused_and_the_old_weights_serve_on() -> None:
    pair = Pair()
    for node in (pair.prefill, pair.decode):
        reply = prepare(pair, node, "wrong-model")
        assert not reply.success
        assert "cannot replace the model" in reply.message
        assert not commit(pair, node).success
        assert node.status.weight_version == "default"
    pair.start("a", prompt_of(9))
    pair.finish()
    pair.check_answer("a", prompt_of(9), 4)


def test_a_discarded_update_cannot_be_committed() -> None:
    pair = Pair()
    assert prepare(pair, pair.prefill).success
    assert reply_of(pair, pair.prefill, DiscardWeights(call_id=3, update_id="u1")).success
    assert commit(pair, pair.prefill) == CallReply(
        call_id=2, success=False, message="update u1 is not prepared here", code="not_prepared"
    )
    pair.finish()


def test_serving_goes_on_while_weights_load() -> None:
    pair = Pair()
    pair.to_prefill(
        PrepareWeights(
            call_id=1, update_id="u1", source=FromDisk(model_path="weights-2"), weight_version="v2"
        ),
        ADMIN,
    )
    pair.start("a", prompt_of(9))
    pair.finish()
    pair.check_answer("a", prompt_of(9), 4)
    second = PrepareWeights(
        call_id=9, update_id="u2", source=FromDisk(model_path="weights-3"), weight_version="v3"
    )
    pair.to_prefill(second, ADMIN)
    busy = reply_of(pair, pair.prefill, msgspec.structs.replace(second, call_id=10))
    assert (busy.call_id, busy.success) == (10, False)
    pair.finish()


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(
    "order",
    [
        PauseGeneration(mode="in_place"),
        SlowDown(forward_sleep_s=1.0),
        ReleaseMemory(tags=("weights", "kv_cache"), timeout_s=1.0),
    ],
    ids=lambda order: type(order).__name__,
)
def test_an_order_that_nobody_waits_for_any_more_is_not_done(
    role: str, order: PauseGeneration | SlowDown | ReleaseMemory
) -> None:
    pair = Pair()
    node = pair.prefill if role == "prefill" else pair.decode
    send = pair.to_prefill if role == "prefill" else pair.to_decode
    send(Ping(call_id=1), ADMIN)
    pong = pair.last_reply(node, ADMIN)
    assert isinstance(pong, Pong)
    timed = msgspec.structs.replace(order, call_id=2, not_after_unix_s=pong.unix_s + 3.0)
    pair.advance(3.5)
    send(timed, ADMIN)
    reply = pair.last_reply(node, ADMIN)
    assert isinstance(reply, CallReply)
    assert (reply.call_id, reply.success) == (2, False)
    assert (node.loop.gate.is_paused, node.engine.forward_sleep_s, node.memory_journal) == (False, 0.0, [])
    send(msgspec.structs.replace(timed, not_after_unix_s=pong.unix_s + 9.0), ADMIN)
    pair.compute(node)
    assert (node.loop.gate.is_paused, node.engine.forward_sleep_s, node.memory_journal) != (False, 0.0, [])


# ---- memory -----------------------------------------------------------------------------------------

ALL: tuple[MemoryTag, ...] = ("weights", "kv_cache", "graphs")


def memory_call(
    pair: Pair, node: PrefillNode | DecodeNode, message: ReleaseMemory | ResumeMemory
) -> MemoryReply:
    (pair.to_prefill if node is pair.prefill else pair.to_decode)(message, ADMIN)
    pair.compute(node)  # a job
    reply = pair.last_reply(node, ADMIN)
    assert isinstance(reply, MemoryReply)
    return reply


def release(tags: tuple[MemoryTag, ...] = ALL, timeout_s: float = 1.0) -> ReleaseMemory:
    return ReleaseMemory(call_id=5, tags=tags, timeout_s=timeout_s)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_node_without_its_memory_pairs_with_nobody_and_comes_back_as_another_incarnation(role: str) -> None:
    pair = Pair()
    node = pair.prefill if role == "prefill" else pair.decode
    pair.start("a", prompt_of(9))
    pair.finish()
    assert memory_call(pair, node, release()) == MemoryReply(
        call_id=5, success=True, message="weights, kv_cache, graphs", released=ALL
    )
    assert node.memory_journal == ["release ['graphs', 'kv_cache', 'weights']"]
    assert node.allocator.counts().shared == 0, "what it had cached is gone"
    assert pair.decode.rooms.ready_peers() == {}
    pair.advance(10.0)
    assert pair.decode.rooms.ready_peers() == {}, "it is tried again and refused"
    pair.start("b", prompt_of(9, seed=1))
    failure = pair.stream("b").failure
    assert failure is not None
    assert failure.code == "not_ready"
    (pair.to_prefill if node is pair.prefill else pair.to_decode)(Ping(call_id=1), ADMIN)
    pong = pair.last_reply(node, ADMIN)
    assert isinstance(pong, Pong)
    assert pong.draining
    assert pong.entry.model_fingerprint == f"none, the memory of {role}-1 is released"

    again = memory_call(pair, node, release(("weights",)))
    assert (again.success, again.message) == (False, "released already: weights")
    assert memory_call(pair, node, ResumeMemory(call_id=6, tags=("kv_cache",))).success
    pair.advance(10.0)
    assert pair.decode.rooms.ready_peers() == {}, "the weights are still away"
    assert memory_call(pair, node, ResumeMemory(call_id=6, tags=("weights",))).success
    pair.advance(10.0)
    assert pair.decode.rooms.ready_peers() == {}, "no bytes are away, but it was said that graphs are"
    assert memory_call(pair, node, ResumeMemory(call_id=6, tags=("graphs",))).success
    second = memory_call(pair, node, ResumeMemory(call_id=7, tags=("weights",)))
    assert (second.success, second.message) == (False, "not released: weights")
    assert node.status.entry.incarnation == f"{role}-1~1"
    pair.advance(10.0)
    prefill = pair.prefill.status.entry.incarnation
    assert pair.decode.rooms.ready_peers() == {prefill: ADDRESS}
    assert pair.backend.connected == {pair.decode.status.entry.incarnation}, "where its memory is now"
    pair.start("c", prompt_of(9), prefill=prefill)
    pair.finish()
    pair.check_answer("c", prompt_of(9), 4)


def test_a_cluster_resumes_what_each_of_its_nodes_has_released() -> None:
    pair = Pair()
    node = pair.decode
    everything = ResumeMemory(call_id=6, tags=ALL, if_released=True)
    nothing = memory_call(pair, node, everything)
    assert nothing == MemoryReply(call_id=6, success=True, message="nothing of it was released")
    assert node.status.entry.incarnation == "decode-1"
    assert memory_call(pair, node, release(("weights", "kv_cache"))).success
    known = memory_call(pair, node, ResumeMemory(call_id=6, tags=(), if_released=True))
    assert (known.success, known.released) == (True, ("weights", "kv_cache"))
    assert memory_call(pair, node, everything) == MemoryReply(
        call_id=6, success=True, message="weights, kv_cache", resumed=("weights", "kv_cache")
    )
    assert node.status.entry.incarnation == "decode-1~1"


def test_two_nodes_without_memory_do_not_take_it_for_the_same_model() -> None:
    pair = Pair()
    for node in (pair.prefill, pair.decode):
        assert memory_call(pair, node, release(("kv_cache",))).success
    pair.advance(10.0)
    assert pair.decode.rooms.ready_peers() == {}
    assert pair.backend.connected == set(), "nothing is sent from memory that is not registered"
    for node in (pair.prefill, pair.decode):
        assert memory_call(pair, node, ResumeMemory(call_id=6, tags=("kv_cache",))).success
    pair.advance(10.0)
    assert pair.decode.rooms.ready_peers() == {"prefill-1~1": ADDRESS}


def test_memory_is_released_when_what_runs_has_ended_or_not_at_all() -> None:
    pair = Pair()
    pair.start("a", prompt_of(9))
    pair.to_decode(release(timeout_s=1.0), ADMIN)
    pair.advance(2.0)
    assert pair.decode.memory_journal == []
    refused = pair.last_reply(pair.decode, ADMIN)
    assert refused == MemoryReply(call_id=5, success=False, message="the node was not idle in time")
    pair.to_decode(release(timeout_s=100.0), ADMIN)
    pair.to_decode(ResumeMemory(call_id=9, tags=ALL), ADMIN)
    busy = pair.last_reply(pair.decode, ADMIN)
    assert busy == MemoryReply(call_id=9, success=False, message="another release or resume is in progress")
    pair.run()
    pair.check_answer("a", prompt_of(9), 4)
    assert pair.decode.memory_journal == ["release ['graphs', 'kv_cache', 'weights']"]
    pair.finish()


def test_memory_is_not_released_while_a_peer_may_still_write_a_page() -> None:
    pair = Pair(decode_pages=32)
    pair.backend.has_started = True
    pair.start("a", prompt_of(9))
    pair.compute(pair.prefill)
    pair.cancel("a")
    assert pair.decode.scheduler.is_idle, "quarantine is no work"
    assert pair.decode.allocator.counts().quarantined > 0
    pair.to_decode(release(timeout_s=100.0), ADMIN)
    pair.decode.engine.finish()
    pair.settle()
    assert pair.decode.memory_journal == []
    pair.write()
    pair.advance(5.0)
    pair.decode.engine.finish()
    pair.settle()
    assert pair.decode.memory_journal == ["release ['graphs', 'kv_cache', 'weights']"]
    pair.finish()


# ---- abort ------------------------------------------------------------------------------------------


def test_an_abort_on_prefill_ends_exactly_the_request_it_names() -> None:
    pair = Pair()
    for name in ("a", "ab"):
        pair.start(name, prompt_of(9, seed=len(name)))
    pair.compute(pair.prefill)
    reply = reply_of(pair, pair.prefill, AbortRequests(call_id=1, request_id="a"))
    assert (reply.success, reply.message) == (True, "1 requests aborted")
    assert pair.stream("a").reasons == {0: "abort"}
    again = reply_of(pair, pair.prefill, AbortRequests(call_id=2, request_id="a"))
    assert again.message == "0 requests aborted"
    pair.finish()
    pair.check_answer("ab", prompt_of(9, seed=2), 4)


def test_an_abort_of_all_on_prefill_leaves_what_decodes() -> None:
    pair = Pair()
    pair.start("decodes", prompt_of(9))
    while not pair.stream("decodes").tokens:
        pair.compute(pair.prefill)
    for _ in range(3):
        pair.compute(pair.prefill)
        pair.backend.finish()
    pair.start("prefills", prompt_of(14, seed=1))
    reply_of(pair, pair.prefill, AbortRequests(call_id=1, all_requests=True))
    pair.finish()
    assert pair.stream("prefills").reasons == {0: "abort"}
    pair.check_answer("decodes", prompt_of(9), 4)


# ---- an operator's calls ----------------------------------------------------------------------------


def test_a_setting_counts_from_the_next_step_on() -> None:
    pair = Pair()
    reply_of(pair, pair.prefill, SetInternalState(call_id=1, settings={"chunked_prefill_size": 2}))
    pair.start("a", prompt_of(9))
    assert pair.prefill.engine.batches[0].rows[0].num_tokens == 2
    refused = reply_of(pair, pair.decode, SetInternalState(call_id=2, settings={"chunked_prefill_size": 2}))
    assert (refused.call_id, refused.success) == (2, False)
    assert "chunked_prefill_size cannot be changed" in refused.message
    pair.finish()
    pair.check_answer("a", prompt_of(9), 4)


def test_the_internal_state_counts_requests_by_state() -> None:
    pair = Pair()
    pair.start("a", prompt_of(9))
    states = {}
    for name, node, send in (
        ("prefill", pair.prefill, pair.to_prefill),
        ("decode", pair.decode, pair.to_decode),
    ):
        send(GetInternalState(call_id=1), ADMIN)
        reply = pair.last_reply(node, ADMIN)
        assert isinstance(reply, InternalStateReply)
        states[name] = {state: count for state, count in reply.state.requests.items() if count}
    assert states == {"prefill": {"computing": 1}, "decode": {"handoff": 1}}
    pair.finish()


def test_a_profile_begins_while_requests_run() -> None:
    pair = Pair()
    pair.start("a", prompt_of(9))
    for node, send in ((pair.prefill, pair.to_prefill), (pair.decode, pair.to_decode)):
        send(StartProfile(call_id=1, profile_id="p", output_dir="/d"), ADMIN)
        while num_replies(node) == 0:
            pair.compute(node)
        assert pair.last_reply(node, ADMIN) == CallReply(
            call_id=1, success=True, message="profiling: 32 forwards at most"
        )
        send(StopProfile(call_id=2), ADMIN)
        while num_replies(node) == 1:
            pair.compute(node)
        assert pair.last_reply(node, ADMIN) == ProfileReply(call_id=2, success=True)
    pair.finish()
    pair.check_answer("a", prompt_of(9), 4)


# ---- drain, rosters, what is shown ------------------------------------------------------------------


def test_a_draining_prefill_node_takes_nothing_new_and_ends_what_it_has() -> None:
    pair = Pair()
    pair.start("a", prompt_of(9))
    pair.prefill.scheduler.is_draining = True
    pair.start("b", prompt_of(9, seed=1))
    failure = pair.stream("b").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("busy", True)
    pair.finish()
    pair.check_answer("a", prompt_of(9), 4)


def test_a_draining_decode_node_takes_nothing_new_and_ends_what_it_has() -> None:
    pair = Pair()
    pair.start("a", prompt_of(9))
    pair.decode.scheduler.is_draining = True
    pair.start("b", prompt_of(9, seed=1))
    failure = pair.stream("b").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("shutting_down", True)
    pair.to_decode(Ping(call_id=1), ADMIN)
    pong = pair.last_reply(pair.decode, ADMIN)
    assert isinstance(pong, Pong)
    assert pong.draining
    pair.finish()
    pair.check_answer("a", prompt_of(9), 4)


def test_peers_are_the_union_of_what_routers_name() -> None:
    pair = Pair()
    entry = pair.prefill.status.entry
    pair.to_decode(Roster(router_id="second", nodes=(entry, pair.decode.status.entry)))
    pair.to_decode(Roster(router_id="router", nodes=()))
    assert pair.decode.rooms.ready_peers() == {"prefill-1": ADDRESS}, "the second one still names it"
    pair.start("a", prompt_of(9))
    pair.backend.has_started = True
    pair.compute()
    pair.to_decode(Roster(router_id="second", nodes=()))
    assert pair.decode.rooms.peers()[0].state.value == "waiting"
    failure = pair.stream("a").failure
    assert failure is not None
    assert failure.code == "peer_lost"
    pair.to_decode(Roster(router_id="second", nodes=(entry,)))
    pair.finish()


def test_a_refused_pair_says_why_and_is_tried_again() -> None:
    pair = Pair()
    pair.prefill.rooms._identity = msgspec.structs.replace(pair.prefill.identity, model_fingerprint="other")
    pair.network.cut()
    pair.advance(1.0)
    pair.to_decode(Ping(call_id=1), ADMIN)
    pong = pair.last_reply(pair.decode, ADMIN)
    assert isinstance(pong, Pong)
    assert pong.ready_peers == ()
    assert "model differs" in pong.refused_peers[ADDRESS]
    pair.prefill.rooms._identity = pair.prefill.identity
    pair.advance(5.0)
    assert pair.decode.rooms.ready_peers() == {"prefill-1": ADDRESS}
    pair.finish()


def test_load_and_metrics_tell_the_same() -> None:
    pair = Pair(decode_has_cache=False)
    pair.start("a", prompt_of(12))
    pair.run()
    pair.start("b", prompt_of(14))
    pair.to_prefill(GetServerInfo(call_id=1), ADMIN)
    info = pair.last_reply(pair.prefill, ADMIN)
    assert isinstance(info, ServerInfoReply)
    assert (info.load.num_running_reqs, info.load.num_queued_tokens) == (1, 2)
    assert info.load.num_cached_prompt_tokens == 12
    pair.to_decode(GetMetrics(call_id=2), ADMIN)
    metrics = pair.last_reply(pair.decode, ADMIN)
    assert isinstance(metrics, MetricsReply)
    assert 'pd_num_decode_transfer_queue_reqs{model_name="model",role="decode"} 1.0' in metrics.text
    assert 'pd_num_pages{model_name="model",role="decode",state="exposed"} 4.0' in metrics.text
    pair.finish()
    pair.to_prefill(GetMetrics(call_id=3), ADMIN)
    metrics = pair.last_reply(pair.prefill, ADMIN)
    assert isinstance(metrics, MetricsReply)
    assert 'pd_computed_prompt_tokens_total{model_name="model",role="prefill"} 14.0' in metrics.text
    assert 'pd_rooms_total{model_name="model",outcome="done",role="prefill"} 2.0' in metrics.text


def test_a_room_that_decode_needs_no_more_has_not_failed() -> None:
    pair = Pair()
    pair.start("one token", prompt_of(12), max_tokens=1)
    pair.compute(pair.prefill)
    pair.compute(pair.prefill)
    assert pair.stream("one token").reasons == {0: "length"}
    pair.start("broken", prompt_of(12, seed=1))
    pair.compute(pair.prefill)
    pair.backend.fail()
    pair.finish()
    pair.to_prefill(GetMetrics(call_id=1), ADMIN)
    metrics = pair.last_reply(pair.prefill, ADMIN)
    assert isinstance(metrics, MetricsReply)
    for outcome in ("aborted", "failed"):
        labels = f'model_name="model",outcome="{outcome}",role="prefill"'
        assert f"pd_rooms_total{{{labels}}} 1.0" in metrics.text


def test_a_request_that_is_sent_to_a_prefill_node_is_refused() -> None:
    pair = Pair()
    request = GenerateRequest(
        request_id="a",
        attempt=1,
        work=Work(prompt_ids=(1,), choices=(0,), sampling=SamplingParams()),
        prefill_incarnation="",
        deadline_s=1.0,
    )
    pair.to_prefill(request)
    reply = pair.last_reply(pair.prefill)
    assert isinstance(reply, AttemptFailed)
    assert (reply.request_id, reply.code, reply.retriable) == ("a", "invalid", False)
    pair.finish()
