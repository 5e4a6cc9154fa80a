"""What the scheduler decides for one step. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..messages.work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledRow:
    """Positions ``[start, start + num_tokens)`` of one sequence, and what to sample after them."""

    row_id: str | int  # opaque, echoed in RowOutput
    work: Work  # of the request: what is sampled and told, and how
    token_ids: Sequence[int]  # the whole sequence known so far, prompt and outputs; may be appended to later
    start: int  # first position computed in this step; [0, start) is in the pool
    num_tokens: int
    pages: Sequence[int]  # page table covering at least [0, start + num_tokens)
    choices: tuple[int, ...] = ()  # of the work, to sample at position start + num_tokens; empty: none

    @property
    def num_prompt_tokens(self) -> int:
        """Of token_ids, which begins with them; the rest is output."""
        return len(self.work.prompt_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.work.prompt_ids)

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class ScheduleBatch:
    """Rows of one forward, prefill chunks and decode rows mixed, in any order."""

    rows: tuple[ScheduledRow, ...]
