"""Which node answers at a URL."""

from __future__ import annotations

from typing import Protocol

import aiohttp
import msgspec

from ..messages.node import NodeEntry
from ..runtime.tls import SYSTEM_TRUST, Trust


class EntryLookup(Protocol):
    """Asks a URL which node it is; None when it does not answer, or not as a node."""

    async def __call__(self, url: str) -> NodeEntry | None: ...


class _ServerInfo(msgspec.Struct):
    """The part of a node's /server_info that is read here."""

    entry: NodeEntry


class HttpEntryLookup:
    """``GET {url}/server_info``, whose answer holds the node's ``entry``."""

    def __init__(self, api_key: str = "", trust: Trust = SYSTEM_TRUST, timeout_s: float = 2.0) -> None:
        self._trust = trust
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def __call__(self, url: str) -> NodeEntry | None:
        try:
            async with (
                aiohttp.ClientSession(headers=self._headers, timeout=self._timeout) as session,
                session.get(f"{url.rstrip('/')}/server_info", ssl=self._trust.of(url) or True) as response,
            ):
                if response.status != 200:
                    return None
                return msgspec.json.decode(await response.read(), type=_ServerInfo).entry
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError):
            return None
        except UnicodeError:  # the host is no name
            return None
