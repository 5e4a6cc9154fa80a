"""What every HTTP request passes first, and what every answer is given on its way out."""

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
from .answer_counts import HttpAnswers
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


class Gateway:
    """Gives each request its id and moment, and each answer the id; counts it when its status is known.

    ``request.state.request_id``: the client's X-Request-ID or a new one. ``request.state.received_s``: when
    the request came, monotonic seconds.

    `root_path`: under which a proxy shows this server, whether or not the proxy takes it off.
    `is_draining`: then each answer is the last one of its connection, and says so.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        answers: HttpAnswers,
        root_path: str = "",
        is_draining: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app = app
        self._answers = answers
        self._root_path = root_path
        self._is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = _header(scope, b"x-request-id")
        request_id = given if is_safe_id(given) else new_request_id()
        scope.setdefault("state", {}).update(request_id=request_id, received_s=time.monotonic())
        if self._root_path:
            scope = self._rooted(scope)
        method, path = scope["method"], route_path(scope)
        is_answered = False

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                is_answered = True
                self._answers.count(path, method, message["status"])
                headers = [*message["headers"], (b"x-request-id", request_id.encode())]
                if self._is_draining():
                    headers.append((b"connection", b"close"))
                message["headers"] = headers
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except Exception:
            if not is_answered:  # no handler has turned it into an answer
                self._answers.count(path, method, 500)
            raise

    def _rooted(self, scope: Scope) -> Scope:
        path = scope["path"]
        if not path.startswith(f"{self._root_path}/"):
            path = self._root_path + path  # what ASGI calls the path holds the root path
        return {**scope, "root_path": self._root_path, "path": path}


class Door:
    """Lets requests in, or tells them why not, before their bodies are read and a route is looked for.

    ``Authorization: Bearer KEY`` on everything but the open paths; without keys, no check.
    ``request.state.client``: the key, where it was checked.

    Admin paths take the admin key alone, which opens the others too. Without an admin key they are ordinary
    paths for whom only this host can reach, and closed for everyone else. `guarded`: (method, path) of what
    is guarded otherwise.

    `admit`: asked about each request that wants tokens (`generating_paths`), with the key that its client
    has shown; most of what comes under overload is refused, which must cost little. Raises RequestError.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: AccessKeys,
        is_loopback: bool,
        admin_paths: Collection[str],
        guarded: Sequence[tuple[str, str]] = (),
        admit: Callable[[str], None] | None = None,
        generating_paths: Collection[str] = (),
    ) -> None:
        self._app = app
        self._keys = keys
        self._is_loopback = is_loopback
        self._admin_paths = frozenset(admin_paths)
        self._guarded = [(method, compile_path(path)[0]) for method, path in guarded]
        self._admit = admit
        self._generating_paths = frozenset(generating_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = route_path(scope)
            try:
                self._check_key(scope, path)
                if self._admit is not None and path in self._generating_paths:
                    self._admit(scope["state"].get("client", ""))
            except RequestError as refusal:
                await error_response(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_key(self, scope: Scope, path: str) -> None:
        if path in OPEN_PATHS or path.startswith(f"{DOCS_FILES}/"):
            return
        if any(method == scope["method"] and pattern.match(path) for method, pattern in self._guarded):
            return
        given = bearer(scope)
        if self._keys.admin and is_same(given, self._keys.admin):
            return
        if path in self._admin_paths:
            if self._keys.admin:
                raise _unauthorized("The admin API key is needed", "invalid_admin_api_key")
            if not self._is_loopback:
                raise RequestError(
                    f"{path} is an admin route and others than this host can reach it: start the server with "
                    "--admin-api-key, or bind it to loopback.",
                    status=403,
                    code="admin_api_key_not_set",
                    error_type="permission_error",
                )
        if self._keys.api:
            if not any(is_same(given, known) for known in self._keys.api):
                raise _unauthorized("A valid API key is needed", "invalid_api_key")
            scope["state"]["client"] = given


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
