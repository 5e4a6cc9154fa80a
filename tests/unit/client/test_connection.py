"""The connection of an engine: threads, loops, cancellation, and the errors it makes of a router's."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pdserve.client.async_engine import AsyncEngine, Outcome
from pdserve.client.connection import Connection
from pdserve.runtime.errors import RequestError, UnreachableError
from pdserve.tests.deadline import DEADLINE_S


class Router(ThreadingHTTPServer):
    """Answers by path. `/generate` streams numbers until its client leaves."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[tuple[str, object]] = []
        self.authorizations: list[str | None] = []
        self.clients_left = threading.Semaphore(0)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Router

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        body: Any = json.loads(content) if content else None
        self.server.bodies.append((self.path, body))
        self.server.authorizations.append(self.headers["authorization"])
        match self.path:
            case "/generate" if body["stream"]:
                self.stream(body)
            case "/generate":
                time.sleep(DEADLINE_S)
            case "/get_load":
                self.answer(200, [])
            case "/abort_request":
                self.answer(400, {"success": False, "message": "no"})
            case "/server_info":
                error = {"message": "Draining.", "type": "service_unavailable", "code": "draining"}
                self.answer(503, {"error": {**error, "param": "p"}}, {"Retry-After": "7"})
            case _:
                self.answer(502, "a proxy's page")

    def answer(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def stream(self, body: dict[str, object]) -> None:
        self.send_response(200)
        self.end_headers()
        scripts: dict[str, list[object]] = {
            "complete": [{"n": 0}, {"n": 1}, "[DONE]"],
            "cut": [{"n": 0}],
            "failing": [{"n": 0}, {"error": {"message": "It broke.", "type": "server_error"}}],
        }
        events = scripts.get(str(body["text"]))
        try:
            for number in range(10**9) if events is None else range(len(events)):
                event: object = {"n": number} if events is None else events[number]
                text = event if isinstance(event, str) else json.dumps(event)
                self.wfile.write(f"data: {text}\n\n".encode())
                if events is None:
                    time.sleep(0.001)
        except OSError:
            self.server.clients_left.release()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def router() -> Iterator[Router]:
    with Router() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def connection(router: Router) -> Iterator[Connection]:
    with closing(Connection(router.url, "secret", lambda: "")) as connection:
        yield connection


@pytest.fixture
def engine(connection: Connection) -> AsyncEngine:
    return AsyncEngine(connection)


def test_the_same_calls_serve_threads_and_several_loops(
    connection: Connection, engine: AsyncEngine, router: Router
) -> None:
    assert connection.run(engine.get_load()) == []
    for _ in range(2):
        assert asyncio.run(engine.get_load()) == []
    assert set(router.authorizations) == {"Bearer secret"}


async def collected(engine: AsyncEngine, prompt: str) -> list[object]:
    return [event async for event in await engine.generate(prompt, stream=True)]


def test_a_stream_is_given_event_by_event(connection: Connection, engine: AsyncEngine) -> None:
    assert asyncio.run(collected(engine, "complete")) == [{"n": 0}, {"n": 1}]
    assert connection.run(collected(engine, "complete")) == [{"n": 0}, {"n": 1}]


def test_a_stream_that_ends_early_is_an_error(engine: AsyncEngine) -> None:
    with pytest.raises(UnreachableError, match="ended a stream before its end"):
        asyncio.run(collected(engine, "cut"))


def test_a_stream_that_fails_says_why(engine: AsyncEngine) -> None:
    with pytest.raises(RequestError, match="It broke"):
        asyncio.run(collected(engine, "failing"))


async def leave_after_three(engine: AsyncEngine) -> None:
    events = await engine.generate("endless", stream=True)
    for _ in range(3):
        await anext(events)
    await events.aclose()


async def cancel_who_waits(engine: AsyncEngine) -> None:
    task = asyncio.create_task(collected(engine, "endless"))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


@pytest.mark.parametrize("leave", [leave_after_three, cancel_who_waits])
def test_leaving_a_stream_ends_the_request(
    engine: AsyncEngine, router: Router, leave: Callable[[AsyncEngine], Coroutine[object, object, None]]
) -> None:
    for _ in range(30):  # the loop that ends here must leave the closing to the connection's
        asyncio.run(leave(engine))
        assert router.clients_left.acquire(timeout=DEADLINE_S)


def test_an_error_keeps_what_the_router_says(engine: AsyncEngine) -> None:
    with pytest.raises(RequestError, match="Draining") as caught:
        asyncio.run(engine.get_server_info())
    error = caught.value
    assert (error.status, error.code, error.param, error.retry_after_s) == (503, "draining", "p", 7.0)


def test_what_a_control_call_could_not_do_is_an_answer(engine: AsyncEngine) -> None:
    assert asyncio.run(engine.abort_request(abort_all=True)) == Outcome(False, "no")


def test_what_is_no_router_is_said(engine: AsyncEngine) -> None:
    with pytest.raises(UnreachableError, match="status 502"):
        asyncio.run(engine.tokenize("x"))


def test_a_cluster_that_is_gone_says_why() -> None:
    gone = Connection("http://127.0.0.1:9", "", lambda: "pdserve up (pid 5) was ended by SIGKILL")
    with closing(gone), pytest.raises(UnreachableError, match="ended by SIGKILL"):
        gone.run(AsyncEngine(gone).get_load())


def test_closing_ends_who_waits_in_a_thread_and_in_a_loop(
    connection: Connection, engine: AsyncEngine, router: Router
) -> None:
    errors: list[BaseException] = []

    def wait(ask: Callable[[], object]) -> None:
        try:
            ask()
        except BaseException as error:
            errors.append(error)

    waits: list[Callable[[], object]] = [
        lambda: connection.run(engine.generate("slow")),
        lambda: asyncio.run(engine.generate("slow")),
    ]
    threads = [threading.Thread(target=wait, args=(ask,)) for ask in waits]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + DEADLINE_S
    while len(router.bodies) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    connection.close()
    connection.close()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert [type(error) for error in errors] == [UnreachableError] * 2
    with pytest.raises(UnreachableError, match="shut down"):
        connection.run(engine.get_load())


def test_a_misspelled_field_is_refused(engine: AsyncEngine, router: Router) -> None:
    with pytest.raises(TypeError, match="top_logprob_num"):
        asyncio.run(engine.generate("x", top_logprob_num=3))  # type: ignore[call-overload]
    assert router.bodies == []
