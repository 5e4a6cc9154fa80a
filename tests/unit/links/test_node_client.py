from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio
import zmq.asyncio

from pdserve.links.node_calls import NodeUnavailableError, StreamMessage
from pdserve.links.node_client import NodeClient
from pdserve.messages.node import AttemptFailed, CancelRequest, Ping, TokenOutput, TokenOutputs
from pdserve.messages.operation import FreezeGc, StartProfile
from pdserve.messages.weights import FromDisk, PrepareWeights
from pdserve.runtime.timing import UNSCALED
from pdserve.tests.unit.api.conftest import eventually
from pdserve.tests.unit.api.scheduler import MODEL, FakeScheduler


@pytest_asyncio.fixture
async def context() -> AsyncIterator[zmq.asyncio.Context]:
    context = zmq.asyncio.Context()
    yield context
    context.destroy(linger=0)


@pytest_asyncio.fixture
async def scheduler(context: zmq.asyncio.Context) -> AsyncIterator[FakeScheduler]:
    scheduler = FakeScheduler(context)
    yield scheduler
    await scheduler.close()


@pytest_asyncio.fixture
async def client(context: zmq.asyncio.Context, scheduler: FakeScheduler) -> AsyncIterator[NodeClient]:
    client = NodeClient(context, scheduler.address, keys=None, timing=UNSCALED)
    yield client
    await client.close()


async def test_calls_get_their_own_replies(client: NodeClient) -> None:
    pong, info, metrics, state = await asyncio.gather(
        client.ping(5.0), client.server_info(), client.metrics(), client.request_state("known")
    )
    assert (pong.entry.role, info.model, metrics, state.state) == ("decode", MODEL, "pd_x 1\n", "decoding")
    assert (await client.flush_cache(0.0)).success
    assert (await client.abort(all_requests=True)).message == "done"


async def test_weights(client: NodeClient, scheduler: FakeScheduler) -> None:
    scheduler.outcome = lambda message: (not isinstance(message, PrepareWeights), "")
    assert not (await client.prepare_weights("u", FromDisk(model_path="/new"), "8")).success
    assert (await client.commit_weights("u")).success
    assert (await client.discard_weights("u")).success


async def test_output_comes_in_order(context: zmq.asyncio.Context, scheduler: FakeScheduler) -> None:
    received: list[StreamMessage] = []
    client = NodeClient(context, scheduler.address, keys=None, timing=UNSCALED, on_stream=received.append)
    client.send(CancelRequest(request_id="r", attempt=1))
    await eventually(lambda: len(scheduler.received) == 1)
    sent: list[StreamMessage] = [
        TokenOutputs(
            outputs=(TokenOutput(request_id="r", attempt=1, choice=0, position=position, token_ids=(5,)),)
        )
        for position in range(20)
    ]
    sent.append(AttemptFailed(request_id="r", attempt=1, code="peer_lost", reason="gone", retriable=True))
    for message in sent:
        await scheduler.send(message)
    await eventually(lambda: len(received) == len(sent))
    assert received == sent
    await client.close()


async def test_what_is_no_message_is_skipped(client: NodeClient, scheduler: FakeScheduler) -> None:
    await client.ping(5.0)
    await scheduler.send_raw(b"\x81\xa1x")
    assert (await client.ping(5.0)).entry.incarnation == "d-1"


async def test_silence_has_a_deadline(client: NodeClient, scheduler: FakeScheduler) -> None:
    await client.ping(5.0)
    scheduler.is_silent = True
    with pytest.raises(NodeUnavailableError, match=r"no answer to Ping within 0\.05 s"):
        await client.ping(0.05)
    assert not client.is_lost


async def test_the_timing_says_how_long_each_call_may_take(
    context: zmq.asyncio.Context, scheduler: FakeScheduler
) -> None:
    short = replace(
        UNSCALED, node_call_s=0.01, profile_start_s=0.02, profile_end_s=0.03, weight_update_s=0.04
    )
    client = NodeClient(context, scheduler.address, keys=None, timing=short)
    scheduler.is_silent = True
    for call, name, seconds in (
        (client.server_info(), "GetServerInfo", 0.01),
        (client.operate(FreezeGc()), "FreezeGc", 0.01),
        (client.operate(StartProfile(profile_id="p", output_dir="/tmp")), "StartProfile", 0.02),
        (client.stop_profile(), "StopProfile", 0.03),
        (client.commit_weights("u"), "CommitWeights", 0.04),
        (client.resume_memory(("weights",)), "ResumeMemory", 0.04),
        (client.resume_memory(()), "ResumeMemory", 0.01),
    ):
        with pytest.raises(NodeUnavailableError, match=f"no answer to {name} within {seconds:g} s$"):
            await call
    await client.close()


async def test_an_order_says_until_when_it_is_good(client: NodeClient, scheduler: FakeScheduler) -> None:
    """By the node's clock, which it is asked first."""
    scheduler.unix_s = 1e9
    assert (await client.operate(FreezeGc())).success
    asked, order = scheduler.received
    assert isinstance(asked, Ping)
    assert isinstance(order, FreezeGc)
    assert 1e9 < order.not_after_unix_s <= 1e9 + UNSCALED.node_call_s


async def test_who_does_not_answer_is_sent_no_order(
    context: zmq.asyncio.Context, scheduler: FakeScheduler
) -> None:
    """Or it would be done when the node goes on, whatever was ordered since."""
    client = NodeClient(context, scheduler.address, keys=None, timing=replace(UNSCALED, node_call_s=0.05))
    scheduler.is_silent = True
    with pytest.raises(NodeUnavailableError, match="no answer to FreezeGc"):
        await client.operate(FreezeGc())
    scheduler.is_silent = False
    await client.ping(5.0)
    assert [type(message) for message in scheduler.received] == [Ping, Ping]
    await client.close()


async def test_a_lost_connection_is_told_once_and_ends_calls(
    context: zmq.asyncio.Context, scheduler: FakeScheduler
) -> None:
    lost: list[str] = []
    client = NodeClient(context, scheduler.address, keys=None, timing=UNSCALED, on_lost=lost.append)
    await client.ping(5.0)
    scheduler.is_silent = True
    call = asyncio.create_task(client.ping(30.0))
    await eventually(lambda: len(scheduler.received) == 2)
    await scheduler.close()
    with pytest.raises(NodeUnavailableError, match="connection lost"):
        await call
    assert (lost, client.is_lost) == (["connection lost"], True)
    with pytest.raises(NodeUnavailableError, match="connection lost"):
        client.send(CancelRequest(request_id="r", attempt=1))
    await client.close()
    await client.close()
    assert lost == ["connection lost"]


async def test_a_node_that_is_not_there_is_lost_at_once(context: zmq.asyncio.Context) -> None:
    lost: list[str] = []
    client = NodeClient(context, "tcp://127.0.0.1:1", keys=None, timing=UNSCALED, on_lost=lost.append)
    with pytest.raises(NodeUnavailableError, match="cannot connect"):
        await client.ping(10.0)
    assert lost == ["cannot connect"]
    await client.close()


async def test_closing_ends_calls_without_a_loss(
    context: zmq.asyncio.Context, scheduler: FakeScheduler
) -> None:
    lost: list[str] = []
    client = NodeClient(context, scheduler.address, keys=None, timing=UNSCALED, on_lost=lost.append)
    scheduler.is_silent = True
    call = asyncio.create_task(client.ping(30.0))
    await eventually(lambda: len(scheduler.received) == 1)
    await client.close()
    with pytest.raises(NodeUnavailableError, match="closed"):
        await call
    assert lost == []
