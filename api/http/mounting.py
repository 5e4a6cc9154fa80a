"""Mounts routes with what every surface of pdserve has: request ids, API keys, error bodies, OpenAPI page."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypeAlias

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from ...runtime.process import AccessKeys
from ...runtime.version import VERSION
from .answer_counts import HttpAnswers
from .errors import install_error_handlers
from .gateway import DOCS_FILES, Door, Gateway
from .membership_guard import Handler, MembershipGuard
from .openapi import NO_BODIES, Bodies, install_schemas

GET = ("GET", "HEAD")
POST = ("POST",)


# Who may: with a key, where keys are set; the admin, for what changes or ends what others do; or who may say
# which nodes belong to the cluster.
Who: TypeAlias = Literal["client", "admin", "member"]


@dataclass(frozen=True, slots=True)
class Route:
    """One handler under one or more paths."""

    methods: tuple[str, ...]
    paths: tuple[str, ...]
    handler: Handler
    bodies: Bodies = NO_BODIES
    who: Who = "client"
    generates: bool = False  # asks for tokens
    name: str = ""  # on the interface's page; empty: the handler's
    about: str = ""  # likewise

    @property
    def tags(self) -> list[str | Enum] | None:
        """Of the interface's page."""
        match self.who:
            case "client":
                return None
            case "admin":
                return ["admin"]
            case "member":
                return ["membership"]


def make_app(
    routes: Sequence[Route],
    *,
    keys: AccessKeys,
    is_loopback: bool,
    answers: HttpAnswers,
    admit: Callable[[str], None] | None = None,
    root_path: str = "",
    allowed_origins: Sequence[str] = (),
    membership: MembershipGuard | None = None,
    is_draining: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """`is_loopback`: only this host can reach it, so the admin routes need no key of their own.

    `membership`: who may use membership routes; None: whoever may use the others.

    `answers`: where each is counted, those of this app's middleware too. `is_draining`: whether each is the
    last one of its connection.

    `admit`: asked before a request that generates is read, see `Door`; None where no route does.

    `root_path`: where a proxy in front shows it, such as ``/llm``. `allowed_origins`: web pages of these
    origins may ask, ``*`` for any (https://fetch.spec.whatwg.org/#http-cors-protocol).
    """
    app = FastAPIOffline(
        title="pdserve",
        version=VERSION,
        redoc_url=None,
        static_url=DOCS_FILES,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # ours are told by the services
    )
    guarded: list[tuple[str, str]] = []
    for route in routes:
        handler = route.handler
        if route.who == "member" and membership is not None:
            handler = membership.guard(handler)
            guarded += itertools.product(route.methods, route.paths)
        for path in route.paths:
            for method in route.methods:
                app.add_api_route(
                    path,
                    handler,
                    methods=[method],
                    response_model=None,
                    responses=route.bodies.responses(),
                    openapi_extra=route.bodies.takes(path),
                    include_in_schema=method != "HEAD",
                    tags=route.tags,
                    name=route.name or None,
                    description=route.about or None,
                )
    install_schemas(app, [route.bodies for route in routes])
    install_error_handlers(app)
    app.add_middleware(
        Door,
        keys=keys,
        is_loopback=is_loopback,
        admin_paths=_paths(route for route in routes if route.who == "admin"),
        guarded=guarded,
        admit=admit,
        generating_paths=_paths(route for route in routes if route.generates),
    )
    if allowed_origins:  # outside the door: a browser's preflight shows no key, and reads refusals too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    answers.know(_paths(routes))
    app.add_middleware(Gateway, answers=answers, root_path=root_path, is_draining=is_draining)
    return app


def _paths(routes: Iterable[Route]) -> list[str]:
    return [path for route in routes for path in route.paths]
