"""What every HTTP request passes first: its id, and the API key."""

from __future__ import annotations

import hmac
import time
from collections.abc import Collection, MutableMapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from ..runtime.errors import RequestError
from .errors import error_response
from .in_flight import is_safe_id, new_request_id

# Probes, scrapers and readers of the interface need no key.
OPEN_PATHS = frozenset(
    {
        "/health",
        "/ready",
        "/readiness",
        "/live",
        "/liveness",
        "/ping",
        "/metrics",
        "/version",
        "/openapi.json",
        "/docs",
    }
)


class RequestIds:
    """``request.state.request_id``: the client's X-Request-ID or a new one. Every answer repeats it.

    ``request.state.received_s``: when the request came, monotonic seconds.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = _header(scope, b"x-request-id")
        request_id = given if is_safe_id(given) else new_request_id()
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["received_s"] = time.monotonic()

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        await self._app(scope, receive, send_with_id)


class ApiKeys:
    """``Authorization: Bearer KEY`` on everything but the open paths; without keys, no check."""

    def __init__(self, app: ASGIApp, keys: Collection[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"] not in OPEN_PATHS:
            scheme, _, key = _header(scope, b"authorization").partition(" ")
            given = key.strip().encode()
            is_known = any(hmac.compare_digest(given, known) for known in self._keys)
            if scheme.lower() != "bearer" or not is_known:
                refusal = RequestError(
                    "A valid API key is needed: `Authorization: Bearer KEY`.",
                    status=401,
                    code="invalid_api_key",
                    error_type="authentication_error",
                )
                await error_response(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _header(scope: Scope, wanted: bytes) -> str:
    for name, value in scope["headers"]:
        if name == wanted:
            return str(value, "latin-1")
    return ""
