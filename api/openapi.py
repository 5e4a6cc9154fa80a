"""The OpenAPI page, from the same types that parse and write the bodies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI

from .errors import ErrorBody

_REF = "#/components/schemas/{name}"


@dataclass(frozen=True, slots=True)
class Bodies:
    """What an operation takes and gives as JSON; None where it is free-form or nothing."""

    request: type[msgspec.Struct] | None = None
    answer: type[msgspec.Struct] | None = None
    streams: bool = False  # with ``stream: true``, as server-sent events

    @property
    def types(self) -> list[type[msgspec.Struct]]:
        return [body for body in (self.request, self.answer) if body is not None]

    def request_body(self) -> dict[str, Any]:
        if self.request is None:
            return {}
        return {"requestBody": {"required": True, "content": {"application/json": _schema(self.request)}}}

    def responses(self) -> dict[int | str, dict[str, Any]]:
        content: dict[str, Any] = {}
        if self.answer is not None:
            content["application/json"] = _schema(self.answer)
        if self.streams:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        error = {"description": "Error", "content": {"application/json": _schema(ErrorBody)}}
        success = {"description": "Success", **({"content": content} if content else {})}
        return {200: success, "4XX": error, "5XX": error}


NO_BODIES = Bodies()


def _schema(body: type[msgspec.Struct]) -> dict[str, Any]:
    return {"schema": {"$ref": _REF.format(name=body.__name__)}}


def install_schemas(app: FastAPI, operations: Sequence[Bodies]) -> None:
    """Make the page that FastAPI derives from the routes hold our types."""
    types = dict.fromkeys([ErrorBody, *(body for bodies in operations for body in bodies.types)])
    _, components = msgspec.json.schema_components(types, ref_template=_REF)
    derive = app.openapi

    def openapi() -> dict[str, Any]:
        page = derive()
        page.setdefault("components", {}).setdefault("schemas", {}).update(components)
        return page

    app.openapi = openapi  # type: ignore[method-assign]
