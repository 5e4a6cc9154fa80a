"""Clients that do not send, or do not read, against short deadlines."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
import uvloop
from fastapi import FastAPI, Request
from starlette.responses import Response, StreamingResponse

from pdserve.api.http.connections import ClientDeadlines
from pdserve.api.http.server import serve
from pdserve.runtime.tls import NO_TLS, TlsFiles
from pdserve.tests.certificates import Certificates
from pdserve.tests.deadline import DEADLINE_S

_LONG_S = 600.0


@contextlib.asynccontextmanager
async def served(
    app: FastAPI,
    *,
    headers_s: float = _LONG_S,
    body_s: float = _LONG_S,
    reader_s: float = _LONG_S,
    tls: TlsFiles = NO_TLS,
) -> AsyncIterator[int]:
    """The port of a server."""
    listener = socket.create_server(("127.0.0.1", 0))
    deadlines = ClientDeadlines(headers_s=headers_s, body_s=body_s, reader_s=reader_s)
    stop = asyncio.Event()
    server = asyncio.create_task(serve(app, listener, tls=tls, stop=stop, deadlines=deadlines))
    try:
        yield listener.getsockname()[1]
    finally:
        stop.set()
        await asyncio.wait_for(server, DEADLINE_S)


async def is_cut_off(reader: asyncio.StreamReader) -> bool:
    """Whether the server ends the connection without an answer (an answer, or nothing for 20 s: no)."""
    try:
        return await asyncio.wait_for(reader.read(1), DEADLINE_S) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("begin", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n"], ids=["nothing", "half headers"])
async def test_headers_must_come(begin: bytes) -> None:
    async with served(FastAPI(), headers_s=0.2) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(begin)
        assert await is_cut_off(reader)
        writer.close()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_tls_handshake_must_come(loop: str, certificates: Certificates) -> None:
    async def wait() -> bool:
        async with served(FastAPI(), headers_s=0.2, tls=certificates.issue("127.0.0.1")) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            is_over = await is_cut_off(reader)
            writer.close()
            return is_over

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        assert runner.run(wait())


async def test_a_body_must_go_on_coming() -> None:
    app = FastAPI()

    @app.post("/")
    async def read(request: Request) -> Response:
        return Response(await request.body())

    async with served(app, body_s=0.2) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
        assert await is_cut_off(reader)
        writer.close()


async def test_an_answer_may_take_longer_than_the_client_may() -> None:
    app = FastAPI()

    @app.post("/")
    async def answer_late(request: Request) -> Response:
        await request.body()
        await asyncio.sleep(0.3)
        return Response("late")

    async with served(app, headers_s=0.1, body_s=0.1, reader_s=0.1) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):  # and the connection is kept
            writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody")
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
            assert head.startswith(b"HTTP/1.1 200")
            assert await reader.readexactly(4) == b"late"
        writer.close()


async def test_a_reader_that_takes_nothing_is_cut_off_and_its_request_ends() -> None:
    app = FastAPI()
    ended = asyncio.Event()
    num_bytes = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_bytes
        try:
            while True:
                yield b"x" * 4096
                num_bytes += 4096
                await asyncio.sleep(0)
        finally:
            ended.set()

    @app.get("/")
    async def stream(_: Request) -> Response:
        return StreamingResponse(endless())

    async with served(app, reader_s=0.2) as port:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            client.connect(("127.0.0.1", port))
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.wait_for(ended.wait(), DEADLINE_S)
    assert num_bytes < 1 << 20, "what nobody reads is not made"
