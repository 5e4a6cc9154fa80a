"""Deterministic operators: a row's whole distribution and its keys and values have the same bits alone, in
any batch, cut into any chunks, after a hand-off, and with one thread or two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from pdserve.engine import operators
from pdserve.engine.model_weights import load_weights
from pdserve.engine.schedule_batch import ScheduledRow
from pdserve.kernels.linear import BASE_HEIGHT
from pdserve.messages.sampling import SamplingParams
from pdserve.models.config import ModelConfig
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.errors import StartupError
from pdserve.tests.unit.engine.conftest import Harness

CPU = torch.device("cpu")
EVERYTHING = 10_000  # more logprobs than a miniature has tokens: the whole distribution
GREEDY = SamplingParams(temperature=0.0, num_logprobs=EVERYTHING)


@dataclass
class Sequence:
    """A prompt on pages of its own, computed piece by piece."""

    engine: Harness
    token_ids: list[int]
    sampling: SamplingParams = GREEDY
    pages: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pages = self.pages or self.engine.pages(len(self.token_ids))

    def row(self, start: int, end: int) -> ScheduledRow:
        row = self.engine.row(
            self.token_ids, start=start, num_tokens=end - start, pages=self.pages, sampling=self.sampling
        )
        return replace(row, row_id=id(self))

    def compute(self, *ends: int) -> tuple[object, ...]:
        """Chunks up to each of `ends` and then to the last token. → what is sampled there."""
        bounds = [0, *ends, len(self.token_ids)]
        for start, end in pairwise(bounds):
            (output,) = self.engine.forward(self.row(start, end)).values()
        tokens: tuple[object, ...] = output.tokens
        return tokens

    def keys_and_values(self, end: int | None = None) -> Tensor:
        """``[Hkv, layers, 2, positions, D]``."""
        pages = self.engine.pool.data[torch.tensor(self.pages)]  # [n, Hkv, layers, 2, page_size, D]
        return pages.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)[:, :, :, : end or len(self.token_ids)]


def thinned(cases: range, num_threads: int) -> range:
    """Fewer with two threads: they wait for one another in each operation, on a busy machine a time slice."""
    return cases if num_threads == 1 else cases[-1 :: -len(cases) // 2]


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture
def exact(checkpoint: Callable[..., Path], harness: Callable[..., Harness]) -> Callable[..., Harness]:
    def load(model: str = "qwen3", **options: object) -> Harness:
        return harness(checkpoint(model), deterministic=True, dtype="float32", num_pages=700, **options)

    return load


@pytest.mark.parametrize(
    ("model", "num_threads", "boundaries"),
    [
        ("qwen3", 1, range(1, 150)),
        ("llama", 1, (1, 3, 15, 16, 17, 127, 128, 129, 146, 149)),
        ("qwen2", 1, (2, 4, 31, 32, 33, 126, 128, 130, 145, 148)),
        ("qwen3", 2, (5, 128, 149)),
    ],
    indirect=["num_threads"],
)
def test_a_chunk_boundary_anywhere_changes_no_bit(
    exact: Callable[..., Harness],
    prompt: Callable[..., list[int]],
    model: str,
    num_threads: int,
    boundaries: tuple[int, ...],
) -> None:
    """The prompt is longer than a block of attention; a last chunk of one token is a decode step."""
    engine = exact(model, page_size=16)
    token_ids = prompt(150)
    whole = Sequence(engine, token_ids)
    expected = whole.compute()
    split = Sequence(engine, token_ids)
    for boundary in boundaries:
        engine.pool.poison(split.pages)
        assert split.compute(boundary) == expected, boundary
        assert torch.equal(split.keys_and_values(), whole.keys_and_values()), boundary


@pytest.mark.parametrize(("page_size", "num_threads"), [(4, 1), (16, 1), (16, 2)], indirect=["num_threads"])
def test_every_position_by_prefill_is_what_decode_steps_make_it(
    exact: Callable[..., Harness], prompt: Callable[..., list[int]], page_size: int, num_threads: int
) -> None:
    engine = exact("qwen3", page_size=page_size)
    token_ids = prompt(140, 5)
    whole, stepped = Sequence(engine, token_ids), Sequence(engine, token_ids)
    whole.compute()
    compared = thinned(range(140), num_threads)
    first = 0 if num_threads == 1 else 120
    if first:
        engine.forward(stepped.row(0, first))
    for position in range(first, 140):
        (output,) = engine.forward(stepped.row(position, position + 1)).values()
        if position in compared:
            as_last = Sequence(engine, token_ids[: position + 1], pages=whole.pages).compute()
            assert output.tokens == as_last, position
    assert torch.equal(stepped.keys_and_values(), whole.keys_and_values())


@pytest.mark.parametrize(("seed", "num_threads"), [(0, 1), (1, 1), (2, 2)], indirect=["num_threads"])
def test_a_row_is_the_same_in_every_batch(
    exact: Callable[..., Harness], prompt: Callable[..., list[int]], seed: int, num_threads: int
) -> None:
    """2 to 33 rows: decode steps, whole prompts and late chunks, greedy and drawn, mixed by chance."""
    engine, chance = exact("qwen3", page_size=4), Random(seed)
    samplings = (
        GREEDY,
        SamplingParams(temperature=0.8, seed=5, num_logprobs=EVERYTHING),
        SamplingParams(temperature=1.3, seed=6, top_k=20, top_p=0.7, num_logprobs=3),
        SamplingParams(temperature=1.0, seed=7, min_p=0.05, repetition_penalty=1.3, num_logprobs=1),
    )
    sequences, starts, alone, written = [], [], [], []
    for index in range(33):
        sequence = Sequence(
            engine, prompt(chance.randint(1, 60), 100 * seed + index), chance.choice(samplings)
        )
        length = len(sequence.token_ids)
        starts.append(chance.choice((0, length - 1, chance.randrange(length))))
        alone.append(sequence.compute(*([starts[-1]] if starts[-1] else [])))
        written.append(sequence.keys_and_values().clone())
        sequences.append(sequence)
    for size in thinned(range(2, 34), num_threads):
        members = chance.sample(range(33), size)
        rows = [sequences[member].row(starts[member], len(sequences[member].token_ids)) for member in members]
        outputs = engine.forward(*rows)
        for member, row in zip(members, rows, strict=True):
            assert outputs[row.row_id].tokens == alone[member], (size, member)
            assert torch.equal(sequences[member].keys_and_values(), written[member])


def test_a_cached_prefix_and_pages_of_another_node_change_no_bit(
    exact: Callable[..., Harness], prompt: Callable[..., list[int]]
) -> None:
    """The prefix was computed in a batch, by a node with another pool; its pages were copied."""
    prefill, decode = exact("llama", page_size=16), exact("llama", page_size=16)
    decode.pages(5 * 16)  # so that page ids differ
    prefix, ending = prompt(144, 1), prompt(30, 2)
    expected = Sequence(decode, prefix + ending).compute()

    cached = Sequence(prefill, prefix)
    others = [Sequence(prefill, prompt(20 + index, index)) for index in range(5)]
    prefill.forward(cached.row(0, 144), *(other.row(0, len(other.token_ids)) for other in others))
    received = Sequence(decode, prefix + ending)
    whole_pages = 144 // 16
    decode.pool.data[torch.tensor(received.pages[:whole_pages])] = prefill.pool.data[
        torch.tensor(cached.pages)
    ]
    (output,) = decode.forward(received.row(144, 174)).values()
    assert output.tokens == expected


def test_one_thread_and_two_give_the_same_bits(
    exact: Callable[..., Harness], prompt: Callable[..., list[int]]
) -> None:
    """Where the survey says so: the digest is what two nodes compare."""
    found, results = [], []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        engine = exact("qwen3")
        assert engine.survey is not None
        found.append(engine.survey.arithmetic)
        results.append(Sequence(engine, prompt(100)).compute(40, 41))
    torch.set_num_threads(1)
    if found[0] != found[1]:
        pytest.skip("this machine's matrix products depend on the number of threads, and the survey says so")
    assert results[0] == results[1]


def test_the_eager_operators_do_change_bits(
    checkpoint: Callable[..., Path], harness: Callable[..., Harness], prompt: Callable[..., list[int]]
) -> None:
    """The control: what is asserted above is not so of itself."""
    engine = harness(checkpoint("qwen3"), dtype="float32", num_pages=700)
    token_ids = prompt(150)
    expected = Sequence(engine, token_ids).compute()
    if all(Sequence(engine, token_ids).compute(boundary) == expected for boundary in (1, 75, 149)):
        pytest.skip("on this machine the eager operators happen to give the same bits too")


def load_weights_of(folder: Path) -> Any:  # noqa: ANN401
    return load_weights(folder, ModelConfig.from_dir(folder), torch.float32, CPU)


def test_the_survey_does_not_depend_on_the_weights(
    checkpoint: Callable[..., Path],
) -> None:
    """Nodes that start before and after a weight update must still pair."""
    folders = [checkpoint("llama", seed=seed) for seed in (0, 1)]
    surveys = [operators.survey(ModelConfig.from_dir(folder), load_weights_of(folder)) for folder in folders]
    assert surveys[0] == surveys[1]
    assert BASE_HEIGHT in surveys[0].heights
    assert 1 in surveys[0].rows
    other = operators.survey(ModelConfig.from_dir(SHIPPED_MODEL), load_weights_of(SHIPPED_MODEL))
    assert other.arithmetic != surveys[0].arithmetic


def test_heights_that_round_otherwise_are_left_out(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("llama")
    real = torch.mm

    def rounding_otherwise_from_64_rows_on(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        result: Tensor = real(*args, **kwargs)
        return result.mul_(1 + 1e-6) if result.shape[0] >= 64 else result

    monkeypatch.setattr(torch, "mm", rounding_otherwise_from_64_rows_on)
    found = operators.survey(ModelConfig.from_dir(folder), load_weights_of(folder))
    assert max(found.heights) == 32


def test_a_machine_that_cannot_is_refused_at_start(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("llama")
    config, weights = ModelConfig.from_dir(folder), load_weights_of(folder)
    real_mm, real_exp = torch.mm, torch.exp

    def last_row_otherwise(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        result: Tensor = real_mm(*args, **kwargs)
        result[-1].mul_(1 + 1e-6)
        return result

    with monkeypatch.context() as patched:
        patched.setattr(torch, "mm", last_row_otherwise)
        with pytest.raises(StartupError, match="different bits at different places of one call of 16 rows"):
            operators.survey(config, weights)

    def first_elements_otherwise(x: Tensor) -> Tensor:
        result = real_exp(x)
        result[:8].mul_(1 + 1e-6)
        return result

    monkeypatch.setattr(torch, "exp", first_elements_otherwise)
    with pytest.raises(StartupError, match="exp of a number depends on its place"):
        operators.survey(config, weights)
