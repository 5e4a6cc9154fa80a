"""Conversations that a cluster keeps are opened and closed here. A turn is `session_params` of /generate."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ...messages.bounds import Count, Name
from ..generation import AdminReply, Sessions
from ..http.answers import json_response
from ..http.bodies import BodyLimits, parse_request, read_object
from ..http.fields import FieldRules, Unsupported
from ..http.mounting import POST, Route
from ..http.openapi import Bodies
from ..refusals import bad_value
from .commands import Command, takes

_OPEN_RULES = FieldRules(unsupported={"streaming": Unsupported("a turn is sent whole")})
_ID = re.compile(r"[\x21-\x7e]{1,256}")


class OpenSessionRequest(msgspec.Struct, kw_only=True):
    capacity_of_str_len: Count = 0  # the most tokens that it keeps; 0: as many as any
    session_id: Name = ""  # default: a new one
    timeout: float | None = None  # seconds that it may be idle; default: --session-timeout


class CloseSessionRequest(msgspec.Struct, kw_only=True):
    session_id: Name


def open_session(sessions: Sessions, limits: BodyLimits) -> Route:
    """Answers with the id, a JSON string, as SGLang does."""

    async def handle(http: Request) -> Response:
        raw = await read_object(http, limits, optional=True)
        asked = parse_request(raw, OpenSessionRequest, _OPEN_RULES)
        if asked.session_id and not _ID.fullmatch(asked.session_id):
            raise bad_value(
                "session_id", "`session_id` takes 1 to 256 visible ASCII characters without spaces."
            )
        if asked.capacity_of_str_len < 0:
            raise bad_value("capacity_of_str_len", "`capacity_of_str_len` must be 0 or more.")
        if asked.timeout is not None and not 0 < asked.timeout <= 86_400:
            raise bad_value("timeout", "`timeout` must be above 0 and at most 86400 seconds.")
        return json_response(
            sessions.open_session(asked.session_id, asked.capacity_of_str_len, asked.timeout)
        )

    return Route(
        POST,
        ("/open_session",),
        handle,
        Bodies(OpenSessionRequest),
        name="open",
        about="Answers with the id, a JSON string, as SGLang does.",
    )


def close_session(close: Callable[[str], Awaitable[AdminReply]]) -> Command[CloseSessionRequest]:
    """`close`: what is done for the session of this id."""

    async def does(asked: CloseSessionRequest) -> AdminReply:
        return await close(asked.session_id)

    return Command(
        name="close", paths=("/close_session",), takes=takes(CloseSessionRequest), does=does, who="client"
    )
