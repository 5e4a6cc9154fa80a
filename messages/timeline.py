"""Spans of one request's timeline, measured where they happen.

The way to the first token is a chain: each stage begins where the one before ended, both on a clock that was
read there, so what no span names is a gap in the chain and is told as *unaccounted*, never as a span.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from .bounds import Count, Name, Seconds

# In the order in which a request passes them. Between two nodes a span begins where one sent and ends where
# the other read, so it holds the encoding, the network, the receiver's loop and the decoding.
FIRST_TOKEN_STAGES = (
    "receive",  # router: from the first line of the HTTP request to its checked body
    "tokenize",  # router
    "prepare",  # router: sampling, ids, the answer's frame
    "queue",  # router: waits for its turn and for a pair of nodes
    "pairing",  # router: picks the pair and sends
    "to_decode",  # router to decode
    "decode_queue",  # decode: waits for pages and places in the batch
    "reserve",  # decode: takes pages, opens the room and sends
    "to_prefill",  # decode to prefill
    "prefill_queue",  # until the forward of its next chunk is submitted: pages, other prompts
    "engine_queue",  # submitted; the engine is in another forward
    "prefill_chunk",  # one forward that computes a chunk of this prompt
    "first_token",  # prefill: from the end of the last chunk's forward until the token is sent
    "from_prefill",  # prefill to decode
    "relay",  # decode: from the first token's arrival until it is sent on
    "to_router",  # decode to router
    "deliver",  # router: from the message to the reader of this request
    "detokenize",  # router
    "stream_out",  # router: the first event is written to the connection
    "failed_attempt",  # router: from sending an attempt to its failure
)
# Behind the first token.
SECOND_TOKEN_STAGES = (
    "decode_wait",  # decode: from the end of the hand-off to the start of its first step
    "first_decode_step",  # decode: the forward of that step
)
# These run beside others and beside one another: they cannot be added up.
OVERLAPPING = (
    "wire",  # prefill: a chunk's pages, from the first write's submission to the last one's end
    "handoff",  # prefill: from the first write of the prompt to the end of its last
    "last_pages",  # decode: from the first token's arrival to the end of the hand-off
)
_IS_ON_THE_WAY = frozenset(FIRST_TOKEN_STAGES)


class Span(msgspec.Struct, frozen=True, array_like=True):
    """One measured stretch of a request's life.

    ``start_unix_s`` is wall-clock time of the process that reports it (whoever leads moves it to its own
    clock, see `runtime/peer_clock.py`), ``duration_s`` is measured on the monotonic clock.
    """

    name: Name
    start_unix_s: Seconds
    duration_s: Seconds
    num_bytes: Count = 0
    num_tokens: Count = 0  # of a chunk

    @property
    def end_unix_s(self) -> float:
        return self.start_unix_s + self.duration_s


Spans: TypeAlias = Annotated[tuple[Span, ...], Meta(max_length=2**20)]


@dataclass(frozen=True, slots=True)
class SpanDates:
    """Dates this process's spans, which are measured in monotonic seconds."""

    unix_minus_monotonic_s: float

    def unix_s(self, at: float) -> float:
        return at + self.unix_minus_monotonic_s

    def span(self, name: str, start: float, end: float, *, num_bytes: int = 0, num_tokens: int = 0) -> Span:
        return Span(name, self.unix_s(start), end - start, num_bytes, num_tokens)


@dataclass(frozen=True, slots=True)
class SpanClock(SpanDates):
    """Dates spans, and tells the time: ``now`` is monotonic seconds."""

    now: Callable[[], float]

    @classmethod
    def start(cls) -> SpanClock:
        return cls(time.time() - time.monotonic(), time.monotonic)

    def unix_now(self) -> float:
        return self.unix_s(self.now())


def moved(spans: Iterable[Span], seconds: float) -> tuple[Span, ...]:
    """The same spans on a clock that is `seconds` ahead of theirs."""
    if seconds == 0.0:
        return tuple(spans)
    return tuple(msgspec.structs.replace(span, start_unix_s=span.start_unix_s + seconds) for span in spans)


def span_between(name: str, start_unix_s: float, end_unix_s: float) -> Span:
    """Of a message, stamped by two processes. Never negative: clocks may differ by a little."""
    return Span(name, start_unix_s, max(0.0, end_unix_s - start_unix_s))


def duration_of(name: str, spans: tuple[Span, ...]) -> float:
    """Of the spans with this name, seconds, added up; 0 if there is none."""
    return sum(span.duration_s for span in spans if span.name == name)


def covered_s(spans: Iterable[Span], start_unix_s: float, end_unix_s: float) -> float:
    """How much of [start, end] lies in at least one span."""
    covered, reached = 0.0, start_unix_s
    for span in sorted(spans, key=lambda span: span.start_unix_s):
        start, end = max(reached, span.start_unix_s), min(span.end_unix_s, end_unix_s)
        if end > start:
            covered += end - start
            reached = end
    return covered


def unaccounted_s(spans: Sequence[Span], start_unix_s: float, end_unix_s: float) -> float:
    """What no stage on the way to the first token names between these times."""
    on_the_way = [span for span in spans if span.name in _IS_ON_THE_WAY]
    return end_unix_s - start_unix_s - covered_s(on_the_way, start_unix_s, end_unix_s)
