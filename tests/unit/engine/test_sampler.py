"""The sampler against transformers' processors and the reference, and that rows do not see one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pdserve.engine.sampler import sample, told_tokens
from pdserve.engine.sampling_batch import Entry, SamplingBatch
from pdserve.engine.schedule_batch import ScheduledRow
from pdserve.kernels.sampling import reference
from pdserve.messages.sampling import SamplingParams, TokenLogprob
from pdserve.messages.work import Work

VOCAB = 97
EOS = (3, 4)
PROMPT, OUTPUT = [5, 6, 6, 90], [6, 7, 7, 7]


def entry(
    index: int,
    choice: int = 0,
    num_output_tokens: int = len(OUTPUT),
    **sampling: Any,  # noqa: ANN401  the fields of SamplingParams
) -> Entry:
    token_ids = PROMPT + OUTPUT[:num_output_tokens]
    row = ScheduledRow(
        row_id=index,
        work=Work(prompt_ids=tuple(PROMPT), choices=(choice,), sampling=SamplingParams(**sampling)),
        token_ids=token_ids,
        start=len(token_ids) - 1,
        num_tokens=1,
        pages=(),
        choices=(choice,),
    )
    return Entry(row_index=index, logits_index=index, choice=choice, row=row)


def told(logits: torch.Tensor, entries: Sequence[Entry]) -> tuple[list[int], list[TokenLogprob | None]]:
    batch = SamplingBatch.build(entries, EOS, VOCAB)
    return told_tokens(sample(logits, batch), batch)


def sampled(logits: torch.Tensor, entries: Sequence[Entry]) -> list[int]:
    before = logits.clone()
    tokens, _ = told(logits, entries)
    assert torch.equal(logits, before)
    return tokens


def logits_of(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


WISHES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "seed": 2, "top_k": 5},
    {"temperature": 1.3, "seed": 3, "top_p": 0.8},
    {"temperature": 0.0, "repetition_penalty": 2.0, "presence_penalty": 1.0},
    {"temperature": 1.0, "seed": 5, "min_p": 0.2, "frequency_penalty": 0.5},
    {"temperature": 1.0, "seed": (1 << 64) - 1, "logit_bias": {5: 3.0, 6: -100.0}},
    {"temperature": 1e-9, "seed": 7, "num_logprobs": 3},
    {"temperature": 2.0, "seed": 8, "min_tokens": 9, "stop_token_ids": (10, 11), "num_logprobs": 0},
]


def test_a_row_gets_the_same_alone_and_in_any_batch() -> None:
    logits = logits_of(len(WISHES))
    entries = [entry(index, **wishes) for index, wishes in enumerate(WISHES)]
    together, logprobs = told(logits, entries)
    for index, wishes in enumerate(WISHES):
        alone, alone_logprobs = told(logits[[index]], [entry(0, **wishes)])
        assert alone == [together[index]]
        assert alone_logprobs == [logprobs[index]]


def test_plain_greedy_asks_for_nothing() -> None:
    batch = SamplingBatch.build([entry(index, temperature=0.0) for index in range(3)], EOS, VOCAB)
    asked = (batch.logits_index, batch.drawn, batch.bias, batch.forbidden, batch.penalties)
    assert asked == (None,) * 5
    assert batch.wishes == ()
    assert not batch.changes_logits
    logits = logits_of(3)
    assert told_tokens(sample(logits, batch), batch) == (logits.argmax(dim=-1).tolist(), [None] * 3)


def test_draws_are_the_references() -> None:
    logits = logits_of(16)
    wishes: dict[str, Any] = {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.01}
    entries = [entry(index, choice=index % 3, seed=index << 60, **wishes) for index in range(16)]
    for index, token in enumerate(sampled(logits, entries)):
        scaled = logits[index].double().numpy() / 0.8
        kept = reference.kept_tokens(scaled, 30, 0.9, 0.01)
        assert token == reference.draw(scaled, kept, index << 60, index % 3, len(PROMPT + OUTPUT))


@pytest.mark.parametrize(
    ("wishes", "warper"),
    [
        ({"top_k": 3}, TopKLogitsWarper(3)),
        ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
        ({"min_p": 0.15}, MinPLogitsWarper(0.15)),
    ],
    ids=["top_k", "top_p", "min_p"],
)
def test_exactly_the_tokens_that_transformers_keeps_are_drawn(
    wishes: dict[str, Any], warper: LogitsProcessor
) -> None:
    logits = logits_of(1, seed=4)
    num_draws = 600
    entries = [entry(0, seed=seed, **wishes) for seed in range(num_draws)]
    kept = warper(torch.zeros(1, 0, dtype=torch.int64), logits.clone())[0].isfinite()
    drawn = sampled(logits, entries)
    assert set(drawn) <= set(kept.nonzero()[:, 0].tolist())
    likely = (logits[0].masked_fill(~kept, float("-inf")).softmax(dim=0) > 0.02).nonzero()[:, 0]
    assert set(likely.tolist()) <= set(drawn)


def test_repetition_penalty_is_transformers() -> None:
    logits = logits_of(6)
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    expected = processor(torch.tensor([PROMPT + OUTPUT]).expand(6, -1), logits.clone()).argmax(dim=-1)
    entries = [entry(index, temperature=0.0, repetition_penalty=1.7) for index in range(6)]
    assert sampled(logits, entries) == expected.tolist()


def test_frequency_and_presence_count_output_only() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [90, 6, 7]] = torch.tensor([1.0, 1.9, 3.4])
    # Once in the output: 6. Three times: 7. In the prompt only: 90.
    assert sampled(logits, [entry(0, temperature=0.0, presence_penalty=1.0)]) == [7]
    assert sampled(logits, [entry(0, temperature=0.0, presence_penalty=1.0, frequency_penalty=0.5)]) == [90]
    assert sampled(logits, [entry(0, temperature=0.0, frequency_penalty=0.6)]) == [7]


@pytest.mark.parametrize(
    ("wishes", "num_output_tokens", "expected"),
    [
        ({}, 0, 3),
        ({"min_tokens": 2}, 2, 3),
        ({"min_tokens": 2}, 1, 9),
        ({"min_tokens": 2, "stop_token_ids": (9, 5_000)}, 1, 8),
        ({"min_tokens": 2, "stop_token_ids": (9,), "ignore_eos": True}, 1, 3),
    ],
)
def test_min_tokens(wishes: dict[str, Any], num_output_tokens: int, expected: int) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [3, 4, 9, 8]] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    asked = entry(0, temperature=0.0, num_output_tokens=num_output_tokens, **wishes)
    assert sampled(logits, [asked]) == [expected]


def test_logprobs_of_named_tokens_are_those_of_the_softmax() -> None:
    """Of the raw logits, in the order in which they are named; another row's wish changes nothing."""
    logits = logits_of(3)
    asked = [
        entry(0, temperature=0.0, num_logprobs=0, logprob_token_ids=(90, 0, 41)),
        entry(1, temperature=0.0, num_logprobs=2, logprob_token_ids=(5,), logit_bias={5: -100.0}),
        entry(2, temperature=0.0, num_logprobs=2),
    ]
    _, of_rows = told(logits, asked)
    expected = logits.log_softmax(-1)
    for row, token_ids in enumerate(((90, 0, 41), (5,), ())):
        logprob = of_rows[row]
        assert logprob is not None
        assert [token_id for token_id, _ in logprob.named] == list(token_ids)
        for token_id, value in logprob.named:
            assert value == pytest.approx(expected[row, token_id].item(), abs=1e-6)


