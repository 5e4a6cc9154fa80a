"""One streamed answer: events to token arrivals, and the contract that makes it count.

An answer is good only if it came with status 200, carried at least one token, gave a finish reason, ended
with `[DONE]` and a clean end of the body, and holds the right number of tokens: exactly the asked number
with `ignore_eos` or finish reason `length`, at most that otherwise; and the prompt's length as sent, when it
was sent as token ids.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass

import msgspec

from .records import CountSource, Outcome, SpanTime, TokenChunk
from .sse import SseParser


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the right answer to a request looks like."""

    num_prompt_tokens: int | None
    """None when the prompt goes out as text and only the server can count it."""
    num_output_tokens: int
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """A judged answer."""

    outcome: Outcome
    error: str
    num_prompt_tokens: int
    num_output_tokens: int
    chunks: tuple[TokenChunk, ...]
    count_source: CountSource
    finish_reason: str | None
    text: str
    spans: tuple[SpanTime, ...]


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: typing.Any = None

    @property
    def text(self) -> str:
        return (self.reasoning or self.reasoning_content or "") + (self.content or "")


class _Choice(msgspec.Struct, frozen=True):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None

    @property
    def all_text(self) -> str:
        return self.text or (self.delta.text if self.delta is not None else "")

    @property
    def shows_output(self) -> bool:
        return bool(self.all_text or (self.delta is not None and self.delta.tool_calls))


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Span(msgspec.Struct, frozen=True):
    name: str
    duration_s: float


class _Timeline(msgspec.Struct, frozen=True):
    spans: list[_Span]


class _Event(msgspec.Struct, frozen=True):
    object: str | None = None
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: typing.Any = None
    timeline: _Timeline | None = None


_event_decoder = msgspec.json.Decoder(_Event)


def error_message(body: bytes) -> str:
    """The message of an OpenAI error body, or the start of whatever came instead."""
    try:
        decoded = msgspec.json.decode(body)
    except msgspec.DecodeError:
        decoded = None
    if isinstance(decoded, dict):
        error = decoded.get("error", decoded)
        message = error.get("message") if isinstance(error, dict) else error
        if isinstance(message, str):
            return message
    return body[:200].decode(errors="replace").strip()


@dataclass(frozen=True, slots=True)
class _Arrival:
    """One chunk with a choice in it, and what each source says of its tokens (None: nothing)."""

    at_s: float
    shows_output: bool
    num_token_ids: int | None
    num_by_usage: int | None

    def num_tokens(self, source: CountSource) -> int | None:
        match source:
            case CountSource.TOKEN_IDS:
                return self.num_token_ids
            case CountSource.CONTINUOUS_USAGE:
                return self.num_by_usage
            case CountSource.CHUNKS:
                return int(self.shows_output)


