"""A prompt that this node computes, chunk by chunk: on a prefill node, and on a decode node that prefills."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

from ..engine.forward_batch import RowOutput
from ..engine.schedule_batch import ScheduledRow
from ..messages.report import PromptReport
from ..messages.work import Work


@dataclass(slots=True, eq=False)
class PromptJob:
    """How far a prompt with its kept output is.

    Token positions, in order:
    [0, num_cached)                 held by the prefix cache
    [num_cached, num_computed)      KV is in our pool
    [num_computed, num_scheduled)   in forwards that run or wait on the engine thread
    [num_scheduled, num_tokens)     to do
    """

    request_id: str
    work: Work  # its end samples every choice
    token_ids: tuple[int, ...]  # prompt and kept output
    pages: list[int] = field(default_factory=list)  # one per page of token_ids, cached ones first
    num_cached: int = 0
    num_computed: int = 0
    num_scheduled: int = 0
    num_forwards: int = 0  # on the engine thread right now
    reports: list[PromptReport] = field(default_factory=list)  # on each chunk

    @classmethod
    def of(cls, request_id: str, work: Work) -> PromptJob:
        return cls(request_id, work, work.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_unscheduled(self) -> int:
        return self.num_tokens - self.num_scheduled

    def take_pages(self, pages: list[int], num_cached: int) -> None:
        """It can begin: all of its pages, of which the cache holds the first `num_cached` tokens."""
        self.pages = pages
        self.num_cached = self.num_computed = self.num_scheduled = num_cached

    def chunk(self, num_tokens: int) -> ScheduledRow:
        """The next tokens as a row of a forward. It samples every choice if it reaches the prompt's end."""
        end = self.num_scheduled + num_tokens
        return ScheduledRow(
            row_id=self.request_id,
            work=self.work,
            token_ids=self.token_ids,
            start=self.num_scheduled,
            num_tokens=num_tokens,
            pages=self.pages,
            choices=self.work.choices if end == self.num_tokens else (),
        )

    def scheduled(self, row: ScheduledRow) -> None:
        """This chunk was handed to the engine."""
        self.num_scheduled += row.num_tokens
        self.num_forwards += 1

    def computed(self, row: ScheduledRow, result: RowOutput) -> None:
        """This chunk's forward is done."""
        self.num_forwards -= 1
        self.num_computed += row.num_tokens
        self.reports.append(result.report)

    def report(self) -> PromptReport:
        """On all of the prompt, when its last chunk is computed."""
        first = (None,) if self.work.prompt_logprobs_from == 0 else ()  # nothing precedes the first token
        return PromptReport(
            logprobs=(*first, *chain.from_iterable(report.logprobs for report in self.reports)),
            hidden_states=b"".join(report.hidden_states for report in self.reports),
            num_cached_tokens=min(self.num_cached, len(self.work.prompt_ids)),
        )
