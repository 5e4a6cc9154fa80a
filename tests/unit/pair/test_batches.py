"""Who is in which forward: continuous batching, chunks, the prefix cache, streaming."""

from __future__ import annotations

import pytest

from pdserve.messages.node import AttemptFailed, ResendFrom, TokenOutputs
from pdserve.messages.sampling import TokenLogprob

from .cluster import ROUTER, Pair, expected_tokens, prompt_of, read_stream


def hand_over(pair: Pair, request_id: str) -> None:
    """Prefill and the wire work until the request runs; decode's forwards wait."""
    for _ in range(100):
        if pair.state(request_id) == "running":
            return
        pair.backend.finish()
        pair.compute(pair.prefill)
    raise AssertionError(f"{request_id} is {pair.state(request_id)}")


# ---- decode -----------------------------------------------------------------------------------------


def test_a_newcomer_is_in_the_very_next_step() -> None:
    pair = Pair()
    pair.start("a", prompt_of(10), max_tokens=20)
    hand_over(pair, "a")
    pair.start("b", prompt_of(6, seed=1), max_tokens=3)
    hand_over(pair, "b")
    assert pair.decode.engine.row_ids() == ["a"], "the step that b found running"
    pair.compute(pair.decode)
    assert pair.decode.engine.row_ids() == ["a", "b"]
    pair.compute(pair.decode)
    pair.compute(pair.decode)
    assert pair.stream("b").reasons == {0: "length"}
    assert pair.decode.engine.row_ids() == ["a"], "who has ended leaves, who goes on stays"
    pair.finish()
    pair.check_answer("a", prompt_of(10), 20)
    pair.check_answer("b", prompt_of(6, seed=1), 3)


def test_nobody_waits_for_a_slower_hand_off() -> None:
    pair = Pair(chunk_tokens=8)
    pair.generate("slow", prompt_of(40), max_tokens=3)
    pair.start("fast", prompt_of(4, seed=1), max_tokens=3)
    for _ in range(6):
        pair.compute(pair.prefill)
    writes = {write.handle: write for write in pair.backend.held}
    of_fast = [write for write in writes.values() if len(write.copies) == 1][-1:]
    pair.backend.held = [*of_fast, *(write for write in writes.values() if write not in of_fast)]
    pair.write(1)
    assert pair.decode.engine.row_ids() == ["fast"]
    pair.compute()
    pair.compute()
    assert pair.stream("fast").reasons == {0: "length"}
    assert pair.state("slow") == "handoff"
    pair.finish()
    pair.check_answer("slow", prompt_of(40), 3)


def test_there_is_one_forward_of_decode_at_a_time() -> None:
    pair = Pair()
    pair.start("a", prompt_of(10))
    hand_over(pair, "a")
    pair.settle()
    assert len(pair.decode.engine.queued) == 1
    pair.finish()


def test_places_in_the_batch_are_not_exceeded() -> None:
    pair = Pair(max_running=2, decode_pages=64)
    for index in range(5):
        pair.generate(f"r{index}", prompt_of(6, seed=index), max_tokens=6)
    pair.finish()
    assert max(len(batch.rows) for batch in pair.decode.engine.batches) == 2
    for index in range(5):
        pair.check_answer(f"r{index}", prompt_of(6, seed=index), 6)


# ---- prefill ----------------------------------------------------------------------------------------


def test_several_prompts_share_a_forward_within_the_budget() -> None:
    pair = Pair(chunk_tokens=8)
    pair.generate("a", prompt_of(3))
    pair.generate("b", prompt_of(9, seed=1))
    pair.start("c", prompt_of(4, seed=2))
    pair.finish()
    rows = [[(row.row_id, row.start, row.end) for row in batch.rows] for batch in pair.prefill.engine.batches]
    assert rows == [[("a", 0, 3), ("b", 0, 5)], [("b", 5, 9), ("c", 0, 4)]]
    for seed, (name, length) in enumerate([("a", 3), ("b", 9), ("c", 4)]):
        pair.check_answer(name, prompt_of(length, seed), 4)


