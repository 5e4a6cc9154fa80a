"""Random checkpoints from ``scripts/dev make_checkpoint``, and sequences computed through a poisoned pool."""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TypedDict, TypeVar, Unpack

import pytest
import torch

from pdserve.engine import operators
from pdserve.engine.device import HOST
from pdserve.engine.forward_batch import ForwardBatch, ForwardOutput, RowOutput
from pdserve.engine.kv_pool import TORCH_DTYPES, KVPool
from pdserve.engine.model_runner import ModelRunner
from pdserve.engine.model_weights import load_weights
from pdserve.engine.operators import EAGER
from pdserve.engine.schedule_batch import ScheduleBatch, ScheduledRow
from pdserve.engine.worker_thread import WorkerThread
from pdserve.messages.kv_layout import KVLayout
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.work import Work
from pdserve.models.config import ModelConfig, kv_layout
from pdserve.tests.scripts import load_script

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)
R = TypeVar("R")


class RowFields(TypedDict, total=False):
    """Of ScheduledRow; any of them, beside the work and the token ids."""

    row_id: str | int
    start: int
    num_tokens: int
    pages: Sequence[int]
    choices: tuple[int, ...]


def whole_row(token_ids: Sequence[int], sampling: SamplingParams, pages: Sequence[int]) -> ScheduledRow:
    """A whole prompt in one chunk, choice 0 sampled."""
    return ScheduledRow(
        row_id="row",
        work=Work(prompt_ids=tuple(token_ids), choices=(0,), sampling=sampling),
        token_ids=token_ids,
        start=0,
        num_tokens=len(token_ids),
        pages=pages,
        choices=(0,),
    )


def wait_for(thread: WorkerThread[R], count: int) -> list[R]:
    """Sleeps on the file descriptor, as the scheduler's loop does."""
    results: list[R] = []
    while len(results) < count:
        readable, _, _ = select.select([thread], [], [], 20)
        assert readable, "nothing finished"
        results += thread.poll()
    return results


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint_script() -> ModuleType:
    return load_script("make_checkpoint")


@pytest.fixture(scope="session")
def checkpoint(
    checkpoint_script: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``checkpoint(model, **options of make_checkpoint)`` → its folder; one for the same arguments."""
    made: dict[str, Path] = {}

    def make(model: str, **options: object) -> Path:
        key = repr((model, sorted(options.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(model)
            checkpoint_script.make_checkpoint(model, made[key], **options)
        return made[key]

    return make


@cache
def _survey(folder: Path, num_threads: int) -> operators.Survey:
    assert torch.get_num_threads() == num_threads
    config = ModelConfig.from_dir(folder)
    return operators.survey(config, load_weights(folder, config, torch.float32, CPU))


@dataclass
class Harness:
    """A runner over a pool whose unwritten slots hold NaN; page tables are given out in a scattered order."""

    config: ModelConfig
    layout: KVLayout
    pool: KVPool
    runner: ModelRunner
    free_pages: list[int] = field(default_factory=list)
    step: int = 0
    survey: operators.Survey | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        page_size: int = 4,
        num_pages: int = 128,
        dtype: str = "auto",
        padding_bytes: int = 0,
        deterministic: bool = False,
    ) -> Harness:
        config = ModelConfig.from_dir(folder)
        if dtype == "auto":
            dtype = config.dtype
        layout = kv_layout(config, page_size, dtype)
        if padding_bytes:
            layout = kv_layout(config, page_size, dtype, layout.page_bytes + padding_bytes)
        pool = KVPool(layout, num_pages, CPU)
        pool.poison(range(num_pages))
        weights = load_weights(folder, config, TORCH_DTYPES[layout.dtype], CPU)
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(7)).tolist()
        chosen, found = EAGER, None
        if deterministic:
            found = _survey(folder, torch.get_num_threads())
            chosen = operators.deterministic(found)
        runner = ModelRunner(config, weights, pool, HOST, operators=chosen)
        return cls(config, layout, pool, runner, order, survey=found)

    def pages(self, num_tokens: int) -> list[int]:
        count = self.layout.pages_for(num_tokens)
        taken, self.free_pages = self.free_pages[:count], self.free_pages[count:]
        assert len(taken) == count
        return taken

    def forward(self, *rows: ScheduledRow) -> dict[str | int, RowOutput]:
        """One step. → the output of each row by its id."""
        self.step += 1
        batch = ForwardBatch.build(
            ScheduleBatch(rows), step=self.step, config=self.config, layout=self.layout
        )
        output: ForwardOutput = self.runner.forward(batch)
        assert output.step == self.step
        assert [row.row_id for row in output.rows] == [row.row_id for row in rows]
        return {row.row_id: row for row in output.rows}

    def row(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams = GREEDY,
        **changes: Unpack[RowFields],
    ) -> ScheduledRow:
        """As `whole_row`, on new pages where none are given."""
        pages = changes["pages"] if "pages" in changes else self.pages(len(token_ids))
        return replace(whole_row(token_ids, sampling, pages), **changes)


@pytest.fixture(scope="session")
def harness() -> Callable[..., Harness]:
    return Harness.load


@pytest.fixture
def prompt() -> Callable[[int, int], list[int]]:
    """``prompt(length, seed)``: random ids that every miniature's vocabulary has."""

    def make(length: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        ids: list[int] = torch.randint(3, 380, (length,), generator=generator).tolist()
        return ids

    return make
