"""HTTP/1.1 as the harness speaks it: an exchange takes a fifth of a general client's processor time.

What the harness takes from the machine, a server beside it lacks; and a chunk has its time before anything
else is done with it.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import httptools

KEEPALIVE_S = 4.0
"""Idle connections are dropped before uvicorn's default of 5 s can close them under a request."""

_FRAMED_BY = (b"content-length", b"transfer-encoding")


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and what came of it so far."""

    request: bytes
    """All of it, from its request line on."""
    on_body: Callable[[int, bytes], None]
    """Gets the status and a piece of the body as it comes."""
    status: int | None = None
    """None until the answer's head is here."""


class Connections:
    """Those to one server, as many as there are requests at a time. For one event loop."""

    def __init__(self, base_url: str, headers: Mapping[str, str]) -> None:
        url = urlsplit(base_url)
        self._host = url.hostname or ""
        self._ssl = ssl.create_default_context() if url.scheme == "https" else None
        self._port = url.port or (80 if self._ssl is None else 443)
        self._path = url.path
        host = url.netloc.rpartition("@")[2]
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in {"Host": host, **headers}.items())
        self._addresses: list[str] = []  # of the host, once looked up
        self._idle: dict[_Connection, float] = {}  # since when, the latest last
        self._open: set[_Connection] = set()

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Its bytes; `path` is below the base URL's."""
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
        return head.encode("latin-1") + body

    async def carry(self, exchange: Exchange) -> None:
        """Returns when the whole answer is here; ConnectionError when it cannot be had, or breaks off."""
        connection = self._idle_one() or await self._connect()
        keeps_alive = False
        try:
            keeps_alive = await connection.carry(exchange)
        finally:
            if keeps_alive and connection in self._open:
                self._idle[connection] = time.monotonic()
            else:  # broken, to be closed, or given up in the middle
                connection.abort()

    def close(self) -> None:
        for connection in tuple(self._open):
            connection.abort()

    def opened(self, connection: _Connection) -> None:
        self._open.add(connection)

    def lost(self, connection: _Connection) -> None:
        self._idle.pop(connection, None)
        self._open.discard(connection)

    def _idle_one(self) -> _Connection | None:
        while self._idle:
            connection, since_s = self._idle.popitem()
            if time.monotonic() - since_s < KEEPALIVE_S:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        failure = OSError("no address")
        try:
            if not self._addresses:
                found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
                self._addresses = [str(address[0]) for *_, address in found]
            for address in self._addresses:
                try:
                    _, connection = await loop.create_connection(
                        lambda: _Connection(self),
                        address,
                        self._port,
                        ssl=self._ssl,
                        server_hostname=None if self._ssl is None else self._host,
                    )
                except OSError as error:
                    failure = error
                else:
                    return connection
        except OSError as error:
            failure = error
        raise ConnectionError(f"cannot connect to {self._host}:{self._port}: {failure}") from failure


class _Connection(asyncio.Protocol):
    """One exchange after the other."""

    def __init__(self, pool: Connections) -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: Exchange | None = None
        self._ended: asyncio.Future[bool] | None = None
        self._is_framed = False  # otherwise the body ends with the connection
        self._transport: asyncio.Transport

    async def carry(self, exchange: Exchange) -> bool:
        """Whether another one may follow."""
        self._exchange = exchange
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(exchange.request)
        return await self._ended

    def abort(self) -> None:
        self._transport.abort()

    # ---- asyncio ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._pool.opened(self)

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:  # nothing was asked
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(ConnectionError(f"the answer is not HTTP/1.1: {error}"))
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.lost(self)
        if self._exchange is None:
            return
        if self._exchange.status is not None and not self._is_framed and exc is None:
            self._end(keeps_alive=False)
        else:
            when = "before" if self._exchange.status is None else "within"
            self._fail(ConnectionResetError(f"the connection ended {when} the answer: {exc or 'closed'}"))

    # ---- the parser ---------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._is_framed = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in _FRAMED_BY:
            self._is_framed = True

    def on_headers_complete(self) -> None:
        if self._exchange is not None and (status := self._parser.get_status_code()) >= 200:
            self._exchange.status = status

    def on_body(self, body: bytes) -> None:
        if self._exchange is not None and self._exchange.status is not None:
            self._exchange.on_body(self._exchange.status, body)

    def on_message_complete(self) -> None:
        if self._exchange is None or self._exchange.status is None:  # what comes before an answer: 100, 103
            return
        self._end(self._parser.should_keep_alive())

    def _end(self, keeps_alive: bool) -> None:
        self._exchange = None
        if self._ended is not None and not self._ended.done():  # otherwise who waited has given up
            self._ended.set_result(keeps_alive)

    def _fail(self, error: ConnectionError) -> None:
        self._exchange = None
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(error)