class StreamReader:
    """Reads one answer as it comes; the first failure seen is the one reported."""

    def __init__(self) -> None:
        self._parser = SseParser()
        self._arrivals: list[_Arrival] = []
        self._texts: list[str] = []
        self._usage: _Usage | None = None
        self._finish_reason: str | None = None
        self._done = False
        self._failure: tuple[Outcome, str] | None = None
        self._spans: tuple[SpanTime, ...] = ()

    def feed(self, data: bytes, now_s: float) -> None:
        """Bytes of the body that arrived at `now_s`."""
        for event in self._parser.feed(data):
            if not self._done and self._failure is None:
                self._handle(event, now_s)

    def fail(self, outcome: Outcome, message: str) -> None:
        """The request ended badly for a reason outside the stream's text."""
        if self._failure is None:
            self._failure = (outcome, message)

    def judge(self, expected: Expectation) -> Answer:
        """The verdict, once the body has ended or failed."""
        source = self._count_source()
        chunks = tuple(
            TokenChunk(arrival.at_s, num_tokens)
            for arrival in self._arrivals
            if (num_tokens := arrival.num_tokens(source) or 0) > 0
        )
        num_output_tokens = self._num_output_tokens(source, chunks)
        outcome, error = self._failure or self._check(expected, source, chunks, num_output_tokens)
        num_prompt_tokens = self._usage.prompt_tokens if self._usage else expected.num_prompt_tokens
        return Answer(
            outcome=outcome,
            error=error,
            num_prompt_tokens=num_prompt_tokens or 0,
            num_output_tokens=num_output_tokens or 0,
            chunks=chunks,
            count_source=source,
            finish_reason=self._finish_reason,
            text="".join(self._texts),
            spans=self._spans,
        )

    def _handle(self, data: bytes, now_s: float) -> None:
        if data == b"[DONE]":
            self._done = True
            return
        try:
            event = _event_decoder.decode(data)
        except msgspec.DecodeError as error:
            self.fail(Outcome.MALFORMED, f"{error}: {data[:200].decode(errors='replace')}")
            return
        if event.error or event.object == "error":
            self.fail(Outcome.IN_STREAM_ERROR, error_message(data))
            return
        for choice in event.choices or ():
            self._take_choice(choice, event.usage, now_s)
        if event.usage is not None:
            self._usage = event.usage
        if event.timeline is not None:
            self._spans = tuple(SpanTime(span.name, span.duration_s) for span in event.timeline.spans)

    def _take_choice(self, choice: _Choice, usage: _Usage | None, now_s: float) -> None:
        num_before = self._usage.completion_tokens if self._usage is not None else 0
        self._arrivals.append(
            _Arrival(
                at_s=now_s,
                shows_output=choice.shows_output,
                num_token_ids=None if choice.token_ids is None else len(choice.token_ids),
                num_by_usage=None if usage is None else usage.completion_tokens - num_before,
            )
        )
        self._texts.append(choice.all_text)
        self._finish_reason = choice.finish_reason or self._finish_reason

    def _count_source(self) -> CountSource:
        """The best source that covers every chunk with text.

        A server that puts one usage on its last chunk only would otherwise seem to send all tokens there.
        """
        showing = [arrival for arrival in self._arrivals if arrival.shows_output] or self._arrivals
        for source in (CountSource.TOKEN_IDS, CountSource.CONTINUOUS_USAGE):
            if showing and all(arrival.num_tokens(source) is not None for arrival in showing):
                return source
        return CountSource.CHUNKS

    def _num_output_tokens(self, source: CountSource, chunks: tuple[TokenChunk, ...]) -> int | None:
        if self._usage is not None:
            return self._usage.completion_tokens
        if source is CountSource.TOKEN_IDS:
            return sum(chunk.num_tokens for chunk in chunks)
        return None

    def _check(
        self,
        expected: Expectation,
        source: CountSource,
        chunks: tuple[TokenChunk, ...],
        num_output_tokens: int | None,
    ) -> tuple[Outcome, str]:
        if not self._done:
            return Outcome.TRUNCATED, "the stream ended without [DONE]"
        if self._finish_reason is None:
            return Outcome.TRUNCATED, "the stream ended without a finish_reason"
        mismatch = self._count_mismatch(expected, source, chunks, num_output_tokens)
        return (Outcome.COUNT_MISMATCH, mismatch) if mismatch else (Outcome.OK, "")

    def _count_mismatch(
        self,
        expected: Expectation,
        source: CountSource,
        chunks: tuple[TokenChunk, ...],
        num_output_tokens: int | None,
    ) -> str | None:
        if num_output_tokens is None:
            return "the server sent no usage, so the number of tokens is unknown"
        if not chunks or num_output_tokens < 1:
            return f"no chunk carried a token, usage says {num_output_tokens}"
        if source is CountSource.TOKEN_IDS:
            num_received = sum(chunk.num_tokens for chunk in chunks)
            if num_received != num_output_tokens:
                return f"{num_received} token ids came, usage says {num_output_tokens}"
        asked = expected.num_output_tokens
        exact = expected.ignore_eos or self._finish_reason == "length"
        if num_output_tokens > asked or (exact and num_output_tokens != asked):
            return f"{asked} output tokens asked, {num_output_tokens} came"
        sent = expected.num_prompt_tokens
        if self._usage is not None and sent is not None and self._usage.prompt_tokens != sent:
            return f"{sent} prompt tokens sent, usage says {self._usage.prompt_tokens}"
        return None
