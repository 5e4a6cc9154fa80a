"""What a request's work says of itself: what may come from a prefix cache, what is told of its prompt."""

from __future__ import annotations

from typing import Any

import pytest

from pdserve.messages.sampling import SamplingParams
from pdserve.messages.work import Work


def work(num_prompt: int = 10, *, output_ids: tuple[int, ...] = (), **sampling: Any) -> Work:  # noqa: ANN401
    return Work(
        prompt_ids=tuple(range(num_prompt)),
        output_ids=output_ids,
        choices=(0,),
        sampling=SamplingParams(**sampling),
    )


def test_its_tokens_are_the_prompt_and_what_was_kept() -> None:
    again = work(3, output_ids=(71, 72))
    assert (again.token_ids, again.num_tokens) == ((0, 1, 2, 71, 72), 5)


@pytest.mark.parametrize(
    ("start", "reusable"), [(None, 9), (0, 0), (1, 0), (2, 1), (9, 8), (10, 9), (11, 9), (99, 9)]
)
def test_a_cache_may_spare_what_no_logprob_of_the_prompt_needs(start: int | None, reusable: int) -> None:
    asked = work(num_prompt_logprobs=None if start is None else 0, prompt_logprobs_start=start or 0)
    assert asked.num_reusable_tokens == reusable


def test_hidden_states_of_the_prompt_spare_nothing() -> None:
    assert work(hidden_states="all").num_reusable_tokens == 0
    assert work(hidden_states="sampled").num_reusable_tokens == 9


def test_a_new_attempt_is_told_nothing_of_the_prompt_and_may_reuse_all_but_the_last_token() -> None:
    again = work(num_prompt_logprobs=0, hidden_states="all", output_ids=(5,))
    assert (again.prompt_logprobs_from, again.wants_prompt_states) == (None, False)
    assert again.num_reusable_tokens == 10
