"""What only a process of the cluster may ask a router, as `MembershipGuard` lets it in."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

import aiohttp
import msgspec

from ..api.http.membership_guard import offered_nonce, proof_header
from ..runtime.process import AccessKeys
from ..runtime.tls import SYSTEM_TRUST, Trust

_MAX_SHOWN = 300  # characters of an answer that is not ours


@dataclass(frozen=True, slots=True)
class RouterAnswer:
    status: int
    content: bytes

    @property
    def problem(self) -> str:
        """Why the router said no, on one line; empty when it did not."""
        if 200 <= self.status < 300:
            return ""
        try:
            refusal = msgspec.json.decode(self.content, type=_Refusal)
            message = refusal.message if refusal.error is None else refusal.error.message
        except (msgspec.DecodeError, UnicodeDecodeError):
            message = " ".join(self.content.decode(errors="replace").split())[:_MAX_SHOWN]
        return f"{self.status}: {message}"


class _ErrorMessage(msgspec.Struct):
    message: str


class _Refusal(msgspec.Struct):
    """An error, or what a control call could not do."""

    error: _ErrorMessage | None = None
    message: str = ""


class MemberCalls:
    """Calls to one router, one at a time. With a cluster secret each has a proof of it, and no key; without
    one our own key for the router, if there is one."""

    def __init__(
        self, session: aiohttp.ClientSession, router: str, keys: AccessKeys, trust: Trust = SYSTEM_TRUST
    ) -> None:
        self._session = session
        self._router = router.rstrip("/")
        self._tls = trust.of(router) or True
        self._secret = keys.cluster_secret
        self._key = keys.admin or keys.first
        self._nonce = ""  # of the router, for the next call

    async def ask(self, method: str, path: str, body: bytes = b"") -> RouterAnswer:
        """`path`: not quoted. Raises aiohttp.ClientError, TimeoutError."""
        answer = await self._send(method, path, body)
        if answer.status == 401 and self._secret and self._nonce:  # we had none, or it was too old
            answer = await self._send(method, path, body)
        return answer

    async def _send(self, method: str, path: str, body: bytes) -> RouterAnswer:
        headers = {"content-type": "application/json"}
        if self._secret and self._nonce:
            headers["authorization"] = proof_header(self._secret, self._nonce, method, path, body)
        elif self._key and not self._secret:
            headers["authorization"] = f"Bearer {self._key}"
        url = f"{self._router}/{quote(path.removeprefix('/'), safe='/')}"
        self._nonce = ""
        async with self._session.request(
            method, url, data=body, headers=headers, allow_redirects=False, ssl=self._tls
        ) as answer:
            self._nonce = offered_nonce(answer.headers)
            return RouterAnswer(answer.status, await answer.read())
