from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterable
from pathlib import Path

import aiohttp
import pytest
import uvloop
from fastapi import FastAPI, Request
from starlette.responses import Response, StreamingResponse

from pdserve.api.http.answer_counts import HttpAnswers
from pdserve.api.http.gateway import Gateway
from pdserve.api.http.in_flight import InFlightRequests
from pdserve.api.http.protocol import HeadWithBody
from pdserve.api.http.server import serve
from pdserve.runtime.errors import RequestError
from pdserve.runtime.listen import bind_http, bind_unix, http_url
from pdserve.runtime.process import NO_SUCCESSOR, SUCCESSOR_MAY_START, Succession
from pdserve.runtime.tls import TlsFiles, Trust
from pdserve.tests.certificates import Certificates
from pdserve.tests.deadline import DEADLINE_S


def app_of(in_flight: InFlightRequests) -> FastAPI:
    app = FastAPI()
    app.add_middleware(
        Gateway, answers=HttpAnswers(lambda: ("tiny", "router")), is_draining=lambda: in_flight.is_draining
    )

    @app.get("/")
    async def draining(_: Request) -> Response:
        return Response("draining" if in_flight.is_draining else "open")

    @app.api_route("/echo", methods=["POST", "PUT"])
    async def echo(request: Request) -> Response:
        return Response(await request.body() or b"nothing")

    @app.post("/stream")
    async def stream(request: Request) -> StreamingResponse:
        body = await request.body()
        return StreamingResponse(iter([b"data: ", body, b"\n\n"]))

    return app


async def talk(*parts: bytes) -> bytes:
    """What a server of `app_of` says to these bytes, sent one after the other, until it hangs up."""
    listener = bind_http("127.0.0.1", 0)
    stop = asyncio.Event()
    server = asyncio.create_task(serve(app_of(InFlightRequests()), listener, stop=stop))
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    for part in parts:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0)
    heard = await asyncio.wait_for(reader.read(), DEADLINE_S)
    writer.close()
    stop.set()
    await asyncio.wait_for(server, DEADLINE_S)
    return heard


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAA\r\n"
WEBSOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n"
LAST = b"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 4\r\n\r\nlast"


