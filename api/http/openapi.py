"""The OpenAPI page, from the same types that parse and write the bodies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI

from .answers import Outcome
from .errors import ErrorBody

_REF = "#/components/schemas/{name}"
_PATH_PARAMETER = re.compile(
    r"\{(\w+)(?::\w+)?\}"
)  # FastAPI derives them from handlers' signatures: ours have none


@dataclass(frozen=True, slots=True)
class Bodies:
    """What a route takes and gives as JSON; None where it is free-form or nothing.

    `refusal`: what a call that could not be done may answer in place of an ErrorBody. `batches`: a list of
    requests' inputs gives a list of answers.
    """

    request: type[msgspec.Struct] | None = None
    answer: type[msgspec.Struct] | None = None
    refusal: type[msgspec.Struct] | None = None
    streams: bool = False  # with ``stream: true``, as server-sent events
    batches: bool = False
    media_type: str = ""  # of an answer that is no JSON

    @property
    def types(self) -> list[type[msgspec.Struct]]:
        return [body for body in (self.request, self.answer, self.refusal) if body is not None]

    def takes(self, path: str) -> dict[str, Any]:
        """What a route under `path` is given, as OpenAPI says it: the path's parameters and the body."""
        given: dict[str, Any] = {}
        if names := _PATH_PARAMETER.findall(path):
            given["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ]
        if self.request is not None:
            content = {"application/json": _schema(self.request)}
            given["requestBody"] = {"required": True, "content": content}
        return given

    def responses(self) -> dict[int | str, dict[str, Any]]:
        content: dict[str, Any] = {}
        if self.answer is not None:
            content["application/json"] = _schema(self.answer, as_list_too=self.batches)
        if self.streams:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        if self.media_type:
            content[self.media_type] = {"schema": {"type": "string"}}
        success = {"description": "Success", **({"content": content} if content else {})}
        refused = [ErrorBody] if self.refusal is None else [ErrorBody, self.refusal]
        refusal = {"description": "Refused", "content": {"application/json": _schema(*refused)}}
        failure = {"description": "Failed", "content": {"application/json": _schema(ErrorBody)}}
        return {200: success, "4XX": refusal, "5XX": failure}


NO_BODIES = Bodies()


def reports(request: type[msgspec.Struct] | None = None, answer: type[msgspec.Struct] = Outcome) -> Bodies:
    """Of a control call, whose `answer` tells whether it was done, also with an error's status."""
    return Bodies(request, answer, refusal=answer)


def _schema(*bodies: type[msgspec.Struct], as_list_too: bool = False) -> dict[str, Any]:
    schemas: list[dict[str, Any]] = [{"$ref": _REF.format(name=body.__name__)} for body in bodies]
    if as_list_too:
        schemas += [{"type": "array", "items": schema} for schema in schemas]
    return {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}


def install_schemas(app: FastAPI, bodies: Sequence[Bodies]) -> None:
    """Make the page that FastAPI derives from the routes hold our types."""
    types = dict.fromkeys([ErrorBody, *(body for each in bodies for body in each.types)])
    _, components = msgspec.json.schema_components(types, ref_template=_REF)
    derive = app.openapi

    def openapi() -> dict[str, Any]:
        page = derive()
        page.setdefault("components", {}).setdefault("schemas", {}).update(components)
        return page

    app.openapi = openapi  # type: ignore[method-assign]
