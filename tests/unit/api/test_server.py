from __future__ import annotations

import asyncio
import os
import signal
import socket

import aiohttp
import pytest
from fastapi import FastAPI, Request
from starlette.responses import Response

from pdserve.api.in_flight import InFlightRequests
from pdserve.api.server import serve
from pdserve.runtime.errors import RequestError


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
    for request_id, generations in (("a", ["x"]), ("chatcmpl-a", ["x"]), ("b", ["cmpl-a-1"])):
        with pytest.raises(RequestError) as caught:
            in_flight.begin(request_id, generations)
        assert caught.value.status == 409
    end()
    assert len(in_flight) == 0
    in_flight.begin("a", ["cmpl-a-0"])()
