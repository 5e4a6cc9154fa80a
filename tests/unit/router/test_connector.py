"""The real links: a zmq connection through NodeClient, and /node_entry over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import msgspec
import pytest
import zmq
import zmq.asyncio
from aiohttp import web

from pdserve.api.generation import GenerateSpec, ModelCard
from pdserve.links.entry_lookup import HttpEntryLookup, NoNodeError, proof_info
from pdserve.links.node_calls import NodeUnavailableError
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
from pdserve.router.assembly import build_router
from pdserve.router.connector import ZmqConnector
from pdserve.router.options import RouterOptions
from pdserve.runtime.cluster_proof import is_nonce
from pdserve.runtime.timing import UNSCALED, Timing
from pdserve.tests.deadline import DEADLINE_S

Entry = Callable[..., NodeEntry]


async def serve(app: web.Application) -> tuple[web.AppRunner, str]:
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


SECRET = "s" * 32


@dataclass
class FakeFront:
    """A server whose /node_entry answers what the test puts here."""

    url: str = ""
    status: int = 200
    body: bytes = b""
    secret: str = ""
    requests: list[web.Request] = field(default_factory=list)

    async def node_entry(self, request: web.Request) -> web.Response:
        self.requests.append(request)
        headers = {"location": f"{self.url}/elsewhere"} if self.status == 302 else {}
        if self.secret:
            headers["authentication-info"] = proof_info(self.secret, request.query["nonce"], self.body)
        return web.Response(body=self.body, status=self.status, headers=headers)


@pytest.fixture
async def front(entry: Entry) -> AsyncIterator[FakeFront]:
    front = FakeFront(body=msgspec.json.encode(entry()))
    app = web.Application()
    for path in ("/node_entry", "/elsewhere"):
        app.router.add_get(path, front.node_entry)
    runner, front.url = await serve(app)
    yield front
    await runner.cleanup()


async def test_a_url_is_asked_for_its_entry_and_shown_no_key(front: FakeFront, entry: Entry) -> None:
    assert await HttpEntryLookup(UNSCALED)(f"{front.url}/") == entry()
    (request,) = front.requests
    assert "authorization" not in request.headers
    assert "cookie" not in request.headers


async def test_with_a_secret_an_entry_must_be_proven(front: FakeFront, entry: Entry) -> None:
    lookup = HttpEntryLookup(UNSCALED, SECRET)
    front.secret = SECRET
    assert await lookup(front.url) == entry()
    assert await lookup(front.url) == entry()
    first, second = (request.query["nonce"] for request in front.requests)
    assert first != second, "an answer that was heard proves nothing later"
    assert is_nonce(first)
    for secret in ("", "o" * 32):
        front.secret = secret
        with pytest.raises(NoNodeError, match="does not prove this cluster's secret: start it with the same"):
            await lookup(front.url)


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (404, b"{}", "HTTP 404"),
        (302, b"{}", "HTTP 302"),
        (200, b"{}", "missing required field `url`"),
        (200, b"<html>", "JSON is malformed"),
        (200, b'{"url": 1}', "Expected `str`"),
        (200, b" " * (1 << 20), "truncated"),
    ],
)
async def test_what_is_no_node_is_told(front: FakeFront, status: int, body: bytes, reason: str) -> None:
    front.status, front.body = status, body
    with pytest.raises(NoNodeError, match=f"{front.url} does not answer as a node: .*{reason}"):
        await HttpEntryLookup(UNSCALED)(front.url)
    assert len(front.requests) == 1, "no redirect is followed"


async def test_nobody_there_is_told() -> None:
    for url in ("http://127.0.0.1:1", "no url", "http://[", "http://127.0.0.1:x", f"http://{'a' * 64}.com"):
        with pytest.raises(NoNodeError, match="does not answer as a node"):
            await HttpEntryLookup(UNSCALED)(url)


async def test_what_is_no_address_is_unavailable() -> None:
    context = zmq.asyncio.Context()
    with pytest.raises(NodeUnavailableError, match="cannot connect to 'nonsense'"):
        ZmqConnector(context, None, UNSCALED)(
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
    router = build_router(
        RouterOptions(timing=Timing(ping_interval_s=0.01)),
        model=model,
        connect=ZmqConnector(context, None, UNSCALED),
        lookup=HttpEntryLookup(UNSCALED),
    )
    router.start()
    await router.administration.register_worker(known.url, known)
    async with asyncio.timeout(DEADLINE_S):
        generation = await router.service.generate(spec())
        deltas = [delta async for delta in generation]
        assert [(delta.token_ids, delta.finish_reason, delta.matched) for delta in deltas] == [
            ((5, 6), "stop", 6)
        ]
        task.cancel()
        node.close(linger=0)
        while router.view.readiness()[0]:  # noqa: ASYNC110 (any condition)
            await asyncio.sleep(0.001)
    await router.close()
    assert not router.service.crashed.done()
    context.term()
