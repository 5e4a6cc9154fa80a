"""The whole router over fake nodes. Nothing here asserts how long anything takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from pdserve.api.generation import GenerateSpec, Generation, SessionHold, TurnParams, WeightSpan
from pdserve.messages.node import (
    AttemptFailed,
    FailureCode,
    Finish,
    GenerateRequest,
    NodeEntry,
    NodeLoad,
    TokenOutput,
    TokenOutputs,
)
from pdserve.messages.operation import CloseSession, ContinueGeneration, PauseGeneration
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.weights import STAGE_PART_BYTES, FromGroup, FromServed, KeepWeights, UpdateGroupSpec
from pdserve.messages.work import Work
from pdserve.router.attempts import RequestRecord
from pdserve.router.registry import MAX_NODES
from pdserve.runtime.errors import RequestError

Spec = Callable[..., GenerateSpec]
Expected = Callable[[tuple[int, ...], int, int], list[int]]
Bench = Any  # of conftest.py, which pytest's importlib mode does not let tests import


async def read(generation: Generation) -> dict[int, list[int]]:
    """All token ids by choice; every choice must end exactly once."""
    ids: dict[int, list[int]] = {}
    ended: list[int] = []
    async with asyncio.timeout(20):
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


async def test_a_request_goes_to_the_decode_node_alone_and_streams(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
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
    assert bench.service.counters.requests == {"finished": 1}
    assert bench.service.counters.attempts == {"ok": 1}


async def test_choices_come_each_with_its_own_tokens(bench: Bench, spec: Spec, expected: Expected) -> None:
    await small_cluster(bench)
    generation = await bench.service.generate(spec(num_choices=3))
    assert await read(generation) == {choice: expected((1, 2, 3), choice, 8) for choice in range(3)}


async def test_many_requests_at_once(bench: Bench, spec: Spec, expected: Expected) -> None:
    nodes = await large_cluster(bench)

    async def one(i: int) -> None:
        generation = await bench.service.generate(spec(f"r{i}", prompt=(i, i + 1), max_tokens=20))
        assert await read(generation) == {0: expected((i, i + 1), 0, 20)}

    await asyncio.gather(*(one(i) for i in range(100)))
    assert all(node.requests() for node in nodes if node.entry.role == "decode")


async def test_a_colocated_decode_node_needs_no_prefill_node(
    bench: Bench, spec: Spec, entry: Callable[..., NodeEntry], expected: Expected
) -> None:
    decode = bench.decode(peers=())
    decode.entry = entry(colocated=True)
    await bench.start()
    await bench.ready(1)
    assert await read(await bench.service.generate(spec())) == {0: expected((1, 2, 3), 0, 8)}
    assert decode.requests()[0].prefill_incarnation == ""


async def test_prompts_with_a_common_prefix_go_to_the_same_prefill_node(bench: Bench, spec: Spec) -> None:
    *_, decode, other = await large_cluster(bench)
    prefix = tuple(range(40))
    for i in range(6):
        await read(await bench.service.generate(spec(f"r{i}", prompt=(*prefix, 100 + i), max_tokens=1)))
    paired = {r.prefill_incarnation for node in (decode, other) for r in node.requests()}
    assert len(paired) == 1


async def test_a_conversation_goes_back_to_its_decode_node(bench: Bench, spec: Spec) -> None:
    *_, decode, other = await large_cluster(bench)
    prompts = {name: tuple(range(first, first + 24)) for name, first in (("a", 1), ("b", 100), ("c", 200))}
    for turn in range(3):
        for name, prompt in prompts.items():
            answer = await read(await bench.service.generate(spec(f"{name}{turn}", prompt=prompt)))
            prompts[name] = (*prompt, *answer[0], 7 + turn)
    used = {
        name: {n.entry.url for n in (decode, other) for r in n.requests() if r.request_id[0] == name}
        for name in prompts
    }
    assert all(len(urls) == 1 for urls in used.values()), used
    assert set.union(*used.values()) == {decode.entry.url, other.entry.url}


async def test_decode_is_told_how_much_is_ahead_on_prefill(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    await read(await bench.service.generate(spec("a", prompt=tuple(range(40)))))
    await read(await bench.service.generate(spec("b", prompt=tuple(range(50)))))
    assert [request.num_prefill_tokens_ahead for request in decode.requests()] == [40, 10]


async def test_answers_go_on_without_a_prefill_node(bench: Bench, spec: Spec, expected: Expected) -> None:
    prefill, decode = await small_cluster(bench)
    assert await read(await bench.service.generate(spec("before"))) == {0: expected((1, 2, 3), 0, 8)}
    prefill.die()
    assert await read(await bench.service.generate(spec("after"))) == {0: expected((1, 2, 3), 0, 8)}
    assert [request.prefill_incarnation for request in decode.requests()] == ["p-1", ""]
    assert bench.service.view.readiness() == (True, "")


async def test_a_retracted_request_goes_on_with_what_it_has(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    _, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 3
    generation = await bench.service.generate(spec())
    await bench.until(lambda: bench.service.counters.num_tokens == 3)
    decode.tokens_per_attempt = None
    reason = "too few pages"
    decode.emit(AttemptFailed(request_id="r", attempt=1, code="retracted", reason=reason, retriable=True))
    assert await read(generation) == {0: expected((1, 2, 3), 0, 8)}
    assert [(r.was_retracted, len(r.work.output_ids)) for r in decode.requests()] == [(False, 0), (True, 3)]
    assert bench.service.counters.attempts["retracted"] == 1


async def test_an_id_in_use_is_refused(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 1
    generation = await bench.service.generate(spec())
    with pytest.raises(RequestError) as refused:
        await bench.service.generate(spec())
    assert refused.value.status == 409
    generation.cancel()


# ---- failures -------------------------------------------------------------------------------------------


async def test_a_decode_node_lost_in_mid_stream_is_continued_elsewhere(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    *_, d, e = await large_cluster(bench)
    d.tokens_per_attempt = e.tokens_per_attempt = 3
    generation = await bench.service.generate(spec(max_tokens=8))
    stream = aiter(generation)
    ids = [token for _ in range(3) for token in (await anext(stream)).token_ids]
    first, second = (d, e) if d.requests() else (e, d)
    second.tokens_per_attempt = None
    first.die()
    ids += [token async for delta in stream for token in delta.token_ids]
    assert ids == expected((1, 2, 3), 0, 8)
    assert second.requests()[0].work.output_ids == tuple(ids[:3])
    assert second.requests()[0].prefill_incarnation != first.requests()[0].prefill_incarnation
    assert generation.info.num_attempts == 2
    assert bench.service.counters.attempts == {"peer_lost": 1, "ok": 1}


async def test_a_frozen_decode_node_is_suspected_and_told_to_stop(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    *_, d, e = await large_cluster(bench, pong_timeout_s=0.05)
    d.tokens_per_attempt = e.tokens_per_attempt = 3
    generation = await bench.service.generate(spec(max_tokens=8))
    first, second = (d, e) if d.requests() else (e, d)
    second.tokens_per_attempt = None
    first.answers_pings = False
    assert await read(generation) == {0: expected((1, 2, 3), 0, 8)}
    assert [cancel.attempt for cancel in first.cancels()] == [1]
    # It resumes and goes on where it was: nobody listens.
    late = TokenOutput(request_id="r", attempt=1, choice=0, position=3, token_ids=(1,))
    first.emit(TokenOutputs(outputs=(late,)))


async def test_a_connection_that_died_in_silence_is_made_again(bench: Bench) -> None:
    """A network that forgot it tells nobody; the node goes on registering itself and waits for pings."""
    node = bench.decode()
    await bench.start(lease_s=0.8)
    await bench.until(lambda: bench.service.view.workers()[0].healthy)
    (link,) = node.links
    node.answers_pings = False  # on this connection, that is
    async with asyncio.timeout(10):
        while link in node.links:
            await bench.service.register_worker(node.entry.url, node.entry)
            await asyncio.sleep(0.005)
    node.answers_pings = True
    await bench.service.register_worker(node.entry.url, node.entry)
    await bench.until(lambda: bool(bench.service.view.workers()) and bench.service.view.workers()[0].healthy)


async def test_choices_of_a_lost_node_are_each_continued_alone(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    *_, d, e = await large_cluster(bench)
    d.tokens_per_attempt = e.tokens_per_attempt = 2
    generation = await bench.service.generate(spec(max_tokens=6, num_choices=3))
    first, second = (d, e) if d.requests() else (e, d)
    await bench.until(lambda: bench.service.counters.num_tokens == 6)
    second.tokens_per_attempt = None
    first.die()
    assert await read(generation) == {choice: expected((1, 2, 3), choice, 6) for choice in range(3)}
    assert sorted(request.work.choices for request in second.requests()) == [(0,), (1,), (2,)]


async def test_the_only_decode_node_comes_back_as_another_incarnation(
    bench: Bench, spec: Spec, entry: Callable[..., NodeEntry], expected: Expected
) -> None:
    _, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 3
    generation = await bench.service.generate(spec(max_tokens=8))
    await bench.until(lambda: bench.service.counters.num_tokens == 3)
    decode.tokens_per_attempt = None
    decode.start_again("d-2")
    await bench.service.register_worker(decode.entry.url, decode.entry)
    assert await read(generation) == {0: expected((1, 2, 3), 0, 8)}


@pytest.mark.parametrize("code", ["busy", "version_skew", "not_ready"])
async def test_what_costs_no_attempt_goes_on_until_it_works(
    bench: Bench, spec: Spec, code: FailureCode, expected: Expected
) -> None:
    _, decode = await small_cluster(bench, busy_delay_s=0.001)
    decode.fail_with = [code] * 6
    generation = await bench.service.generate(spec())
    assert await read(generation) == {0: expected((1, 2, 3), 0, 8)}
    assert bench.service.counters.attempts == {code: 6, "ok": 1}


async def test_three_failures_fail_the_request(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    decode.fail_with = ["transfer_failed"] * 3
    generation = await bench.service.generate(spec())
    with pytest.raises(RequestError, match="scripted transfer_failed") as error:
        await read(generation)
    assert error.value.status == 503
    assert len(decode.requests()) == 3
    assert bench.service.counters.requests == {"failed": 1}


async def test_a_request_that_can_never_be_served_is_the_clients_mistake(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    decode.fail_with = ["invalid"]
    with pytest.raises(RequestError) as error:
        await read(await bench.service.generate(spec()))
    assert error.value.status == 400
    assert len(decode.requests()) == 1


async def test_a_gap_is_asked_for_again(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 0
    generation = await bench.service.generate(spec(max_tokens=4))

    def emit(position: int, *ids: int, finish: Finish | None = None) -> None:
        output = TokenOutput(
            request_id="r", attempt=1, choice=0, position=position, token_ids=ids, finish=finish
        )
        decode.emit(TokenOutputs(outputs=(output,)))

    emit(0, 10)
    emit(2, 12)  # position 1 got lost
    emit(3, 13, finish=Finish(reason="length"))
    assert [(resend.choice, resend.position) for resend in decode.resends()] == [(0, 1)]
    emit(1, 11, 12, 13, finish=Finish(reason="length"))
    emit(1, 11, 12, 13, finish=Finish(reason="length"))
    assert await read(generation) == {0: [10, 11, 12, 13]}


@pytest.mark.parametrize("is_colocated", [False, True])
async def test_a_node_that_shuts_down_is_not_asked_again_before_its_next_pong(
    bench: Bench, spec: Spec, expected: Expected, entry: Callable[..., NodeEntry], is_colocated: bool
) -> None:
    """Otherwise a request uses up its attempts before the router knows that the node drains."""
    decode = bench.decode()
    if is_colocated:
        decode.entry = entry(colocated=True)
    else:
        bench.prefill()
    await bench.start(ping_interval_s=0.3)
    await bench.ready(1 if is_colocated else 2)
    decode.fail_with = ["shutting_down"] * 5
    decode.draining = True
    generation = await bench.service.generate(spec())
    num_pings = decode.calls.count("ping")
    await bench.until(lambda: decode.calls.count("ping") > num_pings)
    assert len(decode.requests()) == 1
    decode.fail_with.clear()  # started again
    decode.draining = False
    assert await read(generation) == {0: expected((1, 2, 3), 0, 8)}
    assert len(decode.requests()) == 2


async def test_a_retry_waits_for_the_weights_it_began_with(
    bench: Bench, spec: Spec, entry: Callable[..., NodeEntry]
) -> None:
    """A mixed answer is worse than none."""
    prefill, decode = await small_cluster(bench, no_pair_timeout_s=0.05)
    decode.tokens_per_attempt = 2
    generation = await bench.service.generate(spec())
    await bench.until(lambda: bench.service.counters.num_tokens == 2)
    prefill.entry = entry("prefill", "p", weight_version="v2")
    decode.entry = entry(weight_version="v2")
    await bench.until(
        lambda: bench.service.view.weight_version() == "v2" and bench.service.view.readiness()[0]
    )
    decode.emit(
        AttemptFailed(
            request_id="r", attempt=1, code="version_skew", reason="weights changed", retriable=True
        )
    )
    with pytest.raises(RequestError, match="no pair of nodes serves weight version v1 any more"):
        await read(generation)


# ---- the reader -----------------------------------------------------------------------------------------


async def test_cancel_releases_decode_and_is_idempotent(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 1
    generation = await bench.service.generate(spec())
    generation.cancel()
    generation.cancel()
    assert [(cancel.attempt, cancel.choices) for cancel in decode.cancels()] == [(1, ())]
    assert bench.service.num_running == 0
    assert bench.service.counters.requests == {"cancelled": 1}


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
    await bench.until(lambda: bench.service._queue.num_new == 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert len(bench.service._queue) == 0


async def test_a_stopped_choice_is_cancelled_and_the_others_go_on(
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


async def test_stopping_the_last_choice_ends_the_request(bench: Bench, spec: Spec) -> None:
    await small_cluster(bench)
    generation = await bench.service.generate(spec(max_tokens=1000))
    async for _ in generation:
        generation.stop_choice(0)
    assert bench.service.counters.requests == {"finished": 1}


# ---- admission ------------------------------------------------------------------------------------------


async def test_a_full_queue_is_429(bench: Bench, spec: Spec) -> None:
    await bench.start(max_queued_requests=2)
    waiting = [asyncio.create_task(bench.service.generate(spec(f"r{i}"))) for i in range(2)]
    await bench.until(lambda: bench.service._queue.num_new == 2)
    with pytest.raises(RequestError) as refused:
        await bench.service.generate(spec("more"))
    assert refused.value.status == 429
    assert refused.value.retry_after_s is not None
    assert bench.service.counters.requests == {"refused": 1}
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ((), "no decode node is registered"),
        (("prefill",), "no decode node is registered"),
        (("decode",), "no prefill node is registered"),
        (("prefill", "decode"), "no decode node has connected to a prefill node yet"),
    ],
)
async def test_without_a_ready_pair_it_is_503_that_says_what_is_missing(
    bench: Bench, spec: Spec, roles: tuple[str, ...], reason: str
) -> None:
    if "prefill" in roles:
        bench.prefill()
    if "decode" in roles:
        bench.decode(peers=())
    await bench.start(no_pair_timeout_s=0.1)
    await bench.until(lambda: all(worker.healthy for worker in bench.service.view.workers()))
    assert bench.service.view.readiness() == (False, reason)
    with pytest.raises(RequestError, match=reason) as error:
        await bench.service.generate(spec())
    assert (error.value.status, error.value.retry_after_s) == (503, 0.1)


async def test_a_request_waits_for_the_first_pair(bench: Bench, spec: Spec, expected: Expected) -> None:
    await bench.start()
    waiting = asyncio.create_task(bench.service.generate(spec()))
    await bench.until(lambda: bench.service._queue.num_new == 1)
    for node in (bench.prefill(), bench.decode()):
        await bench.service.register_worker(node.entry.url, node.entry)
    assert await read(await waiting) == {0: expected((1, 2, 3), 0, 8)}


async def test_requests_wait_for_room_and_go_in_order(bench: Bench, spec: Spec, expected: Expected) -> None:
    prefill, decode = bench.prefill(), bench.decode()
    decode.load = NodeLoad(
        num_total_pages=1000, num_free_pages=1000, page_size=4, max_running_requests=2
    )  # and one more while those run
    await bench.start()
    await bench.ready()
    generations = await asyncio.gather(
        *(bench.service.generate(spec(f"r{i}", max_tokens=5)) for i in range(12))
    )
    for generation in generations:
        assert await read(generation) == {0: expected((1, 2, 3), 0, 5)}
    assert [request.request_id for request in decode.requests()] == [f"r{i}" for i in range(12)]
    assert prefill.requests() == []


async def test_gates_are_passed_when_nothing_moves(bench: Bench, spec: Spec, expected: Expected) -> None:
    """A pong may go on saying that there is no room; only decode's answer counts."""
    bench.prefill()
    decode = bench.decode()
    decode.load = NodeLoad(
        num_total_pages=10, num_free_pages=0, page_size=4, num_running_reqs=9, max_running_requests=1
    )
    await bench.start(gate_patience_s=0.05)
    await bench.ready()
    assert await read(await bench.service.generate(spec())) == {0: expected((1, 2, 3), 0, 8)}


