"""A forward on a device that is not the host's gives the CPU's bits, and never waits on its way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from pdserve.engine.device import HOST, DeviceRuntime
from pdserve.engine.forward_batch import ForwardBatch, RowOutput
from pdserve.engine.kv_pool import KVPool
from pdserve.engine.model_runner import ModelRunner
from pdserve.engine.model_weights import load_weights
from pdserve.engine.schedule_batch import ScheduleBatch, ScheduledRow
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.work import Work
from pdserve.models.config import ModelConfig, kv_layout
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.tests.simulated_device import SimulatedDevice, SimulatedRuntime

CONFIG = ModelConfig.from_dir(SHIPPED_MODEL)
LAYOUT = kv_layout(CONFIG, 4, "float32")
NUM_PAGES = 64

CASES = {
    "greedy": SamplingParams(temperature=0.0),
    "sampled": SamplingParams(seed=7),
    "penalties": SamplingParams(
        temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=-0.4
    ),
    "bias": SamplingParams(temperature=0.0, logit_bias={5: 3.0, 99: -100.0, 17: 20.0}),
    "min tokens": SamplingParams(temperature=0.0, min_tokens=9, stop_token_ids=(17, 4)),
    "top k, top p": SamplingParams(seed=8, top_k=20, top_p=0.9),
    "min p": SamplingParams(seed=9, min_p=0.05),
    "logprobs": SamplingParams(seed=10, num_logprobs=3),
    "named logprobs": SamplingParams(temperature=0.0, num_logprobs=0, logprob_token_ids=(7, 300)),
    "prompt logprobs": SamplingParams(temperature=0.0, num_prompt_logprobs=2, logprob_token_ids=(9,)),
    "hidden states": SamplingParams(temperature=0.0, hidden_states="all"),
}


class Engine:
    """A runner over a pool whose unwritten slots hold NaN."""

    def __init__(self, runtime: DeviceRuntime) -> None:
        weights = load_weights(SHIPPED_MODEL, CONFIG, torch.float32, runtime.device)
        pool = KVPool(LAYOUT, NUM_PAGES, runtime.device)
        pool.poison(range(NUM_PAGES))
        self._runner = ModelRunner(CONFIG, weights, pool, runtime)
        self.num_steps = 0

    def forward(self, *rows: ScheduledRow) -> tuple[RowOutput, ...]:
        self.num_steps += 1
        batch = ForwardBatch.build(ScheduleBatch(rows), step=self.num_steps, config=CONFIG, layout=LAYOUT)
        return self._runner.forward(batch).rows


def prompt_row(sampling: SamplingParams, row_id: int, num_tokens: int) -> ScheduledRow:
    token_ids = torch.randint(20, 400, (num_tokens,), generator=torch.Generator().manual_seed(row_id))
    return ScheduledRow(
        row_id=row_id,
        work=Work(prompt_ids=tuple(token_ids.tolist()), choices=(0,), sampling=sampling),
        token_ids=token_ids.tolist(),
        start=0,
        num_tokens=num_tokens,
        pages=[(row_id * 16 + 7 * index) % NUM_PAGES for index in range(9)],
        choices=(0,),
    )


def next_row(row: ScheduledRow, output: RowOutput) -> ScheduledRow:
    """The decode row behind one that sampled."""
    token_ids = [*row.token_ids, output.tokens[0].token_id]
    return dataclasses.replace(row, token_ids=token_ids, start=len(token_ids) - 1, num_tokens=1)


def outputs(engine: Engine, sampling: SamplingParams) -> Iterator[tuple[RowOutput, ...]]:
    """Two prompts, one of them in two chunks, then two decode steps beside another prompt and alone. The rows
    that sample at a temperature stand beside a greedy one."""
    greedy = SamplingParams(temperature=0.0)
    long = prompt_row(sampling, 0, 23)
    short, third = prompt_row(sampling, 1, 9), prompt_row(greedy, 2, 6)
    first = engine.forward(dataclasses.replace(long, num_tokens=14, choices=()), short)
    yield first
    last_chunk = dataclasses.replace(long, start=14, num_tokens=9)
    short = next_row(short, first[1])
    mixed = engine.forward(last_chunk, short, third)
    yield mixed
    rows = [next_row(row, output) for row, output in zip((last_chunk, short, third), mixed, strict=True)]
    yield engine.forward(*rows)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", CASES)
def test_a_forward_on_a_device_gives_the_cpus_bits_and_waits_once(name: str) -> None:
    """For its results, which are read back together; its numbers come there by one copy."""
    with torch.inference_mode():
        expected = list(outputs(Engine(HOST), CASES[name]))
        with SimulatedDevice() as device:
            runtime = SimulatedRuntime()
            engine = Engine(runtime)
            device.findings.clear()  # of loading
            assert list(outputs(engine, CASES[name])) == expected
    assert not device.findings, "\n".join(map(str, device.findings))
    assert runtime.num_staged == runtime.num_read_back == engine.num_steps
