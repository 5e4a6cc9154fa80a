"""A node's leases with its routers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

import aiohttp
import msgspec

from ..messages.node import NodeEntry
from ..runtime.logs import Complaints
from ..runtime.process import AccessKeys
from ..runtime.timing import Timing
from ..runtime.tls import SYSTEM_TRUST, Trust
from .member_calls import MemberCalls

log = logging.getLogger(__name__)


class Registrar:
    """Keeps the node's lease with every router."""

    def __init__(
        self,
        url: str,
        router_urls: Sequence[str],
        keys: AccessKeys,
        timing: Timing,
        trust: Trust = SYSTEM_TRUST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._timing = timing
        self._clock = clock
        timeout = aiohttp.ClientTimeout(total=timing.register_timeout_s)
        self._session = aiohttp.ClientSession(timeout=timeout)
        self._routers = {
            router: MemberCalls(self._session, router, keys, trust)
            for router in dict.fromkeys(url.rstrip("/") for url in router_urls)
        }
        self._problems = dict.fromkeys(self._routers, "it was not asked yet")  # of each; empty: registered
        self._registered_at_s = dict.fromkeys(self._routers, float("-inf"))  # the last time
        self._complaints = Complaints()

    @property
    def problem(self) -> str:
        """Why no router has this node; empty when one has it, or when it was told of none."""
        if not all(self._problems.values()):
            return ""
        return "; ".join(f"{router}: {problem}" for router, problem in self._problems.items())

    async def renew(self, entry: NodeEntry) -> None:
        body = msgspec.json.encode({"url": self._url, "entry": entry})
        await asyncio.gather(*(self._renew_at(router, body) for router in self._routers))

    async def leave(self) -> None:
        """The node is on its way out: routers take no more registrations of this incarnation."""
        await asyncio.gather(*(self._leave(router) for router in self._routers.values()))

    async def close(self) -> None:
        await self._session.close()

    async def _renew_at(self, router: str, body: bytes) -> None:
        is_away = False
        try:
            problem = (await self._routers[router].ask("POST", "/workers", body)).problem
        except (aiohttp.ClientError, TimeoutError) as error:
            problem, is_away = f"{type(error).__name__}: {error}", True
        was_registered, self._problems[router] = not self._problems[router], problem
        now = self._clock()
        if not problem:
            self._registered_at_s[router] = now
            if not was_registered:
                self._complaints.forget(router)
                log.info("registered with %s", router)
        elif is_away and now - self._registered_at_s[router] < self._timing.router_away_s:
            log.debug("%s is away: %s", router, problem)
        elif self._complaints.is_due(router, problem, now):
            log.warning("registration with %s failed, it is tried each second: %s", router, problem)

    async def _leave(self, router: MemberCalls) -> None:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            await router.ask("DELETE", f"/workers/{self._url}")
