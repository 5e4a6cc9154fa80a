"""The prefix cache on decode: what a follow-up turn transfers, computes and leaves behind."""

from __future__ import annotations

from typing import Any

import pytest

from pdserve.messages.node import (
    CallReply,
    FlushCache,
    GetMetrics,
    MetricsReply,
)
from pdserve.messages.sampling import TokenLogprob
from pdserve.messages.weights import CommitWeights, FromDisk, PrepareWeights

from .cluster import LAYOUT, PAGE_SIZE, Pair, expected_tokens, prompt_of

ADMIN = b"admin"
ALWAYS_PREFILL = 0  # of --local-prefill-threshold


def first_turn(pair: Pair, num_tokens: int = 18, max_tokens: int = 9, **options: Any) -> tuple[int, ...]:  # noqa: ANN401
    """A request up to its end; returns its whole conversation."""
    prompt = prompt_of(num_tokens)
    pair.start("first", prompt, max_tokens=max_tokens, **options)
    pair.finish()
    pair.check_answer("first", prompt, max_tokens)
    return (*prompt, *expected_tokens(prompt, max_tokens))


def num_received(pair: Pair) -> int:
    return pair.decode.report.load(pair.now).num_prompt_tokens_received


@pytest.mark.parametrize("num_new", [1, 2, 5, 6, 13])
def test_a_follow_up_transfers_only_what_decode_lacks(num_new: int) -> None:
    pair = Pair(local_prefill_threshold=ALWAYS_PREFILL)
    conversation = first_turn(pair)  # 27 tokens, of which 26 are computed: 6 whole pages
    before = pair.backend.num_bytes
    prompt = (*conversation, *prompt_of(num_new, seed=5))
    pair.start("next", prompt)
    pair.finish()
    pair.check_answer("next", prompt, 4)
    num_pages = -(-len(prompt) // PAGE_SIZE) - 6
    assert pair.backend.num_bytes - before == num_pages * LAYOUT.page_bytes
    assert pair.stream("next").num_cached_tokens == 16, "prefill's own: it computed the rest"
    load = pair.decode.report.load(pair.now)
    assert (load.num_prompt_tokens_computed, load.num_cached_prompt_tokens) == (0, 24)
    assert load.num_prompt_tokens_received == 18 + len(prompt) - 24


def test_without_the_cache_everything_is_transferred() -> None:
    pair = Pair(decode_has_cache=False)
    conversation = first_turn(pair)
    assert pair.decode.allocator.num_free == pair.decode.allocator.num_pages
    before = pair.backend.num_bytes
    pair.start("next", conversation)
    pair.finish()
    pair.check_answer("next", conversation, 4)
    assert pair.backend.num_bytes - before == 7 * LAYOUT.page_bytes


def test_a_full_hit_needs_no_room() -> None:
    pair = Pair()
    first_turn(pair)
    before, num_forwards = pair.backend.num_bytes, len(pair.prefill.engine.batches)
    prompt = prompt_of(18)  # 16 of its tokens are there in whole pages
    pair.start("again", prompt, max_tokens=5)
    assert pair.state("again") == "local_prefill"
    pair.finish()
    pair.check_answer("again", prompt, 5)
    assert pair.backend.num_bytes == before
    assert len(pair.prefill.engine.batches) == num_forwards
    row = pair.decode.engine.rows_of("again")[0]
    assert (row.start, row.end) == (16, 18)
    assert pair.stream("again").num_cached_tokens == 16
    assert pair.decode.report.load(pair.now).num_prompt_tokens_computed == 2


@pytest.mark.parametrize(
    ("num_tokens", "threshold", "is_local"), [(8, 8, True), (9, 8, False), (5, 0, False)]
)
def test_the_threshold_counts_missing_tokens(num_tokens: int, threshold: int, is_local: bool) -> None:
    pair = Pair(local_prefill_threshold=threshold)
    pair.start("new", prompt_of(num_tokens))
    assert pair.state("new") == ("local_prefill" if is_local else "handoff")
    pair.finish()
    pair.check_answer("new", prompt_of(num_tokens), 4)


def test_a_prompt_that_decode_holds_nothing_of_goes_to_prefill() -> None:
    pair = Pair()
    pair.start("short", prompt_of(3))
    assert pair.state("short") == "handoff"
    pair.finish()


def test_it_is_computed_where_less_is_missing() -> None:
    """The answer of the first turn is on decode alone."""
    pair = Pair(local_prefill_chunk=4)
    conversation = first_turn(pair, num_tokens=6, max_tokens=40)
    prompt = (*conversation, *prompt_of(12, seed=3))
    pair.generate("next", prompt, num_prefill_tokens_ahead=len(prompt) - 4)
    pair.settle()
    assert pair.state("next") == "local_prefill", "14 tokens here, 54 on prefill"
    pair.finish()
    pair.check_answer("next", prompt, 4)
    pair.generate("other", (*prompt_of(6), *prompt_of(20, seed=4)), num_prefill_tokens_ahead=6)
    pair.settle()
    assert pair.state("other") == "handoff", "22 tokens here, 6 on prefill"
    pair.finish()


def test_without_a_prefill_node_decode_prefills_in_short_chunks_beside_streams() -> None:
    pair = Pair(chunk_tokens=16, local_prefill_chunk=3)
    pair.network.cut()
    pair.start("stream", prompt_of(6), max_tokens=8, prefill="")
    pair.compute(pair.decode)
    pair.start("long", prompt_of(10, seed=1), max_tokens=3, prefill="")
    pair.run()
    pair.check_answer("stream", prompt_of(6), 8)
    pair.check_answer("long", prompt_of(10, seed=1), 3)
    chunks = [row.num_tokens for row in pair.decode.engine.rows_of("long")]
    assert chunks[:4] == [3, 3, 3, 1]
    assert pair.backend.num_bytes == 0


def test_a_lone_prompt_is_computed_in_long_chunks() -> None:
    pair = Pair(chunk_tokens=16, local_prefill_chunk=3)
    pair.start("long", prompt_of(10), max_tokens=1, prefill="")
    pair.finish()
    assert [row.num_tokens for row in pair.decode.engine.rows_of("long")] == [10]


@pytest.mark.parametrize("is_colocated", [False, True])
def test_only_requests_of_one_salt_share_prefixes(is_colocated: bool) -> None:
    """Neither on decode, in what was prefilled and in what was generated, nor on prefill."""
    pair = Pair(is_colocated=is_colocated)
    prompt = prompt_of(14)
    cached: dict[str, int] = {}
    for name, salt in (("a", ""), ("b", "mine"), ("c", "other"), ("d", "mine"), ("e", "")):
        pair.start(name, prompt, cache_salt=salt)
        pair.finish()
        pair.check_answer(name, prompt, 4)
        cached[name] = pair.stream(name).num_cached_tokens
    assert cached == {"a": 0, "b": 0, "c": 0, "d": 12, "e": 12}
    answer = (*prompt, *expected_tokens(prompt, 4), 7)
    for name, salt, num_cached in (("f", "mine", 16), ("g", "third", 0)):
        pair.start(name, answer, cache_salt=salt)
        pair.finish()
        assert pair.stream(name).num_cached_tokens == num_cached


def test_choices_of_a_follow_up_share_what_is_cached() -> None:
    pair = Pair(local_prefill_threshold=ALWAYS_PREFILL)
    conversation = first_turn(pair)
    prompt = (*conversation, *prompt_of(7, seed=5))
    pair.start("next", prompt, choices=(0, 1, 2), max_tokens=6)
    pair.finish()
    for choice in range(3):
        pair.check_answer("next", prompt, 6, choice=choice)


def test_pages_are_shared_by_requests_that_run_at_the_same_time() -> None:
    pair = Pair(local_prefill_threshold=ALWAYS_PREFILL)
    prompt = prompt_of(16)
    pair.start("a", prompt, max_tokens=20)
    while pair.state("a") != "running":
        pair.compute(pair.prefill)
        pair.write()
    before = pair.backend.num_bytes
    pair.start("b", (*prompt, *prompt_of(3, seed=1)), max_tokens=3)
    assert pair.decode.cache.num_locked == 4
    pair.finish()
    assert pair.backend.num_bytes - before == LAYOUT.page_bytes
    pair.check_answer("a", prompt, 20)
    pair.check_answer("b", (*prompt, *prompt_of(3, seed=1)), 3)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_what_was_computed_before_an_early_end_stays(how: str) -> None:
    pair = Pair()
    prompt = prompt_of(9)
    pair.start("a", prompt, max_tokens=100, deadline_s=50.0)
    while len(pair.tokens("a")) < 8:
        pair.compute()
        pair.write()
    if how == "cancel":
        pair.cancel("a")
    else:
        pair.advance(60.0)
    pair.finish()
    assert pair.decode.cache.num_pages == (9 + 8 - 1) // PAGE_SIZE
    follow_up = (*prompt, *expected_tokens(prompt, 8))
    pair.start("b", follow_up)
    pair.finish()
    pair.check_answer("b", follow_up, 4)
    assert pair.stream("b").num_cached_tokens == 16


def test_a_room_that_fails_leaves_the_cached_prefix_as_it_was() -> None:
    """Late writes land in quarantine, which the backend of these tests checks page by page."""
    pair = Pair(local_prefill_threshold=ALWAYS_PREFILL)
    conversation = first_turn(pair)
    prompt = (*conversation, *prompt_of(9, seed=2))
    pair.start("next", prompt)
    while not pair.backend.held:
        pair.compute(pair.prefill)
    pair.backend.fail()
    pair.settle()
    failure = pair.stream("next").failure
    assert failure is not None
    assert failure.code == "transfer_failed"
    assert pair.decode.cache.num_locked == 0
    pair.start("again", prompt)
    pair.backend.land_late()
    pair.finish()
    pair.check_answer("again", prompt, 4)


def test_old_conversations_make_room_for_new_ones() -> None:
    pair = Pair(decode_pages=16)
    prompts = [prompt_of(20, seed) for seed in range(6)]
    for index, prompt in enumerate(prompts):
        pair.start(str(index), prompt)
        pair.finish()
        pair.check_answer(str(index), prompt, 4)
    assert pair.decode.cache.match(prompts[5]).num_tokens == 20
    assert pair.decode.cache.match(prompts[0]).num_tokens == 0


def test_a_flush_drops_it() -> None:
    pair = Pair()
    conversation = first_turn(pair)
    assert pair.decode.cache.num_pages == 6
    pair.to_decode(FlushCache(call_id=1), ADMIN)
    assert pair.last_reply(pair.decode, ADMIN) == CallReply(call_id=1, success=True, message="Cache flushed.")
    assert pair.decode.allocator.num_free == pair.decode.allocator.num_pages
    pair.start("next", conversation)
    assert pair.state("next") == "handoff"
    pair.finish()


def test_a_flush_waits_for_who_reads_it() -> None:
    pair = Pair()
    conversation = first_turn(pair)
    pair.start("next", conversation, max_tokens=6)
    pair.to_decode(FlushCache(call_id=1, timeout_s=0.0), ADMIN)
    reply = pair.last_reply(pair.decode, ADMIN)
    assert isinstance(reply, CallReply)
    assert not reply.success
    pair.finish()
    pair.check_answer("next", conversation, 6)


def test_other_weights_drop_it() -> None:
    pair = Pair()
    conversation = first_turn(pair)
    for node in (pair.prefill, pair.decode):
        deliver = pair.to_prefill if node is pair.prefill else pair.to_decode
        deliver(
            PrepareWeights(
                call_id=1, update_id="u", source=FromDisk(model_path="weights-2"), weight_version="2"
            ),
            ADMIN,
        )
        pair.run()
        deliver(CommitWeights(call_id=2, update_id="u"), ADMIN)
        assert pair.last_reply(node, ADMIN) == CallReply(call_id=2, success=True, message="2")
    assert pair.decode.cache.num_pages == 0
    pair.advance(5.0)
    pair.start("next", conversation)
    pair.finish()
    pair.check_answer("next", conversation, 4)
    assert pair.stream("next").num_cached_tokens == 0


def test_prompt_logprobs_of_a_prompt_that_is_cached() -> None:
    pair = Pair(local_prefill_threshold=1000)
    conversation = first_turn(pair)
    pair.start("scored", conversation, num_prompt_logprobs=0, prompt_logprobs_start=10)
    pair.finish()
    stream = pair.stream("scored")
    assert stream.num_cached_tokens == 8
    assert stream.prompt_logprobs == tuple(TokenLogprob(conversation[p], -float(p)) for p in range(10, 27))
    pair.start("scored whole", conversation, num_prompt_logprobs=0)
    pair.finish()
    assert len(pair.stream("scored whole").prompt_logprobs) == 27
    assert pair.stream("scored whole").num_cached_tokens == 0


def test_metrics_tell_the_tokens_apart() -> None:
    pair = Pair(local_prefill_threshold=4)
    conversation = first_turn(pair)
    pair.start("local", conversation)  # 3 of 27 are missing
    pair.finish()
    pair.start(
        "remote", (*conversation, *prompt_of(9, seed=3))
    )  # 28 of 36 are there: the first turn's answer
    pair.finish()
    pair.to_decode(GetMetrics(call_id=1), ADMIN)
    metrics = pair.last_reply(pair.decode, ADMIN)
    assert isinstance(metrics, MetricsReply)
    labels = '{model_name="model",role="decode"}'
    assert f"pd_computed_prompt_tokens_total{labels} 3.0" in metrics.text
    assert f"pd_received_tokens_total{labels} {18 + 12}.0" in metrics.text
    assert f"pd_prefix_cache_hits_total{labels} 48.0" in metrics.text
    assert num_received(pair) == 30
