"""What comes to ``/update_weights_from_tensor``: a safetensors file, or, where it is allowed, SGLang's JSON.

A safetensors file holds numbers and nothing that runs, and is passed on as it comes. SGLang's JSON holds a
pickle, which is read as `pickled_tensors` does it, whole.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

import msgspec
from starlette.requests import Request

from ...messages.bounds import MAX_NAME_CHARS, Name
from ...runtime.errors import RequestError
from ..http.bodies import BodyLimits, parse_request, read_object
from ..http.fields import FieldRules
from ..refusals import bad_value
from .pickled_tensors import UnreadablePickleError, read_pickled_tensors

_MAX_HEADER_BYTES = 100_000_000  # as safetensors itself says
_FLAGS = {"": True, "1": True, "true": True, "0": False, "false": False}
_FORMAT = (
    "The body is the bytes of a safetensors file, of content type application/octet-stream; `weight_version` "
    "goes in the query. Pickled tensors are not read. Two lines instead of them: "
    "`file = safetensors.torch.save({name: t.cpu().contiguous() for name, t in named_tensors})` and "
    '`requests.post(url, data=file, headers={"Content-Type": "application/octet-stream"})`.'
)
_OR_FLAG = " (A router with --allow-pickled-tensors reads pickles of plain CPU tensors.)"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorUpdate:
    """`body`: a safetensors file with some of the model's tensors, or all."""

    body: AsyncIterator[bytes]
    weight_version: str | None
    mode: str  # as the client names it
    abort_all_requests: bool
    force: bool


class _PickledRequest(msgspec.Struct, kw_only=True):
    """SGLang's. It has an entry for each of its ranks, which all hold the same where tensors are whole."""

    serialized_named_tensors: list[str]  # pickles, in base64
    load_format: Literal["direct", "flattened_bucket"] | None = None  # the pickle itself tells
    weight_version: Name | None = None
    mode: str = "wait"
    abort_all_requests: bool = False
    force: bool = False


async def read_tensor_update(
    http: Request, limits: BodyLimits, rules: FieldRules, *, allows_pickles: bool
) -> TensorUpdate:
    """`rules`: of the JSON's fields beyond our own. Raises RequestError for what is neither form."""
    if not http.headers.get("content-type", "").startswith("application/json"):
        return TensorUpdate(
            weight_version=_weight_version(http),
            body=await _checked(http.stream()),
            mode=http.query_params.get("mode", "wait"),
            abort_all_requests=_flag(http, "abort_all_requests"),
            force=_flag(http, "force"),
        )
    if not allows_pickles:
        raise RequestError(_FORMAT + _OR_FLAG, code="not_safetensors")
    body = parse_request(await read_object(http, limits), _PickledRequest, rules)
    return TensorUpdate(
        body=_chained(await _unpickled(body.serialized_named_tensors)),
        weight_version=body.weight_version,
        mode=body.mode,
        abort_all_requests=body.abort_all_requests,
        force=body.force,
    )


async def _unpickled(serialized: list[str]) -> bytes:
    name = "serialized_named_tensors"
    if len(set(serialized)) != 1:
        raise bad_value(name, f"`{name}` must be one pickle of whole tensors, or the same for each rank.")
    try:
        payload = base64.b64decode(serialized[0], validate=True)
    except binascii.Error:
        raise bad_value(name, f"`{name}` must be in base64.") from None
    try:
        return await asyncio.to_thread(read_pickled_tensors, payload)
    except UnreadablePickleError as error:
        raise bad_value(name, f"`{name}` is refused: {error}. {_FORMAT}") from None


def _weight_version(http: Request) -> str | None:
    weight_version = http.query_params.get("weight_version") or None
    if weight_version and ("\0" in weight_version or len(weight_version) > MAX_NAME_CHARS):
        raise bad_value(
            "weight_version", f"`weight_version` takes {MAX_NAME_CHARS} characters at most, and no NUL."
        )
    return weight_version


def _flag(http: Request, name: str) -> bool:
    text = http.query_params.get(name, "false").lower()
    if text not in _FLAGS:
        raise bad_value(name, f"`{name}` must be true or false, got {text!r}.")
    return _FLAGS[text]


async def _checked(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes, once they begin as a safetensors file does: 8 bytes that count a JSON object's."""
    start = b""
    async for piece in body:
        start += piece
        if len(start) > 8:
            break
    num_bytes = int.from_bytes(start[:8], "little")
    if len(start) <= 8 or not 2 <= num_bytes <= _MAX_HEADER_BYTES or start[8:9] != b"{":
        raise RequestError(_FORMAT, code="not_safetensors")
    return _chained(start, body)


async def _chained(start: bytes, rest: AsyncIterator[bytes] | None = None) -> AsyncIterator[bytes]:
    yield start
    if rest is not None:
        async for piece in rest:
            yield piece


async def in_parts(body: AsyncIterator[bytes], num_bytes: int) -> AsyncIterator[bytes]:
    """The same bytes in parts of this length; the last one may be shorter."""
    kept = bytearray()
    async for piece in body:
        kept += piece
        while len(kept) >= num_bytes:
            yield bytes(kept[:num_bytes])
            del kept[:num_bytes]
    if kept:
        yield bytes(kept)
