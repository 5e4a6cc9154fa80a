"""Waiting for what others bring about, in a task of the router's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

WAIT_POLL_S = 0.02


class Hears(Protocol):
    """`pdserve.router.cluster.Cluster.hears`."""

    def __call__(self, condition: Callable[[], bool], timeout_s: float) -> Awaitable[bool]: ...


async def until(condition: Callable[[], bool], timeout_s: float, clock: Callable[[], float]) -> bool:
    """Whether it has come true in time."""
    deadline = clock() + timeout_s
    while not condition():
        if clock() >= deadline:
            return False
        await asyncio.sleep(WAIT_POLL_S)
    return True
