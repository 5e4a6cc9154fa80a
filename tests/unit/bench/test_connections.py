"""HTTP/1.1 answers in every framing, in any pieces, and connections that are kept or not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from pdserve.bench.connections import Connections, Exchange
from pdserve.tests.deadline import DEADLINE_S

OK = b"HTTP/1.1 200 OK\r\n"


async def exchanged(connections: Connections) -> tuple[int | None, bytes]:
    body = bytearray()
    exchange = Exchange(connections.request("POST", "/path", b"{}"), lambda _, data: body.extend(data))
    await asyncio.wait_for(connections.carry(exchange), DEADLINE_S)
    return exchange.status, bytes(body)


async def ask(*answers: Sequence[bytes]) -> tuple[list[tuple[int | None, bytes]], int]:
    """Status and body of each exchange with a server that writes these pieces, one answer a request, and how
    many connections it saw. An answer that ends with b"" ends its connection."""
    left = list(answers)
    num_connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        while left:
            try:
                await reader.readuntil(b"Content-Length: 2\r\n\r\n{}")
            except asyncio.IncompleteReadError:
                break
            for piece in left.pop(0):
                if not piece:
                    writer.close()
                    return
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    connections = Connections(f"http://127.0.0.1:{port}/base", {"X-Name": "value"})
    got: list[tuple[int | None, bytes]] = []
    try:
        for _ in answers:
            got.append(await exchanged(connections))
    finally:
        connections.close()
        server.close()
        await server.wait_closed()
    return got, num_connections


def test_a_request_is_whole() -> None:
    connections = Connections("http://[::1]:80/base", {"X-Name": "value"})
    assert connections.request("POST", "/path", b"{}") == (
        b"POST /base/path HTTP/1.1\r\nHost: [::1]:80\r\nX-Name: value\r\nContent-Length: 2\r\n\r\n{}"
    )


@pytest.mark.parametrize(
    ("pieces", "status", "body"),
    [
        ((OK + b"Content-Length: 3\r\n\r\nabc",), 200, b"abc"),
        ((OK + b"Content-Le", b"ngth: 3\r\n\r\na", b"bc"), 200, b"abc"),
        ((OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r", b"\n2\r\nbc\r\n0\r\n\r\n"), 200, b"abc"),
        ((OK + b"\r\nab", b"c", b""), 200, b"abc"),
        ((b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n"), 204, b""),
        ((b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 2\r\n\r\n{}",), 429, b"{}"),
    ],
)
async def test_every_framing(pieces: tuple[bytes, ...], status: int, body: bytes) -> None:
    assert await ask(pieces) == ([(status, body)], 1)


async def test_a_connection_is_kept_unless_the_server_says_otherwise() -> None:
    kept = (OK + b"Content-Length: 1\r\n\r\na",)
    last = (OK + b"Connection: close\r\nContent-Length: 1\r\n\r\nb",)
    got, num_connections = await ask(kept, kept, last, kept)
    assert ([body for _, body in got], num_connections) == ([b"a", b"a", b"b", b"a"], 2)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ((b"",), "ended before the answer"),
        ((OK + b"Content-Length: 3\r\n\r\nab", b""), "ended within the answer"),
        ((OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n", b""), "ended within the answer"),
        ((b"SSH-2.0-OpenSSH\r\n",), "not HTTP/1.1"),
    ],
)
async def test_what_breaks_off_is_an_error(pieces: tuple[bytes, ...], message: str) -> None:
    with pytest.raises(ConnectionError, match=message):
        await ask(pieces)