async def test_a_deadline_in_the_queue_is_503_and_while_running_504(bench: Bench, spec: Spec) -> None:
    await bench.start()
    with pytest.raises(RequestError) as error:
        await bench.service.generate(spec(timeout_s=0.05))
    assert (error.value.status, error.value.code) == (503, "queue_timeout")
    for node in (bench.prefill(), bench.decode()):
        node.tokens_per_attempt = 1
        await bench.service.register_worker(node.entry.url, node.entry)
    await bench.ready()
    with pytest.raises(RequestError) as error:
        await read(await bench.service.generate(spec(timeout_s=0.05)))
    assert (error.value.status, error.value.code) == (504, "deadline_exceeded")


async def test_drain_lets_running_requests_end_and_refuses_new_ones(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    await small_cluster(bench)
    generation = await bench.service.generate(spec())
    drained = asyncio.create_task(bench.service.drain(10.0))
    await asyncio.sleep(0)
    with pytest.raises(RequestError) as refused:
        await bench.service.generate(spec("late"))
    assert refused.value.status == 503
    assert bench.service.view.readiness() == (False, "the router is shutting down")
    assert await read(generation) == {0: expected((1, 2, 3), 0, 8)}
    assert await drained


async def test_what_does_not_end_in_time_is_failed_by_close(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 1
    generation = await bench.service.generate(spec())
    assert not await bench.service.drain(0.01)
    await bench.service.close()
    with pytest.raises(RequestError, match="shutting down"):
        await read(generation)
    assert len(decode.cancels()) == 1


# ---- nodes ----------------------------------------------------------------------------------------------


async def test_static_urls_are_polled_until_they_answer(bench: Bench, spec: Spec) -> None:
    prefill = bench.prefill()
    bench.decode()
    prefill.alive = False
    bench.static_urls = ("http://p", "http://d")
    await bench.start()
    await bench.until(lambda: len(bench.service.view.workers()) == 1)
    prefill.alive = True
    await bench.ready()


async def test_every_node_is_told_of_every_node(bench: Bench) -> None:
    nodes = await small_cluster(bench)
    for node in nodes:
        await bench.until(lambda node=node: len(node.rosters()[-1].nodes) == 2)


async def test_a_dead_node_leaves_the_workers(bench: Bench) -> None:
    _, decode = await small_cluster(bench, lease_s=1.0, pong_timeout_s=0.5)
    decode.die()
    worker = next(w for w in bench.service.view.workers() if w.entry.role == "decode")
    assert not worker.healthy
    await bench.until(lambda: len(bench.service.view.workers()) == 1)
    assert bench.service.view.readiness() == (False, "no decode node is registered")


async def test_a_node_with_a_bad_address_harms_nobody(
    bench: Bench, spec: Spec, entry: Callable[..., NodeEntry], expected: Expected
) -> None:
    await small_cluster(bench)
    bad = entry("decode", "bad", zmq_address="nonsense")
    assert (await bench.service.register_worker(bad.url, bad)).success
    assert await read(await bench.service.generate(spec())) == {0: expected((1, 2, 3), 0, 8)}


async def test_a_node_whose_link_broke_is_connected_again(bench: Bench) -> None:
    _, decode = await small_cluster(bench)
    decode.links[0].reset("connection lost")
    assert not bench.service.view.readiness()[0]
    await bench.ready()


async def test_a_draining_node_gets_no_new_work(bench: Bench, spec: Spec) -> None:
    *_, d, e = await large_cluster(bench)
    d.draining = True
    await bench.ready(3)
    for i in range(4):
        await read(await bench.service.generate(spec(f"r{i}", max_tokens=1)))
    assert (len(d.requests()), len(e.requests())) == (0, 4)


async def test_a_node_that_leaves_ends_what_it_works_on(bench: Bench, spec: Spec, expected: Expected) -> None:
    prefill, decode = await small_cluster(bench)
    decode.pace_s = 0.001
    generation = await bench.service.generate(spec(max_tokens=100))
    assert (await bench.service.remove_worker("http://d")).success
    assert bench.service.view.readiness() == (False, "every decode node is draining")
    assert await read(generation) == {0: expected((1, 2, 3), 0, 100)}
    assert generation.info.num_attempts == 1
    await bench.until(lambda: [w.entry for w in bench.service.view.workers()] == [prefill.entry])


async def test_an_operator_removes_a_node_and_names_it_again(bench: Bench) -> None:
    _, decode = await small_cluster(bench)
    assert (await bench.service.remove_worker("http://d")).success
    assert not (await bench.service.remove_worker("http://d")).success
    assert not (await bench.service.register_worker("http://d", decode.entry)).success
    assert (await bench.service.register_worker("http://d", None)).success
    await bench.ready()
    reply = await bench.service.register_worker("http://nowhere", None)
    assert (reply.success, "does not answer" in reply.message) == (False, True)


async def test_a_router_takes_so_many_nodes(bench: Bench, entry: Callable[..., NodeEntry]) -> None:
    _, decode = await small_cluster(bench)
    made_up = [entry("decode", f"made-up-{i}") for i in range(MAX_NODES)]
    for each in made_up[:-2]:
        await bench.service.register_worker(each.url, each)
    with pytest.raises(RequestError, match=f"has {MAX_NODES} nodes, as many as it takes") as refusal:
        await bench.service.register_worker(made_up[-1].url, made_up[-1])
    assert (refusal.value.status, refusal.value.code) == (503, "too_many_nodes")
    assert (await bench.service.register_worker(decode.entry.url, decode.entry)).success


# ---- admin ----------------------------------------------------------------------------------------------


async def test_flush_asks_every_node(bench: Bench) -> None:
    nodes = await small_cluster(bench)
    reply = await bench.service.flush_cache(3.0)
    assert reply.success
    assert all("flush 3" in node.calls for node in nodes)
    assert "http://p: flushed" in reply.message


async def test_a_death_is_told_to_every_decode_node(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    reply = await bench.service.assert_peer_death("gone")
    assert reply.success
    assert "dead gone" in decode.calls
    assert "dead gone" not in prefill.calls
    decode.death_reply = "gone is alive"
    reply = await bench.service.assert_peer_death("gone")
    assert (reply.success, "gone is alive" in reply.message) == (False, True)


async def test_no_death_is_believed_of_a_node_that_answers(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    reply = await bench.service.assert_peer_death(prefill.entry.incarnation)
    assert (reply.success, "is alive" in reply.message) == (False, True)
    assert not any(call.startswith("dead") for call in decode.calls)


async def test_a_death_that_no_decode_node_heard_of_is_to_be_told_again(bench: Bench) -> None:
    _, decode = await small_cluster(bench)
    decode.die()
    reply = await bench.service.assert_peer_death("gone")
    assert not reply.success


async def test_flush_without_nodes_is_no_success(bench: Bench) -> None:
    await bench.start()
    assert not (await bench.service.flush_cache(0.0)).success


async def test_abort_ends_a_request_by_its_exact_id(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 1
    generations = [await bench.service.generate(spec(name)) for name in ("r", "r2")]
    reply = await bench.service.abort_requests("unknown", False)
    assert (reply.success, reply.message) == (True, "no request 'unknown' is known")
    assert (await bench.service.abort_requests("r", False)).success
    deltas = [delta async for delta in generations[0]]
    assert deltas[-1].finish_reason == "abort"
    assert [cancel.request_id for cancel in decode.cancels()] == ["r"]
    assert (await bench.service.abort_requests("", True)).success
    assert [delta.finish_reason async for delta in generations[1]][-1] == "abort"
    assert "abort True" in decode.calls


async def test_f10_an_aborted_answer_has_every_token_that_nodes_have(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    _, decode = await small_cluster(bench)
    decode.tokens_per_attempt, decode.num_withheld = 2, 3
    generation = await bench.service.generate(spec(num_choices=2))
    reading = asyncio.create_task(read(generation))
    await bench.until(lambda: bench.service.own_state("r")["choices"][1]["num_tokens"] == 2)
    assert (await bench.service.abort_requests("r", False)).success
    assert await reading == {choice: expected((1, 2, 3), choice, 5) for choice in (0, 1)}
    assert bench.service.counters.requests["aborted"] == 1
    assert [(cancel.attempt, cancel.aborts) for cancel in decode.cancels()] == [(1, True)]


@pytest.mark.parametrize("goes", ["silent", "lost"])
async def test_f10_an_abort_ends_without_a_node_that_does_not_answer(
    bench: Bench, spec: Spec, expected: Expected, goes: str
) -> None:
    _, decode = await small_cluster(bench, abort_grace_s=0.01 if goes == "silent" else 60.0)
    decode.tokens_per_attempt, decode.answers_aborts = 1, False
    generation = await bench.service.generate(spec())
    reading = asyncio.create_task(read(generation))
    await bench.until(lambda: bench.service.own_state("r")["choices"][0]["num_tokens"] == 1)
    aborting = asyncio.create_task(bench.service.abort_requests("r", False))
    await bench.until(decode.cancels)
    if goes == "lost":
        decode.die()
    assert await reading == {0: expected((1, 2, 3), 0, 1)}
    assert (await aborting).success
    assert len(decode.requests()) == 1, "what an abort found is not tried again"


async def test_f8_choices_beyond_a_node_s_places_go_in_turns(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    _, decode = await small_cluster(bench)
    decode.load = msgspec.structs.replace(decode.load, max_running_requests=3)
    await bench.until(lambda: bench.service.view.workers()[1].load.max_running_requests == 3)
    answer = await read(await bench.service.generate(spec(num_choices=8)))
    assert answer == {choice: expected((1, 2, 3), choice, 8) for choice in range(8)}
    assert [request.work.choices for request in decode.requests()] == [(0, 1, 2), (3, 4, 5), (6, 7)]


async def test_f8_choices_beyond_a_node_s_pages_go_in_turns(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    decode.load = msgspec.structs.replace(decode.load, num_total_pages=8, num_free_pages=8)
    await bench.until(lambda: bench.service.view.workers()[1].load.num_total_pages == 8)
    await read(await bench.service.generate(spec(num_choices=5)))  # 3 + 8 - 1 tokens: 3 pages each
    assert [request.work.choices for request in decode.requests()] == [(0, 1), (2, 3), (4,)]


async def test_f8_choices_that_wait_for_their_turn_end_with_an_abort_or_a_stop(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    _, decode = await small_cluster(bench, pong_timeout_s=60.0, gate_patience_s=60.0)
    decode.load = msgspec.structs.replace(decode.load, max_running_requests=1)
    decode.tokens_per_attempt = 1
    await bench.until(lambda: bench.service.view.workers()[1].load.max_running_requests == 1)
    decode.answers_pings = False  # so it is busy with what it was sent, and nobody says otherwise
    generation = await bench.service.generate(spec(num_choices=4))
    await bench.until(lambda: len(decode.requests()) == 2)  # one more than there are places
    generation.stop_choice(3)
    assert (await bench.service.abort_requests("r", False)).success
    assert await read(generation) == {
        0: [expected((1, 2, 3), 0, 1)[0]],
        1: [expected((1, 2, 3), 1, 1)[0]],
        2: [],
    }


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_f4_the_smallest_pool_ends_a_length_that_nobody_asked_for(
    bench: Bench, spec: Spec, role: str
) -> None:
    """It is settled when the request is sent: when it comes, no node may be known."""
    await bench.start()
    wanted = [
        replace(spec("default", max_tokens=900), has_default_length=True),
        replace(spec("short", max_tokens=5), has_default_length=True),
        replace(spec("floor", max_tokens=900, min_tokens=40), has_default_length=True),
        spec("asked", max_tokens=30),
    ]
    running = [asyncio.create_task(bench.service.generate(each)) for each in wanted]
    await bench.until(lambda: bench.service.num_queued == 4)
    prefill, decode = bench.prefill(), bench.decode()
    node = prefill if role == "prefill" else decode
    node.load = msgspec.structs.replace(node.load, num_total_pages=7, num_free_pages=7)
    for each in (prefill, decode):
        await bench.service.register_worker(each.entry.url, each.entry)
    for task in running:
        await read(await task)
    lengths = {request.request_id: request.work.sampling.max_tokens for request in decode.requests()}
    assert lengths == {"default": 26, "short": 5, "floor": 40, "asked": 30}, (
        "28 tokens of KV, 3 of the prompt"
    )


async def test_a_pause_keeps_everything_in_the_queue_and_no_deadline_runs_out(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    prefill, decode = await small_cluster(bench)
    service = bench.service
    assert (await service.pause_generation("retract", drains=False)).success
    assert prefill.operations == decode.operations == [PauseGeneration(mode="retract")]
    waiting = asyncio.create_task(service.generate(spec("r", timeout_s=0.1)))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    assert decode.requests() == []
    assert (await service.view.server_info())["router"]["pause"] == "retract"
    assert (await service.continue_generation()).success
    assert decode.operations[-1] == ContinueGeneration()
    generation = await waiting
    tokens = [token async for delta in generation for token in delta.token_ids]
    assert tokens == expected((1, 2, 3), 0, 8)


async def test_what_a_pause_retracted_goes_on_at_no_cost_of_an_attempt(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    _, decode = await small_cluster(bench)
    decode.fail_with = ["paused"] * 5
    await bench.service.pause_generation("retract", drains=False)
    waiting = asyncio.create_task(bench.service.generate(spec("r")))
    await bench.service.continue_generation()
    tokens = [token async for delta in await waiting for token in delta.token_ids]
    assert tokens == expected((1, 2, 3), 0, 8)
    assert not any(request.was_retracted for request in decode.requests()), "memory was not short"


async def test_a_pause_that_aborts_or_drains(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 1
    generation = await bench.service.generate(spec("r"))
    assert (await bench.service.pause_generation("abort", drains=False)).success
    assert [delta.finish_reason async for delta in generation][-1] == "abort"
    await bench.service.continue_generation()

    decode.tokens_per_attempt = None
    decode.pace_s = 0.01
    generation = await bench.service.generate(spec("s"))
    pausing = asyncio.create_task(bench.service.pause_generation("in_place", drains=True))
    assert [delta.finish_reason async for delta in generation][-1] == "length"
    assert (await pausing).success
    assert decode.operations[-1] == PauseGeneration(mode="in_place")
    await bench.service.continue_generation()


async def test_a_node_that_is_not_reached_is_named_by_a_pause(bench: Bench) -> None:
    _, decode = await small_cluster(bench)
    decode.operation_reply = "no"
    reply = await bench.service.pause_generation("in_place", drains=False)
    assert (reply.success, "http://d: no" in reply.message) == (False, True)
    await bench.service.continue_generation()


async def test_weights_are_updated_everywhere_between_requests(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    prefill, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 3
    running = await bench.service.generate(spec())
    update = asyncio.create_task(bench.service.weights.update_weights_from_disk("/new", "v2", "wait"))
    await bench.until(lambda: bench.service._queue.held)
    late = asyncio.create_task(bench.service.generate(spec("late")))
    await bench.until(lambda: bench.service._queue.num_new == 1)
    assert not any(call.startswith("commit") for call in decode.calls)
    assert (await bench.service.weights.update_weights_from_disk("/other", None, "wait")).success is False

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
    assert bench.service.view.weight_version() == "v2"
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
    reply = await bench.service.weights.update_weights_from_disk("/new", None, "wait")
    assert not reply.success
    assert reply.message == "the old weights serve on; http://p: hidden_size 512, here 256"
    assert all("discard" in node.calls and "commit" not in node.calls for node in (prefill, decode))
    generation = await bench.service.generate(spec())
    assert await read(generation) == {0: expected((1, 2, 3), 0, 8)}
    assert generation.info.weight_version == "v1"


async def test_weights_that_nodes_would_not_have_in_common_are_taken_by_none(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    prefill.prepared_fingerprint = "made of others"
    reply = await bench.service.weights.update_weights_from_disk("/new", None, "wait")
    assert not reply.success
    assert "http://p: made of others" in reply.message
    assert "http://d: new" in reply.message
    assert all("discard" in node.calls and "commit" not in node.calls for node in (prefill, decode))


async def test_a_node_that_fails_to_swap_is_named_and_pairs_with_nobody(bench: Bench) -> None:
    prefill, _ = await small_cluster(bench, weight_commit_s=0.05, weight_ready_s=0.1)
    prefill.commit_reply = "not idle"
    reply = await bench.service.weights.update_weights_from_disk("/new", "v2", "wait")
    assert not reply.success
    assert "http://p: not idle" in reply.message
    await bench.until(lambda: not bench.service.view.readiness()[0])
    assert bench.service.view.readiness() == (False, "nodes serve different weight versions: v1, v2")


async def test_a_node_that_is_not_idle_yet_is_asked_again(bench: Bench) -> None:
    """A cancelled request is over here while its last write is still on the wire there."""
    prefill, decode = await small_cluster(bench)
    prefill.commit_reply = "the node is not idle"
    update = asyncio.create_task(bench.service.weights.update_weights_from_disk("/new", "v2", "wait"))
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
    reply = await bench.service.weights.update_weights_from_disk("/new", "v2", "wait")
    why = "http://p: update u is not prepared here; http://d: update u is not prepared here"
    assert (reply.success, reply.message) == (False, f"this update changed nothing; {why}")
    assert not bench.service._queue.held


@pytest.mark.parametrize("is_there", [True, False])
async def test_an_update_that_another_router_replaced_is_not_waited_for(bench: Bench, is_there: bool) -> None:
    prefill, decode = nodes = await small_cluster(bench, weight_ready_s=3600.0)
    if not is_there:
        prefill.commit_reply = "update u is not prepared here"
    decode.peers = ()  # so that it waits for a pair
    update = asyncio.create_task(bench.service.weights.update_weights_from_disk("/new", "v2", "wait"))
    await bench.until(lambda: decode.entry.weight_version == "v2")
    assert bench.service._queue.held
    for node in nodes:
        node.entry = msgspec.structs.replace(node.entry, update_id="theirs", weight_version="v3")
    reply = await update
    text = "another router's update took the place of weight version v2"
    assert (reply.success, reply.message) == (False, text)
    assert not bench.service._queue.held


async def test_a_node_that_dies_during_the_update_is_named(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    decode.hangs_in = "prepare"
    update = asyncio.create_task(bench.service.weights.update_weights_from_disk("/new", "v2", "wait"))
    await bench.until(lambda: "prepare /new v2" in decode.calls)
    decode.die()
    reply = await update
    assert (reply.success, "http://d: lost" in reply.message) == (False, True)
    assert "discard" in prefill.calls


async def test_a_node_that_dies_after_the_update_does_not_hold_requests_for_long(bench: Bench) -> None:
    _, decode = await small_cluster(bench, weight_ready_s=0.1)
    decode.hangs_in = "ping"
    reply = await bench.service.weights.update_weights_from_disk("/new", "v2", "wait")
    assert (reply.success, "new weights are loaded, but" in reply.message) == (False, True)
    assert not bench.service._queue.held


async def test_a_node_that_is_started_again_in_the_commit_does_not_fail_the_update(bench: Bench) -> None:
    nodes = await large_cluster(bench)
    died = nodes[-1]
    died.hangs_in = "commit"
    update = asyncio.create_task(bench.service.weights.update_weights_from_disk("/new", "v2", "wait"))
    await bench.until(lambda: "commit" in died.calls)
    died.die()
    died.hangs_in, died.alive = "no call", True
    died.entry = msgspec.structs.replace(died.entry, incarnation="e-2")
    await bench.service.register_worker(died.entry.url, died.entry)
    reply = await update
    expected = "3 nodes serve weight version v2, 1 died and read it when started again"
    assert (reply.success, reply.message) == (True, expected)
    await bench.until(lambda: died.entry.weight_version == "v2")


async def test_an_update_ends_when_the_lease_of_a_node_that_died_in_the_commit_does(bench: Bench) -> None:
    *_, died = await large_cluster(bench, lease_s=1.0, pong_timeout_s=0.5)
    died.hangs_in = "commit"
    update = asyncio.create_task(bench.service.weights.update_weights_from_disk("/new", "v2", "wait"))
    await bench.until(lambda: "commit" in died.calls)
    died.die()
    reply = await update
    expected = "3 nodes serve weight version v2, 1 died and read it when started again"
    assert (reply.success, reply.message) == (True, expected)


async def test_an_update_whose_only_prefill_node_died_ends_when_it_is_back(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench, weight_rejoin_s=0.02)
    prefill.hangs_in = "commit"
    update = asyncio.create_task(bench.service.weights.update_weights_from_disk("/new", "v2", "wait"))
    await bench.until(lambda: "commit" in prefill.calls)
    prefill.die()
    prefill.hangs_in, prefill.alive = "no call", True
    prefill.entry = msgspec.structs.replace(prefill.entry, incarnation="p-2")
    decode.peers = ("p-2",)
    await bench.service.register_worker(prefill.entry.url, prefill.entry)
    reply = await update
    expected = "1 nodes serve weight version v2, 1 died and read it when started again"
    assert (reply.success, reply.message) == (True, expected)
    assert prefill.entry.weight_version == "v2"


async def test_a_node_that_does_not_swap_fails_the_update(bench: Bench) -> None:
    _, decode = await small_cluster(bench, weight_commit_s=0.01, weight_ready_s=0.05)
    decode.commit_reply = "the node is not idle"
    reply = await bench.service.weights.update_weights_from_disk("/new", "v2", "wait")
    expected = "1 nodes serve weight version v2; the update is decided, but http://d: the node is not idle"
    assert (reply.success, reply.message) == (False, expected)


async def test_weights_have_a_version_of_their_own_each_time(bench: Bench) -> None:
    await small_cluster(bench)
    versions = []
    for _ in range(2):
        assert (await bench.service.weights.update_weights_from_disk("/models/step", None, "wait")).success
        versions.append(bench.service.view.weight_version())
    assert versions[0].startswith("step@")
    assert versions[0] != versions[1]


async def test_weights_are_not_updated_while_a_request_does_not_end(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench, weight_drain_s=0.05)
    decode.tokens_per_attempt = 1
    generation = await bench.service.generate(spec())
    reply = await bench.service.weights.update_weights_from_disk("/new", None, "wait")
    assert (reply.success, reply.message) == (False, "1 requests were still running; nothing was changed")
    assert not bench.service._queue.held
    generation.cancel()


async def test_running_requests_are_aborted_where_the_update_says_so(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 2
    running = await bench.service.generate(spec())
    await bench.until(lambda: len(bench.service._generations["r"].record.choices[0].kept_ids) == 2)
    assert (await bench.service.weights.update_weights_from_disk("/new", "v2", "abort")).success
    assert [delta.finish_reason async for delta in running][-1] == "abort"
    assert decode.calls.index("prepare /new v2") < decode.calls.index("commit")


async def test_retracted_requests_go_on_with_the_new_weights_and_say_from_where(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    prefill, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 3
    running = [await bench.service.generate(spec(name)) for name in ("r", "s")]
    await bench.until(
        lambda: all(len(g.record.choices[0].kept_ids) == 3 for g in bench.service._generations.values())
    )
    prefill.commit_reply = "the node is not idle"
    update = asyncio.create_task(bench.service.weights.update_weights_from_disk("/new", "v2", "retract"))
    await bench.until(lambda: "commit" in decode.calls)
    late = asyncio.create_task(bench.service.generate(spec("late")))
    await bench.until(lambda: len(bench.service._queue) == 3)
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
    update = asyncio.create_task(bench.service.weights.update_weights_from_disk("/new", "v2", "wait"))

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
    weights = bench.service.weights
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
    assert (await bench.service.weights.update_weights_from_tensor(body, "v2", "wait")).success
    whole = b"a" * (size - 1) + b"b" * (size + 3) + b"end"
    for node in nodes:
        assert [call for call in node.calls if call != "ping"] == [
            f"stage {size} at 0",
            f"stage {size} at {size}",
            f"stage 5 at {2 * size}",
            f"prepare {whole.decode()} v2",
            "commit",
        ]
    assert bench.service.view.weight_version() == "v2"


async def test_tensors_that_one_node_cannot_hold_are_dropped_by_all(bench: Bench) -> None:
    nodes = await small_cluster(bench)
    nodes[0].stage_reply = "this host has 3 MiB left"
    body = body_of(b"a" * STAGE_PART_BYTES, b"b")
    reply = await bench.service.weights.update_weights_from_tensor(body, None, "wait")
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
    update = asyncio.create_task(
        bench.service.weights.update_weights_from_tensor(body_of(b"a"), None, "wait")
    )
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
    await bench.until(lambda: all(worker.healthy for worker in bench.service.view.workers()))
    reply = await bench.service.weights.init_weights_update_group(group(5), 2)
    assert (reply.success, reply.ranks) == (True, {"http://p": 2, "http://d1": 3, "http://d2": 4})
    assert "join g as 4 of 5" in nodes[0].calls
    wrong = await bench.service.weights.init_weights_update_group(group(4), 2)
    assert (wrong.success, wrong.ranks) == (False, reply.ranks)
    assert wrong.message.startswith("world_size is 4, but there are 2 ranks before the nodes' and 3 nodes")
    assert (await bench.service.weights.destroy_weights_update_group("g")).success
    assert all("leave g" in node.calls for node in nodes)


async def test_an_update_under_the_name_of_the_one_before_waits_for_the_nodes_too(bench: Bench) -> None:
    nodes = await small_cluster(bench)
    for _ in range(3):
        assert (await bench.service.weights.update_weights_from_disk("/new", "same", "wait")).success
        known = {node.entry.update_id for node in bench.service._nodes}
        assert known == {node.entry.update_id for node in nodes}, "the router knows what they serve"
        assert len(known) == 1
    for node in nodes:
        assert [call for call in node.calls if call.startswith("prepare")] == 3 * ["prepare /new same"]


async def test_a_group_that_one_node_does_not_join_is_left_by_all(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    decode.join_reply = "nobody listens at trainer:5"
    reply = await bench.service.weights.init_weights_update_group(group(3), 1)
    assert (reply.success, reply.message) == (False, "http://d: nobody listens at trainer:5")
    assert "leave g" in prefill.calls
    assert "leave g" not in decode.calls, "it is in none"


async def test_tensors_that_a_trainer_broadcasts_are_taken_by_all(bench: Bench) -> None:
    nodes = await small_cluster(bench)
    source = FromGroup(group_name="g", tensors=(), is_one_bucket=True, timeout_s=1.0)
    assert (await bench.service.weights.update_weights_from_distributed(source, "v2", "wait")).success
    for node in nodes:
        assert [call for call in node.calls if call != "ping"] == ["prepare g v2", "commit"]


async def test_memory_is_released_and_resumed_everywhere_and_requests_wait_meanwhile(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    nodes = prefill, decode = await small_cluster(bench)
    assert (await bench.service.weights.release_memory_occupation(("weights", "kv_cache"))).success
    late = asyncio.create_task(bench.service.generate(spec("late")))
    await bench.until(lambda: bench.service._queue.num_new == 1)
    assert (await bench.service.weights.resume_memory_occupation(("weights",))).success
    assert (await bench.service.weights.update_weights_from_disk("/new", "v2", "wait")).success
    assert bench.service._queue.held
    resumed = asyncio.create_task(bench.service.weights.resume_memory_occupation(("kv_cache",)))
    await bench.until(lambda: prefill.entry.incarnation == "p-1~1" and decode.entry.incarnation == "d-1~1")
    decode.peers = (prefill.entry.incarnation,)
    assert (await resumed).success
    assert {node.incarnation for node in bench.service._nodes} == {"p-1~1", "d-1~1"}
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
    reply = await bench.service.weights.release_memory_occupation(("kv_cache",))
    assert (reply.success, reply.message) == (False, "http://d: the node was not idle in time")
    assert "resume kv_cache" in prefill.calls
    assert "resume kv_cache" not in decode.calls
    assert not bench.service._queue.held
    again = await bench.service.weights.resume_memory_occupation(("kv_cache",))
    assert (again.success, again.message) == (False, "not released: kv_cache")


async def test_a_node_whose_answer_to_a_release_is_lost_is_asked_to_resume_too(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    decode.hangs_in = "release kv_cache"
    pending = asyncio.create_task(bench.service.weights.release_memory_occupation(("kv_cache",)))
    await bench.until(lambda: "release kv_cache" in decode.calls)
    decode.die()
    reply = await pending
    assert (reply.success, bench.service._queue.held) == (False, False)
    assert reply.message.endswith("; to be resumed: http://d: lost"), reply.message
    assert "resume kv_cache" in prefill.calls


async def test_a_node_that_is_started_again_while_memory_is_released_is_no_reason_not_to_resume(
    bench: Bench, spec: Spec, expected: Expected
) -> None:
    prefill, decode = await small_cluster(bench)
    assert (await bench.service.weights.release_memory_occupation(("kv_cache",))).success
    late = asyncio.create_task(bench.service.generate(spec("late")))
    decode.start_again("d-2", peers=("p-1~1",))
    await bench.service.register_worker(decode.entry.url, decode.entry)
    await bench.until(lambda: all(worker.healthy for worker in bench.service.view.workers()))
    reply = await bench.service.weights.resume_memory_occupation(("kv_cache",))
    assert reply.success, reply.message
    assert (prefill.entry.incarnation, decode.entry.incarnation) == ("p-1~1", "d-2")
    assert await read(await late) == {0: expected((1, 2, 3), 0, 8)}


async def test_memory_that_one_node_cannot_resume_is_asked_for_again(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    assert (await bench.service.weights.release_memory_occupation(("weights", "kv_cache"))).success
    decode.release_reply = "no memory is left"
    reply = await bench.service.weights.resume_memory_occupation(("weights", "kv_cache"))
    assert (reply.success, reply.message) == (False, "http://d: no memory is left")
    assert bench.service._queue.held
    decode.release_reply = ""
    decode.peers = ("p-1~1",)
    reply = await bench.service.weights.resume_memory_occupation(("weights", "kv_cache"))
    assert reply.success, reply.message
    assert not bench.service._queue.held
    assert {prefill.entry.incarnation, decode.entry.incarnation} == {"p-1~1", "d-1~1"}, "each once"


async def test_memory_that_another_router_released_is_resumed(bench: Bench) -> None:
    _, decode = nodes = await small_cluster(bench)
    for node in nodes:
        node.released = {"weights", "kv_cache"}
    reply = await bench.service.weights.resume_memory_occupation(("weights", "graphs"))
    assert (reply.success, reply.message) == (False, "not released: graphs")
    assert all(node.released == {"weights", "kv_cache"} for node in nodes), "nothing was changed"
    assert (await bench.service.weights.resume_memory_occupation(("weights",))).success
    decode.peers = ("p-1~1",)
    assert (await bench.service.weights.resume_memory_occupation(("kv_cache",))).success
    assert not bench.service._queue.held


async def test_memory_moves_alone(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    decode.hangs_in = "release weights"
    released = asyncio.create_task(bench.service.weights.release_memory_occupation(("weights",)))
    await bench.until(lambda: "release weights" in decode.calls)
    service, why = bench.service, "memory is being released or resumed"
    for call in (
        service.weights.update_weights_from_disk("/new", "v2", "wait"),
        service.weights.release_memory_occupation(("kv_cache",)),
        service.weights.resume_memory_occupation(("weights",)),
    ):
        reply = await call
        assert (reply.success, reply.message) == (False, why)
    decode.die()
    await released
    prefill.hangs_in = "prepare /new v2"
    decode.start_again("d-2", peers=("p-1~1",))
    await bench.service.register_worker(decode.entry.url, decode.entry)
    await bench.until(lambda: bool(bench.service._nodes.ready_pairs()))
    update = asyncio.create_task(service.weights.update_weights_from_disk("/new", "v2", "wait"))
    await bench.until(lambda: prefill.hangs_in in prefill.calls)
    reply = await service.weights.resume_memory_occupation(("weights",))
    assert (reply.success, reply.message) == (False, "another weight update is running")
    prefill.die()
    assert not (await update).success


async def test_questions_about_weights_go_to_every_node(bench: Bench) -> None:
    _, decode = await small_cluster(bench)
    named = await bench.service.weights.weights_by_name("norm", 3)
    assert {url: reply.values for url, reply in named.items()} == {"http://p": [0.5], "http://d": [0.5]}
    assert "get norm 3" in decode.calls
    checks = await bench.service.weights.check_weights()
    assert {url: reply.whole for url, reply in checks.items()} == {"http://p": "ab", "http://d": "ab"}
    decode.hangs_in = "check"
    pending = asyncio.create_task(bench.service.weights.check_weights())
    await bench.until(lambda: decode.calls.count("check") == 2)
    decode.die()
    assert {url: reply.success for url, reply in (await pending).items()} == {
        "http://p": True,
        "http://d": False,
    }


async def test_weights_are_not_updated_around_a_silent_node(bench: Bench) -> None:
    _, decode = await small_cluster(bench)
    decode.die()
    reply = await bench.service.weights.update_weights_from_disk("/new", None, "wait")
    assert (reply.success, reply.message) == (False, "these nodes do not answer: http://d")


async def test_where_a_request_is(bench: Bench, spec: Spec) -> None:
    await bench.start()
    assert await bench.service.view.request_state("r") is None
    waiting = asyncio.create_task(bench.service.generate(spec()))
    await bench.until(lambda: bench.service._queue.num_new == 1)
    state = await bench.service.view.request_state("r")
    assert (state["state"], state["waits_for"]) == ("queued", "a ready pair of nodes")
    prefill, decode = bench.prefill(), bench.decode()
    decode.tokens_per_attempt = 0
    for node in (prefill, decode):
        await bench.service.register_worker(node.entry.url, node.entry)
    generation = await waiting
    state = await bench.service.view.request_state("r")
    assert (state["state"], state["waits_for"]) == ("dispatched", "the first token from http://d")
    assert state["choices"][0]["prefill"] == "http://p"
    assert state["nodes"]["http://d"]["state"] == "running"
    output = TokenOutput(request_id="r", attempt=1, choice=0, position=0, token_ids=(7,))
    decode.emit(TokenOutputs(outputs=(output,)))
    state = await bench.service.view.request_state("r")
    assert (state["state"], state["choices"][0]["num_tokens"]) == ("streaming", 1)
    generation.cancel()
    state = await bench.service.view.request_state("r")
    assert state["state"] == "not of this router"


async def test_server_info_gathers_the_nodes(bench: Bench) -> None:
    await small_cluster(bench)
    info = await bench.service.view.server_info()
    assert [node["url"] for node in info["prefill"]] == ["http://p"]
    assert info["decode"][0]["config"] == {"port": 1}
    assert info["decode"][0]["internal_states"][0]["num_total_pages"] == 1000
    assert info["router"]["max_attempts"] == 3


async def test_metrics_count_what_happened(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    decode.fail_with = ["busy"]
    await read(await bench.service.generate(spec()))
    text = await bench.service.view.metrics_text()
    assert 'pd_router_attempts_total{code="busy",model_name="model",role="router"} 1.0' in text
    assert 'pd_router_requests_total{model_name="model",outcome="finished",role="router"} 1.0' in text
    assert 'pd_router_workers{model_name="model",role="decode",state="ready"} 1.0' in text
    assert 'pd_router_tokens_total{model_name="model",role="router"} 8.0' in text


async def test_unstreamed_requests_come_in_larger_pieces(bench: Bench) -> None:
    _, decode = await small_cluster(bench)
    spec = GenerateSpec(
        request_id="r", work=Work(prompt_ids=(1,), choices=(0,), sampling=SamplingParams(max_tokens=2))
    )
    await read(await bench.service.generate(spec))
    request = decode.requests()[0]
    assert isinstance(request, GenerateRequest)
    assert request.stream_interval == 16


async def test_nodes_pull_from_a_node_of_theirs_or_another(bench: Bench) -> None:
    prefill, decode = await small_cluster(bench)
    prefill.entry = msgspec.structs.replace(prefill.entry, weight_version="v2")
    await bench.until(lambda: bench.service.view.workers()[0].entry.weight_version == "v2")
    reply = await bench.service.weights.update_weights_from_peer("http://p", None, "wait")
    assert reply.success, reply.message
    assert decode.entry.weight_version == "v2"
    bench.prefill("far")  # it is in no roster
    reply = await bench.service.weights.update_weights_from_peer("http://far", "v4", "wait")
    assert reply.success, reply.message
    pulls = [call for call in decode.calls if call.startswith("prepare")]
    assert pulls == ["prepare tcp://p v2", "prepare tcp://far v4"]
    reply = await bench.service.weights.update_weights_from_peer("http://nobody", None, "wait")
    assert (reply.success, reply.message) == (
        False,
        "http://nobody does not answer as a node",
    )


async def test_only_the_version_of_the_weights_changes_on_all_nodes(bench: Bench, spec: Spec) -> None:
    prefill, decode = await small_cluster(bench)
    reply = await bench.service.weights.update_weight_version("step-8", "wait")
    assert (reply.success, reply.message) == (True, "2 nodes serve weight version step-8")
    assert [node.entry.weight_version for node in (prefill, decode)] == ["step-8", "step-8"]
    assert [source for node in (prefill, decode) for source in node.sources] == [FromServed(), FromServed()]
    decode.prepare_reply = "memory is released"
    reply = await bench.service.weights.update_weight_version("step-9", "wait")
    assert not reply.success
    assert [node.entry.weight_version for node in (prefill, decode)] == ["step-8", "step-8"]


async def test_a_salt_goes_to_the_node_and_into_the_estimates(bench: Bench, spec: Spec) -> None:
    _, decode = await small_cluster(bench)
    prompt = tuple(range(1, 13))
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        await read(await bench.service.generate(spec(name, prompt, cache_salt=salt)))
    assert [request.work.cache_salt for request in decode.requests()] == ["x", "y", "x"]
    ahead = [request.num_prefill_tokens_ahead for request in decode.requests()]
    assert ahead == [12, 12, 1], "nothing is known of what another salt left there"


async def test_one_node_saves_what_all_hold(bench: Bench) -> None:
    p, q, d, e = await large_cluster(bench)
    reply = await bench.service.weights.save_model("/new", is_remote=False, max_shard_bytes=9)
    assert (reply.success, reply.message) == (True, "http://p has saved /new")
    p.stage_reply = "the disk is full"
    reply = await bench.service.weights.save_model("s3://b", is_remote=True, max_shard_bytes=9)
    assert not reply.success
    assert "the disk is full" in reply.message
    saves = [call for node in (p, q, d, e) for call in node.calls if call.startswith("save")]
    assert saves == ["save /new False 9", "save s3://b True 9"]


# ---- sessions -------------------------------------------------------------------------------------------


def of_session(spec: GenerateSpec, session_id: str) -> GenerateSpec:
    return replace(spec, session=SessionHold(session_id, 60.0))


def decodes_of(nodes: list[Any], name: str) -> list[str]:
    """Which decode nodes were sent requests whose id begins with `name`."""
    return [n.entry.incarnation for n in nodes for r in n.requests() if r.request_id.startswith(name)]


async def test_every_turn_goes_to_the_decode_node_that_the_session_names(bench: Bench, spec: Spec) -> None:
    *_, d, e = await large_cluster(bench)
    ids = [bench.service.open_session("", 0, None) for _ in range(4)]
    assert sorted(session_id.rpartition("@")[2] for session_id in ids) == ["d", "d", "e", "e"]
    for turn in range(3):
        for session, session_id in enumerate(ids):
            one = spec(f"{session}-{turn}", prompt=(turn, 5))  # the other node may hold it as well
            await read(await bench.service.generate(of_session(one, session_id)))
    for session, session_id in enumerate(ids):
        name = session_id.rpartition("@")[2]
        assert decodes_of([d, e], f"{session}-") == [f"{name}-1"] * 3
    assert {r.session_id for n in (d, e) for r in n.requests()} == set(ids)
    assert {r.session_timeout_s for n in (d, e) for r in n.requests()} == {60.0}


async def test_a_session_outlives_its_decode_node(bench: Bench, spec: Spec, expected: Expected) -> None:
    *_, d, e = await large_cluster(bench)
    session_id = bench.service.open_session("mine", 0, None)
    params = TurnParams(id=session_id)
    first = bench.service.begin_turn(params, "a", (1, 2, 3))
    answer = await read(await bench.service.generate(of_session(spec("a"), session_id)))
    bench.service.finish_turn(first, tuple(answer[0]))
    home, other = (d, e) if d.requests() else (e, d)
    home.tokens_per_attempt = 2
    second = bench.service.begin_turn(TurnParams(id=session_id, rid="a"), "b", (7,))
    assert second.prompt_ids == (1, 2, 3, *answer[0], 7)
    generation = await bench.service.generate(
        of_session(spec("b", prompt=second.prompt_ids, max_tokens=4), session_id)
    )
    await bench.until(lambda: bench.service.counters.num_tokens == 8 + 2)
    home.die()
    assert await read(generation) == {0: expected(second.prompt_ids, 0, 4)}
    assert decodes_of([other], "b") == [other.entry.incarnation]
    home.alive, home.tokens_per_attempt = True, None
    home.entry = msgspec.structs.replace(home.entry, incarnation="again-1")
    await bench.service.register_worker(home.entry.url, home.entry)
    await bench.ready(4)
    await read(await bench.service.generate(of_session(spec("c"), session_id)))
    assert decodes_of([home, other], "c") == [other.entry.incarnation], "its KV is there now"


async def test_a_busy_prefill_node_does_not_move_a_session(bench: Bench, spec: Spec) -> None:
    *_, d, e = await large_cluster(bench)
    session_id = bench.service.open_session("", 0, None)
    home = d if session_id.endswith("@d") else e
    home.fail_with = ["busy"]
    await read(await bench.service.generate(of_session(spec("a"), session_id)))
    assert decodes_of([d, e], "a") == [home.entry.incarnation] * 2


async def test_a_turn_that_fails_at_home_goes_elsewhere(bench: Bench, spec: Spec) -> None:
    *_, d, e = await large_cluster(bench)
    session_id = bench.service.open_session("", 0, None)
    home, other = (d, e) if session_id.endswith("@d") else (e, d)
    home.fail_with = ["transfer_failed"]
    await read(await bench.service.generate(of_session(spec("a"), session_id)))
    assert decodes_of([home, other], "a") == [home.entry.incarnation, other.entry.incarnation]


async def test_closing_a_session_tells_the_nodes(bench: Bench) -> None:
    *_, d, e = await large_cluster(bench)
    session_id = bench.service.open_session("", 0, None)
    assert (await bench.service.close_session(session_id)).success
    assert [n.operations for n in (d, e)] == [[CloseSession(session_id=session_id)]] * 2
    assert not (await bench.service.close_session(session_id)).success
    with pytest.raises(RequestError, match="no session"):
        bench.service.begin_turn(TurnParams(id=session_id), "a", (1,))


async def test_a_session_is_not_idle_while_a_turn_of_it_runs(bench: Bench, spec: Spec) -> None:
    *_, d, e = await large_cluster(bench, session_timeout_s=0.05)
    session_id = bench.service.open_session("", 0, None)
    d.tokens_per_attempt = e.tokens_per_attempt = 2
    generation = await bench.service.generate(of_session(spec("a"), session_id))
    bench.service.open_session("", 0, None)
    await bench.until(lambda: bench.service.num_sessions == 1)
    assert bench.service.begin_turn(TurnParams(id=session_id), "b", (1,)).prompt_ids == (1,)
    generation.cancel()
    await bench.until(lambda: bench.service.num_sessions == 0)


async def test_no_session_without_a_pair(bench: Bench) -> None:
    bench.decode()
    await bench.start()
    with pytest.raises(RequestError) as refused:
        bench.service.open_session("", 0, None)
    assert refused.value.status == 503


@pytest.mark.parametrize("method", ["on_tokens", "open_attempt", "num_tokens"])
async def test_a_fault_in_one_request_ends_that_one_alone(
    bench: Bench, spec: Spec, expected: Expected, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it comes as tokens arrive or as it is dispatched: the router and its other requests go on."""
    await small_cluster(bench)
    intact = getattr(RequestRecord, method)

    def faulty(record: RequestRecord, *rest: object) -> Any:  # noqa: ANN401
        if record.request_id == "bad":
            raise KeyError("x")
        return intact(record, *rest)

    monkeypatch.setattr(RequestRecord, method, faulty)
    with pytest.raises(RequestError, match="KeyError") as caught:
        await read(await bench.service.generate(spec("bad")))
    assert caught.value.status == 500
    generation = await bench.service.generate(spec("good"))
    assert await read(generation) == {0: expected((1, 2, 3), 0, 8)}
    assert bench.service.violations() == []
    assert not bench.service.crashed.done()


async def test_f1_a_node_with_other_files_is_told_of_once_by_name(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    decode = bench.decode()
    decode.entry = msgspec.structs.replace(decode.entry, text_digests={"tokenizer.json": "theirs"})
    bench.model = replace(bench.model, text_digests={"tokenizer.json": "ours"})
    await bench.start()
    assert (await bench.service.register_worker(decode.entry.url, decode.entry)).success
    (warning,) = [text for text in caplog.messages if "differs" in text]
    assert warning.startswith("decode node http://d differs from this router in tokenizer.json: ")


# ---- large requests -------------------------------------------------------------------------------------


async def test_a_message_of_many_outputs_has_the_queue_looked_through_once(
    bench: Bench, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, decode = await small_cluster(bench)
    decode.tokens_per_attempt = 0
    service = bench.service
    generation = await service.generate(spec("a", num_choices=50, max_tokens=1))
    service._queue.hold()
    waiting = asyncio.create_task(service.generate(spec("b")))
    await asyncio.sleep(0)
    looks: list[float] = []
    due = service._queue.due

    def looked_through(now: float) -> Any:  # noqa: ANN401
        looks.append(now)
        return due(now)

    monkeypatch.setattr(service._queue, "due", looked_through)
    output = TokenOutput(
        request_id="a",
        attempt=decode.requests()[0].attempt,
        choice=0,
        position=0,
        token_ids=(1,),
        weight_version="v1",
        finish=Finish(reason="length"),
    )
    outputs = tuple(msgspec.structs.replace(output, choice=choice) for choice in range(50))
    decode.emit(TokenOutputs(outputs=outputs))
    assert len(looks) == 1
    assert await read(generation) == {choice: [1] for choice in range(50)}
    waiting.cancel()


async def test_without_pairs_none_is_chosen_for_each_request_that_waits(
    bench: Bench, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.start()
    service, asked = bench.service, []
    monkeypatch.setattr(service, "_choose", lambda ticket, *_: asked.append(ticket))
    waiting = [asyncio.create_task(service.generate(spec(f"r{number}"))) for number in range(3)]
    await asyncio.sleep(0)
    service.tick()
    assert [ticket.waits_for for ticket in service._queue] == ["a ready pair of nodes"] * 3
    assert asked == []
    for each in waiting:
        each.cancel()
