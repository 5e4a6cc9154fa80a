"""/open_session and /close_session. What a turn is: `session_params` of /generate."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import Response

from ..generation import Sessions
from ..http.answers import json_response, outcome
from ..http.bodies import BodyLimits, parse_request, read_object
from ..http.fields import FieldRules, Unsupported
from ..refusals import bad_value
from .native_types import CloseSessionRequest, OpenSessionRequest

_OPEN_RULES = FieldRules(unsupported={"streaming": Unsupported("a turn is sent whole")})
_CLOSE_RULES = FieldRules()
_ID = re.compile(r"[\x21-\x7e]{1,256}")


async def read_close(http: Request, limits: BodyLimits) -> str:
    """The session's id."""
    body = parse_request(await read_object(http, limits), CloseSessionRequest, _CLOSE_RULES)
    return body.session_id


class SessionRoutes:
    def __init__(self, sessions: Sessions, limits: BodyLimits) -> None:
        self._sessions = sessions
        self._limits = limits

    async def open(self, http: Request) -> Response:
        """Answers with the id, a JSON string, as SGLang does."""
        raw = await read_object(http, self._limits, optional=True)
        body = parse_request(raw, OpenSessionRequest, _OPEN_RULES)
        if body.session_id and not _ID.fullmatch(body.session_id):
            raise bad_value(
                "session_id", "`session_id` takes 1 to 256 visible ASCII characters without spaces."
            )
        if body.capacity_of_str_len < 0:
            raise bad_value("capacity_of_str_len", "`capacity_of_str_len` must be 0 or more.")
        if body.timeout is not None and not 0 < body.timeout <= 86_400:
            raise bad_value("timeout", "`timeout` must be above 0 and at most 86400 seconds.")
        return json_response(
            self._sessions.open_session(body.session_id, body.capacity_of_str_len, body.timeout)
        )

    async def close(self, http: Request) -> Response:
        reply = await self._sessions.close_session(await read_close(http, self._limits))
        return outcome(reply.success, reply.message)
