"""What a number, a text or a list in a message may hold at most. A decoder refuses what lies outside.

These are the bounds that hold for any model and any node: that a value can be computed with at all. What a
model or a node sets (its vocabulary, its context, its pool) is checked where a node accepts a request. A
float in a message is finite, for its bounds are, where it is not said to be a `Measured` one.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta

# ---- numbers ----------------------------------------------------------------------------------------

Int64: TypeAlias = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
# Something's number: a call, an attempt, an epoch, a handle, an address. Only compared, or counted up.
Number: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]
# Of 64 bits: no larger one can be written in msgpack, and none can be stated here.
Unsigned64: TypeAlias = Annotated[int, Meta(ge=0)]
# How many, or how long: tokens, pages, bytes, and offsets into them. Sums of them fit into 64 bits.
Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**50)]
Positive: TypeAlias = Annotated[int, Meta(ge=1, le=2**50)]
TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Choice: TypeAlias = Annotated[int, Meta(ge=0, lt=2**15)]  # of the n answers to one prompt
Rank: TypeAlias = Annotated[int, Meta(ge=0, lt=2**15)]  # in a group of processes
WorldSize: TypeAlias = Annotated[int, Meta(ge=1, le=2**15)]
Port: TypeAlias = Annotated[int, Meta(ge=1, lt=2**16)]
Pid: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Dimension: TypeAlias = Annotated[int, Meta(ge=1, le=2**24)]  # of a model's shape
Seconds: TypeAlias = Annotated[float, Meta(ge=-1e11, le=1e11)]  # also since 1970: 3,000 years
Rate: TypeAlias = Annotated[float, Meta(ge=0, le=1e18)]  # a second
Finite: TypeAlias = Annotated[float, Meta(ge=-1e18, le=1e18)]
# What came out of a model: infinite or NaN where its weights are. Only shown, never computed with.
Measured: TypeAlias = float

# ---- texts and bytes --------------------------------------------------------------------------------

_NO_NUL = r"\A[^\x00]*\Z"
MAX_NAME_CHARS = 4096
# An id, a version, a kind; also a URL or a model's name.
Name: TypeAlias = Annotated[str, Meta(max_length=MAX_NAME_CHARS, pattern=_NO_NUL)]
# As long as Linux takes one; a name in it may still be too long.
Path: TypeAlias = Annotated[str, Meta(max_length=4096, pattern=_NO_NUL)]
FileName: TypeAlias = Annotated[str, Meta(max_length=255, pattern=r"\A(?!\.{1,2}\Z)[^/\x00]+\Z")]
# Of a scheduler's socket.
ZmqAddress: TypeAlias = Annotated[str, Meta(max_length=1024, pattern=r"\Atcp://[^\x00-\x20/]+\Z")]
CacheSalt: TypeAlias = Annotated[str, Meta(max_length=1024)]  # what a client tells its prefixes apart by
Text: TypeAlias = Annotated[str, Meta(max_length=1 << 20)]  # for a person
Page: TypeAlias = Annotated[str, Meta(max_length=1 << 26)]  # of metrics
Blob: TypeAlias = Annotated[bytes, Meta(max_length=2**32 - 1)]  # as much as msgpack takes

# ---- lists ------------------------------------------------------------------------------------------

MAX_TOKENS = 1 << 24  # of one prompt or answer
MAX_PAGES = MAX_TOKENS
# Of a frame that a node is sent. The largest is a prefill request of so many tokens and pages: in msgpack at
# most 5 bytes an id, of prompt and kept output, and 9 a page, of the pages and of those to digest.
MAX_MESSAGE_BYTES = 2 * 5 * MAX_TOKENS + 2 * 9 * MAX_PAGES + (1 << 24)
TokenIds: TypeAlias = Annotated[tuple[TokenId, ...], Meta(max_length=MAX_TOKENS)]
Choices: TypeAlias = Annotated[tuple[Choice, ...], Meta(max_length=2**15)]
Pages: TypeAlias = Annotated[tuple[Count, ...], Meta(max_length=MAX_PAGES)]
Handles: TypeAlias = Annotated[tuple[Number, ...], Meta(max_length=MAX_PAGES)]
Names: TypeAlias = Annotated[tuple[Name, ...], Meta(max_length=2**16)]
Shape: TypeAlias = Annotated[tuple[Count, ...], Meta(max_length=8)]  # of a tensor
