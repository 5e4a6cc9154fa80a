"""A running request as its reader holds it: a stream of deltas that ends, fails, or is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from ..api.generation import ChoiceDelta, GenerationInfo
from ..runtime.errors import RequestError
from .attempts import RequestRecord


class RoutedGeneration:
    """Implements `pdserve.api.generation.Generation`. The service pushes, one reader iterates."""

    def __init__(
        self,
        record: RequestRecord,
        *,
        on_stop_choice: Callable[[RoutedGeneration, int], None],
        on_cancel: Callable[[RoutedGeneration], None],
    ) -> None:
        self.record = record
        self.dispatched: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_stop_choice = on_stop_choice
        self._on_cancel = on_cancel
        self._events: asyncio.Queue[ChoiceDelta | RequestError | None] = asyncio.Queue()
        self._stopped: set[int] = set()

    @property
    def info(self) -> GenerationInfo:
        return self.record.info

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
        self._on_stop_choice(self, choice)

    def cancel(self) -> None:
        self._on_cancel(self)

    # ---- for the service ------------------------------------------------------------------------

    def push(self, delta: ChoiceDelta) -> None:
        self._events.put_nowait(delta)

    def end(self) -> None:
        """Every choice has finished."""
        self.mark_dispatched()
        self._events.put_nowait(None)

    def fail(self, error: RequestError) -> None:
        """Raised by ``generate`` while the request has not been dispatched, by the iterator later."""
        if not self.dispatched.done():
            self.dispatched.set_exception(error)
        else:
            self._events.put_nowait(error)

    def mark_dispatched(self) -> None:
        if not self.dispatched.done():
            self.dispatched.set_result(None)