@pytest.mark.parametrize("offer", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("size", [1, 7, 10_000], ids=lambda size: f"in-{size}s")
async def test_f2_an_offer_to_upgrade_keeps_its_body(offer: bytes, framing: str, size: int) -> None:
    head = b"POST /echo HTTP/1.1\r\nHost: x\r\n" + offer
    if framing == "length":
        request = head + b"Content-Length: 5\r\n\r\nfirst"
    else:
        request = head + b"Transfer-Encoding: chunked\r\n\r\n2\r\nfi\r\n3\r\nrst\r\n0\r\n\r\n"
    whole = request + request + LAST
    heard = await talk(*(whole[start : start + size] for start in range(0, len(whole), size)))
    assert heard.count(b"HTTP/1.1 200 OK") == 3
    assert heard.count(b"\r\n\r\nfirst") == 2
    assert heard.endswith(b"\r\n\r\nlast")


async def test_f2_an_offer_without_a_body_is_answered() -> None:
    heard = await talk(b"PUT /echo HTTP/1.1\r\nHost: x\r\n" + H2C + b"\r\n" + LAST)
    assert heard.count(b"HTTP/1.1 200 OK") == 2
    assert b"\r\n\r\nnothing" in heard


async def test_a_tunnel_is_refused() -> None:
    heard = await talk(b"CONNECT x:1 HTTP/1.1\r\nHost: x:1\r\n\r\n")
    assert heard.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(("path", "body"), [("echo", b"hello"), ("stream", b"data: hello\n\n")])
async def test_http_1_0_is_answered_without_chunks(path: str, body: bytes) -> None:
    heard = await talk(b"POST /%s HTTP/1.0\r\nContent-Length: 5\r\n\r\nhello" % path.encode())
    head, _, rest = heard.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert rest == body


class Wire(asyncio.Transport):
    """Keeps what is written, one entry a call."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.written.append(data)

    def writelines(self, list_of_data: Iterable[bytes]) -> None:  # type: ignore[override]
        self.written.append(b"".join(list_of_data))

    def close(self) -> None:
        self.written.append(b"<close>")


async def test_the_head_of_an_answer_goes_out_with_its_body_and_waits_for_no_later_one() -> None:
    wire = Wire()
    whole = HeadWithBody(wire, asyncio.get_running_loop())
    whole.write(b"head")
    whole.write(b"body")
    await asyncio.sleep(0)
    stream = HeadWithBody(wire, asyncio.get_running_loop())
    stream.write(b"head of a stream")
    await asyncio.sleep(0)
    stream.write(b"piece")
    empty = HeadWithBody(wire, asyncio.get_running_loop())
    empty.write(b"head alone")
    empty.close()
    await asyncio.sleep(0)
    assert wire.written == [b"headbody", b"head of a stream", b"piece", b"head alone", b"<close>"]


@pytest.mark.parametrize("how", ["stop", "signal"])
async def test_the_listener_stays_open_while_draining(how: str) -> None:
    in_flight = InFlightRequests()
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    stop = asyncio.Event()
    server = asyncio.create_task(serve(app_of(in_flight), listener, in_flight=in_flight, stop=stop))
    end = in_flight.begin("r", ["r"])
    async with aiohttp.ClientSession() as http:
        async with http.get(url) as answer:
            assert await answer.text() == "open"
        if how == "stop":
            stop.set()
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(stop.wait(), DEADLINE_S)
        await asyncio.sleep(0)
        async with http.get(url) as answer:
            assert await answer.text() == "draining"
        assert not server.done()
        end()
    await asyncio.wait_for(server, DEADLINE_S)


async def test_a_successor_gets_the_listener_and_nobody_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that exist have one more request answered, those that come wait for the successor."""
    told: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: told.append(number))
    in_flight, stop = InFlightRequests(), asyncio.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    inherited = listener.dup()
    kept = signal.getsignal(NO_SUCCESSOR)
    first = asyncio.create_task(
        serve(app_of(in_flight), listener, in_flight=in_flight, stop=stop, succession=Succession())
    )
    signal.signal(NO_SUCCESSOR, kept)
    get = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(get)
    assert b"connection: close" not in (await reader.readuntil(b"open")).lower()
    end = in_flight.begin("r", ["r"])
    stop.set()
    while not told:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert told == [SUCCESSOR_MAY_START]
    late_reader, late_writer = await asyncio.open_connection("127.0.0.1", port)
    late_writer.write(get)
    writer.write(get)
    in_flight.check_open()
    last = await reader.read()
    assert b"connection: close" in last.lower()
    assert last.endswith(b"draining")
    end()
    await asyncio.wait_for(first, DEADLINE_S)
    stop = asyncio.Event()
    second = asyncio.create_task(serve(app_of(InFlightRequests()), inherited, stop=stop))
    assert (await asyncio.wait_for(late_reader.readuntil(b"open"), DEADLINE_S)).startswith(b"HTTP/1.1 200")
    writer.close()
    late_writer.close()
    stop.set()
    await asyncio.wait_for(second, DEADLINE_S)


async def test_draining_gives_up_in_the_end() -> None:
    in_flight = InFlightRequests()
    in_flight.begin("r", ["r"])
    stop = asyncio.Event()
    stop.set()
    listener = socket.create_server(("127.0.0.1", 0))
    serving = serve(app_of(in_flight), listener, in_flight=in_flight, stop=stop, drain_timeout_s=0.05)
    await asyncio.wait_for(serving, DEADLINE_S)
    assert in_flight.cut.done()


