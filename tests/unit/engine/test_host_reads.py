"""A forward on a device that is not the host's gives the CPU's bits, and this is what it waits for."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

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

SAMPLER = "kernels/sampling/eager.py"
GUMBEL = {f"{SAMPLER} gumbel_argmax: host read"}
IDS = {"engine/sampler.py sample: host read"}
TOLD = {"engine/sampler.py token_logprobs: host read", "engine/sampler.py token_logprobs: blocking copy"}
OF_ENTRIES = {"engine/sampler.py _logprobs: blocking copy"}
NOISE = {*GUMBEL, "kernels/philox/eager.py philox: blocking copy"}
PENALTIES = {f"{SAMPLER} apply_penalties_: host read"}
FILTERS = {f"{SAMPLER} {name}: host read" for name in ("keep_threshold", "_kth_largest", "_top_p_threshold")}
MIN_P = {f"{SAMPLER} keep_threshold: host read"}
PROMPT = {"engine/model_runner.py _prompt_logprobs: host read"}
SHOWN = {"engine/model_runner.py _shown: blocking copy"}


@dataclass(frozen=True)
class Case:
    sampling: SamplingParams
    waits: set[str] = field(default_factory=set)  # beside IDS, which every case reads


CASES = {
    "greedy": Case(SamplingParams(temperature=0.0)),
    "sampled": Case(SamplingParams(seed=7), NOISE),
    "penalties": Case(
        SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=-0.4),
        PENALTIES,
    ),
    "bias": Case(SamplingParams(temperature=0.0, logit_bias={5: 3.0, 99: -100.0, 17: 20.0})),
    "min tokens": Case(SamplingParams(temperature=0.0, min_tokens=9, stop_token_ids=(17, 4))),
    "top k, top p": Case(SamplingParams(seed=8, top_k=20, top_p=0.9), NOISE | FILTERS),
    "min p": Case(SamplingParams(seed=9, min_p=0.05), NOISE | MIN_P),
    "logprobs": Case(SamplingParams(seed=10, num_logprobs=3), NOISE | TOLD | OF_ENTRIES),
    "named logprobs": Case(
        SamplingParams(temperature=0.0, num_logprobs=0, logprob_token_ids=(7, 300)), TOLD | OF_ENTRIES
    ),
    "prompt logprobs": Case(SamplingParams(temperature=0.0, num_prompt_logprobs=2), TOLD | PROMPT),
    "hidden states": Case(SamplingParams(temperature=0.0, hidden_states="all"), SHOWN),
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
def test_a_forward_on_a_device_gives_the_cpus_bits_and_waits_for_no_more_than_this(name: str) -> None:
    case = CASES[name]
    with torch.inference_mode():
        expected = list(outputs(Engine(HOST), case.sampling))
        with SimulatedDevice() as device:
            runtime = SimulatedRuntime()
            engine = Engine(runtime)
            device.findings.clear()  # of loading
            assert list(outputs(engine, case.sampling)) == expected
    waits = Counter(found.summary for found in device.findings)
    assert set(waits) == case.waits | IDS, "\n".join(map(str, device.findings))
    assert runtime.num_staged == engine.num_steps
