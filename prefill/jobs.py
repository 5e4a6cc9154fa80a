"""The prompts that a prefill node has: admitted when all their pages can be had, computed, held, let go of.

A job's pages are here and nowhere else: what the cache holds of its prompt is locked, the rest is its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..components import request_limits
from ..components.invariant_checker import check_idle
from ..components.page_allocator import PageAllocator, PageCounts
from ..components.prefix_cache import PrefixCache
from ..components.prompt_job import PromptJob
from ..engine.engine_thread import Forwards
from ..engine.forward_batch import ForwardBatch, ForwardOutput, RowOutput
from ..engine.schedule_batch import ScheduleBatch, ScheduledRow
from ..messages.kv_layout import KVLayout
from ..messages.peer import PrefillRequest, RoomId
from ..messages.timeline import SpanClock
from ..node.status import NodeStatus
from ..runtime.config import HIDDEN_STATES_FLAG
from ..runtime.containment import Containment
from .batching import next_chunks
from .job import JobState, PrefillJob
from .last_chunk import LastChunk
from .limits import PrefillLimits

# One forward runs while the next one waits behind it: chunks need nothing of each other's results, so the
# engine never pauses for the loop.
_MAX_FORWARDS = 2


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a forward computed of one prompt. The room may have ended meanwhile: those are left out."""

    job: PrefillJob
    result: RowOutput


