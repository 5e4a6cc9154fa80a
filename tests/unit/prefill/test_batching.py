"""next_chunks and PrefillJob: budgets, chunk boundaries, what a row says, how much may be reused."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.components.prompt_job import PromptJob
from pdserve.engine.schedule_batch import ScheduledRow
from pdserve.messages.peer import PrefillRequest, RoomId
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.work import Work
from pdserve.prefill.batching import next_chunks as chunks_of
from pdserve.prefill.job import JobState, PrefillJob
from pdserve.prefill.last_chunk import LastChunk


def next_chunks(
    jobs: Iterable[PrefillJob], max_tokens: int, max_rows: int, last_chunk: LastChunk | None = None
) -> list[tuple[PrefillJob, ScheduledRow]]:
    """Without measurements no last chunk is cut."""
    return chunks_of(jobs, max_tokens, max_rows, last_chunk or LastChunk(16, 1))


def make_job(
    num_tokens: int = 10,
    *,
    num_scheduled: int = 0,
    state: JobState = JobState.COMPUTING,
    output_ids: tuple[int, ...] = (),
    choices: tuple[int, ...] = (0,),
    sampling: SamplingParams = SamplingParams(),  # noqa: B008, frozen
    counter: int = 1,
) -> PrefillJob:
    prompt_ids = tuple(range(1, num_tokens - len(output_ids) + 1))
    message = PrefillRequest(
        room=RoomId("decode", counter),
        epoch=1,
        request_id=f"r{counter}",
        attempt=1,
        work=Work(prompt_ids=prompt_ids, output_ids=output_ids, choices=choices, sampling=sampling),
        dest_pages=(),
        num_cached_tokens=0,
        weight_version="v1",
        deadline_s=10.0,
    )
    prompt = PromptJob.of(message.request_id, message.work)
    prompt.num_scheduled = num_scheduled
    return PrefillJob(message=message, prompt=prompt, state=state)


def test_a_chunk_goes_as_far_as_the_budget() -> None:
    ((job, row),) = next_chunks([make_job(10, num_scheduled=3)], max_tokens=4, max_rows=8)
    assert (row.start, row.end, row.row_id) == (3, 7, job.message.request_id)
    assert row.choices == (), "it does not reach the end of its prompt"
    assert row.pages is job.prompt.pages


def test_the_last_chunk_samples_every_choice() -> None:
    ((_, row),) = next_chunks([make_job(10, num_scheduled=8, choices=(0, 2))], max_tokens=4, max_rows=8)
    assert (row.start, row.end) == (8, 10)
    assert row.choices == (0, 2)


def test_older_prompts_come_first_and_the_rest_of_the_budget_goes_to_the_next() -> None:
    jobs = [make_job(3, counter=1), make_job(9, counter=2), make_job(5, counter=3)]
    chunks = next_chunks(jobs, max_tokens=8, max_rows=8)
    assert [(row.row_id, row.num_tokens) for _, row in chunks] == [("r1", 3), ("r2", 5)]


def test_rows_are_bounded() -> None:
    jobs = [make_job(3, counter=counter) for counter in range(1, 5)]
    assert len(next_chunks(jobs, max_tokens=100, max_rows=2)) == 2


@pytest.mark.parametrize("state", [JobState.WAITING, JobState.SENDING])
def test_only_computing_jobs_are_scheduled(state: JobState) -> None:
    assert next_chunks([make_job(state=state)], max_tokens=8, max_rows=8) == []


def test_a_job_that_is_over_is_not_scheduled() -> None:
    job = make_job()
    job.is_over = True
    assert next_chunks([job], max_tokens=8, max_rows=8) == []


def test_kept_output_counts_as_output() -> None:
    sampling = SamplingParams(num_prompt_logprobs=1)
    job = make_job(10, output_ids=(901, 902), sampling=sampling)
    ((_, row),) = next_chunks([job], max_tokens=20, max_rows=1)
    assert (row.num_prompt_tokens, row.num_output_tokens) == (8, 2)
    assert list(row.token_ids[8:]) == [901, 902]
    assert row.work.prompt_logprobs_from is None, "the first attempt brought them"


def test_prompt_logprobs_are_asked_for_from_their_start() -> None:
    job = make_job(sampling=SamplingParams(num_prompt_logprobs=0, prompt_logprobs_start=4))
    ((_, row),) = next_chunks([job], max_tokens=20, max_rows=1)
    assert row.work.prompt_logprobs_from == 4


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    max_tokens=st.integers(1, 16),
    max_rows=st.integers(1, 4),
)
def test_every_position_of_every_prompt_is_computed_once_and_sampled_once(
    lengths: list[int], max_tokens: int, max_rows: int
) -> None:
    jobs = [make_job(length, counter=counter) for counter, length in enumerate(lengths)]
    num_sampled = 0
    while chunks := next_chunks(jobs, max_tokens, max_rows):
        assert sum(row.num_tokens for _, row in chunks) <= max_tokens
        assert len(chunks) <= max_rows
        for job, row in chunks:
            assert row.start == job.prompt.num_scheduled
            job.prompt.scheduled(row)
            num_sampled += len(row.choices)
    assert [job.prompt.num_scheduled for job in jobs] == lengths
    assert num_sampled == len(lengths)


def test_a_last_chunk_is_cut_when_it_pays_and_others_take_the_place() -> None:
    last_chunk = LastChunk(4, 1)
    last_chunk.measured_forward(1, 0.0001)
    last_chunk.measured_forward(32, 0.0321)
    last_chunk.measured_wire(1000, 1.0)  # as long for a token as its computing
    first, second = make_job(40, num_scheduled=8), make_job(40, counter=2)
    chunks = next_chunks([first, second], 32, 8, last_chunk)
    assert [(job, row.start, row.end) for job, row in chunks] == [(first, 8, 24), (second, 0, 16)]
    assert chunks[0][1].choices == (), "its tail samples"