def test_logit_bias_forces_and_bans() -> None:
    logits = logits_of(2)
    best = logits[1].argmax().item()
    forced = entry(0, temperature=1.0, logit_bias={42: 100.0})
    banned = entry(1, temperature=0.0, logit_bias={int(best): -100.0, 5_000: 100.0})
    tokens = sampled(logits, [forced, banned])
    assert tokens == [42, logits[1].topk(2).indices[1].item()]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = logits_of(2)
    expected = logits.log_softmax(dim=-1)
    entries = [
        entry(0, temperature=2.0, seed=1, top_k=2, logit_bias={42: 100.0}, num_logprobs=4),
        entry(1, temperature=0.0, num_logprobs=0),
    ]
    tokens, (first, second) = told(logits, entries)
    assert first is not None
    assert second is not None
    assert (first.token_id, second.token_id) == (42, tokens[1])
    assert first.logprob == pytest.approx(expected[0, 42].item(), abs=1e-5)
    values, ids = expected[0].topk(4)
    assert [token_id for token_id, _ in first.top] == ids.tolist()
    assert [logprob for _, logprob in first.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert second.logprob == pytest.approx(expected[1].max().item(), abs=1e-5)
    assert second.top == ()


def test_choices_of_one_row_differ_by_their_noise_alone() -> None:
    logits = logits_of(1) / 3
    entries = [Entry(0, 0, choice, entry(0, seed=9).row) for choice in range(8)]
    tokens = sampled(logits, entries)
    assert len(set(tokens)) > 3
    for choice, token in enumerate(tokens):
        assert sampled(logits, [entries[choice]]) == [token]
