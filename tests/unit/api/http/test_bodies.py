from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
import pytest
from starlette.requests import Request

from pdserve.api.http.bodies import BodyLimits, BodyMemory, parse_request, read_body
from pdserve.api.http.fields import TOKEN_RULES
from pdserve.runtime.errors import RequestError


class _Bounded(msgspec.Struct):
    steps: Annotated[int, msgspec.Meta(ge=1, le=9)] = 1
    path: Annotated[str, msgspec.Meta(max_length=3, pattern="^[^\\0]*$")] = ""


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"steps": 0}, "invalid_value"),
        ({"steps": 10}, "invalid_value"),
        ({"path": "long"}, "invalid_value"),
        ({"path": "\0"}, "invalid_value"),
        ({"steps": "1"}, "invalid_type"),
        ({"path": 1}, "invalid_type"),
    ],
)
def test_a_value_beyond_its_bound_is_no_wrong_type(body: dict[str, object], code: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_request(body, _Bounded, TOKEN_RULES)
    assert refused.value.code == code


# ---- bodies -----------------------------------------------------------------------------------------------


class Sender:
    """A client that sends a body piece by piece, and reads what becomes of it."""

    def __init__(self, limits: BodyLimits) -> None:
        self._pieces: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        request = Request({"type": "http", "headers": []}, self._pieces.get)
        self.reading = asyncio.create_task(read_body(request, limits))

    async def send(self, piece: bytes, *, is_last: bool = False) -> None:
        self._pieces.put_nowait({"type": "http.request", "body": piece, "more_body": not is_last})
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_unfinished_bodies_have_a_bound_together_and_small_ones_always_fit() -> None:
    memory = BodyMemory(max_bytes=100, free_bytes=10)
    limits = BodyLimits(memory=memory)
    first, second = Sender(limits), Sender(limits)
    await first.send(b"x" * 70)
    assert memory.held_bytes == 60
    await second.send(b"x" * 50)
    assert memory.held_bytes == 100
    third = Sender(limits)
    await third.send(b"x" * 10)
    await third.send(b"x")
    with pytest.raises(RequestError) as refused:
        await third.reading
    assert (refused.value.status, refused.value.code) == (503, "body_memory_full")
    small = Sender(limits)
    await small.send(b"x" * 10, is_last=True)
    assert await small.reading == b"x" * 10
    await second.send(b"", is_last=True)
    assert await second.reading == b"x" * 50
    assert memory.held_bytes == 60
    first.reading.cancel()  # its client left
    await asyncio.wait({first.reading})
    assert memory.held_bytes == 0
