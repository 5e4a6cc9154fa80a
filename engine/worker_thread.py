"""A thread beside the loop that does what it is given, in order: the engine's, and those of jobs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

from ..runtime.completions import Completions

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class _Failure:
    """What work raised; `poll` raises it in the loop."""

    error: Exception


class WorkerThread(Generic[R]):
    """Every method but those that its work runs belongs to the loop. `num_threads`: of torch, for what it
    computes."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._num_threads = num_threads
        self._work: SimpleQueue[Callable[[], R] | None] = SimpleQueue()
        self._finished = Completions[R | _Failure]()
        # A daemon: work may wait for a peer that never answers, and the process must be able to end.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """Readable while there is something to take."""
        return self._finished.fileno()

    def poll(self) -> list[R]:
        """What has finished since the last call, in order. Raises what some of it raised."""
        results: list[R] = []
        for result in self._finished.drain():
            if isinstance(result, _Failure):
                raise result.error
            results.append(result)
        return results

    def close(self, timeout_s: float = 30.0) -> bool:
        """Finish what is queued and end the thread. False if it did not end in time."""
        self._work.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        self._finished.close()
        return True

    def _put(self, work: Callable[[], R]) -> None:
        self._work.put(work)

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)  # the setting belongs to the calling thread
        while (work := self._work.get()) is not None:
            finished: R | _Failure
            try:
                finished = work()
            except Exception as error:  # carried to the loop, which poll() raises it in
                finished = _Failure(error)
            del work  # what it held, weights perhaps, may go
            self._finished.push(finished)
            del finished  # likewise
