"""When each request is due, and the loop that sends it then.

Open loop: requests are due at the times of a gamma renewal process, whatever the server does. Closed loop:
all are due at once and `max_concurrency` slots let them go. Both together: due by the process, held back
until a slot is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")

LAG_PERIOD_S = 0.01


def arrival_offsets_s(
    num_requests: int, request_rate: float, burstiness: float, rng: np.random.Generator
) -> list[float]:
    """Seconds from the start at which each request is due; the first is due at 0.

    Gaps are gamma distributed with mean 1/`request_rate` and coefficient of variation
    1/sqrt(`burstiness`): 1 is a Poisson process, less is burstier, more is more even.
    """
    if math.isinf(request_rate):
        return [0.0] * num_requests
    gaps_s = rng.gamma(shape=burstiness, scale=1.0 / (request_rate * burstiness), size=num_requests)
    gaps_s[:1] = 0.0
    return [float(offset) for offset in np.cumsum(gaps_s)]


@dataclass(frozen=True, slots=True)
class Release:
    """One request let go: due by the arrival process, released by the concurrency limit."""

    index: int
    due_s: float
    released_s: float


@dataclass(frozen=True, slots=True)
class LoadRun(Generic[T]):
    """Everything a run gave, in the order of the requests."""

    results: list[T]
    duration_s: float
    """From the start to the last result."""
    loop_lags_s: list[float]
    """How late the client's event loop woke, sampled every `LAG_PERIOD_S`."""


async def run_load(
    offsets_s: Sequence[float],
    send: Callable[[Release], Awaitable[T]],
    max_concurrency: int | None,
    clock: Callable[[], float] = time.perf_counter,
) -> LoadRun[T]:
    """Sends every request when it is due and waits for all results."""
    slots = asyncio.Semaphore(max_concurrency) if max_concurrency is not None else None

    async def release(index: int, due_s: float) -> T:
        if slots is None:
            return await send(Release(index, due_s, due_s))
        waited = slots.locked()
        async with slots:
            return await send(Release(index, due_s, max(due_s, clock()) if waited else due_s))

    loop_lags_s: list[float] = []
    lag_task = asyncio.create_task(_sample_lag(loop_lags_s, clock))
    start_s = clock()
    try:
        async with asyncio.TaskGroup() as group:
            tasks = []
            for index, offset_s in enumerate(offsets_s):
                due_s = start_s + offset_s
                await asyncio.sleep(max(0.0, due_s - clock()))
                tasks.append(group.create_task(release(index, due_s)))
        duration_s = clock() - start_s
    finally:
        lag_task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await lag_task
    return LoadRun([task.result() for task in tasks], duration_s, loop_lags_s)


async def _sample_lag(lags_s: list[float], clock: Callable[[], float]) -> None:
    while True:
        before_s = clock()
        await asyncio.sleep(LAG_PERIOD_S)
        lags_s.append(max(0.0, clock() - before_s - LAG_PERIOD_S))
