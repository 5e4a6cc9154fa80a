"""JSON answers of the control routes."""

from __future__ import annotations

import msgspec
from starlette.responses import Response


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """SGLang's form of a control call's answer, well ended or not."""

    success: bool
    message: str


def json_response(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def outcome(success: bool, message: str, *, failure_status: int = 400) -> Response:
    """The outcome in the body, beside its status."""
    return json_response(Outcome(success=success, message=message), 200 if success else failure_status)
