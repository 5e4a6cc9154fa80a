"""Who may change which nodes belong to the cluster: register one, renew its lease, remove one.

The scheme is HTTP's own (RFC 9110, 11). An answer of 401 has ``WWW-Authenticate: Cluster-Secret nonce="N"``;
the request is sent again with ``Authorization: Cluster-Secret nonce="N", proof="P"``; and what succeeds has
the next nonce in ``Authentication-Info: nextnonce="N"``, so that a renewal takes one trip.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias, assert_never

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive

from ...runtime.cluster_proof import RequestProofs, is_same, request_proof
from ...runtime.errors import RequestError
from ...runtime.listen import is_loopback_address
from ...runtime.process import AccessKeys
from ...runtime.timing import Timing
from .bodies import BodyLimits, read_body
from .errors import error_response
from .gateway import bearer, route_path

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]

_SCHEME = "Cluster-Secret"
_CREDENTIALS = re.compile(rf'{_SCHEME} nonce="([\w=-]+)", proof="([0-9a-f]+)"', re.ASCII | re.IGNORECASE)
_CHALLENGE = re.compile(rf'{_SCHEME} nonce="([\w=-]+)"', re.ASCII | re.IGNORECASE)
_NEXT_NONCE = re.compile(r'nextnonce="([\w=-]+)"', re.ASCII)
_BODY_LIMITS = BodyLimits(max_bytes=1 << 16)  # a registration is far smaller
# Who sends one of these speaks for somebody else, who may be anywhere: a web page, a proxy's client.
_ON_BEHALF = ("origin", "forwarded", "x-forwarded-for", "via")
_SAME_SECRET = "--cluster-secret-file FILE (or PDSERVE_CLUSTER_SECRET)"


def proof_header(secret: str, nonce: str, method: str, path: str, body: bytes) -> str:
    """The value of ``Authorization`` that answers a router's nonce."""
    return f'{_SCHEME} nonce="{nonce}", proof="{request_proof(secret, nonce, method, path, body)}"'


def offered_nonce(headers: Mapping[str, str]) -> str:
    """The nonce for the next request, from an answer's headers; empty if it has none."""
    found = _NEXT_NONCE.search(headers.get("authentication-info", "")) or _CHALLENGE.search(
        headers.get("www-authenticate", "")
    )
    return "" if found is None else found[1]


class MembershipGuard:
    """The admin key opens it, or a proof of the cluster secret; where there is neither secret nor key,
    whoever is on this host may pass."""

    def __init__(self, keys: AccessKeys, timing: Timing, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._clock = clock
        self._proofs = (
            RequestProofs(keys.cluster_secret, life_s=timing.nonce_life_s) if keys.cluster_secret else None
        )

    def guard(self, handler: Handler) -> Handler:
        @functools.wraps(handler)  # its name is what the interface's page shows
        async def guarded(http: Request) -> Response:
            body = bytes(await read_body(http, _BODY_LIMITS))
            refusal = self._refusal(http, body)
            if refusal is None:
                answer = await handler(Request(http.scope, _of(body)))
            else:
                answer = error_response(refusal)
            if self._proofs is not None:
                nonce = self._proofs.nonce(self._clock())
                if refusal is None:
                    answer.headers["authentication-info"] = f'nextnonce="{nonce}"'
                elif refusal.status == 401:
                    answer.headers["www-authenticate"] = f'{_SCHEME} nonce="{nonce}", Bearer'
            return answer

        return guarded

    def _refusal(self, http: Request, body: bytes) -> RequestError | None:
        if self._keys.admin and is_same(bearer(http.scope), self._keys.admin):
            return None
        if self._proofs is not None:
            return self._refusal_of_proof(http, body, self._proofs)
        if self._keys.api or self._keys.admin:
            return _not_ours(
                "Nodes are registered and removed with the admin API key, or by themselves where all "
                f"processes of the cluster are started with the same {_SAME_SECRET}."
            )
        if _is_of_this_host(http):
            return None
        return _not_ours(
            "Without a cluster secret only processes of this host may register and remove nodes: start all "
            f"processes of the cluster with the same {_SAME_SECRET}.",
            status=403,
        )

    def _refusal_of_proof(self, http: Request, body: bytes, proofs: RequestProofs) -> RequestError | None:
        given = _CREDENTIALS.fullmatch(http.headers.get("authorization", ""))
        if given is None:
            return _not_ours(
                "Nodes are registered and removed with a proof of this router's cluster secret: start the "
                f"node with the same {_SAME_SECRET}; or show the admin API key."
            )
        nonce, proof = given.groups()
        path = route_path(http.scope)
        match proofs.judge(nonce, proof, http.method, path, body, self._clock()):
            case "proven":
                return None
            case "stale":
                return _not_ours(
                    "This nonce was used before, or is too old: prove it with the one given here."
                )
            case "wrong":
                return _not_ours(
                    "This is no proof of this router's cluster secret: start both with the same "
                    f"{_SAME_SECRET}."
                )
            case "busy":
                return _not_ours("Too many registrations of late.", status=503)
            case never:
                assert_never(never)


def _of(body: bytes) -> Receive:
    """A body that was read, to be read once more."""

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _is_of_this_host(http: Request) -> bool:
    if http.client is None or any(name in http.headers for name in _ON_BEHALF):
        return False
    return is_loopback_address(http.client.host)


def _not_ours(message: str, status: int = 401) -> RequestError:
    return RequestError(message, status=status, code="not_of_this_cluster", error_type="authentication_error")
