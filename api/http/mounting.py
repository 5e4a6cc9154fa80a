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
class Operation:
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
    operations: Sequence[Operation],
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

    `membership`: who may use membership operations; None: whoever may use the others.

    `answers`: where each is counted, those of this app's middleware too. `is_draining`: whether each is the
    last one of its connection.

    `admit`: asked before a request that generates is read, see `Door`; None where no operation does.

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
    for operation in operations:
        handler = operation.handler
        if operation.who == "member" and membership is not None:
            handler = membership.guard(handler)
            guarded += itertools.product(operation.methods, operation.paths)
        for path in operation.paths:
            for method in operation.methods:
                app.add_api_route(
                    path,
                    handler,
                    methods=[method],
                    response_model=None,
                    responses=operation.bodies.responses(),
                    openapi_extra=operation.bodies.takes(path),
                    include_in_schema=method != "HEAD",
                    tags=operation.tags,
                    name=operation.name or None,
                    description=operation.about or None,
                )
    install_schemas(app, [operation.bodies for operation in operations])
    install_error_handlers(app)
    app.add_middleware(
        Door,
        keys=keys,
        is_loopback=is_loopback,
        admin_paths=_paths(operation for operation in operations if operation.who == "admin"),
        guarded=guarded,
        admit=admit,
        generating_paths=_paths(operation for operation in operations if operation.generates),
    )
    if allowed_origins:  # outside the door: a browser's preflight shows no key, and reads refusals too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    answers.know(_paths(operations))
    app.add_middleware(Gateway, answers=answers, root_path=root_path, is_draining=is_draining)
    return app


def _paths(operations: Iterable[Operation]) -> list[str]:
    return [path for operation in operations for path in operation.paths]
