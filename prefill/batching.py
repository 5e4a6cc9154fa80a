"""Which chunks of which prompts the next forward computes."""

from __future__ import annotations

from collections.abc import Iterable

from ..engine.schedule_batch import ScheduledRow
from .job import PrefillJob
from .last_chunk import LastChunk


def next_chunks(
    jobs: Iterable[PrefillJob], max_tokens: int, max_rows: int, last_chunk: LastChunk
) -> list[tuple[PrefillJob, ScheduledRow]]:
    """Oldest prompts first, each as far as the token budget goes; the last row may end inside its prompt, and
    so does one whose last chunk is worth being cut.

    A row samples only when it reaches the end of its prompt. Empty when nothing is left to schedule.
    """
    chunks: list[tuple[PrefillJob, ScheduledRow]] = []
    for job in jobs:
        if max_tokens == 0 or len(chunks) == max_rows:
            break
        num_tokens = min(max_tokens, job.num_unscheduled)
        if num_tokens and num_tokens == job.num_unscheduled:
            num_tokens -= last_chunk.tail(job.prompt.num_scheduled, job.prompt.num_tokens)
        if num_tokens:
            chunks.append((job, job.prompt.chunk(num_tokens)))
            max_tokens -= num_tokens
    return chunks
