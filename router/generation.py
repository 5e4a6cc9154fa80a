"""A running request as its reader holds it: a stream of deltas that ends, fails, or is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from ..api.generation import ChoiceDelta, GenerationInfo
from ..runtime.errors import RequestError
from .events import ChoiceStopped, ReaderLeft


class RoutedGeneration:
    """Implements `pdserve.api.generation.Generation`. The service pushes, one reader iterates.

    `tell` hears what the reader says, while the request runs.
    """

    def __init__(
        self, request_id: str, info: GenerationInfo, tell: Callable[[ChoiceStopped | ReaderLeft], None]
    ) -> None:
        self.info = info
        self.dispatched: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request_id = request_id
        self._tell = tell
        self._events: asyncio.Queue[ChoiceDelta | RequestError | None] = asyncio.Queue()
        self._stopped: set[int] = set()
        self._is_over = False  # the router knows it no more; its id may be another request's

    async def __aiter__(self) -> AsyncGenerator[ChoiceDelta, None]:
        try:
            while (event := await self._events.get()) is not None:
                if isinstance(event, RequestError):
                    raise event
                if event.choice not in self._stopped:
                    yield event
        finally:
            self.cancel()

    def stop_choice(self, choice: int) -> None:
        self._stopped.add(choice)
        if not self._is_over:
            self._tell(ChoiceStopped(self._request_id, choice))

    def cancel(self) -> None:
        if not self._is_over:
            self._tell(ReaderLeft(self._request_id))

    # ---- for the service ------------------------------------------------------------------------

    def push(self, delta: ChoiceDelta) -> None:
        self._events.put_nowait(delta)

    def end(self) -> None:
        """Nothing more comes."""
        self._is_over = True
        self.mark_dispatched()
        self._events.put_nowait(None)

    def fail(self, error: RequestError) -> None:
        """Raised by ``generate`` while the request has not been dispatched, by the iterator later."""
        self._is_over = True
        if not self.dispatched.done():
            self.dispatched.set_exception(error)
        else:
            self._events.put_nowait(error)

    def mark_dispatched(self) -> None:
        if not self.dispatched.done():
            self.dispatched.set_result(None)
