"""Logical time: a queue of events, and an asyncio loop that has no other time than theirs."""

from __future__ import annotations

import asyncio
import heapq
import selectors
from asyncio import Handle, TimerHandle
from collections.abc import Callable, Mapping
from contextvars import Context
from typing import Any

START_S = 100.0


class EventQueue:
    """Events at the same time run in the order in which they were pushed."""

    def __init__(self) -> None:
        self.start_s = self.now = START_S
        self.num_run = 0
        self.trace: list[str] | None = None  # of what happens, when somebody wants to read it
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._num_pushed = 0

    def at(self, when: float, run: Callable[[], None]) -> None:
        """Run it at `when`, or now if that is over."""
        self._num_pushed += 1
        heapq.heappush(self._heap, (max(when, self.now), self._num_pushed, run))

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now - self.start_s:9.4f}  {text}")

    def after(self, seconds: float, run: Callable[[], None]) -> None:
        self.at(self.now + seconds, run)

    def run_next(self, until: float) -> bool:
        """Run the next event, if there is one at or before `until`; time moves to it, or to `until`."""
        if not self._heap or self._heap[0][0] > until:
            self.now = max(self.now, until)
            return False
        self.now, _, run = heapq.heappop(self._heap)
        self.num_run += 1
        run()
        return True

    @property
    def is_empty(self) -> bool:
        return not self._heap


class _Selector(selectors.BaseSelector):
    """Where a real loop would sleep on its sockets, events run, until one of them has work for the loop."""

    def __init__(self, queue: EventQueue) -> None:
        self.queue = queue
        self.has_work = False
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:  # noqa: ANN401
        key = self._keys[fileobj] = selectors.SelectorKey(fileobj, 0, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:  # noqa: ANN401
        return self._keys.pop(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return []
        self.has_work = False
        if timeout is None and self.queue.is_empty:
            raise RuntimeError("everybody waits, and nothing will ever happen")
        until = float("inf") if timeout is None else self.queue.now + timeout
        while not self.has_work and self.queue.run_next(until):
            pass
        return []


class SimulationLoop(asyncio.SelectorEventLoop):
    """An asyncio loop on logical time: its timers and the queue's events run in the order of their times."""

    def __init__(self, queue: EventQueue) -> None:
        self._events_of = _Selector(queue)
        super().__init__(self._events_of)

    def time(self) -> float:
        return self._events_of.queue.now

    def call_soon(  # type: ignore[override]  # not worth its type variables
        self,
        callback: Callable[..., object],
        *args: Any,  # noqa: ANN401
        context: Context | None = None,
    ) -> Handle:
        self._events_of.has_work = True
        return super().call_soon(callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,  # noqa: ANN401
        context: Context | None = None,
    ) -> TimerHandle:
        self._events_of.has_work = True
        return super().call_at(when, callback, *args, context=context)
