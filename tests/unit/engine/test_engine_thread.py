from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.engine.device import HOST
from pdserve.engine.engine_thread import EngineThread
from pdserve.engine.forward_batch import ForwardBatch, ForwardOutput
from pdserve.engine.job import FinishedJob, Job
from pdserve.engine.kv_pool import KVPool
from pdserve.engine.model_runner import ModelRunner
from pdserve.engine.model_weights import load_weights
from pdserve.engine.schedule_batch import ScheduleBatch, ScheduledRow
from pdserve.messages.kv_layout import KVLayout
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.work import Work
from pdserve.models.config import ModelConfig, kv_layout
from pdserve.runtime.errors import StartupError
from pdserve.tests.deadline import DEADLINE_S
from pdserve.tests.unit.engine.conftest import wait_for


@dataclass(frozen=True)
class Engine:
    config: ModelConfig
    layout: KVLayout
    runner: ModelRunner
    thread: EngineThread[object]  # of a job: its outcome


def load_engine(folder: Path) -> Engine:
    config = ModelConfig.from_dir(folder)
    layout = kv_layout(config, page_size=4, dtype="float32")
    cpu = torch.device("cpu")
    weights = load_weights(folder, config, torch.float32, cpu)
    runner = ModelRunner(config, weights, KVPool(layout, 8, cpu), HOST)
    return Engine(config, layout, runner, EngineThread(runner, num_threads=1))


@pytest.fixture
def engine(checkpoint: Callable[..., Path]) -> Iterator[Engine]:
    loaded = load_engine(checkpoint("mistral"))
    yield loaded
    assert loaded.thread.close()


def outcome(made: object) -> object:
    """What the owner of a job gets of it."""
    return made


def batch_of(engine: Engine, step: int, token: int = 5) -> ForwardBatch:
    row = ScheduledRow(
        row_id="only",
        work=Work(prompt_ids=(token, 6, 7), choices=(0,), sampling=SamplingParams(temperature=0.0)),
        token_ids=(token, 6, 7),
        start=0,
        num_tokens=3,
        pages=[2],
        choices=(0,),
    )
    return ForwardBatch.build(ScheduleBatch((row,)), step=step, config=engine.config, layout=engine.layout)


def test_forwards_finish_in_order(engine: Engine) -> None:
    for step in range(5):
        engine.thread.submit(batch_of(engine, step, token=5 + step))
    outputs = wait_for(engine.thread, 5)
    expected = [engine.runner.forward(batch_of(engine, step, token=5 + step)) for step in range(5)]
    for output, same in zip(outputs, expected, strict=True):
        assert isinstance(output, ForwardOutput)
        assert (output.step, output.rows) == (same.step, same.rows)
        assert output.started <= output.finished


def test_nothing_is_readable_before_and_after(engine: Engine) -> None:
    assert select.select([engine.thread], [], [], 0)[0] == []
    engine.thread.submit(batch_of(engine, 0))
    wait_for(engine.thread, 1)
    assert select.select([engine.thread], [], [], 0)[0] == []
    assert engine.thread.poll() == []


def test_jobs_run_between_forwards_on_the_same_thread(engine: Engine) -> None:
    ran_on: list[Any] = []

    def job() -> str:
        ran_on.append((threading.current_thread(), torch.get_num_threads()))
        return "done"

    engine.thread.submit(batch_of(engine, 0))
    engine.thread.submit_job(Job("load", job, outcome))
    engine.thread.submit(batch_of(engine, 1))
    first, result, second = wait_for(engine.thread, 3)
    assert [type(item) for item in (first, result, second)] == [ForwardOutput, FinishedJob, ForwardOutput]
    assert isinstance(result, FinishedJob)
    assert (result.name, result.deliver()) == ("load", "done")
    assert ran_on[0][0] is not threading.current_thread()
    assert ran_on[0][1] == 1


def test_a_jobs_refusal_is_its_result(engine: Engine) -> None:
    def refuse() -> None:
        raise StartupError("no such checkpoint")

    engine.thread.submit_job(Job("load", refuse, outcome))
    (result,) = wait_for(engine.thread, 1)
    assert isinstance(result, FinishedJob)
    assert str(result.deliver()) == "no such checkpoint"


def test_what_a_forward_raises_is_raised_in_the_loop(engine: Engine) -> None:
    engine.thread.submit(batch_of(engine, 0, token=10_000))  # outside the vocabulary
    with pytest.raises(IndexError):
        wait_for(engine.thread, 1)


def test_progress_tells_what_runs_and_since_when(engine: Engine) -> None:
    release, running = threading.Event(), threading.Event()

    def job() -> None:
        running.set()
        release.wait(DEADLINE_S)

    before = time.monotonic()
    engine.thread.submit_job(Job("slow", job, outcome), expected_s=3.0)
    assert running.wait(DEADLINE_S)
    progress = engine.thread.progress
    assert progress is not None
    assert (progress.step, progress.name, progress.expected_s) == (None, "slow", 3.0)
    assert before <= progress.started <= time.monotonic()
    release.set()
    wait_for(engine.thread, 1)
    assert engine.thread.progress is None


def test_expectations_follow_what_was_measured(engine: Engine) -> None:
    at_first = engine.thread.expected_s(batch_of(engine, 0))
    for step in range(20):
        engine.thread.submit(batch_of(engine, step))
    wait_for(engine.thread, 20)
    assert engine.thread.expected_s(batch_of(engine, 0)) < at_first


def test_close_finishes_what_is_queued(checkpoint: Callable[..., Path]) -> None:
    engine = load_engine(checkpoint("mistral"))
    done: list[int] = []
    engine.thread.submit_job(Job("one", lambda: done.append(1), outcome))
    assert engine.thread.close()
    assert done == [1]


# ---- slow motion and profiles ---------------------------------------------------------------------------


def test_a_forward_sleeps_before_it_is_measured(engine: Engine) -> None:
    engine.thread.forward_sleep_s = 0.2
    submitted = time.monotonic()
    engine.thread.submit(batch_of(engine, 1))
    (slow,) = wait_for(engine.thread, 1)
    assert isinstance(slow, ForwardOutput)
    assert slow.started - submitted >= 0.2, "the sleep is no part of the forward's own time"
    engine.thread.forward_sleep_s = 0.0
    engine.thread.submit(batch_of(engine, 2))
    (again,) = wait_for(engine.thread, 1)
    assert isinstance(again, ForwardOutput)
    assert again.rows[0].tokens == slow.rows[0].tokens


def test_a_sleep_is_expected_and_no_hang(engine: Engine) -> None:
    engine.thread.forward_sleep_s = 0.3
    expected_s = engine.thread.expected_s(batch_of(engine, 1))
    engine.thread.submit(batch_of(engine, 1))
    deadline = time.monotonic() + DEADLINE_S
    while (progress := engine.thread.progress) is None:
        assert time.monotonic() < deadline
    assert progress.expected_s == pytest.approx(expected_s + 0.3)
    wait_for(engine.thread, 1)
