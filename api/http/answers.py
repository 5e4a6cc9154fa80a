"""JSON answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

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
    """A body that is JSON already, in pieces. A large one is sent in parts, as the reader takes them, so that
    its copy on the way to the socket holds nobody up."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        num_bytes = sum(map(len, pieces))
        self._is_large = num_bytes > _PART_BYTES
        super().__init__(b"" if self._is_large else b"".join(pieces), media_type="application/json")
        self.headers["content-length"] = str(num_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._is_large:
            await super().__call__(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for part in _parts(self._pieces):
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0)  # a socket with room for it all would be filled in one go
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _parts(pieces: Sequence[bytes]) -> Iterator[bytes]:
    """The same bytes, about as many at a time as may be sent in one go."""
    held: list[bytes] = []
    num_held = 0
    for piece in pieces:
        for start in range(0, len(piece), _PART_BYTES):
            cut = piece[start : start + _PART_BYTES]
            held.append(cut)
            num_held += len(cut)
            if num_held >= _PART_BYTES:
                yield b"".join(held)
                held, num_held = [], 0
    if held:
        yield b"".join(held)
