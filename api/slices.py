"""Large work in slices, between which everything else on the loop has its turn.

What keeps the interpreter for itself (a call into C over megabytes) stops every stream for as long, in a
thread too. So what a request makes large is done a slice at a time, each a few milliseconds long at most.
How much is a slice is said here, and nowhere else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import msgspec

SLICE_BYTES = 64 << 10  # of JSON: at most 5 ms to decode, and 20 ms to scan if all of it is brackets
SLICE_ITEMS = 8_000  # token ids and other small things of which each costs well under a microsecond
SLICE_ENTRIES = 2_000  # things of which each costs some microseconds: logprobs, tokens to be spelled
SLICE_DELTAS = 200  # of choices that arrived together: detokenized and shown, each takes tens of microseconds

MAX_INLINE_MESSAGES = 100  # a template takes some 20 microseconds for each

T = TypeVar("T")
R = TypeVar("R")

_thread = ThreadPoolExecutor(1, thread_name_prefix="large")  # one: they take turns


async def in_thread(work: Callable[[], T]) -> T:
    """For what cannot be cut and is Python all along: every 5 ms the interpreter lets the loop run."""
    return await asyncio.get_running_loop().run_in_executor(_thread, work)


def at_once(steps: Generator[None, None, T]) -> T:
    """What the generator returns, in a thread, which need not yield."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


async def in_slices(steps: Generator[None, None, T]) -> T:
    """What the generator returns. Others run at each of its yields."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        await asyncio.sleep(0)


def encoded(part: T) -> T:
    """`part` as JSON already, which msgspec writes as it is: a large answer is encoded a part at a time."""
    return cast(T, msgspec.Raw(msgspec.json.encode(part)))


HOLE = cast(
    Any, msgspec.Raw(b"\0")
)  # stands in a document for what `filled` puts there; no JSON has this byte


def filled(document: bytes, items: Sequence[bytes]) -> list[bytes]:
    """The document in pieces, with these items, JSON already, in place of its list's HOLE. Together they may
    be many megabytes, which are copied nowhere."""
    head, tail = document.split(b"\0")
    pieces = [head]
    for index, item in enumerate(items):
        pieces += (b",", item) if index else (item,)
    return [*pieces, tail]


async def rows(items: Sequence[T], row: Callable[[T], R], width: int = 1) -> list[R]:
    """A row of an answer for each item, of `width` entries. Where they are many they are encoded at once:
    others run between slices of them."""
    size = max(1, SLICE_ENTRIES // width)
    if len(items) <= size:
        return [row(item) for item in items]
    made: list[R] = []
    async for run in sliced(items, size):
        made += [encoded(row(item)) for item in run]
    return made


async def spaced(items: Iterable[T]) -> AsyncGenerator[T, None]:
    """Each of `items`, for work of up to some milliseconds on each. Others run between them."""
    is_first = True
    for item in items:
        if not is_first:
            await asyncio.sleep(0)
        is_first = False
        yield item


async def sliced(items: Sequence[T], size: int) -> AsyncGenerator[Sequence[T], None]:
    """`items` in runs of `size`. Others run between them."""
    for start in range(0, len(items), size):
        if start:
            await asyncio.sleep(0)
        yield items[start : start + size] if len(items) > size else items