def test_the_number_of_rows_is_bounded_too() -> None:
    pair = Pair(chunk_tokens=100, max_rows=2)
    for index in range(3):
        pair.generate(f"r{index}", prompt_of(5, seed=index))
    pair.finish()
    assert [len(batch.rows) for batch in pair.prefill.engine.batches] == [2, 1]


def test_at_most_two_forwards_of_prefill_are_on_the_engine() -> None:
    pair = Pair(chunk_tokens=4)
    pair.start("a", prompt_of(20))
    assert len(pair.prefill.engine.queued) == 2
    pair.compute()
    assert len(pair.prefill.engine.queued) == 2
    pair.finish()


def test_a_prompt_that_waits_for_pages_lets_nobody_pass() -> None:
    pair = Pair(prefill_pages=8, decode_pages=64)
    pair.generate("a", prompt_of(20))
    pair.generate("long", prompt_of(24, seed=1))
    pair.start("short", prompt_of(4, seed=2))
    assert {row.row_id for batch in pair.prefill.engine.batches for row in batch.rows} == {"a"}
    pair.finish()
    order = list(dict.fromkeys(row.row_id for batch in pair.prefill.engine.batches for row in batch.rows))
    assert order == ["a", "long", "short"]


# ---- the prefix cache -------------------------------------------------------------------------------


def test_cached_pages_travel_before_the_first_forward() -> None:
    pair = Pair(chunk_tokens=8, decode_has_cache=False)
    shared = prompt_of(13)
    pair.start("a", shared)
    pair.finish()
    assert pair.stream("a").num_cached_tokens == 0
    assert pair.prefill.report.load(pair.now).num_locked_pages == 0

    pair.journal.clear()
    prompt = (*shared[:12], *prompt_of(7, seed=5))
    pair.start("b", prompt)
    assert pair.journal == [
        "write page 0",
        "write page 1",
        "write page 2",
        "prefill forward b [12, 19)",
    ]
    assert pair.prefill.report.load(pair.now).num_locked_pages == 3
    pair.finish()
    pair.check_answer("b", prompt, 4)
    assert pair.stream("b").num_cached_tokens == 12
    load = pair.prefill.report.load(pair.now)
    assert (load.num_locked_pages, load.num_cached_prompt_tokens) == (0, 12)


@pytest.mark.parametrize(("num_tokens", "num_cached"), [(12, 8), (13, 12), (3, 0), (4, 0), (5, 4)])
def test_at_least_one_token_is_computed(num_tokens: int, num_cached: int) -> None:
    pair = Pair()
    for name in ("a", "b"):
        pair.start(name, prompt_of(num_tokens))
        pair.finish()
    assert pair.stream("b").num_cached_tokens == num_cached
    pair.check_answer("b", prompt_of(num_tokens), 4)


def test_equal_prompts_at_the_same_time_are_computed_twice_and_cached_once() -> None:
    pair = Pair(chunk_tokens=16)
    pair.generate("a", prompt_of(12))
    pair.start("b", prompt_of(12))
    pair.finish()
    pair.check_answer("a", prompt_of(12), 4)
    pair.check_answer("b", prompt_of(12), 4)
    assert pair.prefill.report.load(pair.now).num_used_pages == 0
    assert pair.prefill.allocator.counts().shared == 3


def test_the_least_recently_used_pages_make_room() -> None:
    pair = Pair(prefill_pages=8, decode_has_cache=False)
    for seed in (1, 2):
        pair.start(f"first {seed}", prompt_of(16, seed))
        pair.finish()
    assert pair.prefill.allocator.num_free == 0
    pair.start("again 1", prompt_of(16, seed=1), max_tokens=1)
    pair.finish()
    pair.start("new", prompt_of(16, seed=3))
    pair.finish()
    pair.start("again 1 once more", prompt_of(16, seed=1))
    pair.finish()
    pair.start("again 2", prompt_of(16, seed=2))
    pair.finish()
    assert pair.stream("again 1 once more").num_cached_tokens == 12
    assert pair.stream("again 2").num_cached_tokens == 0
    for seed in (1, 2):
        pair.check_answer(f"first {seed}", prompt_of(16, seed), 4)


