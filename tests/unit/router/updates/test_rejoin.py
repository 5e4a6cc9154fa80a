"""Nodes that were started again come to the weights of the cluster by themselves, and nobody else does."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from pdserve.messages.node import renewed
from pdserve.messages.weights import FromPeer, of_one_node
from pdserve.tests.deadline import DEADLINE_S

from ..conftest import Bench, FakeNode

NEW = {"weight_version": "v2", "model_fingerprint": "new", "update_id": "u"}


@pytest.fixture(autouse=True)
def soon(bench: Bench) -> None:
    bench.options["weight_rejoin_retry_s"] = 0.05


def serve(node: FakeNode, **changes: str) -> FakeNode:
    node.entry = msgspec.structs.replace(node.entry, **(changes or NEW))
    return node


async def started(bench: Bench) -> tuple[FakeNode, FakeNode, FakeNode]:
    """Two nodes that serve an update, and one that does not."""
    nodes = serve(bench.prefill()), serve(bench.decode()), bench.decode("e")
    await bench.start(weight_rejoin_s=0.02)
    return nodes


async def turns(node: FakeNode, count: int) -> None:
    """It answers so many more pings, each 10 ms or more: at 40 the router has ticked, every 200 ms, and what
    was to happen by time alone has happened."""
    async with asyncio.timeout(DEADLINE_S):
        for _ in range(count):
            num_calls = len(node.calls)
            while len(node.calls) == num_calls:  # noqa: ASYNC110 (any condition)
                await asyncio.sleep(0.001)


def changes(node: FakeNode) -> list[str]:
    return [call for call in node.calls if call.startswith(("prepare", "commit", "discard"))]


async def test_it_reads_them_from_a_prefill_node_and_is_ready(bench: Bench) -> None:
    prefill, decode, late = await started(bench)
    await bench.ready(3)
    assert changes(late) == ["prepare tcp://p v2", "commit"]
    assert late.sources == [FromPeer(zmq_address="tcp://p", update_id="u", fingerprint="new")]
    assert late.entry.update_id == "u"
    await turns(late, 40)
    assert changes(late) == ["prepare tcp://p v2", "commit"], "once"
    assert changes(prefill) == changes(decode) == []


async def test_what_fails_is_tried_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    nodes = serve(bench.prefill()), serve(bench.decode()), bench.decode("e")
    late = nodes[-1]
    late.prepare_reply = "this host has 3 MiB left"
    await bench.start(weight_rejoin_s=0.02)
    await bench.until(lambda: changes(late).count("prepare tcp://p v2") == 2)
    assert "weights v2: not yet on http://e: this host has 3 MiB left" in caplog.text
    late.prepare_reply = ""
    await bench.ready(3)
    assert "discard" not in changes(late), "it may be another router's"


async def test_an_update_waits_for_it(bench: Bench) -> None:
    nodes = serve(bench.prefill()), serve(bench.decode()), bench.decode("e")
    late = nodes[-1]
    late.commit_reply = "the node is not idle"
    await bench.start(weight_rejoin_s=0.02)
    await bench.until(lambda: "commit" in changes(late))
    update = asyncio.create_task(bench.weights.update_weights_from_disk("/new", "v3", "wait"))
    await turns(late, 40)
    assert not any(call.startswith("prepare") for node in nodes[:2] for call in node.calls)
    late.commit_reply = ""
    reply = await update
    assert reply.success, reply.message
    assert {node.entry.weight_version for node in nodes} == {"v3"}
    assert len({node.entry.update_id for node in nodes}) == 1


async def test_an_update_brings_who_is_late_before_it_begins(bench: Bench) -> None:
    nodes = serve(bench.prefill()), serve(bench.decode()), bench.decode("e"), bench.decode("f")
    first, second = nodes[2:]
    first.prepare_reply = "this host has 3 MiB left"
    await bench.start(weight_rejoin_s=1000.0)
    await bench.until(lambda: all(worker.healthy for worker in bench.view.workers()))
    assert changes(first) == changes(second) == []
    refused = await bench.weights.update_weights_from_disk("/new", "v3", "wait")
    assert not refused.success
    assert changes(second)[:3] == ["prepare tcp://p v2", "commit", "prepare /new v3"]
    assert second.entry.weight_version == "v2"
    first.prepare_reply = ""
    reply = await bench.weights.update_weights_from_disk("/new", "v3", "wait")
    assert reply.success, reply.message
    assert changes(first)[-4:] == ["prepare tcp://p v2", "commit", "prepare /new v3", "commit"]
    assert {node.entry.weight_version for node in nodes} == {"v3"}


async def test_updates_that_arrive_at_once_are_one_and_refusals(bench: Bench) -> None:
    nodes = await started(bench)
    weights = bench.weights
    await bench.until(lambda: all(worker.healthy for worker in bench.view.workers()))
    replies = await asyncio.gather(
        *(weights.update_weights_from_disk(f"/{name}", name, "wait") for name in ("a", "b", "c"))
    )
    assert [reply.success for reply in replies].count(True) == 1
    assert [reply.message for reply in replies].count("another weight update is running") == 2
    assert len({node.entry.weight_version for node in nodes}) == 1


async def test_what_was_forced_on_one_node_is_left_alone(bench: Bench) -> None:
    nodes = bench.prefill(), bench.decode(), bench.decode("e")
    serve(nodes[2], weight_version="v9", model_fingerprint="other", update_id=of_one_node("x"))
    await bench.start(weight_rejoin_s=0.02)
    await bench.ready(2)
    await turns(nodes[2], 40)
    assert [changes(node) for node in nodes] == [[], [], []]


async def test_of_two_updates_the_one_that_this_router_rolled_out_counts(bench: Bench) -> None:
    prefill, decode, late = await started(bench)
    serve(late, weight_version="v1.5", model_fingerprint="older", update_id="t")
    await bench.ready(2)
    await turns(late, 40)
    assert changes(late) == [], "it could be either"
    for node in (prefill, decode):
        node.prepared_fingerprint = "newest"
    late.answers_pings = False  # and is lost, so the update goes without it
    late.die()
    await bench.until(lambda: len(bench.view.workers()) == 2)
    reply = await bench.weights.update_weights_from_disk("/new", "v3", "wait")
    assert reply.success, reply.message
    late.answers_pings = late.alive = True
    await bench.admin.register_worker(late.entry.url, late.entry)
    await bench.ready(3)
    assert late.entry.weight_version == "v3"


async def test_nobody_is_brought_while_memory_is_released(bench: Bench) -> None:
    prefill, decode = serve(bench.prefill()), serve(bench.decode())
    await bench.start(weight_rejoin_s=0.02)
    await bench.ready()
    assert (await bench.weights.release_memory_occupation(("weights",))).success
    late = bench.decode("e")
    await bench.admin.register_worker(late.entry.url, late.entry)
    await turns(late, 40)
    assert changes(late) == []
    late.released |= {"weights"}
    decode.peers = (renewed("p-1"),)
    assert (await bench.weights.resume_memory_occupation(("weights",))).success
    await bench.until(lambda: late.entry.weight_version == "v2")
    assert prefill.entry.update_id == decode.entry.update_id == "u"


async def test_a_node_that_waits_for_a_source_is_brought_as_soon_as_there_is_one(bench: Bench) -> None:
    """Only what was tried is not tried again for a while."""
    prefill, decode, late = serve(bench.prefill()), serve(bench.decode()), bench.decode("e")
    prefill.draining = decode.draining = True
    await bench.start(weight_rejoin_s=0.02, weight_rejoin_retry_s=3600.0)
    await bench.until(lambda: all(worker.healthy for worker in bench.view.workers()))
    await turns(late, 40)
    assert changes(late) == []
    prefill.draining = False
    await bench.until(lambda: late.entry.weight_version == "v2")
