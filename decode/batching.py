"""What the next forward on a decode node computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..components.prompt_job import PromptJob
from ..engine.schedule_batch import ScheduledRow
from .sequence import DecodeRequest, Sequence


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One token more of one choice."""

    request: DecodeRequest
    sequence: Sequence
    row: ScheduledRow


@dataclass(slots=True, eq=False)
class LocalPrefill:
    """A request whose prompt this node computes itself."""

    request: DecodeRequest
    job: PromptJob


@dataclass(frozen=True, slots=True)
class ChunkRow:
    """A chunk of such a prompt; it samples every choice when it is the last one."""

    prefill: LocalPrefill
    row: ScheduledRow

    @property
    def request(self) -> DecodeRequest:
        return self.prefill.request


Row = DecodeRow | ChunkRow


def decode_row(request: DecodeRequest, sequence: Sequence) -> DecodeRow:
    row = ScheduledRow(
        row_id=sequence.key.request_id,
        work=request.work,
        token_ids=sequence.token_ids,
        start=len(sequence.token_ids) - 1,
        num_tokens=1,
        pages=sequence.pages,
        choices=(sequence.choice,),
    )
    return DecodeRow(request, sequence, row)


def prefill_rows(prefills: Iterable[LocalPrefill], budget: int) -> list[ChunkRow]:
    """Oldest prompts first, each as far as the token budget goes."""
    rows: list[ChunkRow] = []
    for prefill in prefills:
        num_tokens = min(budget, prefill.job.num_unscheduled)
        if num_tokens <= 0:
            continue
        rows.append(ChunkRow(prefill, prefill.job.chunk(num_tokens)))
        budget -= num_tokens
    return rows
