"""The thread that forwards run on, so that the scheduler's loop never waits for one.

`submit` and `submit_job` put work into one queue, done in order; `poll` takes what is finished, and `fileno`
is readable while there is something to take. torch releases the GIL in its kernels.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeAlias

import torch

from ..runtime.completions import Completions
from ..runtime.containment import Containment
from ..runtime.errors import PdserveError, UnexpectedError
from .forward_batch import ForwardBatch, ForwardOutput
from .model_runner import ModelRunner
from .step_profiler import StepProfiler

_containment = Containment()


@dataclass(frozen=True, slots=True)
class JobResult:
    """What a job returned, or the error that it ended with."""

    name: str
    value: Any
    error: PdserveError | None
    started: float  # monotonic seconds
    finished: float


@dataclass(frozen=True, slots=True)
class Progress:
    """What the thread is doing. Older than max(10 s, 10 × expected) means it hangs."""

    step: int | None  # None: a job
    name: str  # "forward", or the job's
    started: float  # monotonic seconds
    expected_s: float


@dataclass(frozen=True, slots=True)
class _Job:
    name: str
    run: Callable[[], Any]
    expected_s: float


@dataclass(frozen=True, slots=True)
class Failure:
    """What may not be raised on the thread; `poll` raises it in the loop."""

    error: Exception


Finished: TypeAlias = ForwardOutput | JobResult


def run_job(name: str, run: Callable[[], Any]) -> JobResult:
    """Do it, and contain what it raises (see runtime/containment.py): nobody but who asked for it is told.

    What a broken invariant raises is raised on.
    """
    started = time.monotonic()
    value: Any = None
    failures: list[PdserveError] = []
    with _containment.around(f"the job {name!r}", lambda why: failures.append(UnexpectedError(why))):
        try:
            value = run()
        except PdserveError as error:
            failures.append(error)
    return JobResult(name, value, failures[0] if failures else None, started, time.monotonic())


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


class EngineThread:
    """Owns the runner from its start on. Every method but the thread's own body belongs to the loop."""

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
        self._num_threads = num_threads
        self._work: SimpleQueue[ForwardBatch | _Job | None] = SimpleQueue()
        self._finished = Completions[Finished | Failure]()
        self._times = StepTimes()
        self.progress: Progress | None = None  # None: idle. Written by the thread, read by anyone
        self.num_queued = 0  # submitted and not yet polled
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, batch: ForwardBatch) -> None:
        self.num_queued += 1
        if self._share is not None:
            self._share(batch)
        self._work.put(batch)

    def submit_job(self, name: str, run: Callable[[], Any], expected_s: float = 60.0) -> None:
        """Run something else on the thread, after what was submitted before: loading weights, say."""
        self.num_queued += 1
        self._work.put(_Job(name, run, expected_s))

    def fileno(self) -> int:
        return self._finished.fileno()

    def poll(self) -> list[Finished]:
        """What has finished since the last call, in order. Raises what a forward raised: the engine
        is lost."""
        results: list[Finished] = []
        for result in self._finished.drain():
            if isinstance(result, Failure):
                raise result.error
            self.num_queued -= 1
            results.append(result)
        return results

    def expected_s(self, batch: ForwardBatch) -> float:
        return self._times.expected_s(batch)

    def close(self, timeout_s: float = 30.0) -> bool:
        """Finish what is queued and end the thread. False if it did not end in time."""
        self._work.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        self._finished.close()
        return True

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)  # the setting belongs to the calling thread
        while (work := self._work.get()) is not None:
            finished: Finished | Failure
            try:
                finished = self._do(work)
            except Exception as error:  # carried to the loop, which poll() raises it in
                finished = Failure(error)
            self.progress = None
            del work  # what it held, weights perhaps, may go
            self._finished.push(finished)
            del finished  # likewise

    def _do(self, work: ForwardBatch | _Job) -> Finished:
        started = time.monotonic()
        if isinstance(work, ForwardBatch):
            sleep_s = self.forward_sleep_s
            expected_s = sleep_s + self._times.expected_s(work) + self._profiler.overhead_s
            self.progress = Progress(work.step, "forward", started, expected_s)
            if sleep_s:
                time.sleep(sleep_s)
            with self._profiler.step(work):
                output = self._runner.forward(work)
            self._times.measured(work, output.finished - output.started)
            return output
        self.progress = Progress(None, work.name, started, work.expected_s)
        return run_job(work.name, work.run)
