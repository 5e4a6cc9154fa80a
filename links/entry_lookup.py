"""Which node answers at a URL that we were told."""

from __future__ import annotations

import asyncio
import re
import secrets
from typing import Protocol

import aiohttp
import msgspec

from ..messages.node import NodeEntry
from ..runtime.cluster_proof import entry_proof, is_same
from ..runtime.errors import PdserveError
from ..runtime.timing import Timing
from ..runtime.tls import SYSTEM_TRUST, Trust

_MAX_ENTRY_BYTES = 1 << 17
_PROOF = re.compile(r'rspauth="([0-9a-f]+)"')


class NoNodeError(PdserveError):
    """Nobody at the URL answers as a node of this cluster. The message is one line and names the URL."""


class EntryLookup(Protocol):
    """Asks a URL which node it is. Raises NoNodeError."""

    async def __call__(self, url: str) -> NodeEntry: ...


def proof_info(secret: str, nonce: str, entry: bytes) -> str:
    """The value of ``Authentication-Info`` with which a node answers a router's nonce (RFC 7616, 3.5)."""
    return f'rspauth="{entry_proof(secret, nonce, entry)}"'


class HttpEntryLookup:
    """``GET {url}/node_entry?nonce=N``. Anybody may be there: no key of ours is sent, no redirect followed,
    and with a cluster secret nothing is believed without a proof of it.
    """

    def __init__(self, timing: Timing, cluster_secret: str = "", trust: Trust = SYSTEM_TRUST) -> None:
        self._secret = cluster_secret
        self._trust = trust
        self._timeout = aiohttp.ClientTimeout(total=timing.entry_lookup_s)

    async def __call__(self, url: str) -> NodeEntry:
        nonce = secrets.token_hex(16)
        try:
            async with (
                aiohttp.ClientSession(timeout=self._timeout) as session,
                session.get(
                    f"{url.rstrip('/')}/node_entry",
                    params={"nonce": nonce},
                    allow_redirects=False,
                    ssl=self._trust.of(url) or True,
                ) as response,
            ):
                if response.status != 200:
                    raise NoNodeError(f"{url} does not answer as a node: HTTP {response.status}")
                content = await _read(response)
                proof = _PROOF.fullmatch(response.headers.get("authentication-info", ""))
        except (aiohttp.ClientError, TimeoutError, UnicodeError) as error:  # the last: the host is no name
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise NoNodeError(f"{url} does not answer as a node: {reason}") from error
        if self._secret:
            expected = entry_proof(self._secret, nonce, content)
            if proof is None or not is_same(proof[1], expected):
                raise NoNodeError(
                    f"{url} does not prove this cluster's secret: start it with the same "
                    "--cluster-secret-file (or PDSERVE_CLUSTER_SECRET)"
                )
        try:
            return msgspec.json.decode(content, type=NodeEntry)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise NoNodeError(f"{url} does not answer as a node: {error}") from error


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """At most `_MAX_ENTRY_BYTES`: what goes on behind them is no entry."""
    try:
        return await response.content.readexactly(_MAX_ENTRY_BYTES)
    except asyncio.IncompleteReadError as error:
        return error.partial
