"""Server-sent events, and work that ends when its client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...runtime.errors import RequestError
from .errors import encode_error, error_response
from .in_flight import draining_error

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


def event(payload: bytes) -> bytes:
    return b"data: %b\n\n" % payload


class ClientLeftError(Exception):
    """The client closed the connection before its answer was complete; the work was cancelled."""


async def unless_client_leaves(
    receive: Receive, work: Coroutine[Any, Any, T], cut: asyncio.Future[None]
) -> T:
    """The result of `work`, which is cancelled, and has cleaned up, before ClientLeftError is raised, or
    RequestError (503) when `cut` is done."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnect(receive))
    ends: set[asyncio.Future[Any]] = {working, watching, cut}
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if cut.done():
            raise draining_error("The server has shut down before the answer was complete.")
        raise ClientLeftError
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.wait({working, watching})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Streams events, then ``[DONE]``.

    Headers go out with the first event, so that what fails before it gets a proper HTTP status. A failure
    after that is an event ``{"error": …}`` and then the end of the connection without a terminal chunk: no
    client can take the stream for complete. When the client leaves, the events' generator is closed at once.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, cut: asyncio.Future[None], on_end: Callable[[], None]
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._cut = cut
        self._on_end = on_end
        self._has_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_client_leaves(receive, self._stream(send), self._cut)
        except ClientLeftError:
            return
        except RequestError as error:
            if not self._has_started:
                await error_response(error)(scope, receive, send)
                return
            # Returning without a last body part makes the server drop the connection (see server.py).
            body = event(encode_error(error))
            await send({"type": "http.response.body", "body": body, "more_body": True})
        finally:
            self._on_end()

    async def _stream(self, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:
            async for payload in events:
                await self._start(send)
                await send({"type": "http.response.body", "body": payload, "more_body": True})
        await self._start(send)
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _start(self, send: Send) -> None:
        if not self._has_started:
            self._has_started = True
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
