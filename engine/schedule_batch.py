"""What the scheduler decides for one step. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..messages.sampling import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledRow:
    """Positions ``[start, start + num_tokens)`` of one sequence, and what to sample after them."""

    row_id: str | int  # opaque, echoed in RowOutput
    token_ids: Sequence[int]  # the whole sequence known so far, prompt and outputs; may be appended to later
    num_prompt_tokens: int  # token_ids[:num_prompt_tokens] is the prompt, the rest output
    start: int  # first position computed in this step; [0, start) is in the pool
    num_tokens: int
    pages: Sequence[int]  # page table covering at least [0, start + num_tokens)
    sampling: SamplingParams
    choices: tuple[int, ...] = ()  # choice indices to sample at position start + num_tokens; empty: none
    num_output_tokens: int = 0  # tokens generated so far by these choices, for min_tokens
    # Set: every prompt token at a position p in (start, start + num_tokens] with p >= this gets the logprob
    # of token_ids[p] given [0, p). The token at position 0 has none.
    prompt_logprobs_from: int | None = None

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class ScheduleBatch:
    """Rows of one forward, prefill chunks and decode rows mixed, in any order."""

    rows: tuple[ScheduledRow, ...]
