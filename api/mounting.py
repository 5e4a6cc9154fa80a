"""Mounts routes with what every surface of pdserve has: request ids, API keys, error bodies, OpenAPI page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fastapi import FastAPI, Request
from starlette.responses import Response

from .errors import install_error_handlers
from .gateway import ApiKeys, RequestIds
from .openapi import NO_BODIES, Bodies, install_schemas
from .version import VERSION

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]

GET = ("GET", "HEAD")
POST = ("POST",)


@dataclass(frozen=True, slots=True)
class Operation:
    """One handler under one or more paths."""

    methods: tuple[str, ...]
    paths: tuple[str, ...]
    handler: Handler
    bodies: Bodies = NO_BODIES


def make_app(operations: Sequence[Operation], *, api_keys: Collection[str]) -> FastAPI:
    app = FastAPI(title="pdserve", version=VERSION, redoc_url=None)
    for operation in operations:
        for path in operation.paths:
            for method in operation.methods:
                app.add_api_route(
                    path,
                    operation.handler,
                    methods=[method],
                    response_model=None,
                    responses=operation.bodies.responses(),
                    openapi_extra=operation.bodies.request_body(),
                    include_in_schema=method != "HEAD",
                )
    install_schemas(app, [operation.bodies for operation in operations])
    install_error_handlers(app)
    app.add_middleware(ApiKeys, keys=api_keys)
    app.add_middleware(RequestIds)
    return app
