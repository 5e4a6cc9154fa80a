"""Jobs beside the forwards."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator

import pytest
import torch

from pdserve.engine.job import Job
from pdserve.engine.job_thread import JobThread
from pdserve.runtime.errors import BrokenInvariantError, PdserveError, StartupError
from pdserve.tests.unit.engine.conftest import wait_for


def outcome(made: object) -> object:
    """What the owner of a job gets of it."""
    return made


@pytest.fixture
def jobs() -> Iterator[JobThread[object]]:
    thread: JobThread[object] = JobThread()
    yield thread
    assert thread.close()


def test_jobs_are_done_in_order_on_another_thread_with_one_core(jobs: JobThread[object]) -> None:
    ran_on: list[tuple[threading.Thread, int]] = []
    for number in range(3):

        def run(number: int = number) -> int:
            ran_on.append((threading.current_thread(), torch.get_num_threads()))
            return number

        jobs.submit(Job(f"job {number}", run, outcome))
    results = wait_for(jobs, 3)
    assert [result.name for result in results] == ["job 0", "job 1", "job 2"]
    assert [result.deliver() for result in results] == [0, 1, 2]
    assert {num_threads for _, num_threads in ran_on} == {1}
    assert threading.current_thread() not in {thread for thread, _ in ran_on}
    assert select.select([jobs], [], [], 0)[0] == []


def test_an_owner_takes_what_its_job_makes_and_is_asked_on_the_loop(jobs: JobThread[object]) -> None:
    took_on: list[threading.Thread] = []

    def finish(length: int | PdserveError) -> str:
        took_on.append(threading.current_thread())
        return f"{length} bytes"

    jobs.submit(Job("read", lambda: 3, finish))
    (read,) = wait_for(jobs, 1)
    assert not took_on
    assert read.deliver() == "3 bytes"
    assert took_on == [threading.current_thread()]


def test_mypy_refuses_an_owner_that_takes_something_else(jobs: JobThread[object]) -> None:
    """An ignore that nothing needs is an error too, so each of these holds what it says."""

    def told(length: int | PdserveError) -> int:
        return 0 if isinstance(length, PdserveError) else length

    def made(length: int) -> int:
        return length

    Job("read", lambda: "text", told)  # type: ignore[misc]  # it makes text
    Job("read", lambda: 3, made)  # type: ignore[arg-type]  # nobody takes the error
    texts: JobThread[str] = JobThread()
    texts.submit(Job("read", lambda: 3, told))  # type: ignore[arg-type]  # the loop of this thread takes text
    texts.close()


def test_a_refusal_is_its_result_and_the_next_job_is_done(jobs: JobThread[object]) -> None:
    def refuse() -> None:
        raise StartupError("no such checkpoint")

    jobs.submit(Job("load", refuse, outcome))
    jobs.submit(Job("next", lambda: 1, outcome))
    first, second = wait_for(jobs, 2)
    assert str(first.deliver()) == "no such checkpoint"
    assert second.deliver() == 1


class PanicException(BaseException):  # the name that PyO3 gives it
    """As Rust's panics arrive in Python: no Exception."""


@pytest.mark.parametrize("error", [KeyError("x"), PanicException("index out of bounds")])
def test_what_a_job_never_says_that_it_raises_ends_that_job_alone(
    jobs: JobThread[object], error: BaseException
) -> None:
    def fail() -> None:
        raise error

    jobs.submit(Job("load", fail, outcome))
    jobs.submit(Job("next", lambda: 1, outcome))
    first, second = wait_for(jobs, 2)
    assert str(first.deliver()) == f"the job 'load' failed here: {type(error).__name__}: {error}"
    assert second.deliver() == 1


def test_a_broken_invariant_is_raised_in_the_loop(jobs: JobThread[object]) -> None:
    def fail() -> None:
        raise BrokenInvariantError("two owners")

    jobs.submit(Job("check", fail, outcome))
    with pytest.raises(BrokenInvariantError):
        wait_for(jobs, 1)


def test_closing_does_not_wait_for_ever() -> None:
    jobs: JobThread[object] = JobThread()
    release = threading.Event()
    jobs.submit(Job("stuck", lambda: release.wait(60), outcome))
    assert not jobs.close(timeout_s=0.01)
    release.set()
    assert jobs.close()
