"""The thread that forwards run on, so that the scheduler's loop never waits for one.

`submit` and `submit_job` put work into one queue, done in order; `poll` takes what is finished, and `fileno`
is readable while there is something to take. torch releases the GIL in its kernels.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from ..runtime.containment import Containment
from .forward_batch import ForwardBatch, ForwardOutput
from .job import AnyJob, FinishedJob
from .model_runner import ModelRunner
from .step_profiler import StepProfiler
from .worker_thread import WorkerThread

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Progress:
    """What the thread is doing. Older than max(10 s, 10 × expected) means it hangs."""

    step: int | None  # None: a job
    name: str  # "forward", or the job's
    started: float  # monotonic seconds
    expected_s: float


class Forwards(Protocol):
    """The engine's thread, as far as the stages of a role know it."""

    def submit(self, batch: ForwardBatch) -> None: ...


class StepTimes:
    """How long a step is expected to take: so much a step, and so much for each prefill token beside it."""

    _KEPT = 0.8  # of an old average, against 0.2 of what was just measured

    def __init__(self) -> None:
        # Before anything was measured: slow enough for a large model on a small machine.
        self._decode_s = 1.0
        self._prefill_token_s = 0.01

    def expected_s(self, batch: ForwardBatch) -> float:
        return self._decode_s + self._prefill_token_s * batch.num_prefill_tokens

    def measured(self, batch: ForwardBatch, seconds: float) -> None:
        if batch.num_prefill_tokens == 0:
            self._decode_s += (1 - self._KEPT) * (seconds - self._decode_s)
        else:
            per_token = max(seconds - self._decode_s, 0.0) / batch.num_prefill_tokens
            if batch.num_decode_rows == 0:
                per_token = seconds / batch.num_prefill_tokens
            self._prefill_token_s += (1 - self._KEPT) * (per_token - self._prefill_token_s)


class EngineThread(WorkerThread[ForwardOutput | FinishedJob[R]]):
    """Owns the runner from its start on. Its `poll` raises what a forward raised: the engine is lost."""

    def __init__(
        self,
        runner: ModelRunner,
        num_threads: int,
        name: str = "engine",
        share: Callable[[ForwardBatch], None] | None = None,
        profiler: StepProfiler | None = None,
    ) -> None:
        """`share` gives every batch to the other ranks, in the order of submission. `profiler` belongs to the
        thread: start and stop it in jobs."""
        self._runner = runner
        self._share = share
        self._profiler = profiler or StepProfiler(name)
        self.forward_sleep_s = 0.0  # before each forward. Written by the loop, read by the thread
        self._times = StepTimes()
        self.progress: Progress | None = None  # None: idle. Written by the thread, read by anyone
        self._containment = Containment()
        super().__init__(name, num_threads)

    def submit(self, batch: ForwardBatch) -> None:
        if self._share is not None:
            self._share(batch)
        self._put(partial(self._forward, batch))

    def submit_job(self, job: AnyJob[R], expected_s: float = 60.0) -> None:
        """Run something else on the thread, after what was submitted before: starting a profile, say."""
        self._put(partial(self._do, job, expected_s))

    def expected_s(self, batch: ForwardBatch) -> float:
        return self._times.expected_s(batch)

    # ---- on the thread ------------------------------------------------------------------------------

    def _forward(self, batch: ForwardBatch) -> ForwardOutput:
        sleep_s = self.forward_sleep_s
        expected_s = sleep_s + self._times.expected_s(batch) + self._profiler.overhead_s
        with self._in_progress(batch.step, "forward", expected_s):
            if sleep_s:
                time.sleep(sleep_s)
            with self._profiler.step(batch):
                output = self._runner.forward(batch)
            self._times.measured(batch, output.finished - output.started)
            return output

    def _do(self, job: AnyJob[R], expected_s: float) -> FinishedJob[R]:
        with self._in_progress(None, job.name, expected_s):
            return job.do(self._containment)

    @contextlib.contextmanager
    def _in_progress(self, step: int | None, name: str, expected_s: float) -> Iterator[None]:
        self.progress = Progress(step, name, time.monotonic(), expected_s)
        try:
            yield
        finally:
            self.progress = None
