"""HTTP to a router from any thread and any event loop.

Everything runs in one event loop of its own, on a thread of its own, so that plain calls, `await` in a
running loop, and several loops one after the other share one pool of connections.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

import aiohttp
import msgspec

from ..bench.sse import SseParser
from ..runtime.errors import PdserveError, RequestError, UnreachableError
from ..runtime.tls import SYSTEM_TRUST, Trust

T = TypeVar("T")

_CONNECT_TIMEOUT_S = 10.0
_DONE = b"[DONE]"


class _ErrorInfo(msgspec.Struct):
    message: str
    type: str = "server_error"
    param: str | None = None
    code: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _ErrorInfo


class Connection:
    """To the router at `url`, with this key. `why_it_ended`: why a cluster of ours is gone; else nothing."""

    def __init__(
        self, url: str, key: str, why_it_ended: Callable[[], str], trust: Trust = SYSTEM_TRUST
    ) -> None:
        self.url = url
        self._tls = trust.of(url)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._why_it_ended = why_it_ended
        self._session: aiohttp.ClientSession | None = None
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="pdserve-engine", daemon=True)
        self._thread.start()

    # ---- from any thread ----------------------------------------------------------------------------

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which runs in the connection's loop. Blocks this thread."""
        future = self._submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # KeyboardInterrupt: the request must not go on alone
            raise

    async def bring(self, work: Coroutine[Any, Any, T]) -> T:
        """The same for a coroutine of any loop, which goes on meanwhile."""
        return await asyncio.wrap_future(self._submit(work))

    def begin(self, work: Coroutine[Any, Any, object]) -> None:
        """Runs `work` without waiting for it; nothing happens when the connection is closed."""
        if self._is_closed:
            work.close()
        else:
            asyncio.run_coroutine_threadsafe(work, self._loop)

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller runs on the connection's thread, which must not wait for itself."""
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """Ends every request: those who wait for one get UnreachableError. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._end_requests(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ---- in the connection's loop -------------------------------------------------------------------

    async def ask(
        self, method: str, path: str, body: object = None, timeout_s: float | None = None
    ) -> tuple[int, bytes]:
        """The status and body of the answer, if it is one that the caller can read. A body of bytes is sent
        as it is, another one as JSON.

        Raises RequestError for an answer in the form of an error, UnreachableError when none comes.
        """
        try:
            async with self._open(method, path, body, timeout_s) as response:
                content = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._unreachable(error) from None
        if response.status >= 400 and (refusal := _refusal(content, response)) is not None:
            raise refusal
        return response.status, content

    async def stream(self, path: str, body: object) -> AsyncGenerator[Any, None]:
        """The events of a stream, decoded. Closing it cancels the request. Raises as `ask` does."""
        parser = SseParser()
        try:
            async with self._open("POST", path, body, None) as response:
                if response.status >= 400:
                    content = await response.read()
                    raise _refusal(content, response) or _unreadable(content, response.status)
                async for chunk in response.content.iter_any():
                    for event in parser.feed(chunk):
                        if event == _DONE:
                            return
                        yield _event(event)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._unreachable(error) from None
        raise UnreachableError(f"the router at {self.url} ended a stream before its end")

    def _open(
        self, method: str, path: str, body: object, timeout_s: float | None
    ) -> aiohttp.client._RequestContextManager:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0, ssl=self._tls or True),
                headers=self._headers,
            )
        is_raw = isinstance(body, bytes)
        content = body if is_raw or body is None else msgspec.json.encode(body)
        kind = "application/octet-stream" if is_raw else "application/json"
        return self._session.request(
            method,
            f"{self.url}{path}",
            data=content,
            headers={"Content-Type": kind} if content is not None else None,
            timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=_CONNECT_TIMEOUT_S),
        )

    def _unreachable(self, error: Exception) -> UnreachableError:
        if ended := self._why_it_ended():
            return UnreachableError(f"the cluster is gone: {ended}; see its log")
        return UnreachableError(
            f"the router at {self.url} does not answer: {str(error) or type(error).__name__}"
        )

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self._is_closed:
            work.close()
            raise UnreachableError("the engine was shut down")
        return asyncio.run_coroutine_threadsafe(self._until_closed(work), self._loop)

    async def _until_closed(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await work
        except asyncio.CancelledError:
            if self._is_closed:  # not the wish of whoever waits
                raise UnreachableError("the engine was shut down") from None
            raise

    async def _end_requests(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
        await self._loop.shutdown_asyncgens()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()


async def next_event(events: AsyncGenerator[T, None]) -> T | None:
    """The next event of a stream, None at its end; to be run in the connection's loop.

    A coroutine of its own, because a generator belongs to the loop in whose thread `anext` is called: that
    loop closes it when it ends, and would do so from a foreign thread, beside ours.
    """
    return await anext(events, None)


async def close_stream(events: AsyncGenerator[object, None]) -> None:
    """Ends a stream that is left, in the loop that it belongs to; see `next_event`."""
    await events.aclose()


def _event(event: bytes) -> Any:  # noqa: ANN401  JSON is what it is
    value = msgspec.json.decode(event)
    if isinstance(value, dict) and "error" in value:
        raise _request_error(msgspec.convert(value, _ErrorBody).error, 500)
    return value


def _refusal(content: bytes, response: aiohttp.ClientResponse) -> RequestError | None:
    """An answer in the form of an error; None for one of another form."""
    try:
        error = msgspec.json.decode(content, type=_ErrorBody).error
    except msgspec.DecodeError:
        return None
    retry_after = response.headers.get("retry-after", "")
    return _request_error(error, response.status, float(retry_after) if retry_after.isdigit() else None)


def _request_error(error: _ErrorInfo, status: int, retry_after_s: float | None = None) -> RequestError:
    return RequestError(
        error.message,
        status=status,
        param=error.param,
        code=error.code,
        error_type=error.type,
        retry_after_s=retry_after_s,
    )


def _unreadable(content: bytes, status: int) -> PdserveError:
    return UnreachableError(f"status {status}, and no answer of pdserve: {content[:200]!r}")
