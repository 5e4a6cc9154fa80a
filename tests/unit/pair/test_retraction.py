"""Too few pages for all that runs: who gives back, who goes on, and that every stream gets its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.messages.node import GetMetrics, MetricsReply

from .cluster import PAGE_SIZE, Pair, expected_tokens, prompt_of
from .retries import RetriedRequest

OPTIMISTIC = 0.01  # counts on next to no growth


def run_all(pair: Pair, requests: Sequence[RetriedRequest], watch: Callable[[], None] = lambda: None) -> None:
    for _ in range(3000):
        worked = [pair.prefill.engine.finish(), pair.backend.finish(), pair.decode.engine.finish()]
        pair.settle()
        watch()
        worked += [request.pump() for request in requests]
        if all(request.is_over for request in requests):
            pair.finish()
            return
        if not any(worked):
            pair.advance(0.5)
    states = {request.request_id: pair.state(request.request_id) for request in requests}
    raise AssertionError(f"the requests do not end: {states}")


def crowd(pair: Pair, num: int, *, num_tokens: int = 6, max_tokens: int = 20) -> list[RetriedRequest]:
    requests = [
        RetriedRequest(
            pair,
            f"r{index}",
            prompt_of(num_tokens, seed=index),
            options={"max_tokens": max_tokens},
        )
        for index in range(num)
    ]
    for request in requests:
        request.start()
    return requests


def num_retracted(pair: Pair) -> int:
    pair.to_decode(GetMetrics(call_id=1), b"admin")
    metrics = pair.last_reply(pair.decode, b"admin")
    assert isinstance(metrics, MetricsReply)
    line = 'pd_num_retracted_requests_total{model_name="model",role="decode"} '
    return int(float(metrics.text.split(line)[1].split("\n")[0]))


@pytest.mark.parametrize("decode_has_cache", [True, False])
@pytest.mark.parametrize("is_colocated", [True, False])
def test_eight_streams_in_a_tiny_pool_get_the_tokens_of_an_undisturbed_run(
    decode_has_cache: bool, is_colocated: bool
) -> None:
    pair = Pair(
        decode_pages=20,
        conservativeness=OPTIMISTIC,
        decode_has_cache=decode_has_cache,
        is_colocated=is_colocated,
    )
    requests = crowd(pair, 8)  # each needs 7 pages in the end
    run_all(pair, requests)
    assert sum(sum(request.num_retractions.values()) for request in requests) == num_retracted(pair) > 0
    for index, request in enumerate(requests):
        assert request.tokens() == expected_tokens(prompt_of(6, seed=index), 20)
        assert request.finishes[0].reason == "length"


def test_the_oldest_is_never_retracted_and_nobody_twice() -> None:
    pair = Pair(decode_pages=20, conservativeness=OPTIMISTIC)
    requests = crowd(pair, 8)
    run_all(pair, requests)
    retractions = [request.num_retractions.get(0, 0) for request in requests]
    assert retractions[0] == 0
    assert max(retractions) == 1


def test_the_youngest_goes_and_its_prefix_stays() -> None:
    pair = Pair(decode_pages=9, conservativeness=OPTIMISTIC)
    requests = crowd(pair, 2)
    while pair.stream("r1").failure is None:
        pair.prefill.engine.finish(), pair.backend.finish(), pair.decode.engine.finish()
        pair.settle()
    failure = pair.stream("r1").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("retracted", True)
    num_tokens = 6 + len(pair.tokens("r1"))
    assert pair.state("r0") == "running"
    num_kept = pair.decode.cache.match([*requests[1].prompt, *pair.tokens("r1")]).num_tokens
    assert num_tokens - 2 * PAGE_SIZE < num_kept < num_tokens, "but for the page that was needed"
    run_all(pair, requests)
    rows = pair.decode.engine.rows_of("r1")
    again = next(row for row in rows if row.start and row.num_output_tokens and row.num_tokens != 1)
    assert again.start >= PAGE_SIZE, "its prefix is not computed again"
    assert requests[1].tokens() == expected_tokens(prompt_of(6, seed=1), 20)


def test_who_was_retracted_waits_for_all_that_it_can_need() -> None:
    pair = Pair(decode_pages=9, conservativeness=OPTIMISTIC)
    requests = crowd(pair, 2)

    def watch() -> None:
        for request in pair.decode.running:
            if request.message.was_retracted:
                assert all(s.promised == s.growth for s in request.live_sequences)

    run_all(pair, requests, watch)
    assert requests[1].num_retractions == {0: 1}


def test_the_oldest_waits_for_pages_that_are_promised_to_others() -> None:
    """It stands still, keeps its place, and goes on when they have ended."""
    pair = Pair(decode_pages=8, conservativeness=OPTIMISTIC)
    pair.start("old", prompt_of(4), max_tokens=20)  # 6 pages in the end
    pair.start("sure", prompt_of(4, seed=1), max_tokens=13, was_retracted=True)  # 4 pages
    pair.run()
    assert pair.stream("old").failure is None
    pair.check_answer("old", prompt_of(4), 20)
    pair.check_answer("sure", prompt_of(4, seed=1), 13)
    alone = [batch for batch in pair.decode.engine.batches if [row.row_id for row in batch.rows] == ["sure"]]
    assert alone, "there was a step without the oldest"
    pair.finish()


def test_cached_conversations_go_before_anyone_who_runs() -> None:
    pair = Pair(decode_pages=16, conservativeness=OPTIMISTIC)
    for seed in range(3):
        pair.start(f"before {seed}", prompt_of(12, seed=seed), max_tokens=2)
        pair.finish()
    requests = crowd(pair, 2)
    run_all(pair, requests)
    assert num_retracted(pair) == 0


def test_a_cautious_node_retracts_nobody() -> None:
    pair = Pair(decode_pages=20, conservativeness=11.0)
    requests = crowd(pair, 8)
    run_all(pair, requests)
    assert num_retracted(pair) == 0


def test_after_a_retraction_less_is_let_in() -> None:
    pair = Pair(decode_pages=9, conservativeness=OPTIMISTIC)
    before = pair.decode.growth.share
    requests = crowd(pair, 2)
    run_all(pair, requests)
    assert pair.decode.growth.share > 5 * before


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    pair = Pair(decode_pages=8, conservativeness=OPTIMISTIC)
    pair.start("huge", prompt_of(10), max_tokens=24)  # 33 tokens: 9 pages
    failure = pair.stream("huge").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("invalid", False)
    pair.start("fits", prompt_of(10), max_tokens=23)
    pair.finish()
    pair.check_answer("fits", prompt_of(10), 23)


def test_all_choices_of_a_request_are_retracted_together() -> None:
    pair = Pair(decode_pages=12, conservativeness=OPTIMISTIC)
    first = RetriedRequest(pair, "a", prompt_of(6), options={"max_tokens": 20})
    second = RetriedRequest(pair, "b", prompt_of(6, seed=1), choices=(0, 1, 2), options={"max_tokens": 10})
    for request in (first, second):
        request.start()
    run_all(pair, [first, second])
    assert second.num_retractions
    assert not first.num_retractions
    for choice in range(3):
        assert second.tokens(choice) == expected_tokens(prompt_of(6, seed=1), 10, choice)


def test_the_only_one_left_is_retracted_when_its_pages_may_never_come_back() -> None:
    """A prefill node was lost with pages that it may still write: no use in waiting here."""
    pair = Pair(decode_pages=12, conservativeness=OPTIMISTIC)
    pair.start("alone", prompt_of(4), max_tokens=40)
    while pair.state("alone") != "running":
        pair.compute()
        pair.write()
    pair.start("lost", prompt_of(20, seed=1))
    pair.network.cut()
    pair.network.holds_to_prefill = True  # nobody is there any more
    for _ in range(100):
        pair.compute(pair.decode)
        if pair.stream("alone").failure is not None:
            break
    failure = pair.stream("alone").failure
    assert failure is not None
    assert failure.code == "retracted"
    assert pair.decode.allocator.counts().quarantined == 5
    pair.network.holds_to_prefill = False
    pair.advance(10.0)
    pair.finish()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 14), st.integers(1, 24), st.integers(1, 3)), min_size=2, max_size=8
    ),
    decode_pages=st.integers(10, 30),
    chunk_tokens=st.integers(2, 12),
    conservativeness=st.sampled_from([0.01, 0.3, 1.0, 11.0]),
    threshold=st.sampled_from([None, 0, 6, 1000]),
    decode_has_cache=st.booleans(),
    shares_prompt=st.booleans(),
    is_colocated=st.booleans(),
)
def test_any_crowd_ends_with_the_right_tokens_nobody_retracted_twice(
    sizes: list[tuple[int, int, int]],
    decode_pages: int,
    chunk_tokens: int,
    conservativeness: float,
    threshold: int | None,
    decode_has_cache: bool,
    shares_prompt: bool,
    is_colocated: bool,
) -> None:
    pair = Pair(
        decode_pages=decode_pages,
        chunk_tokens=chunk_tokens,
        local_prefill_chunk=3,
        conservativeness=conservativeness,
        local_prefill_threshold=threshold,
        decode_has_cache=decode_has_cache,
        is_colocated=is_colocated,
    )
    requests = []
    for index, (num_tokens, max_tokens, num_choices) in enumerate(sizes):
        prompt = prompt_of(num_tokens, seed=0 if shares_prompt else index)
        options = {"max_tokens": max_tokens}
        requests.append(RetriedRequest(pair, f"r{index}", prompt, tuple(range(num_choices)), options=options))
        requests[-1].start()
        pair.compute()
    run_all(pair, requests)
    first_running = next((r for r in requests if not r.failure), None)
    for request, (_, max_tokens, _) in zip(requests, sizes, strict=True):
        if request.failure:
            assert request.failure == "invalid"
            continue
        for choice in request.choices:
            assert request.tokens(choice) == expected_tokens(request.prompt, max_tokens, choice)
            assert request.num_retractions.get(choice, 0) <= 1
    if first_running is not None:
        assert not first_running.num_retractions, "the oldest"
    if conservativeness > 10:
        assert not any(request.num_retractions for request in requests)
