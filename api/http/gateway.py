"""What every HTTP request passes first: its id, and the API key."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, MutableMapping, Sequence
from typing import Any

from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from ...runtime.cluster_proof import is_same
from ...runtime.errors import RequestError
from ...runtime.process import AccessKeys
from ..request_ids import is_safe_id, new_request_id
from .errors import error_response

# Probes, scrapers and readers of the interface need no key; nor do routers that ask who is there, which show
# none to a URL that they were told.
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
        "/node_entry",
    }
)
DOCS_FILES = "/docs/files"  # scripts and styles of that page: ours, so that it needs no other host


class RootPath:
    """The path under which a proxy shows this server, whether or not the proxy takes it off."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            if not path.startswith(f"{self._root_path}/"):
                path = self._root_path + path  # what ASGI calls the path holds the root path
            scope = {**scope, "root_path": self._root_path, "path": path}
        await self._app(scope, receive, send)


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
    """``Authorization: Bearer KEY`` on everything but the open paths; without keys, no check.

    ``request.state.client``: the key, where it was checked.

    Admin paths take the admin key alone, which opens the others too. Without an admin key they are ordinary
    paths for whom only this host can reach, and closed for everyone else.

    `guarded`: (method, path) of what is guarded otherwise.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: AccessKeys,
        admin_paths: Collection[str],
        is_loopback: bool,
        guarded: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._app = app
        self._keys = keys
        self._admin_paths = frozenset(admin_paths)
        self._is_loopback = is_loopback
        self._guarded = [(method, compile_path(path)[0]) for method, path in guarded]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (self._app if refusal is None else error_response(refusal))(scope, receive, send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        path = route_path(scope)
        if path in OPEN_PATHS or path.startswith(f"{DOCS_FILES}/"):
            return None
        if any(method == scope["method"] and pattern.match(path) for method, pattern in self._guarded):
            return None
        given = bearer(scope)
        if self._keys.admin and is_same(given, self._keys.admin):
            return None
        if path in self._admin_paths:
            if self._keys.admin:
                return _unauthorized("The admin API key is needed", "invalid_admin_api_key")
            if not self._is_loopback:
                return RequestError(
                    f"{path} is an admin route and others than this host can reach it: start the server with "
                    "--admin-api-key, or bind it to loopback.",
                    status=403,
                    code="admin_api_key_not_set",
                    error_type="permission_error",
                )
        if self._keys.api and not any(is_same(given, known) for known in self._keys.api):
            return _unauthorized("A valid API key is needed", "invalid_api_key")
        if self._keys.api:
            scope.setdefault("state", {})["client"] = given
        return None


class Door:
    """Requests that ask for tokens come in here or are told when to come again, before their bodies are read.

    It stands outside of the routes, because most of what comes under overload is refused, which must cost
    little. `admit` gets the key that a client showed and raises RequestError.
    """

    def __init__(self, app: ASGIApp, admit: Callable[[str], None], paths: Collection[str]) -> None:
        self._app = app
        self._admit = admit
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and route_path(scope) in self._paths:
            try:
                self._admit(scope["state"].get("client", ""))
            except RequestError as refusal:
                await error_response(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def route_path(scope: Scope) -> str:
    """The path that routes are looked up by."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _unauthorized(what: str, code: str) -> RequestError:
    return RequestError(
        f"{what}: `Authorization: Bearer KEY`.",
        status=401,
        code=code,
        error_type="authentication_error",
    )


def bearer(scope: Scope) -> str:
    """The key that the request shows; empty if none."""
    scheme, _, key = _header(scope, b"authorization").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _header(scope: Scope, wanted: bytes) -> str:
    for name, value in scope["headers"]:
        if name == wanted:
            return str(value, "latin-1")
    return ""
