"""The body of a request: read without holding the loop, and taken for one of our types.

Which fields beyond a type's own are ignored, and which refused, is in fields.py.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from ...runtime.errors import RequestError
from ..refusals import unsupported
from ..slices import in_slices
from .fields import FieldRules, tell_ignored
from .json_slices import JSON_BOUNDS, JsonBounds, JsonTooLargeError, decode_slices

S = TypeVar("S", bound=msgspec.Struct)


@dataclass(kw_only=True, slots=True)
class BodyMemory:
    """What the bodies that are being received take together, but for the first `free_bytes` of each: small
    ones come in whoever else sends what."""

    max_bytes: int = 256 << 20
    free_bytes: int = 64 << 10
    held_bytes: int = 0

    def take(self, num_bytes: int) -> None:
        """Raises RequestError when there is no room for so many more."""
        if self.held_bytes + num_bytes > self.max_bytes:
            raise RequestError(
                f"Unfinished bodies fill the {self.max_bytes} bytes that all have together; try again later.",
                status=503,
                code="body_memory_full",
                error_type="service_unavailable",
                retry_after_s=1.0,
            )
        self.held_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self.held_bytes -= num_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class BodyLimits:
    """Bounds of a single request's body, and of all together."""

    memory: BodyMemory = field(default_factory=BodyMemory)
    max_bytes: int = 32 << 20
    json: JsonBounds = JSON_BOUNDS
    strict_fields: bool = False  # unknown fields of generating requests are refused, not ignored


async def read_object(request: Request, limits: BodyLimits, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object that is the body, without holding the loop however large it is.

    A byte order mark before it is ignored (RFC 8259, 8.1); with `optional`, no body is an empty one. Raises
    RequestError: 415 when it is compressed, 413 when there is too much of it, 503 when too much of other
    bodies is here, 400 when it is no object.
    """
    body = await read_body(request, limits)
    if optional and not body:
        return {}
    if body.startswith(codecs.BOM_UTF8):
        del body[: len(codecs.BOM_UTF8)]
    try:
        value = await in_slices(decode_slices(body, limits.json))
    except JsonTooLargeError as error:
        raise _too_large(f"The body has {error}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.", code="invalid_json")
    return value


async def read_body(request: Request, limits: BodyLimits) -> bytearray:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise RequestError(
            f"`Content-Encoding: {encoding}` is not supported: send the body as it is.",
            status=415,
            code="unsupported_content_encoding",
        )
    memory = limits.memory
    body = bytearray()
    num_held = 0
    try:
        async for part in request.stream():
            body += part
            if len(body) > limits.max_bytes:
                raise _too_large(f"The body is larger than {limits.max_bytes} bytes.")
            if (num_more := len(body) - memory.free_bytes - num_held) > 0:
                memory.take(num_more)
                num_held += num_more
        return body
    finally:
        memory.give_back(num_held)


def _too_large(message: str) -> RequestError:
    return RequestError(message, status=413, code="body_too_large")


def parse_request(
    value: Mapping[str, Any], request_type: type[S], rules: FieldRules, *, strict: bool = True
) -> S:
    """`value` as a `request_type`. Raises RequestError that names the field. `strict`: unknown fields are
    refused, also where the rules would have them ignored."""
    own_fields = request_type.__struct_fields__
    given: dict[str, Any] = {}
    for name, content in value.items():
        if content is None:
            continue
        if name in own_fields and name not in rules.hidden:
            given[name] = _without_nulls(content)
        elif (known := rules.unsupported.get(name)) is not None:
            if content not in known.inert:
                raise unsupported(name, known.reason)
        elif name not in rules.harmless:
            if strict or rules.refuse_unknown:
                raise unsupported(name, "unknown field")
            tell_ignored(name)
    try:
        return msgspec.convert(given, request_type)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None


def _without_nulls(content: Any) -> Any:  # noqa: ANN401 (any JSON)
    """Nulls inside option objects mean defaults, too; a list's nulls are left for the type check."""
    if isinstance(content, dict):
        return {name: inner for name, inner in content.items() if inner is not None}
    return content


_BOUND = re.compile(r"^Expected `[^`]+` (?:<=|>=|<|>|of length|matching|that's) ")


def _invalid(message: str) -> RequestError:
    """From msgspec's ``Expected `int`, got `str` - at `$.stop[0]```; a bound has no "got"."""
    missing = re.search(r"missing required field `(\w+)`", message)
    if missing:
        return RequestError(f"`{missing[1]}` is required.", param=missing[1], code="missing_parameter")
    what, _, path = message.partition(" - at `")
    what = re.sub(r"matching regex .*", "without NUL characters", what)  # all that bodies have patterns for
    param = path.rstrip("`").removeprefix("$").removeprefix(".") or None
    code = "invalid_value" if _BOUND.search(message) else "invalid_type"
    return RequestError(f"`{param}`: {what}." if param else f"{what}.", param=param, code=code)
