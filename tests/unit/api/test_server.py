from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import aiohttp
import pytest
import uvloop
from fastapi import FastAPI, Request
from starlette.responses import Response

from pdserve.api.in_flight import InFlightRequests
from pdserve.api.server import serve
from pdserve.runtime.errors import RequestError
from pdserve.runtime.listen import bind_http, bind_unix, http_url


def app_of(in_flight: InFlightRequests) -> FastAPI:
    app = FastAPI()

    @app.get("/")
    async def draining(_: Request) -> Response:
        return Response("draining" if in_flight.is_draining else "open")

    return app


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
        await asyncio.wait_for(stop.wait(), 5)
        await asyncio.sleep(0)
        async with http.get(url) as answer:
            assert await answer.text() == "draining"
        assert not server.done()
        end()
    await asyncio.wait_for(server, 10)


async def test_draining_gives_up_in_the_end() -> None:
    in_flight = InFlightRequests()
    in_flight.begin("r", ["r"])
    stop = asyncio.Event()
    stop.set()
    listener = socket.create_server(("127.0.0.1", 0))
    serving = serve(app_of(in_flight), listener, in_flight=in_flight, stop=stop, drain_timeout_s=0.05)
    await asyncio.wait_for(serving, 10)


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
        await asyncio.wait_for(server, 10)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        runner.run(ask())
