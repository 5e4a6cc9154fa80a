"""The real links: a zmq connection through NodeClient, and /server_info over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
import zmq
import zmq.asyncio
from aiohttp import web

from pdserve.api.entry_lookup import HttpEntryLookup
from pdserve.api.generation import GenerateSpec, ModelCard
from pdserve.api.node_calls import NodeUnavailableError
from pdserve.messages.codec import Codec
from pdserve.messages.node import (
    ClientToNode,
    Finish,
    GenerateRequest,
    NodeEntry,
    NodeLoad,
    Ping,
    Pong,
    TokenOutput,
    TokenOutputs,
)
from pdserve.router.links import ZmqConnector
from pdserve.router.options import RouterOptions
from pdserve.router.service import RouterService

Entry = Callable[..., NodeEntry]


async def serve(app: web.Application) -> tuple[web.AppRunner, str]:
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


@pytest.fixture
async def answers() -> AsyncIterator[tuple[str, dict[str, web.Response]]]:
    """A server whose /server_info answers what the test puts under "answer"."""
    answer: dict[str, web.Response] = {}

    async def server_info(request: web.Request) -> web.Response:
        assert request.headers.get("Authorization") == "Bearer key"
        return answer["answer"]

    app = web.Application()
    app.router.add_get("/server_info", server_info)
    runner, url = await serve(app)
    yield url, answer
    await runner.cleanup()


async def test_an_entry_is_read_from_server_info(
    answers: tuple[str, dict[str, web.Response]], entry: Entry
) -> None:
    url, answer = answers
    body = msgspec.json.encode({"entry": entry(), "model": {"more": 1}})
    answer["answer"] = web.Response(body=body, content_type="application/json")
    assert await HttpEntryLookup("key")(f"{url}/") == entry()


@pytest.mark.parametrize(
    ("status", "text"), [(404, "{}"), (200, "{}"), (200, "<html>"), (200, '{"entry": {"url": 1}}')]
)
async def test_what_is_no_node_is_none(
    answers: tuple[str, dict[str, web.Response]], status: int, text: str
) -> None:
    url, answer = answers
    answer["answer"] = web.Response(status=status, text=text)
    assert await HttpEntryLookup("key")(url) is None


async def test_nobody_there_is_none() -> None:
    assert await HttpEntryLookup()("http://127.0.0.1:1") is None
    for url in ("no url", "http://[", "http://127.0.0.1:x", f"http://{'a' * 64}.com"):
        assert await HttpEntryLookup()(url) is None


async def test_what_is_no_address_is_unavailable() -> None:
    context = zmq.asyncio.Context()
    with pytest.raises(NodeUnavailableError, match="cannot connect to 'nonsense'"):
        ZmqConnector(context, keys=None)(
            "nonsense", on_stream=lambda message: None, on_lost=lambda reason: None
        )
    context.destroy(linger=0)


async def test_a_request_over_real_sockets(
    entry: Entry, spec: Callable[..., GenerateSpec], model: ModelCard
) -> None:
    context = zmq.asyncio.Context()
    codec: Codec[ClientToNode] = Codec(ClientToNode)
    node = context.socket(zmq.ROUTER)
    port = node.bind_to_random_port("tcp://127.0.0.1")
    known = entry(zmq_address=f"tcp://127.0.0.1:{port}", colocated=True)

    async def decode() -> None:
        while True:
            who, frame = await node.recv_multipart()
            match codec.decode(frame):
                case Ping(call_id=call_id):
                    reply = Pong(
                        call_id=call_id, entry=known, load=NodeLoad(), ready_peers=(), refused_peers={}
                    )
                    await node.send_multipart([who, codec.encode(reply)])
                case GenerateRequest() as request:
                    output = TokenOutput(
                        request_id=request.request_id,
                        attempt=request.attempt,
                        choice=0,
                        position=0,
                        token_ids=(5, 6),
                        finish=Finish(reason="stop", matched=6),
                    )
                    await node.send_multipart([who, codec.encode(TokenOutputs(outputs=(output,)))])

    task = asyncio.create_task(decode())
    service = RouterService(
        RouterOptions(ping_interval_s=0.01),
        model=model,
        connect=ZmqConnector(context, keys=None),
        lookup=HttpEntryLookup(),
    )
    await service.start()
    await service.register_worker(known.url, known)
    async with asyncio.timeout(10):
        generation = await service.generate(spec())
        deltas = [delta async for delta in generation]
        assert [(delta.token_ids, delta.finish_reason, delta.matched) for delta in deltas] == [
            ((5, 6), "stop", 6)
        ]
        task.cancel()
        node.close(linger=0)
        while service.view.readiness()[0]:  # noqa: ASYNC110 (any condition)
            await asyncio.sleep(0.001)
    await service.close()
    assert not service.crashed.done()
    context.term()