class PrefillJobs:
    """`layout`: of all heads. `build` makes a forward of rows; what it raises is a row's fault."""

    def __init__(
        self,
        *,
        allocator: PageAllocator,
        cache: PrefixCache | None,
        engine: Forwards,
        build: Callable[[ScheduleBatch], ForwardBatch],
        status: NodeStatus,
        layout: KVLayout,
        limits: PrefillLimits,
        last_chunk: LastChunk,
        clock: SpanClock,
    ) -> None:
        self.containment = Containment()
        self._allocator = allocator
        self._cache = cache
        self._engine = engine
        self._build = build
        self._status = status
        self._layout = layout
        self._limits = limits
        self._last_chunk = last_chunk
        self._clock = clock
        self._jobs: dict[RoomId, PrefillJob] = {}  # every job, in order of arrival
        self._forwards: deque[list[tuple[PrefillJob, ScheduledRow]]] = deque()  # on the engine thread

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[PrefillJob]:
        """In order of arrival. A job that is over is among them until its last forward is done."""
        return iter(self._jobs.values())

    def get(self, room: RoomId) -> PrefillJob | None:
        return self._jobs.get(room)

    def num_in(self, state: JobState) -> int:
        return sum(job.state is state for job in self)

    # ---- 1 to 2: waiting for pages ------------------------------------------------------------------

    def add(self, request: PrefillRequest) -> PrefillJob:
        now = self._clock.now()
        job = PrefillJob(
            request, PromptJob.of(request.request_id, request.work), state_since_s=now, reached_s=now
        )
        self._jobs[request.room] = job
        return job

    def impossible(self, job: PrefillJob) -> str | None:
        """Why this prompt can never be computed here; None if it can."""
        num_pages, num_there = self._layout.pages_for(job.prompt.num_tokens), self._allocator.num_pages
        if num_pages > num_there:
            return f"the prompt needs {num_pages} KV pages, the prefill node has {num_there}"
        work = job.message.work
        if work.sampling.hidden_states == "all" and not self._limits.returns_hidden_states:
            return f"the prefill node was started without {HIDDEN_STATES_FLAG}"
        return request_limits.refusal(work, self._status.model)

    def admit(self, now: float) -> Iterator[PrefillJob]:
        """Oldest first; who does not get all of its pages lets nobody pass, or long prompts would starve."""
        for job in list(self):
            if job.state is not JobState.WAITING:
                continue
            if not self._take_pages(job):
                return
            job.enter(JobState.COMPUTING, now)
            yield job

    def _take_pages(self, job: PrefillJob) -> bool:
        """Locks the cached prefix and allocates the rest; all or nothing."""
        num_pages = self._layout.pages_for(job.prompt.num_tokens)
        cached: list[int] = []
        if self._cache is not None:
            job.match = self._cache.match(
                job.prompt.token_ids,
                max_tokens=job.message.work.num_reusable_tokens,
                namespace=job.message.work.cache_salt,
            )
            self._cache.lock(job.match)
            cached = job.match.pages
            num_missing = num_pages - len(cached) - self._allocator.num_free
            if 0 < num_missing <= self._cache.num_evictable:  # else the rest would go for nothing
                self._cache.evict(num_missing)
        own = self._allocator.allocate_private(job.room, num_pages - len(cached))
        if own is None:
            self._unlock(job)
            return False
        job.prompt.take_pages([*cached, *own], len(cached) * self._layout.page_size)
        return True

    # ---- 2: computing -------------------------------------------------------------------------------

    def launch(self, fail: Callable[[PrefillJob, str], None]) -> None:
        """Keeps the engine busy. `fail`: of a prompt of which no forward can be made, with the reason."""
        while len(self._forwards) < _MAX_FORWARDS:
            limits = self._limits
            chunks = next_chunks(self, limits.max_batch_tokens, limits.max_batch_rows, self._last_chunk)
            if not chunks:
                return
            try:
                batch = self._build(ScheduleBatch(rows=tuple(row for _, row in chunks)))
            except Exception:  # which of them is at fault says each one alone
                if not self._give_up_faulty(chunks, fail):
                    raise
                continue
            self._engine.submit(batch)
            submitted = self._clock.now()
            self._forwards.append(chunks)
            for job, row in chunks:
                job.submitted_s.append(submitted)
                job.prompt.scheduled(row)

    def _give_up_faulty(
        self, chunks: Iterable[tuple[PrefillJob, ScheduledRow]], fail: Callable[[PrefillJob, str], None]
    ) -> bool:
        """Fails the prompts of which no batch can be made. False: there is none."""
        num_before = self.containment.num_faults
        for job, row in chunks:

            def give_up(why: str, job: PrefillJob = job) -> None:
                fail(job, why)

            with self.containment.around("a chunk", give_up):
                self._build(ScheduleBatch(rows=(row,)))
        return self.containment.num_faults > num_before

    def apply(self, output: ForwardOutput) -> tuple[int, list[Chunk]]:
        """A forward is done. Returns how many tokens it computed, and what it says of rooms that are open."""
        chunks = self._forwards.popleft()
        open_chunks = []
        for (job, row), result in zip(chunks, output.rows, strict=True):
            job.prompt.computed(row, result)
            self._note_chunk(job, row, output)
            if job.is_over:
                self._free_if_unused(job)
            else:
                open_chunks.append(Chunk(job, result))
        num_tokens = sum(row.num_tokens for _, row in chunks)
        self._last_chunk.measured_forward(num_tokens, output.finished - output.started)
        return num_tokens, open_chunks

    def _note_chunk(self, job: PrefillJob, row: ScheduledRow, output: ForwardOutput) -> None:
        """What it waited for since its chunk before, and the chunk itself, as the engine measured it."""
        submitted = job.submitted_s.popleft()
        if submitted > job.reached_s:
            job.spans.append(self._clock.span("prefill_queue", job.reached_s, submitted))
            job.reached_s = submitted
        job.spans.append(self._clock.span("engine_queue", job.reached_s, output.started))
        chunk = self._clock.span("prefill_chunk", output.started, output.finished, num_tokens=row.num_tokens)
        job.spans.append(chunk)
        job.reached_s = output.finished

    # ---- 3: sending ---------------------------------------------------------------------------------

    def pages_to_send(self, job: PrefillJob) -> list[int]:
        """Every whole page that is computed; in the end the last one too."""
        if job.state is JobState.SENDING:
            return job.prompt.pages
        if not self._limits.overlaps_transfer:
            return []
        return job.prompt.pages[: job.prompt.num_computed // self._layout.page_size]

    def enter_sending(self, job: PrefillJob, now: float) -> None:
        """Its last chunk is computed: it shares its whole pages."""
        job.enter(JobState.SENDING, now)
        self._insert_into_cache(job)

    def _insert_into_cache(self, job: PrefillJob) -> None:
        """Hand the whole pages to the tree, and keep them locked there until the last one has travelled."""
        if self._cache is None:
            return
        before, prompt = job.match, job.prompt
        job.match = self._cache.insert(
            prompt.token_ids, prompt.pages, job.room, job.message.work.cache_salt
        ).match
        self._cache.lock(job.match)
        if before is not None:
            self._cache.unlock(before)

    # ---- 4: gone ------------------------------------------------------------------------------------

    def release(self, room: RoomId) -> PrefillJob:
        """The room has ended. A forward that still writes into its pages is waited for."""
        job = self._jobs[room]
        job.is_over = True
        self._free_if_unused(job)
        return job

    def _free_if_unused(self, job: PrefillJob) -> None:
        """Pages go back once no forward can write into them any more."""
        if job.prompt.num_forwards == 0:
            self._unlock(job)
            self._allocator.free_private(job.room)
            del self._jobs[job.room]

    def _unlock(self, job: PrefillJob) -> None:
        if self._cache is not None and job.match is not None:
            self._cache.unlock(job.match)
            job.match = None

    def drop_cache(self) -> bool:
        """False if a job reads any of it."""
        return self._cache is None or self._cache.reset()

    # ---- what there is ------------------------------------------------------------------------------

    def page_counts(self) -> PageCounts:
        return self._allocator.counts()

    @property
    def num_locked_pages(self) -> int:
        return self._cache.num_locked if self._cache else 0

    @property
    def num_evictable_pages(self) -> int:
        return self._cache.num_evictable if self._cache else 0

    def check_idle(self) -> None:
        """Nothing may be held but the cache; raises BrokenInvariantError, as that is a bug."""
        caches = [] if self._cache is None else [self._cache]
        check_idle(self._allocator, caches, states={"open": self._jobs.keys()})