def test_pages_that_are_in_use_are_not_evicted() -> None:
    pair = Pair(prefill_pages=8)
    pair.start("a", prompt_of(16))
    pair.compute()
    pair.compute()  # computed and in the cache; on the wire
    pair.start("b", prompt_of(24, seed=1))
    assert pair.prefill.engine.rows_of("b") == [], "it waits for pages that nobody may take"
    pair.write()
    assert pair.prefill.engine.rows_of("b") != []
    pair.finish()
    pair.check_answer("a", prompt_of(16), 4)
    pair.check_answer("b", prompt_of(24, seed=1), 4)


@pytest.mark.parametrize(
    ("start", "num_cached"), [(0, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12), (30, 12)]
)
def test_prompt_logprobs_use_no_cached_prefix_past_the_first_position_asked_for(
    start: int, num_cached: int
) -> None:
    pair = Pair()
    prompt = prompt_of(14)
    pair.start("a", prompt)
    pair.finish()
    pair.start("b", prompt, num_prompt_logprobs=0, prompt_logprobs_start=start)
    pair.finish()
    stream = pair.stream("b")
    assert stream.num_cached_tokens == num_cached
    logprobs = [TokenLogprob(prompt[p], -float(p)) for p in range(max(1, start), 14)]
    assert list(stream.prompt_logprobs) == ([None, *logprobs] if start == 0 else logprobs)


def test_without_a_cache_everything_is_computed() -> None:
    pair = Pair(has_cache=False, decode_has_cache=False)
    for name in ("a", "b"):
        pair.start(name, prompt_of(12))
        pair.finish()
        pair.check_answer(name, prompt_of(12), 4)
    assert pair.prefill.report.load(pair.now).num_prompt_tokens_computed == 24


# ---- streaming --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "sizes"), [(1, [1] * 10), (3, [1, 3, 3, 3]), (4, [1, 4, 4, 1]), (0, [10])]
)
def test_stream_interval(interval: int, sizes: list[int]) -> None:
    pair = Pair()
    pair.start("a", prompt_of(10), max_tokens=10, stream_interval=interval)
    pair.finish()
    pair.check_answer("a", prompt_of(10), 10)
    assert pair.stream("a").message_sizes == sizes


def test_a_gap_is_sent_again() -> None:
    pair = Pair()
    pair.start("a", prompt_of(10), max_tokens=6)
    pair.run()
    sent = pair.decode.server.sent[ROUTER]
    kept = [message for message in sent if isinstance(message, TokenOutputs)][:2]
    sent.clear()
    pair.to_decode(ResendFrom(request_id="a", attempt=1, choice=0, position=2))
    stream = read_stream([*kept, *sent], "a")
    assert stream.tokens == {0: expected_tokens(prompt_of(10), 6)}
    assert stream.reasons == {0: "length"}
    pair.finish()


def test_a_gap_while_running_is_closed_at_once() -> None:
    pair = Pair()
    pair.start("a", prompt_of(10), max_tokens=8, stream_interval=0)
    hand_over(pair, "a")
    pair.compute()
    assert pair.tokens("a") == []
    pair.to_decode(ResendFrom(request_id="a", attempt=1, choice=0, position=0))
    assert pair.tokens("a") == expected_tokens(prompt_of(10), 2)
    pair.finish()
    pair.check_answer("a", prompt_of(10), 8)


@pytest.mark.parametrize(("request_id", "position"), [("unknown", 0), ("a", 99)])
def test_what_is_not_on_record_fails_the_attempt(request_id: str, position: int) -> None:
    pair = Pair()
    pair.start("a", prompt_of(10))
    pair.run()
    pair.to_decode(ResendFrom(request_id=request_id, attempt=1, choice=0, position=position))
    failure = pair.last_reply(pair.decode)
    assert isinstance(failure, AttemptFailed)
    assert (failure.request_id, failure.retriable) == (request_id, True)
    pair.finish()
