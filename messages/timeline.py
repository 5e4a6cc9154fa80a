"""Spans of one request's timeline, measured where they happen."""

from __future__ import annotations

import msgspec


class Span(msgspec.Struct, frozen=True, array_like=True):
    """One measured stretch of a request's life.

    ``start_unix_s`` is wall-clock time (so that spans of several processes can be put on one axis),
    ``duration_s`` is measured on the monotonic clock of the process that saw both ends.
    """

    name: str
    start_unix_s: float
    duration_s: float
    num_bytes: int = 0
