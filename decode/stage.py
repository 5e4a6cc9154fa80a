"""What the stages of a request have in common: each holds some requests, and can let go of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from ..components.output_streamer import StreamKey
from ..messages.node import FailureCode
from .sequence import DecodeRequest


class Stage(Protocol):
    """A request is in exactly one. It leaves by going on to another, or by one of these three ways."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[DecodeRequest]: ...

    def __contains__(self, key: StreamKey) -> bool: ...

    def state_of(self, request: DecodeRequest) -> str:
        """In a word."""
        ...

    def cancel(self, key: StreamKey, choices: tuple[int, ...], now: float) -> None:
        """The client wants no more of these choices (of all, when none is named)."""
        ...

    def abort(self, request: DecodeRequest, now: float) -> None:
        """It ends with what it has."""
        ...

    def fail(
        self, request: DecodeRequest, code: FailureCode, reason: str, now: float, *, retriable: bool
    ) -> None:
        """The attempt ends; the router may make another where it is retriable."""
        ...
