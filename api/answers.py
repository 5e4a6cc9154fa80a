"""JSON answers of the control routes."""

from __future__ import annotations

import msgspec
from starlette.responses import Response


def json_response(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def outcome(success: bool, message: str, *, failure_status: int = 400) -> Response:
    """SGLang's form: the outcome in the body, beside its status."""
    status = 200 if success else failure_status
    return json_response({"success": success, "message": message}, status)
