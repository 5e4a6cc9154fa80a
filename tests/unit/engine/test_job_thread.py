"""Jobs beside the forwards."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator

import pytest
import torch

from pdserve.engine.job_thread import JobThread
from pdserve.runtime.errors import BrokenInvariantError, StartupError
from pdserve.tests.unit.engine.conftest import wait_for


@pytest.fixture
def jobs() -> Iterator[JobThread]:
    thread = JobThread()
    yield thread
    assert thread.close()


def test_jobs_are_done_in_order_on_another_thread_with_one_core(jobs: JobThread) -> None:
    for number in range(3):
        jobs.submit(
            f"job {number}",
            lambda number=number: (number, threading.current_thread(), torch.get_num_threads()),  # type: ignore[misc]
        )
    results = wait_for(jobs, 3)
    assert [result.name for result in results] == ["job 0", "job 1", "job 2"]
    for number, result in enumerate(results):
        found, thread, num_threads = result.value
        assert (found, num_threads, result.error) == (number, 1, None)
        assert thread is not threading.current_thread()
    assert select.select([jobs], [], [], 0)[0] == []


def test_a_refusal_is_its_result_and_the_next_job_is_done(jobs: JobThread) -> None:
    def refuse() -> None:
        raise StartupError("no such checkpoint")

    jobs.submit("load", refuse)
    jobs.submit("next", lambda: 1)
    first, second = wait_for(jobs, 2)
    assert (str(first.error), first.value) == ("no such checkpoint", None)
    assert second.value == 1


class PanicException(BaseException):  # the name that PyO3 gives it
    """As Rust's panics arrive in Python: no Exception."""


@pytest.mark.parametrize("error", [KeyError("x"), PanicException("index out of bounds")])
def test_what_a_job_never_says_that_it_raises_ends_that_job_alone(
    jobs: JobThread, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    jobs.submit("load", fail)
    jobs.submit("next", lambda: 1)
    first, second = wait_for(jobs, 2)
    assert str(first.error) == f"the job 'load' failed here: {type(error).__name__}: {error}"
    assert second.value == 1


def test_a_broken_invariant_is_raised_in_the_loop(jobs: JobThread) -> None:
    def fail() -> None:
        raise BrokenInvariantError("two owners")

    jobs.submit("check", fail)
    with pytest.raises(BrokenInvariantError):
        wait_for(jobs, 1)


def test_closing_does_not_wait_for_ever() -> None:
    jobs = JobThread()
    release = threading.Event()
    jobs.submit("stuck", lambda: release.wait(60))
    assert not jobs.close(timeout_s=0.01)
    release.set()
    assert jobs.close()
