"""Hidden states of prompt and output: which node tells them, through chunks, caches and new attempts.

The fake engine's hidden state at position p is the number p.
"""

from __future__ import annotations

import pytest

from .cluster import Pair, expected_tokens, prompt_of


@pytest.mark.parametrize("is_colocated", [False, True])
def test_those_of_the_prompt_and_of_each_output_token(is_colocated: bool) -> None:
    pair = Pair(chunk_tokens=4, is_colocated=is_colocated)
    pair.start("a", prompt_of(11), max_tokens=4, hidden_states="all")
    pair.finish()
    stream = pair.stream("a")
    assert stream.prompt_hidden_states == [float(position) for position in range(11)]
    assert stream.hidden_states == [[10.0], [11.0], [12.0], [13.0]]
    pair.check_answer("a", prompt_of(11), 4)


@pytest.mark.parametrize("is_colocated", [False, True])
def test_a_cached_prompt_is_computed_again_for_them(is_colocated: bool) -> None:
    pair = Pair(is_colocated=is_colocated)
    for request_id in ("a", "b"):
        pair.start(request_id, prompt_of(11), hidden_states="all")
        pair.finish()
    stream = pair.stream("b")
    assert stream.prompt_hidden_states == [float(position) for position in range(11)]
    assert stream.num_cached_tokens == 0
    pair.start("c", prompt_of(11), hidden_states="sampled")
    pair.finish()
    assert pair.stream("c").prompt_hidden_states == []
    assert pair.stream("c").hidden_states[0] == [10.0]
    assert pair.stream("c").num_cached_tokens > 0


def test_choices_share_that_of_the_prompts_last_token() -> None:
    pair = Pair()
    pair.start("a", prompt_of(6), choices=(0, 1), max_tokens=2, hidden_states="all")
    pair.finish()
    stream = pair.stream("a")
    assert stream.prompt_hidden_states == [float(position) for position in range(6)]
    assert sorted(stream.hidden_states) == [[5.0], [5.0], [6.0], [6.0]]


def test_a_new_attempt_gives_those_of_its_own_tokens() -> None:
    pair = Pair()
    kept = expected_tokens(prompt_of(6), 3)
    pair.start("a", prompt_of(6), attempt=2, output_ids=kept, max_tokens=5, hidden_states="sampled")
    pair.finish()
    assert pair.stream("a", 2, base=3).hidden_states == [[8.0], [9.0]]


def test_without_the_flag_they_are_refused_by_name() -> None:
    pair = Pair(returns_hidden_states=False)
    pair.start("a", prompt_of(6), hidden_states="all")
    pair.finish()
    failure = pair.stream("a").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("invalid", False)
    assert failure.reason == "the decode node was started without --enable-return-hidden-states"
    pair.start("b", prompt_of(6), hidden_states="sampled")
    pair.finish()
    pair.check_answer("b", prompt_of(6), 4)


def test_a_prefill_node_without_the_flag_refuses_too() -> None:
    pair = Pair()
    pair.prefill.limits.returns_hidden_states = False
    pair.start("a", prompt_of(6), hidden_states="all")
    pair.finish()
    failure = pair.stream("a").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("invalid", False)
    assert failure.reason == "the prefill node was started without --enable-return-hidden-states"
