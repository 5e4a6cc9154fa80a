"""One hand-off: what overlaps, what leaves early, what must wait; busy, refused and invalid ones."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest

from pdserve.messages.peer import PrefillRequest
from pdserve.messages.sampling import TokenLogprob
from pdserve.messages.timeline import unaccounted_s

from .cluster import ADDRESS, LAYOUT, PAGE_SIZE, Pair, expected_tokens, kv_of, prompt_of


def test_each_chunk_is_on_the_wire_while_the_next_one_computes() -> None:
    pair = Pair(chunk_tokens=8)
    pair.start("a", prompt_of(21))
    pair.compute()
    assert pair.journal == [
        "prefill forward a [0, 8)",
        "prefill forward a [8, 16)",  # waits on the engine: it never pauses for the loop
        "write page 0",
        "write page 1",
        "prefill forward a [16, 21)",
    ]
    assert pair.backend.num_outstanding == 1, "two neighbours travel as one write"
    pair.compute()
    pair.compute()
    assert pair.journal[5:] == [
        "write page 2",
        "write page 3",
        "write page 4",
        "write page 5",
        "FirstToken arrives",
    ]
    assert pair.backend.num_pages_written == 0, "every write of every chunk is held still"
    pair.finish()
    pair.check_answer("a", prompt_of(21), 4)


def test_the_first_token_reaches_the_client_before_the_last_pages_land() -> None:
    pair = Pair(chunk_tokens=8)
    prompt = prompt_of(14)
    pair.start("a", prompt)
    pair.compute()
    pair.write()
    pair.compute()
    assert pair.tokens("a") == expected_tokens(prompt, 1)
    assert pair.state("a") == "handoff"
    assert pair.backend.num_outstanding == 1

    pair.write()
    assert pair.journal[-2:] == ["HandoffDone arrives", "decode forward a [14, 15)"]
    assert pair.state("a") == "running"
    pair.finish()
    pair.check_answer("a", prompt, 4)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 7, 8, 9, 16, 17, 23, 24, 25])
def test_decode_gets_exactly_the_prompts_pages_and_computes_none_of_it(num_tokens: int) -> None:
    pair = Pair(chunk_tokens=8)
    prompt = prompt_of(num_tokens)
    pair.start("a", prompt)
    while pair.state("a") == "handoff":
        assert pair.decode.engine.batches == []
        pair.backend.finish()
        pair.compute(pair.prefill)
    (row,) = pair.decode.engine.batches[0].rows
    assert (row.start, row.end) == (num_tokens, num_tokens + 1)
    values = [value for page in row.pages for value in pair.decode.pool.pages[page]]
    assert values[:num_tokens] == kv_of(prompt, "weights-1")
    assert all(value is None for value in values[num_tokens:])

    pair.finish()
    pair.check_answer("a", prompt, 4)
    num_pages = -(-num_tokens // PAGE_SIZE)
    assert pair.backend.num_bytes == num_pages * LAYOUT.page_bytes
    assert pair.decode.report.load(pair.now).num_prompt_tokens_computed == 0
    assert pair.prefill.report.load(pair.now).num_prompt_tokens_computed == num_tokens


def test_the_last_write_alone_completes_a_hand_off() -> None:
    pair = Pair(chunk_tokens=4, decode_pages=64)
    for name in ("x", "y"):  # leaves holes, so the pages travel one by one
        pair.generate(name, prompt_of(4, seed=ord(name)), max_tokens=1)
    pair.finish()
    pair.start("a", prompt_of(12))
    for _ in range(3):
        pair.compute()
    num_writes = pair.backend.num_outstanding
    for _ in range(num_writes):
        assert pair.decode.engine.batches == []
        pair.write(1)
    assert pair.decode.engine.row_ids() == ["a"]
    pair.finish()
    pair.check_answer("a", prompt_of(12), 4)


def test_without_overlap_no_page_travels_before_the_last_chunk() -> None:
    pair = Pair(overlaps_transfer=False)
    pair.start("a", prompt_of(20))
    pair.compute()
    pair.compute()
    assert pair.backend.num_outstanding == 0
    pair.compute()
    pair.finish()
    pair.check_answer("a", prompt_of(20), 4)
    assert pair.stream("a").span_names.count("wire") == 1


def test_the_timeline_of_a_request_is_reported_with_its_last_token() -> None:
    pair = Pair()
    pair.start("a", prompt_of(10))
    pair.finish()
    stream = pair.stream("a")
    there = ["decode_queue", "reserve", "to_prefill"]
    prefill = ["prefill_queue", *["engine_queue", "prefill_chunk"] * 2, "first_token"]
    rest = ["from_prefill", "relay", "handoff", "wire", "wire", "last_pages", "decode_wait"]
    assert stream.span_names == [*there, *prefill, *rest, "first_decode_step"]
    assert stream.weight_version == "default"
    # Each stage on the way to the first token begins where the one before ended.
    chain = stream.spans[: stream.span_names.index("relay") + 1]
    for before, after in pairwise(chain):
        assert after.start_unix_s == pytest.approx(before.end_unix_s, abs=1e-12)
    assert [span.num_tokens for span in chain if span.name == "prefill_chunk"] == [8, 2]
    assert unaccounted_s(stream.spans, chain[0].start_unix_s, chain[-1].end_unix_s) == pytest.approx(
        0.0, abs=1e-12
    )


def test_logprobs_of_prompt_and_first_token_come_from_prefill() -> None:
    pair = Pair(chunk_tokens=4)
    prompt = prompt_of(11)
    pair.start("a", prompt, num_logprobs=0, num_prompt_logprobs=0)
    pair.finish()
    pair.check_answer("a", prompt, 4)
    logprobs = tuple(TokenLogprob(prompt[position], -float(position)) for position in range(1, 11))
    assert pair.stream("a").prompt_logprobs == (None, *logprobs)


def test_a_new_attempt_goes_on_behind_the_kept_tokens() -> None:
    pair = Pair()
    prompt = prompt_of(10)
    tokens = expected_tokens(prompt, 8)
    asked: dict[str, Any] = {"num_logprobs": 0, "num_prompt_logprobs": 0, "logprob_token_ids": (9,)}
    pair.start("a", prompt, max_tokens=8, attempt=2, output_ids=tokens[:3], **asked)
    pair.finish()
    stream = pair.stream("a", 2, base=3)
    assert stream.tokens == {0: tokens[3:]}
    assert stream.reasons == {0: "length"}
    assert stream.prompt_logprobs == (), "they belong to the first attempt"
    assert [logprob.named for logprob in stream.logprobs[0]] == [((9, -9.0),)] * 5
    assert all(row.num_prompt_tokens == 10 for row in pair.prefill.engine.rows_of("a"))


# ---- what ends before it begins ---------------------------------------------------------------------


def test_a_full_queue_is_answered_busy_and_costs_nothing() -> None:
    pair = Pair(prefill_pages=4, max_waiting=1)
    pair.start("a", prompt_of(16))  # takes all pages of prefill
    pair.start("b", prompt_of(8, seed=1))  # waits
    pair.start("c", prompt_of(8, seed=2))
    failure = pair.stream("c").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("busy", True)
    assert pair.state("c") == ""
    assert pair.decode.allocator.counts().quarantined == 0
    assert pair.decode.allocator.counts().exposed == 6, "those of a and b alone"
    pair.finish()
    pair.check_answer("a", prompt_of(16), 4)
    pair.check_answer("b", prompt_of(8, seed=1), 4)


def test_a_request_of_other_weights_is_a_version_skew() -> None:
    pair = Pair()
    pair.network.holds_to_prefill = True
    pair.generate("a", prompt_of(9))
    pair.step()
    queue = pair.network.wires[ADDRESS].to_prefill
    request = queue.pop()
    assert isinstance(request, PrefillRequest)
    queue.append(msgspec.structs.replace(request, weight_version="older"))
    pair.network.holds_to_prefill = False
    pair.settle()
    failure = pair.stream("a").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("version_skew", True)
    assert pair.prefill.engine.batches == []
    assert pair.decode.allocator.num_free == 32, "it was drained at once: nothing was written"
    pair.finish()


def test_an_unknown_prefill_node_is_not_ready() -> None:
    pair = Pair()
    pair.network.cut()
    pair.settle()
    pair.start("a", prompt_of(9))
    failure = pair.stream("a").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("not_ready", True)
    pair.finish()


def test_what_decode_could_never_hold_is_invalid() -> None:
    pair = Pair(decode_pages=8, max_running=2)
    pair.start("pages", prompt_of(9), max_tokens=100)
    pair.start("places", prompt_of(4), choices=(0, 1, 2), max_tokens=1)
    for name in ("pages", "places"):
        failure = pair.stream(name).failure
        assert failure is not None
        assert (failure.code, failure.retriable) == ("invalid", False)
    pair.start("fits", prompt_of(9), max_tokens=24)  # the last token's KV is never written: 32 slots
    pair.finish()
    pair.check_answer("fits", prompt_of(9), 24)


def test_what_prefill_could_never_hold_is_invalid() -> None:
    pair = Pair(prefill_pages=4)
    pair.start("a", prompt_of(17))
    failure = pair.stream("a").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("invalid", False)
    pair.start("b", prompt_of(16))
    pair.finish()
    pair.check_answer("b", prompt_of(16), 4)


def test_a_request_that_was_sent_twice_is_served_once() -> None:
    pair = Pair()
    pair.generate("a", prompt_of(9))
    pair.start("a", prompt_of(9))
    pair.finish()
    pair.check_answer("a", prompt_of(9), 4)
    assert pair.backend.num_pages_written == 3


# ---- several choices --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [3, 8, 10])
def test_choices_share_whole_pages_and_copy_the_partial_one(num_tokens: int) -> None:
    pair = Pair()
    prompt = prompt_of(num_tokens)
    pair.start("a", prompt, choices=(0, 1, 2), max_tokens=6)
    while pair.state("a") == "handoff":
        pair.backend.finish()
        pair.compute(pair.prefill)
    counts = pair.decode.allocator.counts()
    assert counts.shared == num_tokens // PAGE_SIZE
    assert counts.private == 3, "one page each that it writes alone"
    pair.finish()
    for choice in (0, 1, 2):
        pair.check_answer("a", prompt, 6, choice)
    num_pages = -(-num_tokens // PAGE_SIZE)
    assert pair.backend.num_pages_written == num_pages, "handed over once"


def test_choices_end_one_by_one() -> None:
    pair = Pair()
    prompt = prompt_of(10)
    # The stop ids end choice 0 at its 3rd token and choice 1 at its first; choice 2 runs to its length.
    stops = (expected_tokens(prompt, 3, 0)[2], expected_tokens(prompt, 1, 1)[0])
    pair.start("a", prompt, choices=(0, 1, 2), max_tokens=5, stop_token_ids=stops)
    pair.finish()
    stream = pair.stream("a")
    assert stream.reasons == {0: "stop", 1: "stop", 2: "length"}
    assert {choice: len(tokens) for choice, tokens in stream.tokens.items()} == {0: 3, 1: 1, 2: 5}
    assert [len(batch.rows) for batch in pair.decode.engine.batches] == [2, 2, 1, 1]


def test_the_choice_that_owned_the_prompt_may_end_with_the_first_token() -> None:
    pair = Pair()
    prompt = prompt_of(10)
    pair.start(
        "a", prompt, choices=(0, 1, 2), max_tokens=5, stop_token_ids=(expected_tokens(prompt, 1, 0)[0],)
    )
    pair.finish()
    assert pair.stream("a").reasons == {0: "stop", 1: "length", 2: "length"}
    pair.check_answer("a", prompt, 5, 2)


def test_a_failed_write_is_counted_and_the_pair_goes_on() -> None:
    pair = Pair()
    pair.start("a", prompt_of(10))
    pair.compute(pair.prefill)
    pair.compute(pair.prefill)
    pair.backend.fail(1)
    pair.settle()
    assert pair.stream("a").failure is not None
    lines = pair.prefill.metrics.render().splitlines()
    (sample,) = [line for line in lines if line.startswith("pd_failed_writes_total{")]
    assert sample.endswith(" 1.0")
    assert pair.decode.rooms.ready_peers() == {"prefill-1": ADDRESS}
    pair.start("b", prompt_of(10))
    pair.finish()
    assert pair.tokens("b") == expected_tokens(prompt_of(10), 4)
    assert "PeerWelcome arrives" not in pair.journal, "on the connection that there was"


@pytest.mark.parametrize("how", ["max_tokens", "eos", "stop id"])
def test_a_first_token_may_be_the_last(how: str) -> None:
    prompt = prompt_of(10)
    (token,) = expected_tokens(prompt, 1)
    pair = Pair(eos_token_ids=(token,) if how == "eos" else (0,))
    pair.start(
        "a",
        prompt,
        max_tokens=1 if how == "max_tokens" else 8,
        stop_token_ids=(token,) if how == "stop id" else (),
    )
    pair.compute()
    pair.compute()
    stream = pair.stream("a")
    assert stream.tokens == {0: [token]}
    assert stream.reasons == {0: "length" if how == "max_tokens" else "stop"}
    assert pair.state("a") == ""
    assert pair.decode.engine.batches == []
    assert pair.decode.allocator.num_free == 32, "writes that had not started were cancelled: drained at once"
    pair.finish()


def test_pages_of_a_first_token_end_wait_for_writes_that_have_started() -> None:
    pair = Pair()
    pair.backend.has_started = True
    pair.start("a", prompt_of(10), max_tokens=1)
    pair.compute()
    pair.compute()
    assert pair.stream("a").reasons == {0: "length"}
    assert pair.decode.allocator.counts().quarantined == 3
    pair.write()
    assert pair.decode.allocator.num_free == 32
    pair.finish()
