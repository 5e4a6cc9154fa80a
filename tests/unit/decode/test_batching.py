"""Rows of a decode node's forward: one token of each choice, and chunks of prompts within the budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pdserve.components.prompt_job import PromptJob
from pdserve.decode.batching import LocalPrefill, decode_row, prefill_rows
from pdserve.decode.sequence import DecodeRequest

if TYPE_CHECKING:
    from .conftest import Requests


def local_prefill(request: DecodeRequest) -> LocalPrefill:
    return LocalPrefill(request, PromptJob.of(request.key.request_id, request.work))


def test_a_decode_row_computes_the_last_token(make: Requests) -> None:
    request = make("a", num_tokens=10, output_ids=(71, 72), choices=(0, 3))
    sequence = request.sequences[1]
    sequence.token_ids.append(73)
    row = decode_row(request, sequence).row
    assert (row.row_id, row.start, row.num_tokens, row.choices) == ("a", 12, 1, (3,))
    assert (row.num_prompt_tokens, row.num_output_tokens) == (10, 3)
    assert row.token_ids[row.start] == 73


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(0, []), (-3, []), (4, [("a", 0, 4)]), (10, [("a", 0, 10)]), (12, [("a", 0, 10), ("b", 0, 2)])],
)
def test_chunks_share_the_budget(make: Requests, budget: int, expected: list[tuple[str, int, int]]) -> None:
    prefills = [local_prefill(make(name)) for name in ("a", "b")]
    rows = [row.row for row in prefill_rows(prefills, budget)]
    assert [(row.row_id, row.start, row.end) for row in rows] == expected


def test_only_the_last_chunk_samples(make: Requests) -> None:
    prefill = local_prefill(make("a", num_tokens=10, choices=(0, 1)))
    (first,) = prefill_rows([prefill], 6)
    assert first.row.choices == ()
    prefill.job.scheduled(first.row)
    (last,) = prefill_rows([prefill], 6)
    assert (last.row.start, last.row.end, last.row.choices) == (6, 10, (0, 1))
    prefill.job.scheduled(last.row)
    assert prefill_rows([prefill], 6) == []


@pytest.mark.parametrize(("output_ids", "wanted_from"), [((), 3), ((71,), None)])
def test_prompt_logprobs_belong_to_the_first_attempt(
    make: Requests, output_ids: tuple[int, ...], wanted_from: int | None
) -> None:
    request = make("a", output_ids=output_ids, num_prompt_logprobs=0, prompt_logprobs_start=3)
    (row,) = prefill_rows([local_prefill(request)], 100)
    assert row.row.work.prompt_logprobs_from == wanted_from
    assert row.row.num_output_tokens == len(output_ids)
