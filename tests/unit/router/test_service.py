"""The whole router over fake nodes. Nothing here asserts how long anything takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from pdserve.api.generation import GenerateSpec, Generation, TurnParams, WeightSpan
from pdserve.messages.node import (
    AttemptFailed,
    NodeEntry,
    TokenOutput,
    TokenOutputs,
)
from pdserve.messages.operation import CloseSession, ContinueGeneration, PauseGeneration
from pdserve.messages.weights import STAGE_PART_BYTES, FromGroup, FromServed, KeepWeights, UpdateGroupSpec
from pdserve.runtime.errors import RequestError
from pdserve.tests.deadline import DEADLINE_S

Spec = Callable[..., GenerateSpec]
Expected = Callable[[tuple[int, ...], int, int], list[int]]
Bench = Any  # of conftest.py, which pytest's importlib mode does not let tests import


async def read(generation: Generation) -> dict[int, list[int]]:
    """All token ids by choice; every choice must end exactly once."""
    ids: dict[int, list[int]] = {}
    ended: list[int] = []
    async with asyncio.timeout(DEADLINE_S):
        async for delta in generation:
            assert delta.choice not in ended
            ids.setdefault(delta.choice, []).extend(delta.token_ids)
            if delta.finish_reason is not None:
                ended.append(delta.choice)
    return ids


async def small_cluster(bench: Bench, **options: object) -> tuple[Any, Any]:
    prefill, decode = bench.prefill(), bench.decode()
    await bench.start(**options)
    await bench.ready()
    return prefill, decode


async def large_cluster(bench: Bench, **options: object) -> list[Any]:
    """Two of each: prefill p and q, decode d and e."""
    nodes = [bench.prefill("p"), bench.prefill("q")]
    nodes += [bench.decode(name, peers=("p-1", "q-1")) for name in "de"]
    await bench.start(**options)
    await bench.ready(4)
    return nodes


# ---- answers --------------------------------------------------------------------------------------------


async def test_a_request_streams(bench: Bench, spec: Spec, expected: Expected) -> None:
    prefill, decode = await small_cluster(bench)
    generation = await bench.service.generate(spec())
    assert await read(generation) == {0: expected((1, 2, 3), 0, 8)}
    assert generation.info.num_attempts == 1
    assert generation.info.weight_version == "v1"
    assert [span.name for span in generation.info.spans] == ["queue", "pairing"]
    assert [(r.prefill_incarnation, r.work.choices, r.stream_interval) for r in decode.requests()] == [
        ("p-1", (0,), 1)
    ]
    assert decode.requests()[0].weight_version == "v1"
    assert prefill.requests() == []
    assert bench.state.counters.requests == {"finished": 1}
    assert bench.state.counters.attempts == {"ok": 1}


async def test_a_stopped_choice_is_read_no_more_and_the_others_go_on(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    _, decode = await small_cluster(bench)
    generation = await bench.service.generate(spec(num_choices=2, max_tokens=30))
    ids: list[int] = []
    async for delta in generation:
        if delta.choice == 0:
            generation.stop_choice(0)
            generation.stop_choice(0)
        else:
            ids.extend(delta.token_ids)
    assert ids == expected((1, 2, 3), 1, 30)
    assert [cancel.choices for cancel in decode.cancels()] == [(0,)]


# ---- failures -------------------------------------------------------------------------------------------


# ---- the reader -----------------------------------------------------------------------------------------


async def test_a_reader_that_leaves_its_loop_cancels(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 1
    stream = aiter(await bench.service.generate(spec()))
    await anext(stream)
    await stream.aclose()
    assert len(decode.cancels()) == 1


async def test_a_client_that_leaves_the_queue_is_never_dispatched(bench: Bench, spec: Spec) -> None:
    await bench.start()
    waiting = asyncio.create_task(bench.service.generate(spec()))
    await bench.until(lambda: bench.requests.queue.num_new == 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert len(bench.requests.queue) == 0


# ---- admission ------------------------------------------------------------------------------------------


async def test_what_has_not_ended_is_failed_by_close(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 1
    generation = await bench.service.generate(spec())
    await bench.service.close()
    assert bench.view.readiness() == (False, "the router is shutting down")
    with pytest.raises(RequestError, match="shutting down") as refused:
        await bench.service.generate(spec("late"))
    assert refused.value.status == 503
    with pytest.raises(RequestError, match="shutting down"):
        await read(generation)
    assert len(decode.cancels()) == 1


# ---- nodes ----------------------------------------------------------------------------------------------


async def test_a_node_with_a_bad_address_harms_nobody(
    bench: Bench, spec: Spec, entry: Callable[..., NodeEntry], expected: Expected
) -> None:
    await small_cluster(bench)
    bad = entry("decode", "bad", zmq_address="nonsense")
    assert (await bench.admin.register_worker(bad.url, bad)).success
    assert await read(await bench.service.generate(spec())) == {0: expected((1, 2, 3), 0, 8)}


async def test_an_operator_removes_a_node_and_names_it_again(bench: Bench) -> None:
    _, decode = await small_cluster(bench)
    assert (await bench.admin.remove_worker("http://d")).success
    assert not (await bench.admin.remove_worker("http://d")).success
    assert not (await bench.admin.register_worker("http://d", decode.entry)).success
    assert (await bench.admin.register_worker("http://d", None)).success
    await bench.ready()
    reply = await bench.admin.register_worker("http://nowhere", None)
    assert (reply.success, "does not answer" in reply.message) == (False, True)


# ---- admin ----------------------------------------------------------------------------------------------


async def test_flush_asks_every_node(bench: Bench) -> None:
    nodes = await small_cluster(bench)
    reply = await bench.admin.flush_cache(3.0)
    assert reply.success
    assert all("flush 3" in node.calls for node in nodes)
    assert "http://p: flushed" in reply.message


async def test_a_death_is_told_to_every_decode_node(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    reply = await bench.admin.assert_peer_death("gone")
    assert reply.success
    assert "dead gone" in decode.calls
    assert "dead gone" not in prefill.calls
    decode.death_reply = "gone is alive"
    reply = await bench.admin.assert_peer_death("gone")
    assert (reply.success, "gone is alive" in reply.message) == (False, True)


async def test_no_death_is_believed_of_a_node_that_answers(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    reply = await bench.admin.assert_peer_death(prefill.entry.incarnation)
    assert (reply.success, "is alive" in reply.message) == (False, True)
    assert not any(call.startswith("dead") for call in decode.calls)


async def test_a_death_that_no_decode_node_heard_of_is_to_be_told_again(bench: Bench) -> None:
    _, decode = await small_cluster(bench)
    decode.die()
    reply = await bench.admin.assert_peer_death("gone")
    assert not reply.success


async def test_flush_without_nodes_is_no_success(bench: Bench) -> None:
    await bench.start()
    assert not (await bench.admin.flush_cache(0.0)).success


async def test_abort_ends_a_request_by_its_exact_id(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 1
    generations = [await bench.service.generate(spec(name)) for name in ("r", "r2")]
    reply = await bench.admin.abort_requests("unknown", False)
    assert (reply.success, reply.message) == (True, "no request 'unknown' is known")
    assert (await bench.admin.abort_requests("r", False)).success
    deltas = [delta async for delta in generations[0]]
    assert deltas[-1].finish_reason == "abort"
    assert [cancel.request_id for cancel in decode.cancels()] == ["r"]
    assert (await bench.admin.abort_requests("", True)).success
    assert [delta.finish_reason async for delta in generations[1]][-1] == "abort"
    assert "abort True" in decode.calls


async def test_a_pause_keeps_everything_in_the_queue_and_no_deadline_runs_out(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    prefill, decode = await small_cluster(bench)
    assert (await bench.admin.pause_generation("retract", drains=False)).success
    assert prefill.operations == decode.operations == [PauseGeneration(mode="retract")]
    waiting = asyncio.create_task(bench.service.generate(spec("r", timeout_s=0.1)))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    assert decode.requests() == []
    assert (await bench.view.server_info())["router"]["pause"] == "retract"
    assert (await bench.admin.continue_generation()).success
    assert decode.operations[-1] == ContinueGeneration()
    generation = await waiting
    tokens = [token async for delta in generation for token in delta.token_ids]
    assert tokens == expected((1, 2, 3), 0, 8)


async def test_what_a_pause_retracted_goes_on_at_no_cost_of_an_attempt(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    _, decode = await small_cluster(bench)
    decode.fail_with = ["paused"] * 5
    await bench.admin.pause_generation("retract", drains=False)
    waiting = asyncio.create_task(bench.service.generate(spec("r")))
    await bench.admin.continue_generation()
    tokens = [token async for delta in await waiting for token in delta.token_ids]
    assert tokens == expected((1, 2, 3), 0, 8)
    assert not any(request.was_retracted for request in decode.requests()), "memory was not short"


async def test_a_pause_that_aborts_or_drains(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 1
    generation = await bench.service.generate(spec("r"))
    assert (await bench.admin.pause_generation("abort", drains=False)).success
    assert [delta.finish_reason async for delta in generation][-1] == "abort"
    await bench.admin.continue_generation()

    decode.tokens_per_attempt = None
    decode.pace_s = 0.01
    generation = await bench.service.generate(spec("s"))
    pausing = asyncio.create_task(bench.admin.pause_generation("in_place", drains=True))
    assert [delta.finish_reason async for delta in generation][-1] == "length"
    assert (await pausing).success
    assert decode.operations[-1] == PauseGeneration(mode="in_place")
    await bench.admin.continue_generation()


async def test_a_pause_that_drains_waits_for_nothing_that_is_paused(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 1
    generation = await bench.service.generate(spec("r"))
    await bench.admin.pause_generation("in_place", drains=False)
    reply = await bench.admin.pause_generation("in_place", drains=True)
    assert (reply.success, "continue it first" in reply.message) == (False, True)
    assert bench.service.state.pause_mode == "in_place"
    generation.cancel()
    assert (await bench.admin.pause_generation("in_place", drains=True)).success
    await bench.admin.continue_generation()


async def test_a_node_that_is_not_reached_is_named_by_a_pause(bench: Bench) -> None:
    _, decode = await small_cluster(bench)
    decode.operation_reply = "no"
    reply = await bench.admin.pause_generation("in_place", drains=False)
    assert (reply.success, "http://d: no" in reply.message) == (False, True)
    await bench.admin.continue_generation()


async def test_weights_are_updated_everywhere_between_requests(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    prefill, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 3
    running = await bench.service.generate(spec())
    update = asyncio.create_task(bench.weights.update_weights_from_disk("/new", "v2", "wait"))
    await bench.until(lambda: bench.requests.queue.held)
    late = asyncio.create_task(bench.service.generate(spec("late")))
    await bench.until(lambda: bench.requests.queue.num_new == 1)
    assert not any(call.startswith("commit") for call in decode.calls)
    assert (await bench.weights.update_weights_from_disk("/other", None, "wait")).success is False

    decode.tokens_per_attempt = None  # the running one may end, on the old weights, by a new attempt
    decode.emit(
        AttemptFailed(request_id="r", attempt=1, code="transfer_failed", reason="lost", retriable=True)
    )
    assert await read(running) == {0: expected((1, 2, 3), 0, 8)}
    reply = await update
    assert (reply.success, reply.message) == (True, "2 nodes serve weight version v2")
    generation = await late
    assert await read(generation) == {0: expected((1, 2, 3), 0, 8)}
    assert (running.info.weight_version, generation.info.weight_version) == ("v1", "v2")
    assert bench.view.weight_version() == "v2"
    for node in (prefill, decode):
        assert [call for call in node.calls if call.startswith(("prepare", "commit", "discard"))] == [
            "prepare /new v2",
            "commit",
        ]


async def test_weights_that_one_node_refuses_are_taken_by_none(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    prefill, decode = await small_cluster(bench)
    prefill.prepare_reply = "hidden_size 512, here 256"
    reply = await bench.weights.update_weights_from_disk("/new", None, "wait")
    assert not reply.success
    assert reply.message == "the old weights serve on; http://p: hidden_size 512, here 256"
    assert all("discard" in node.calls and "commit" not in node.calls for node in (prefill, decode))
    generation = await bench.service.generate(spec())
    assert await read(generation) == {0: expected((1, 2, 3), 0, 8)}
    assert generation.info.weight_version == "v1"


async def test_weights_that_nodes_would_not_have_in_common_are_taken_by_none(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    prefill.prepared_fingerprint = "made of others"
    reply = await bench.weights.update_weights_from_disk("/new", None, "wait")
    assert not reply.success
    assert "http://p: made of others" in reply.message
    assert "http://d: new" in reply.message
    assert all("discard" in node.calls and "commit" not in node.calls for node in (prefill, decode))


async def test_a_node_that_fails_to_swap_is_named_and_pairs_with_nobody(bench: Bench) -> None:
    prefill, _ = await small_cluster(bench, weight_commit_s=0.05, weight_ready_s=0.1)
    prefill.commit_reply = "not idle"
    reply = await bench.weights.update_weights_from_disk("/new", "v2", "wait")
    assert not reply.success
    assert "http://p: not idle" in reply.message
    await bench.until(lambda: not bench.view.readiness()[0])
    assert bench.view.readiness() == (False, "nodes serve different weight versions: v1, v2")


async def test_a_node_that_is_not_idle_yet_is_asked_again(bench: Bench) -> None:
    """A cancelled request is over here while its last write is still on the wire there."""
    prefill, decode = await small_cluster(bench)
    prefill.commit_reply = "the node is not idle"
    update = asyncio.create_task(bench.weights.update_weights_from_disk("/new", "v2", "wait"))
    await bench.until(lambda: prefill.calls.count("commit") == 2)
    prefill.commit_reply = ""
    reply = await update
    assert (reply.success, reply.message) == (True, "2 nodes serve weight version v2")
    assert decode.calls.count("commit") == 1, "it has swapped: it is not asked again"


async def test_an_update_that_another_router_drove_out_changes_nothing_and_says_so(bench: Bench) -> None:
    """Its patience is for nodes that are busy: nobody waits for what cannot come."""
    nodes = await small_cluster(bench, weight_commit_s=3600.0, weight_ready_s=3600.0)
    for node in nodes:
        node.commit_reply = "update u is not prepared here"
    reply = await bench.weights.update_weights_from_disk("/new", "v2", "wait")
    why = "http://p: update u is not prepared here; http://d: update u is not prepared here"
    assert (reply.success, reply.message) == (False, f"this update changed nothing; {why}")
    assert not bench.requests.queue.held


@pytest.mark.parametrize("is_there", [True, False])
async def test_an_update_that_another_router_replaced_is_not_waited_for(bench: Bench, is_there: bool) -> None:
    prefill, decode = nodes = await small_cluster(bench, weight_ready_s=3600.0)
    if not is_there:
        prefill.commit_reply = "update u is not prepared here"
    decode.peers = ()  # so that it waits for a pair
    update = asyncio.create_task(bench.weights.update_weights_from_disk("/new", "v2", "wait"))
    await bench.until(lambda: decode.entry.weight_version == "v2")
    assert bench.requests.queue.held
    for node in nodes:
        node.entry = msgspec.structs.replace(node.entry, update_id="theirs", weight_version="v3")
    reply = await update
    text = "another router's update took the place of weight version v2"
    assert (reply.success, reply.message) == (False, text)
    assert not bench.requests.queue.held


async def test_a_node_that_dies_during_the_update_is_named(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    decode.hangs_in = "prepare"
    update = asyncio.create_task(bench.weights.update_weights_from_disk("/new", "v2", "wait"))
    await bench.until(lambda: "prepare /new v2" in decode.calls)
    decode.die()
    reply = await update
    assert (reply.success, "http://d: lost" in reply.message) == (False, True)
    assert "discard" in prefill.calls


async def test_a_node_that_dies_after_the_update_does_not_hold_requests_for_long(bench: Bench) -> None:
    _, decode = await small_cluster(bench, weight_ready_s=0.1)
    decode.hangs_in = "ping"
    reply = await bench.weights.update_weights_from_disk("/new", "v2", "wait")
    assert (reply.success, "new weights are loaded, but" in reply.message) == (False, True)
    assert not bench.requests.queue.held


async def test_a_node_that_is_started_again_in_the_commit_does_not_fail_the_update(bench: Bench) -> None:
    nodes = await large_cluster(bench)
    died = nodes[-1]
    died.hangs_in = "commit"
    update = asyncio.create_task(bench.weights.update_weights_from_disk("/new", "v2", "wait"))
    await bench.until(lambda: "commit" in died.calls)
    died.die()
    died.hangs_in, died.alive = "no call", True
    died.entry = msgspec.structs.replace(died.entry, incarnation="e-2")
    await bench.admin.register_worker(died.entry.url, died.entry)
    reply = await update
    expected = "3 nodes serve weight version v2, 1 died and read it when started again"
    assert (reply.success, reply.message) == (True, expected)
    await bench.until(lambda: died.entry.weight_version == "v2")


async def test_an_update_ends_when_the_lease_of_a_node_that_died_in_the_commit_does(bench: Bench) -> None:
    *_, died = await large_cluster(bench, lease_s=1.0, pong_timeout_s=0.5)
    died.hangs_in = "commit"
    update = asyncio.create_task(bench.weights.update_weights_from_disk("/new", "v2", "wait"))
    await bench.until(lambda: "commit" in died.calls)
    died.die()
    reply = await update
    expected = "3 nodes serve weight version v2, 1 died and read it when started again"
    assert (reply.success, reply.message) == (True, expected)


async def test_an_update_whose_only_prefill_node_died_ends_when_it_is_back(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench, weight_rejoin_s=0.02)
    prefill.hangs_in = "commit"
    update = asyncio.create_task(bench.weights.update_weights_from_disk("/new", "v2", "wait"))
    await bench.until(lambda: "commit" in prefill.calls)
    prefill.die()
    prefill.hangs_in, prefill.alive = "no call", True
    prefill.entry = msgspec.structs.replace(prefill.entry, incarnation="p-2")
    decode.peers = ("p-2",)
    await bench.admin.register_worker(prefill.entry.url, prefill.entry)
    reply = await update
    expected = "1 nodes serve weight version v2, 1 died and read it when started again"
    assert (reply.success, reply.message) == (True, expected)
    assert prefill.entry.weight_version == "v2"


async def test_a_node_that_does_not_swap_fails_the_update(bench: Bench) -> None:
    _, decode = await small_cluster(bench, weight_commit_s=0.01, weight_ready_s=0.05)
    decode.commit_reply = "the node is not idle"
    reply = await bench.weights.update_weights_from_disk("/new", "v2", "wait")
    expected = "1 nodes serve weight version v2; the update is decided, but http://d: the node is not idle"
    assert (reply.success, reply.message) == (False, expected)


async def test_weights_have_a_version_of_their_own_each_time(bench: Bench) -> None:
    await small_cluster(bench)
    versions = []
    for _ in range(2):
        assert (await bench.weights.update_weights_from_disk("/models/step", None, "wait")).success
        versions.append(bench.view.weight_version())
    assert versions[0].startswith("step@")
    assert versions[0] != versions[1]


async def test_weights_are_not_updated_while_a_request_does_not_end(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench, weight_drain_s=0.05)
    decode.tokens_per_attempt = 1
    generation = await bench.service.generate(spec())
    reply = await bench.weights.update_weights_from_disk("/new", None, "wait")
    assert (reply.success, reply.message) == (False, "1 requests were still running; nothing was changed")
    assert not bench.requests.queue.held
    generation.cancel()


async def test_running_requests_are_aborted_where_the_update_says_so(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 2
    running = await bench.service.generate(spec())
    await bench.until(lambda: len(bench.requests.get("r").choices[0].kept_ids) == 2)
    assert (await bench.weights.update_weights_from_disk("/new", "v2", "abort")).success
    assert [delta.finish_reason async for delta in running][-1] == "abort"
    assert decode.calls.index("prepare /new v2") < decode.calls.index("commit")


async def test_retracted_requests_go_on_with_the_new_weights_and_say_from_where(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    prefill, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 3
    running = [await bench.service.generate(spec(name)) for name in ("r", "s")]
    await bench.until(lambda: all(len(record.choices[0].kept_ids) == 3 for record in bench.requests))
    prefill.commit_reply = "the node is not idle"
    update = asyncio.create_task(bench.weights.update_weights_from_disk("/new", "v2", "retract"))
    await bench.until(lambda: "commit" in decode.calls)
    late = asyncio.create_task(bench.service.generate(spec("late")))
    await bench.until(lambda: len(bench.requests.queue) == 3)
    assert {cancel.request_id for cancel in decode.cancels()} == {"r", "s"}
    decode.tokens_per_attempt = None
    prefill.commit_reply = ""
    assert (await update).success
    for generation in (*running, await late):
        assert await read(generation) == {0: expected((1, 2, 3), 0, 8)}
    spans = [WeightSpan("v1", 0), WeightSpan("v2", 3)]
    assert [generation.info.weight_spans for generation in running] == [{0: spans}] * 2
    assert (await late).info.weight_spans == {0: [WeightSpan("v2", 0)]}
    assert all(generation.info.num_attempts == 2 for generation in running)


async def test_nodes_hear_that_the_coordinator_lives(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench, weight_lease_s=0.01)
    decode.hangs_in = "prepare"
    update = asyncio.create_task(bench.weights.update_weights_from_disk("/new", "v2", "wait"))

    def num_kept(node: object) -> int:
        return sum(isinstance(message, KeepWeights) for message in node.received)  # type: ignore[attr-defined]

    await bench.until(lambda: num_kept(prefill) > 2 and num_kept(decode) > 2)
    decode.die()
    assert not (await update).success
    before = num_kept(prefill)
    await asyncio.sleep(0.03)
    assert num_kept(prefill) == before, "it ends with the update"


@pytest.mark.parametrize("call", ["update", "resume"])
async def test_nodes_are_asked_at_once_whether_they_have_changed(bench: Bench, call: str) -> None:
    """Requests wait meanwhile: not for the next ping, which may be long in coming."""
    _, decode = await small_cluster(bench, ping_interval_s=60.0, pong_timeout_s=61.0, weight_ready_s=5.0)
    decode.peers = ("p-1", "p-1~1")  # also by the name that it has when its memory is resumed
    weights = bench.weights
    if call == "update":
        reply = await weights.update_weights_from_disk("/new", "v2", "wait")
    else:
        assert (await weights.release_memory_occupation(("kv_cache",))).success
        reply = await weights.resume_memory_occupation(("kv_cache",))
    assert reply.success, reply.message


async def body_of(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def test_tensors_reach_every_node_in_parts_before_anything_is_prepared(bench: Bench) -> None:
    nodes = await small_cluster(bench)
    size = STAGE_PART_BYTES
    body = body_of(b"a" * (size - 1), b"b" * (size + 3), b"", b"end")
    assert (await bench.weights.update_weights_from_tensor(body, "v2", "wait")).success
    whole = b"a" * (size - 1) + b"b" * (size + 3) + b"end"
    for node in nodes:
        assert [call for call in node.calls if call != "ping"] == [
            f"stage {size} at 0",
            f"stage {size} at {size}",
            f"stage 5 at {2 * size}",
            f"prepare {whole.decode()} v2",
            "commit",
        ]
    assert bench.view.weight_version() == "v2"


async def test_tensors_that_one_node_cannot_hold_are_dropped_by_all(bench: Bench) -> None:
    nodes = await small_cluster(bench)
    nodes[0].stage_reply = "this host has 3 MiB left"
    body = body_of(b"a" * STAGE_PART_BYTES, b"b")
    reply = await bench.weights.update_weights_from_tensor(body, None, "wait")
    assert (reply.success, reply.message) == (
        False,
        "the old weights serve on; http://p: this host has 3 MiB left",
    )
    for node in nodes:
        calls = [call.split()[0] for call in node.calls if call != "ping"]
        assert calls == ["stage", "discard"], "the rest is read and not sent"


async def test_a_node_that_is_lost_while_tensors_are_sent_ends_the_update(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    decode.hangs_in = "stage"
    update = asyncio.create_task(bench.weights.update_weights_from_tensor(body_of(b"a"), None, "wait"))
    await bench.until(lambda: "stage 1 at 0" in decode.calls)
    decode.die()
    reply = await update
    assert (reply.success, "http://d: lost" in reply.message) == (False, True)
    assert "discard" in prefill.calls


def group(world_size: int) -> UpdateGroupSpec:
    return UpdateGroupSpec(
        name="g",
        backend="gloo",
        master_address="trainer",
        master_port=5,
        world_size=world_size,
        timeout_s=1.0,
    )


async def test_every_node_gets_a_rank_of_its_own_in_an_update_group(bench: Bench) -> None:
    nodes = [bench.decode("d2"), bench.prefill("p"), bench.decode("d1")]
    await bench.start()
    await bench.until(lambda: all(worker.healthy for worker in bench.view.workers()))
    reply = await bench.weights.init_weights_update_group(group(5), 2)
    assert (reply.success, reply.ranks) == (True, {"http://p": 2, "http://d1": 3, "http://d2": 4})
    assert "join g as 4 of 5" in nodes[0].calls
    wrong = await bench.weights.init_weights_update_group(group(4), 2)
    assert (wrong.success, wrong.ranks) == (False, reply.ranks)
    assert wrong.message.startswith("world_size is 4, but there are 2 ranks before the nodes' and 3 nodes")
    assert (await bench.weights.destroy_weights_update_group("g")).success
    assert all("leave g" in node.calls for node in nodes)


async def test_an_update_under_the_name_of_the_one_before_waits_for_the_nodes_too(bench: Bench) -> None:
    nodes = await small_cluster(bench)
    for _ in range(3):
        assert (await bench.weights.update_weights_from_disk("/new", "same", "wait")).success
        known = {node.entry.update_id for node in bench.state.nodes}
        assert known == {node.entry.update_id for node in nodes}, "the router knows what they serve"
        assert len(known) == 1
    for node in nodes:
        assert [call for call in node.calls if call.startswith("prepare")] == 3 * ["prepare /new same"]


async def test_a_group_that_one_node_does_not_join_is_left_by_all(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    decode.join_reply = "nobody listens at trainer:5"
    reply = await bench.weights.init_weights_update_group(group(3), 1)
    assert (reply.success, reply.message) == (False, "http://d: nobody listens at trainer:5")
    assert "leave g" in prefill.calls
    assert "leave g" not in decode.calls, "it is in none"


async def test_tensors_that_a_trainer_broadcasts_are_taken_by_all(bench: Bench) -> None:
    nodes = await small_cluster(bench)
    source = FromGroup(group_name="g", tensors=(), is_one_bucket=True, timeout_s=1.0)
    assert (await bench.weights.update_weights_from_distributed(source, "v2", "wait")).success
    for node in nodes:
        assert [call for call in node.calls if call != "ping"] == ["prepare g v2", "commit"]


async def test_memory_is_released_and_resumed_everywhere_and_requests_wait_meanwhile(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    nodes = prefill, decode = await small_cluster(bench)
    assert (await bench.weights.release_memory_occupation(("weights", "kv_cache"))).success
    late = asyncio.create_task(bench.service.generate(spec("late")))
    await bench.until(lambda: bench.requests.queue.num_new == 1)
    assert (await bench.weights.resume_memory_occupation(("weights",))).success
    assert (await bench.weights.update_weights_from_disk("/new", "v2", "wait")).success
    assert bench.requests.queue.held
    resumed = asyncio.create_task(bench.weights.resume_memory_occupation(("kv_cache",)))
    await bench.until(lambda: prefill.entry.incarnation == "p-1~1" and decode.entry.incarnation == "d-1~1")
    decode.peers = (prefill.entry.incarnation,)
    assert (await resumed).success
    assert {node.incarnation for node in bench.state.nodes} == {"p-1~1", "d-1~1"}
    generation = await late
    assert await read(generation) == {0: expected((1, 2, 3), 0, 8)}
    assert generation.info.weight_version == "v2"
    for node in nodes:
        assert [call for call in node.calls if call.startswith(("release", "resume"))] == [
            "release weights kv_cache",
            "resume ",  # what have you released?
            "resume weights",
            "resume ",
            "resume kv_cache",
        ]


async def test_memory_that_one_node_cannot_release_is_resumed_by_the_others(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    decode.release_reply = "the node was not idle in time"
    reply = await bench.weights.release_memory_occupation(("kv_cache",))
    assert (reply.success, reply.message) == (False, "http://d: the node was not idle in time")
    assert "resume kv_cache" in prefill.calls
    assert "resume kv_cache" not in decode.calls
    assert not bench.requests.queue.held
    again = await bench.weights.resume_memory_occupation(("kv_cache",))
    assert (again.success, again.message) == (False, "not released: kv_cache")


async def test_a_node_whose_answer_to_a_release_is_lost_is_asked_to_resume_too(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    decode.hangs_in = "release kv_cache"
    pending = asyncio.create_task(bench.weights.release_memory_occupation(("kv_cache",)))
    await bench.until(lambda: "release kv_cache" in decode.calls)
    decode.die()
    reply = await pending
    assert (reply.success, bench.requests.queue.held) == (False, False)
    assert reply.message.endswith("; to be resumed: http://d: lost"), reply.message
    assert "resume kv_cache" in prefill.calls


async def test_a_node_that_is_started_again_while_memory_is_released_is_no_reason_not_to_resume(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    prefill, decode = await small_cluster(bench)
    assert (await bench.weights.release_memory_occupation(("kv_cache",))).success
    late = asyncio.create_task(bench.service.generate(spec("late")))
    decode.start_again("d-2", peers=("p-1~1",))
    await bench.admin.register_worker(decode.entry.url, decode.entry)
    await bench.until(lambda: all(worker.healthy for worker in bench.view.workers()))
    reply = await bench.weights.resume_memory_occupation(("kv_cache",))
    assert reply.success, reply.message
    assert (prefill.entry.incarnation, decode.entry.incarnation) == ("p-1~1", "d-2")
    assert await read(await late) == {0: expected((1, 2, 3), 0, 8)}


async def test_memory_that_one_node_cannot_resume_is_asked_for_again(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    assert (await bench.weights.release_memory_occupation(("weights", "kv_cache"))).success
    decode.release_reply = "no memory is left"
    reply = await bench.weights.resume_memory_occupation(("weights", "kv_cache"))
    assert (reply.success, reply.message) == (False, "http://d: no memory is left")
    assert bench.requests.queue.held
    decode.release_reply = ""
    decode.peers = ("p-1~1",)
    reply = await bench.weights.resume_memory_occupation(("weights", "kv_cache"))
    assert reply.success, reply.message
    assert not bench.requests.queue.held
    assert {prefill.entry.incarnation, decode.entry.incarnation} == {"p-1~1", "d-1~1"}, "each once"


async def test_memory_that_another_router_released_is_resumed(bench: Bench) -> None:
    _, decode = nodes = await small_cluster(bench)
    for node in nodes:
        node.released = {"weights", "kv_cache"}
    reply = await bench.weights.resume_memory_occupation(("weights", "graphs"))
    assert (reply.success, reply.message) == (False, "not released: graphs")
    assert all(node.released == {"weights", "kv_cache"} for node in nodes), "nothing was changed"
    assert (await bench.weights.resume_memory_occupation(("weights",))).success
    decode.peers = ("p-1~1",)
    assert (await bench.weights.resume_memory_occupation(("kv_cache",))).success
    assert not bench.requests.queue.held


async def test_memory_moves_alone(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    decode.hangs_in = "release weights"
    released = asyncio.create_task(bench.weights.release_memory_occupation(("weights",)))
    await bench.until(lambda: "release weights" in decode.calls)
    why = "memory is being released or resumed"
    for call in (
        bench.weights.update_weights_from_disk("/new", "v2", "wait"),
        bench.weights.release_memory_occupation(("kv_cache",)),
        bench.weights.resume_memory_occupation(("weights",)),
    ):
        reply = await call
        assert (reply.success, reply.message) == (False, why)
    decode.die()
    await released
    prefill.hangs_in = "prepare /new v2"
    decode.start_again("d-2", peers=("p-1~1",))
    await bench.admin.register_worker(decode.entry.url, decode.entry)
    await bench.until(lambda: bool(bench.state.nodes.ready_pairs()))
    update = asyncio.create_task(bench.weights.update_weights_from_disk("/new", "v2", "wait"))
    await bench.until(lambda: prefill.hangs_in in prefill.calls)
    reply = await bench.weights.resume_memory_occupation(("weights",))
    assert (reply.success, reply.message) == (False, "another weight update is running")
    prefill.die()
    assert not (await update).success


async def test_questions_about_weights_go_to_every_node(bench: Bench) -> None:
    _, decode = await small_cluster(bench)
    named = await bench.weights.weights_by_name("norm", 3)
    assert {url: reply.values for url, reply in named.items()} == {"http://p": [0.5], "http://d": [0.5]}
    assert "get norm 3" in decode.calls
    checks = await bench.weights.check_weights()
    assert {url: reply.whole for url, reply in checks.items()} == {"http://p": "ab", "http://d": "ab"}
    decode.hangs_in = "check"
    pending = asyncio.create_task(bench.weights.check_weights())
    await bench.until(lambda: decode.calls.count("check") == 2)
    decode.die()
    assert {url: reply.success for url, reply in (await pending).items()} == {
        "http://p": True,
        "http://d": False,
    }


async def test_weights_are_not_updated_around_a_silent_node(bench: Bench) -> None:
    _, decode = await small_cluster(bench)
    decode.die()
    reply = await bench.weights.update_weights_from_disk("/new", None, "wait")
    assert (reply.success, reply.message) == (False, "these nodes do not answer: http://d")


async def test_where_a_request_is(bench: Bench, spec: Spec) -> None:
    await bench.start()
    assert await bench.view.request_state("r") is None
    waiting = asyncio.create_task(bench.service.generate(spec()))
    await bench.until(lambda: bench.requests.queue.num_new == 1)
    state = await bench.view.request_state("r")
    assert (state["state"], state["waits_for"]) == ("queued", "a ready pair of nodes")
    prefill, decode = bench.prefill(), bench.decode()
    decode.tokens_per_attempt = 0
    for node in (prefill, decode):
        await bench.admin.register_worker(node.entry.url, node.entry)
    generation = await waiting
    state = await bench.view.request_state("r")
    assert (state["state"], state["waits_for"]) == ("dispatched", "the first token from http://d")
    assert state["choices"][0]["prefill"] == "http://p"
    assert state["nodes"]["http://d"]["state"] == "running"
    output = TokenOutput(request_id="r", attempt=1, choice=0, position=0, token_ids=(7,))
    decode.emit(TokenOutputs(outputs=(output,)))
    state = await bench.view.request_state("r")
    assert (state["state"], state["choices"][0]["num_tokens"]) == ("streaming", 1)
    generation.cancel()
    state = await bench.view.request_state("r")
    assert state["state"] == "not of this router"


async def test_server_info_gathers_the_nodes(bench: Bench) -> None:
    await small_cluster(bench)
    info = await bench.view.server_info()
    assert [node["url"] for node in info["prefill"]] == ["http://p"]
    assert info["decode"][0]["config"] == {"port": 1}
    assert info["decode"][0]["internal_states"][0]["num_total_pages"] == 1000
    assert info["router"]["max_attempts"] == 3


async def test_metrics_count_what_happened(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    decode.fail_with = ["busy"]
    await read(await bench.service.generate(spec()))
    text = await bench.view.metrics_text()
    assert 'pd_router_attempts_total{code="busy",model_name="model",role="router"} 1.0' in text
    assert 'pd_router_requests_total{model_name="model",outcome="finished",role="router"} 1.0' in text
    assert 'pd_router_workers{model_name="model",role="decode",state="ready"} 1.0' in text
    assert 'pd_router_tokens_total{model_name="model",role="router"} 8.0' in text


async def test_nodes_pull_from_a_node_of_theirs_or_another(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    prefill.entry = msgspec.structs.replace(prefill.entry, weight_version="v2")
    await bench.until(lambda: bench.view.workers()[0].entry.weight_version == "v2")
    reply = await bench.weights.update_weights_from_peer("http://p", None, "wait")
    assert reply.success, reply.message
    assert decode.entry.weight_version == "v2"
    bench.prefill("far")  # it is in no roster
    reply = await bench.weights.update_weights_from_peer("http://far", "v4", "wait")
    assert reply.success, reply.message
    pulls = [call for call in decode.calls if call.startswith("prepare")]
    assert pulls == ["prepare tcp://p v2", "prepare tcp://far v4"]
    reply = await bench.weights.update_weights_from_peer("http://nobody", None, "wait")
    assert (reply.success, reply.message) == (
        False,
        "http://nobody does not answer as a node",
    )


async def test_only_the_version_of_the_weights_changes_on_all_nodes(bench: Bench, spec: Spec) -> None:
    prefill, decode = await small_cluster(bench)
    reply = await bench.weights.update_weight_version("step-8", "wait")
    assert (reply.success, reply.message) == (True, "2 nodes serve weight version step-8")
    assert [node.entry.weight_version for node in (prefill, decode)] == ["step-8", "step-8"]
    assert [source for node in (prefill, decode) for source in node.sources] == [FromServed(), FromServed()]
    decode.prepare_reply = "memory is released"
    reply = await bench.weights.update_weight_version("step-9", "wait")
    assert not reply.success
    assert [node.entry.weight_version for node in (prefill, decode)] == ["step-8", "step-8"]


async def test_one_node_saves_what_all_hold(bench: Bench) -> None:
    p, q, d, e = await large_cluster(bench)
    reply = await bench.weights.save_model("/new", is_remote=False, max_shard_bytes=9)
    assert (reply.success, reply.message) == (True, "http://p has saved /new")
    p.stage_reply = "the disk is full"
    reply = await bench.weights.save_model("s3://b", is_remote=True, max_shard_bytes=9)
    assert not reply.success
    assert "the disk is full" in reply.message
    saves = [call for node in (p, q, d, e) for call in node.calls if call.startswith("save")]
    assert saves == ["save /new False 9", "save s3://b True 9"]


# ---- sessions -------------------------------------------------------------------------------------------


async def test_closing_a_session_tells_the_nodes(bench: Bench) -> None:
    *_, d, e = await large_cluster(bench)
    session_id = bench.sessions.open_session("", 0, None)
    assert (await bench.sessions.close_session(session_id)).success
    assert [n.operations for n in (d, e)] == [[CloseSession(session_id=session_id)]] * 2
    assert not (await bench.sessions.close_session(session_id)).success
    with pytest.raises(RequestError, match="no session"):
        bench.sessions.begin_turn(TurnParams(id=session_id), "a", (1,))


# ---- large requests -------------------------------------------------------------------------------------
