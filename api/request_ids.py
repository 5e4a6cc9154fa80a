"""The ids by which clients, answers and logs know a request."""

from __future__ import annotations

import re
import uuid

# What may stand in a header and in a log line without harm.
_SAFE_ID = re.compile(r"[\x21-\x7e]{1,256}")


def new_request_id() -> str:
    return uuid.uuid4().hex


def is_safe_id(request_id: str) -> bool:
    return _SAFE_ID.fullmatch(request_id) is not None


def bare_id(request_id: str) -> str:
    """Without the prefix that an OpenAI answer's id has."""
    return request_id.removeprefix("cmpl-").removeprefix("chatcmpl-")
