"""What is kept of one request: when it was due and sent, when its tokens came, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise


class Outcome(StrEnum):
    """How a request ended. Only `OK` enters the latency tables."""

    OK = "ok"
    TRUNCATED = "truncated"
    """The answer began and stopped short: no `[DONE]`, no finish reason, or a broken connection."""
    IN_STREAM_ERROR = "in_stream_error"
    """The stream carried an error object, whatever came after it."""
    MALFORMED = "malformed"
    """An event was not the JSON that the endpoint promises."""
    HTTP_4XX = "http_4xx"
    HTTP_5XX = "http_5xx"
    HTTP_OTHER = "http_other"
    """A status that is neither 200 nor an error, such as 204."""
    TIMEOUT = "timeout"
    CONNECT = "connect"
    """The connection failed before a status line came."""
    COUNT_MISMATCH = "count_mismatch"
    """A whole answer with the wrong number of tokens, or with no way to know it."""


REFUSALS = frozenset({429, 503})
"""The statuses of a server that has too much to do."""


class CountSource(StrEnum):
    """Where the number of tokens in a chunk is known from, best first."""

    TOKEN_IDS = "token_ids"
    CONTINUOUS_USAGE = "continuous_usage"
    CHUNKS = "chunks"
    """Nothing says it: each chunk with text is taken as one token."""


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """One chunk that carried tokens; `at_s` is on the client's monotonic clock."""

    at_s: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class SpanTime:
    """One named stretch of the server's own timeline of a request."""

    name: str
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRequest:
    """One request. Times are seconds on the client's monotonic clock.

    due_s <= released_s <= sent_s: the arrival process asks for the request at `due_s`, `--max-concurrency`
    lets it go at `released_s`, and the HTTP client gets it at `sent_s`.
    """

    index: int
    outcome: Outcome
    status: int | None
    error: str
    num_prompt_tokens: int
    num_output_tokens: int
    """As the server counts them."""
    due_s: float
    released_s: float
    sent_s: float
    ended_s: float
    """The response's end, or the failure."""
    chunks: tuple[TokenChunk, ...]
    count_source: CountSource
    finish_reason: str | None
    text: str
    spans: tuple[SpanTime, ...]

    @property
    def ok(self) -> bool:
        return self.outcome is Outcome.OK

    @property
    def refusal_s(self) -> float | None:
        """Sent to told to come again later; None for every other end."""
        return self.ended_s - self.sent_s if self.status in REFUSALS else None

    @property
    def first_token_s(self) -> float | None:
        return self.chunks[0].at_s if self.chunks else None

    @property
    def last_token_s(self) -> float | None:
        return self.chunks[-1].at_s if self.chunks else None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.sent_s

    @property
    def e2e_s(self) -> float | None:
        return None if self.last_token_s is None else self.last_token_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """None for an answer of one token."""
        if self.first_token_s is None or self.last_token_s is None or self.num_output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.num_output_tokens - 1)

    @property
    def second_token_gap_s(self) -> float | None:
        """Zero when the first chunk already holds two tokens, None when there is no second token."""
        if not self.chunks:
            return None
        if self.chunks[0].num_tokens > 1:
            return 0.0
        return self.chunks[1].at_s - self.chunks[0].at_s if len(self.chunks) > 1 else None

    @property
    def chunk_gaps_s(self) -> list[float]:
        return [later.at_s - earlier.at_s for earlier, later in pairwise(self.chunks)]

    @property
    def itls_s(self) -> list[float]:
        """One gap a token: a chunk of k tokens after a gap g gives g/k, k times."""
        return list(self._token_gaps_s())

    def _token_gaps_s(self) -> Iterator[float]:
        for earlier, later in pairwise(self.chunks):
            gap_s = (later.at_s - earlier.at_s) / later.num_tokens
            for _ in range(later.num_tokens):
                yield gap_s

    @property
    def mean_itl_s(self) -> float | None:
        gaps = self.itls_s
        return sum(gaps) / len(gaps) if gaps else None

    @property
    def queue_s(self) -> float:
        """Wait for a slot of `--max-concurrency`, on the client."""
        return self.released_s - self.due_s

    @property
    def send_delay_s(self) -> float:
        """How late the client itself was."""
        return self.sent_s - self.released_s
