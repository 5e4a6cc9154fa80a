"""A forward on a device that is not the host's gives the CPU's bits, and this is what it waits for."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from pdserve.engine.forward_batch import ForwardBatch, RowOutput
from pdserve.engine.kv_pool import KVPool
from pdserve.engine.model_runner import ModelRunner
from pdserve.engine.model_weights import load_weights
from pdserve.engine.schedule_batch import ScheduleBatch, ScheduledRow
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.work import Work
from pdserve.models.config import ModelConfig, kv_layout
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.tests.simulated_device import DEVICE, SimulatedDevice, to_device

CPU = torch.device("cpu")
CONFIG = ModelConfig.from_dir(SHIPPED_MODEL)
LAYOUT = kv_layout(CONFIG, 4, "float32")
NUM_PAGES = 64
T = TypeVar("T")

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


def map_tensors(tree: T, change: Callable[[Tensor], Tensor]) -> T:
    """A batch with every tensor of it changed."""
    part: Any = tree
    changed: Any = part
    if isinstance(part, Tensor):
        changed = change(part)
    elif isinstance(part, tuple):
        changed = tuple(map_tensors(each, change) for each in part) if type(part) is tuple else part
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = [(each.name, getattr(part, each.name)) for each in dataclasses.fields(part)]
        changed = dataclasses.replace(part, **{name: map_tensors(value, change) for name, value in fields})
    result: T = changed
    return result


class Engine:
    """A runner over a pool whose unwritten slots hold NaN."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        weights = load_weights(SHIPPED_MODEL, CONFIG, torch.float32, device)
        pool = KVPool(LAYOUT, NUM_PAGES, device)
        pool.poison(range(NUM_PAGES))
        self._runner = ModelRunner(CONFIG, weights, pool, device)
        self._step = 0

    def batch(self, *rows: ScheduledRow) -> ForwardBatch:
        self._step += 1
        batch = ForwardBatch.build(ScheduleBatch(rows), step=self._step, config=CONFIG, layout=LAYOUT)
        return batch if self.device == CPU else map_tensors(batch, to_device)

    def forward(self, batch: ForwardBatch) -> tuple[RowOutput, ...]:
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
    first = engine.forward(engine.batch(dataclasses.replace(long, num_tokens=14, choices=()), short))
    yield first
    last_chunk = dataclasses.replace(long, start=14, num_tokens=9)
    short = next_row(short, first[1])
    mixed = engine.forward(engine.batch(last_chunk, short, third))
    yield mixed
    rows = [next_row(row, output) for row, output in zip((last_chunk, short, third), mixed, strict=True)]
    yield engine.forward(engine.batch(*rows))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", CASES)
def test_a_forward_on_a_device_gives_the_cpus_bits_and_waits_for_no_more_than_this(name: str) -> None:
    case = CASES[name]
    with torch.inference_mode():
        expected = list(outputs(Engine(CPU), case.sampling))
        with SimulatedDevice() as device:
            engine = Engine(DEVICE)
            device.findings.clear()  # of loading
            assert list(outputs(engine, case.sampling)) == expected
    waits = Counter(found.summary for found in device.findings)
    assert set(waits) == case.waits | IDS, "\n".join(map(str, device.findings))
