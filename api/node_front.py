"""A node's own HTTP: a process beside its scheduler, which keeps the scheduler's loop free of HTTP.

It pings the scheduler every second and, while that answers, registers the node with the routers that it was
told of. Such a registration is a lease of 5 s; so a node whose scheduler is gone or stands still leaves the
cluster by itself. The front ends when it is told to, or when the scheduler does not come (back).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
import zmq.asyncio

from ..messages.node import NodeEntry, Pong
from .node_client import NodeClient, NodeUnavailableError

log = logging.getLogger(__name__)

PING_INTERVAL_S = 1.0
PING_TIMEOUT_S = 2.0
REGISTER_TIMEOUT_S = 1.0
RECONNECT_INTERVAL_S = 0.2
SCHEDULER_GONE_S = 10.0  # without a connection for so long, after there was one
WEIGHTS_TIMEOUT_S = 600.0


class SchedulerLink:
    """The connection to the scheduler, made again while it is not there, and what it said last."""

    def __init__(self, context: zmq.asyncio.Context, address: str) -> None:
        self._context = context
        self._address = address
        self._client = NodeClient(context, address)
        self._answered_at_s = float("-inf")
        self._lost_at_s: float | None = None
        self.pong: Pong | None = None

    @property
    def client(self) -> NodeClient:
        return self._client

    @property
    def is_alive(self) -> bool:
        return time.monotonic() - self._answered_at_s < PING_INTERVAL_S + PING_TIMEOUT_S

    @property
    def is_gone(self) -> bool:
        """It was there, and its connection has been closed for long."""
        return self._lost_at_s is not None and time.monotonic() - self._lost_at_s > SCHEDULER_GONE_S

    async def ping(self) -> Pong | None:
        """None when the scheduler does not answer; then the link is ready to try again."""
        if self._client.is_lost:
            await self._client.close()
            self._client = NodeClient(self._context, self._address)
        try:
            self.pong = await self._client.ping(PING_TIMEOUT_S)
        except NodeUnavailableError as error:
            if self._client.is_lost and self.pong is not None and self._lost_at_s is None:
                log.warning("%s", error)
                self._lost_at_s = time.monotonic()
            return None
        self._answered_at_s = time.monotonic()
        self._lost_at_s = None
        return self.pong

    async def close(self) -> None:
        await self._client.close()


class Registrar:
    """Keeps the node's lease with every router."""

    def __init__(self, url: str, router_urls: Sequence[str], api_keys: Collection[str]) -> None:
        self._url = url
        self._is_registered = dict.fromkeys((router.rstrip("/") for router in router_urls), False)
        headers = {"authorization": f"Bearer {key}" for key in list(api_keys)[:1]}
        timeout = aiohttp.ClientTimeout(total=REGISTER_TIMEOUT_S)
        self._session = aiohttp.ClientSession(headers=headers, timeout=timeout)

    async def renew(self, entry: NodeEntry) -> None:
        body = {"url": self._url, "entry": msgspec.structs.asdict(entry)}
        await asyncio.gather(*(self._renew_at(router, body) for router in self._is_registered))

    async def leave(self) -> None:
        await asyncio.gather(*(self._leave(router) for router in self._is_registered))
        await self._session.close()

    async def _renew_at(self, router: str, body: dict[str, Any]) -> None:
        try:
            async with self._session.post(f"{router}/workers", json=body) as answer:
                problem = "" if answer.ok else f"{answer.status}: {(await answer.text())[:300]}"
        except (aiohttp.ClientError, TimeoutError) as error:
            problem = f"{type(error).__name__}: {error}"
        is_registered = not problem
        if is_registered != self._is_registered[router]:
            self._is_registered[router] = is_registered
            log.info("registered with %s", router) if is_registered else log.warning(
                "registration with %s failed: %s", router, problem
            )

    async def _leave(self, router: str) -> None:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            await self._session.delete(f"{router}/workers/{quote(self._url, safe='')}")