def test_ids_in_flight() -> None:
    in_flight = InFlightRequests()
    end = in_flight.begin("a", ["cmpl-a-0", "cmpl-a-1"])
    assert in_flight.generations_of("a") == in_flight.generations_of("cmpl-a") == ("cmpl-a-0", "cmpl-a-1")
    assert in_flight.generations_of("b") == ("b",)
    begun = in_flight.begin("ab", ["cmpl-ab-0"])
    assert in_flight.generations_matching("a") == ("cmpl-a-0", "cmpl-a-1")  # the very id comes first
    assert in_flight.generations_matching("cmpl-ab") == ("cmpl-ab-0",)
    assert in_flight.generations_matching("c") == ("c",)
    begun()
    for request_id, generations in (("a", ["x"]), ("chatcmpl-a", ["x"]), ("b", ["cmpl-a-1"])):
        with pytest.raises(RequestError) as caught:
            in_flight.begin(request_id, generations)
        assert caught.value.status == 409
    end()
    assert len(in_flight) == 0
    in_flight.begin("a", ["cmpl-a-0"])()
    ends = [in_flight.begin(f"batch7-{n}", [f"cmpl-batch7-{n}"]) for n in range(2)]
    assert in_flight.generations_matching("batch7") == ("cmpl-batch7-0", "cmpl-batch7-1")
    assert in_flight.generations_of("batch7") == ("batch7",)
    for end in ends:
        end()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_unix_socket_is_served_beside_the_port(loop: str, tmp_path: Path) -> None:
    path = str(tmp_path / "router.sock")

    async def ask() -> None:
        listeners = [bind_http("127.0.0.1", 0), bind_unix(path)]
        stop = asyncio.Event()
        server = asyncio.create_task(serve(app_of(InFlightRequests()), *listeners, stop=stop))
        urls = {http_url("127.0.0.1", listeners[0]): None, "http://localhost": aiohttp.UnixConnector(path)}
        for url, connector in urls.items():
            async with aiohttp.ClientSession(connector=connector) as http, http.get(url) as answer:
                assert await answer.text() == "open"
        stop.set()
        await asyncio.wait_for(server, DEADLINE_S)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        runner.run(ask())


async def test_tls_is_not_spoken_with_who_does_not(certificates: Certificates) -> None:
    files, stop = certificates.issue("127.0.0.1"), asyncio.Event()
    listener = bind_http("127.0.0.1", 0)
    server = asyncio.create_task(serve(app_of(InFlightRequests()), listener, tls=files, stop=stop))
    async with aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientError):
            await http.get(http_url("127.0.0.1", listener))
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await http.get(http_url("127.0.0.1", listener, "https"))
    stop.set()
    await asyncio.wait_for(server, DEADLINE_S)


async def test_a_stream_over_tls_ends_as_it_should(certificates: Certificates) -> None:
    files, stop = certificates.issue("127.0.0.1"), asyncio.Event()
    listener = bind_http("127.0.0.1", 0)
    server = asyncio.create_task(serve(app_of(InFlightRequests()), listener, tls=files, stop=stop))
    url = http_url("127.0.0.1", listener, "https")
    body, tls = b"x" * 300_000, Trust(files).of(url) or True
    async with aiohttp.ClientSession() as http, http.post(f"{url}/stream", data=body, ssl=tls) as answer:
        assert await answer.read() == b"data: " + body + b"\n\n"
    stop.set()
    await asyncio.wait_for(server, DEADLINE_S)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_unix_socket_beside_a_tls_port_speaks_tls_too(
    loop: str, certificates: Certificates, tmp_path: Path
) -> None:
    path = str(tmp_path / "router.sock")
    tls = Trust(TlsFiles(ca_certs=certificates.ca_certs)).of("https://localhost")

    async def ask() -> bytes:
        listeners, stop = [bind_http("127.0.0.1", 0), bind_unix(path)], asyncio.Event()
        files = certificates.issue("localhost")
        server = asyncio.create_task(serve(app_of(InFlightRequests()), *listeners, tls=files, stop=stop))
        reader, writer = await asyncio.open_unix_connection(path, ssl=tls, server_hostname="localhost")
        writer.write(LAST)
        heard = await asyncio.wait_for(reader.read(), DEADLINE_S)
        writer.close()
        stop.set()
        await asyncio.wait_for(server, DEADLINE_S)
        return heard

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        assert runner.run(ask()).endswith(b"\r\n\r\nlast")
