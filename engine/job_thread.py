"""A thread for what takes long and is no forward: reading weights, comparing them.

Forwards go on meanwhile on the engine's thread, and the loop on its own.
"""

from __future__ import annotations

from functools import partial
from typing import TypeVar

from ..runtime.containment import Containment
from .job import AnyJob, FinishedJob
from .worker_thread import WorkerThread

R = TypeVar("R")


class JobThread(WorkerThread[FinishedJob[R]]):
    """Jobs are done one by one, in the order of submission. The thread computes alone: the other cores are
    the forwards'. Its `poll` raises a broken invariant that a job found."""

    def __init__(self, name: str = "jobs") -> None:
        self._containment = Containment()
        super().__init__(name, num_threads=1)

    def submit(self, job: AnyJob[R]) -> None:
        self._put(partial(job.do, self._containment))

    def close(self, timeout_s: float = 5.0) -> bool:
        """Not as long as for the engine: a job may wait for a peer that never answers."""
        return super().close(timeout_s)
