"""What a row of the table does, whatever its command."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from starlette.requests import Request

from pdserve.api.control.commands import NOTHING, Command, merged, takes
from pdserve.api.generation import AdminReply
from pdserve.api.http.bodies import BodyLimits
from pdserve.runtime.errors import RequestError


class Asked(msgspec.Struct):
    size: int = 1


def request(body: bytes) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


@pytest.mark.parametrize(("failure_status", "status"), [(400, 400), (404, 404), (200, 200)])
@pytest.mark.parametrize("success", [True, False])
async def test_a_command_is_given_what_it_takes_and_reports(
    success: bool, failure_status: int, status: int
) -> None:
    given: list[int] = []

    async def grow(asked: Asked) -> AdminReply:
        given.append(asked.size)
        return AdminReply(success, "told")

    command = Command(
        name="grow", paths=("/grow",), takes=takes(Asked), does=grow, failure_status=failure_status
    )
    answer = await command.route(BodyLimits()).handler(request(b'{"size": 3}'))
    assert given == [3]
    assert answer.status_code == (200 if success else status)
    assert json.loads(bytes(answer.body)) == {"success": success, "message": "told"}


async def test_a_body_that_it_does_not_take_is_refused_before_anything_is_done() -> None:
    async def grow(_: Asked) -> AdminReply:
        raise AssertionError

    handler = (
        Command(name="grow", paths=("/grow",), takes=takes(Asked), does=grow).route(BodyLimits()).handler
    )
    for body in (b"", b"[]", b'{"size": "x"}', b'{"unknown": 1}'):
        with pytest.raises(RequestError):
            await handler(request(body))


async def test_a_command_that_takes_nothing_reads_nothing() -> None:
    async def rest(_: None) -> AdminReply:
        return AdminReply(True)

    handler = Command(name="rest", paths=("/rest",), takes=NOTHING, does=rest).route(BodyLimits()).handler
    assert (await handler(request(b"no JSON"))).status_code == 200


def test_parts_are_done_when_all_are() -> None:
    done, said, failed = AdminReply(True), AdminReply(True, "a"), AdminReply(False, "b")
    assert merged([done, said]) == AdminReply(True, "a")
    assert merged([said, failed, done]) == AdminReply(False, "a; b")
    assert merged([]) == AdminReply(True)
