"""A front's connection to its scheduler."""

from __future__ import annotations

import logging
import time

import zmq.asyncio

from ..links.node_calls import NodeUnavailableError
from ..links.node_client import NodeClient
from ..messages.link_guard import LinkKeys
from ..messages.node import Pong
from ..runtime.timing import Timing

log = logging.getLogger(__name__)


class SchedulerLink:
    """The connection to the scheduler, made again while it is not there, and what it said last."""

    def __init__(
        self, context: zmq.asyncio.Context, address: str, keys: LinkKeys | None, timing: Timing
    ) -> None:
        self._context = context
        self._timing = timing
        self._address = address
        self._keys = keys
        self._client = NodeClient(context, address, keys=keys, timing=timing)
        self._answered_at_s = float("-inf")
        self._lost_at_s: float | None = None
        self.pong: Pong | None = None

    @property
    def client(self) -> NodeClient:
        return self._client

    @property
    def is_alive(self) -> bool:
        timing = self._timing
        silent_s = time.monotonic() - self._answered_at_s
        return silent_s < timing.front_ping_interval_s + timing.front_ping_timeout_s

    @property
    def is_gone(self) -> bool:
        """It was there, and its connection has been closed for long."""
        if self._lost_at_s is None:
            return False
        return time.monotonic() - self._lost_at_s > self._timing.scheduler_gone_s

    async def ping(self) -> Pong | None:
        """None when the scheduler does not answer; then the link is ready to try again."""
        if self._client.is_lost:
            await self._client.close()
            self._client = NodeClient(self._context, self._address, keys=self._keys, timing=self._timing)
        try:
            self.pong = await self.ask()
        except NodeUnavailableError as error:
            if self._client.is_lost and self.pong is not None and self._lost_at_s is None:
                log.warning("%s", error)
                self._lost_at_s = time.monotonic()
            return None
        self._answered_at_s = time.monotonic()
        self._lost_at_s = None
        return self.pong

    async def ask(self) -> Pong:
        """How the scheduler is now. Raises NodeUnavailableError."""
        return await self._client.ping(self._timing.front_ping_timeout_s)

    async def close(self) -> None:
        await self._client.close()
