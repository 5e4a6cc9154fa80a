"""A thread for what takes long and is no forward: reading weights, comparing them.

Forwards go on meanwhile on the engine's thread, and the loop on its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from ..runtime.completions import Completions
from .engine_thread import Failure, JobResult, run_job


@dataclass(frozen=True, slots=True)
class _Job:
    name: str
    run: Callable[[], Any]


class JobThread:
    """Jobs are done one by one, in the order of submission. Every method but the thread's body belongs to the
    loop. The thread computes alone: the other cores are the forwards'."""

    def __init__(self, name: str = "jobs") -> None:
        self._work: SimpleQueue[_Job | None] = SimpleQueue()
        self._finished = Completions[JobResult | Failure]()
        # A daemon: a job may wait for a peer that never answers, and the process must be able to end.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, name: str, run: Callable[[], Any]) -> None:
        self._work.put(_Job(name, run))

    def fileno(self) -> int:
        """Readable while there is something to take."""
        return self._finished.fileno()

    def poll(self) -> list[JobResult]:
        """What has finished since the last call, in order. Raises a broken invariant that a job found."""
        results: list[JobResult] = []
        for result in self._finished.drain():
            if isinstance(result, Failure):
                raise result.error
            results.append(result)
        return results

    def close(self, timeout_s: float = 5.0) -> bool:
        """Finish what is queued and end the thread. False if it did not end in time."""
        self._work.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        self._finished.close()
        return True

    def _run(self) -> None:
        torch.set_num_threads(1)  # the setting belongs to the calling thread
        while (job := self._work.get()) is not None:
            finished = _do(job)
            del job  # what it held, weights perhaps, may go
            self._finished.push(finished)
            del finished  # likewise


def _do(job: _Job) -> JobResult | Failure:
    try:
        return run_job(job.name, job.run)
    except Exception as error:  # a broken invariant, carried to the loop, which poll() raises it in
        return Failure(error)
