"""Stands for the engine's and the jobs' thread: forwards and jobs wait until they are told to finish."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..components.page_allocator import PageAllocator
from ..engine.forward_batch import ForwardOutput, RowOutput
from ..engine.job import AnyJob, FinishedJob
from ..engine.schedule_batch import ScheduleBatch, ScheduledRow
from ..messages.report import PromptReport, SampledToken
from ..messages.sampling import TokenLogprob
from ..node.control import JobEnd
from ..runtime.containment import Containment
from .tokens import PAGE_SIZE, Pool, kv_of, next_token


class WrongPage(AssertionError):  # noqa: N818, it is a finding
    """A forward or a write touched a page that is not its own, or read what nobody put there."""


class FakeJobs:
    """The jobs' thread. Its work is done in turn with the forwards."""

    def __init__(self, queue: Callable[[AnyJob[JobEnd]], None]) -> None:
        self.submit = queue
        self.results: deque[FinishedJob[JobEnd]] = deque()

    def poll(self) -> list[FinishedJob[JobEnd]]:
        results = list(self.results)
        self.results.clear()
        return results


class FakeEngine:
    """Work waits in `queued` until `finish`. Each forward verifies every slot that attention would read,
    and that it may write those it writes. `on_queued` is called for each piece of work."""

    def __init__(
        self,
        name: str,
        pool: Pool,
        allocator: PageAllocator,
        clock: Callable[[], float],
        journal: list[str] | None = None,
        on_queued: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.pool = pool
        self.allocator = allocator
        self.clock = clock
        self.weights = "weights-1"
        self.forward_sleep_s = 0.0  # nothing sleeps on a logical clock
        self.queued: deque[ScheduleBatch | AnyJob[JobEnd]] = deque()
        self.results: deque[ForwardOutput] = deque()
        self.jobs = FakeJobs(self._queue)
        self.containment = Containment()  # of jobs
        self.batches: list[ScheduleBatch] = []
        self._journal = journal
        self._on_queued = on_queued

    @staticmethod
    def build(batch: ScheduleBatch) -> ScheduleBatch:
        """A copy, as the real one is: the scheduler may append to what it named."""
        rows = (replace(row, token_ids=tuple(row.token_ids), pages=tuple(row.pages)) for row in batch.rows)
        return replace(batch, rows=tuple(rows))

    def submit(self, batch: ScheduleBatch) -> None:
        for row in batch.rows:
            if self._journal is not None:
                self._journal.append(f"{self.name} forward {row.row_id} [{row.start}, {row.end})")
            self._check_writable(row)
        self.batches.append(batch)
        self._queue(batch)

    def submit_job(self, job: AnyJob[JobEnd]) -> None:
        self._queue(job)

    def _queue(self, work: ScheduleBatch | AnyJob[JobEnd]) -> None:
        self.queued.append(work)
        if self._on_queued is not None:
            self._on_queued()

    def poll(self) -> list[ForwardOutput]:
        results = list(self.results)
        self.results.clear()
        return results

    def fileno(self) -> int:
        return -1

    # ---- for whoever drives it ----

    def finish(self) -> bool:
        """The oldest forward or job is done; False if there is none."""
        if not self.queued:
            return False
        work = self.queued.popleft()
        if isinstance(work, ScheduleBatch):
            rows = tuple(self._compute(row) for row in work.rows)
            started = self.clock()
            self.results.append(ForwardOutput(len(self.batches), rows, started, self.clock()))
        else:
            self.jobs.results.append(work.do(self.containment))
        return True

    def row_ids(self, index: int = -1) -> list[str | int]:
        """The requests in a batch."""
        return [row.row_id for row in self.batches[index].rows]

    def rows_of(self, request_id: str) -> list[ScheduledRow]:
        return [row for batch in self.batches for row in batch.rows if row.row_id == request_id]

    def _compute(self, row: ScheduledRow) -> RowOutput:
        self._check_writable(row)
        known = row.token_ids[: row.end]
        values = kv_of(known, self.weights)
        pages = self.pool.pages
        for index in range(-(-row.start // PAGE_SIZE)):
            first = index * PAGE_SIZE
            expected = tuple(values[first : min(first + PAGE_SIZE, row.start)])
            found = pages[row.pages[index]][: len(expected)]
            if found != expected:
                raise WrongPage(
                    f"{self.name}, {row.row_id}: page {row.pages[index]}, for positions from {first} on, "
                    f"holds {found} in place of {expected}"
                )
        for position in range(row.start, row.end):
            self.pool.write(row.pages[position // PAGE_SIZE], position % PAGE_SIZE, values[position])
        return RowOutput(row.row_id, _sample(row, known), _report(row))

    def _check_writable(self, row: ScheduledRow) -> None:
        for index in range(row.start // PAGE_SIZE, (row.end - 1) // PAGE_SIZE + 1):
            state = self.allocator.describe(row.pages[index])
            if not state.startswith("private"):
                raise WrongPage(
                    f"{self.name}, {row.row_id}: writes page {row.pages[index]}, which is {state}"
                )


def _sample(row: ScheduledRow, known: Sequence[int]) -> tuple[SampledToken, ...]:
    sampling = row.work.sampling
    state = b"" if sampling.hidden_states == "none" else _state_of(row.end - 1)
    tokens = [(choice, next_token(known, choice)) for choice in row.choices]
    return tuple(
        SampledToken(
            choice,
            token,
            None if sampling.num_logprobs is None else _logprob(row, token, -0.5),
            state,
        )
        for choice, token in tokens
    )


def _report(row: ScheduledRow) -> PromptReport:
    wanted_from = row.work.prompt_logprobs_from
    if wanted_from is None:
        scored = range(0)
    else:
        scored = range(max(wanted_from, row.start + 1), min(row.end + 1, row.num_prompt_tokens))
    wants_states = row.work.wants_prompt_states and row.start < row.num_prompt_tokens
    shown = range(row.start, row.end) if wants_states else range(0)
    return PromptReport(
        logprobs=tuple(_logprob(row, row.token_ids[position], -float(position)) for position in scored),
        hidden_states=b"".join(map(_state_of, shown)),
    )


def _logprob(row: ScheduledRow, token_id: int, logprob: float) -> TokenLogprob:
    named = row.work.sampling.logprob_token_ids
    return TokenLogprob(token_id, logprob, named=tuple((each, -float(each)) for each in named))


def _state_of(position: int) -> bytes:
    """The hidden state of a position is one number, the position."""
    return array("f", [position]).tobytes()
