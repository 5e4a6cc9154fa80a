"""JsonResponse: a large body comes whole, in parts, between which others run."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import msgspec
import pytest

from pdserve.api.http.answers import JsonResponse
from pdserve.api.slices import HOLE, filled

MB = 1 << 20


@pytest.mark.parametrize(("num_bytes", "num_parts"), [(0, 1), (MB, 1), (MB + 1, 2), (5 * MB, 6)])
async def test_parts_of_a_body(num_bytes: int, num_parts: int) -> None:
    body = (bytes(range(256)) * (num_bytes // 256 + 1))[:num_bytes]
    sent: list[MutableMapping[str, Any]] = []
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        raise AssertionError("nothing is read")

    running = asyncio.create_task(others())
    await asyncio.sleep(0)
    before = turns
    pieces = [body[: num_bytes // 3], b"", body[num_bytes // 3 :]]
    await JsonResponse(pieces)({"type": "http"}, receive, send)
    running.cancel()
    start, *parts = sent
    assert (start["type"], start["status"]) == ("http.response.start", 200)
    assert (b"content-length", str(num_bytes).encode()) in start["headers"]
    assert len(parts) == num_parts
    assert b"".join(part["body"] for part in parts) == body
    assert [part.get("more_body", False) for part in parts] == [True] * (num_parts - 1) + [False]
    assert turns - before >= num_parts - 1


def test_a_list_is_filled_with_what_is_encoded_already() -> None:
    document = msgspec.json.encode({"choices": [HOLE], "usage": 1})
    for items in ([], [b"1"], [b'{"a":"\\u0000"}', b"[2,3]"]):
        whole = b"".join(filled(document, items))
        assert msgspec.json.decode(whole) == {"choices": list(map(msgspec.json.decode, items)), "usage": 1}
