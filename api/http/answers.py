"""JSON answers."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_PART_BYTES = 1 << 20


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """SGLang's form of a control call's answer, well ended or not."""

    success: bool
    message: str


def json_response(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def outcome(success: bool, message: str, *, failure_status: int = 400) -> Response:
    """The outcome in the body, beside its status."""
    return json_response(Outcome(success=success, message=message), 200 if success else failure_status)


class JsonResponse(Response):
    """A body that is JSON already, of any size: sent in parts, as the reader takes them, so that its copy on
    the way to the socket holds nobody up."""

    def __init__(self, body: bytes) -> None:
        super().__init__(body, media_type="application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytes(self.body)
        if len(body) <= _PART_BYTES:
            await super().__call__(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(body), _PART_BYTES):
            part, more = body[start : start + _PART_BYTES], start + _PART_BYTES < len(body)
            await send({"type": "http.response.body", "body": part, "more_body": more})
            await asyncio.sleep(0)  # a socket with room for it all would be filled in one go
