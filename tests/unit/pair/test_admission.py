"""Admission and growth: what is let in never runs out of pages, and everyone's turn comes."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.simulation.tokens import VOCAB_SIZE

from .cluster import ADDRESS, Pair, expected_tokens, prompt_of

NOTHING_IS_RETRACTED = 11.0


@dataclasses.dataclass(frozen=True)
class Ask:
    num_tokens: int
    max_tokens: int
    num_choices: int
    num_stops: int  # stop ids among the tokens of the first choice
    shares_prompt: bool
    turns_before: int  # forwards and writes that end before it arrives


ASKS = st.lists(
    st.builds(
        Ask,
        num_tokens=st.integers(1, 30),
        max_tokens=st.integers(1, 14),
        num_choices=st.integers(1, 3),
        num_stops=st.integers(0, 2),
        shares_prompt=st.booleans(),
        turns_before=st.integers(0, 3),
    ),
    min_size=1,
    max_size=10,
)


class Crowd:
    """Sends the requests, some cancelled on the way, and compares each one's end with the formula."""

    def __init__(self, pair: Pair, asks: list[Ask], cancelled: set[int]) -> None:
        self.pair = pair
        self.asks = asks
        self.cancelled = cancelled

    def prompt(self, index: int) -> tuple[int, ...]:
        ask = self.asks[index]
        return prompt_of(ask.num_tokens, seed=0 if ask.shares_prompt else index + 1)

    def stops(self, index: int) -> tuple[int, ...]:
        ask = self.asks[index]
        return tuple(expected_tokens(self.prompt(index), ask.max_tokens)[-ask.num_stops :][: ask.num_stops])

    def run(self) -> None:
        pair = self.pair
        for index, ask in enumerate(self.asks):
            pair.start(
                f"r{index}",
                self.prompt(index),
                max_tokens=ask.max_tokens,
                choices=tuple(range(ask.num_choices)),
                stop_token_ids=self.stops(index),
            )
            for _ in range(ask.turns_before):
                pair.backend.finish(1)
                pair.compute()
            if index in self.cancelled:
                pair.cancel(f"r{index}")
        for _ in range(40):  # who lets others pass waits on the clock
            pair.run()
            if not pair.decode.requests:
                break
            pair.advance(0.5)
        pair.finish()
        for index in range(len(self.asks)):
            self.check(index)

    def check(self, index: int) -> None:
        stream, ask = self.pair.stream(f"r{index}"), self.asks[index]
        for choice in range(ask.num_choices):
            tokens = expected_tokens(self.prompt(index), ask.max_tokens, choice)
            ends = [at for at, token in enumerate(tokens) if token in self.stops(index)]
            wanted = tokens[: ends[0] + 1] if ends else tokens
            got = stream.tokens.get(choice, [])
            if stream.failure is not None and stream.failure.code == "retracted":
                assert got == wanted[: len(got)], "it goes on from these in another attempt"
            elif stream.failure is not None:
                assert stream.failure.code in ("busy", "invalid")
                assert got == []
            elif index in self.cancelled and choice not in stream.finishes:
                assert got == wanted[: len(got)]
            else:
                assert got == wanted
                assert stream.reasons[choice] == ("stop" if ends else "length")


@settings(max_examples=40, deadline=None)
@given(
    asks=ASKS,
    decode_pages=st.integers(6, 40),
    prefill_pages=st.integers(8, 24),
    chunk_tokens=st.integers(1, 12),
    max_running=st.integers(1, 6),
    is_colocated=st.booleans(),
    has_started=st.booleans(),
    cancelled=st.sets(st.integers(0, 9), max_size=2),
)
def test_every_request_ends_once_with_the_right_tokens_and_every_page_comes_back(
    asks: list[Ask],
    decode_pages: int,
    prefill_pages: int,
    chunk_tokens: int,
    max_running: int,
    is_colocated: bool,
    has_started: bool,
    cancelled: set[int],
) -> None:
    """A sequence that could not grow would raise in RequestPages, and end the test."""
    pair = Pair(
        decode_pages=decode_pages,
        prefill_pages=prefill_pages,
        chunk_tokens=chunk_tokens,
        max_running=max_running,
        is_colocated=is_colocated,
    )
    pair.backend.has_started = has_started
    Crowd(pair, asks, cancelled).run()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"choices": ()}, "choices"),
        ({"choices": (0, 1, 0)}, "choices"),
        ({"stream_interval": -1}, "stream_interval"),
    ],
)
def test_a_request_that_makes_no_sense_ends_alone(options: dict[str, Any], reason: str) -> None:
    """Our routers send none, but what a client sends must never end a scheduler."""
    pair = Pair()
    pair.start("good", prompt_of(10))
    pair.start("bad", prompt_of(10, seed=1), **options)
    failure = pair.stream("bad").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("invalid", False)
    assert reason in failure.reason
    pair.finish()
    pair.check_answer("good", prompt_of(10), 4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": (VOCAB_SIZE,) * 10}, "token ids from 0"),
        ({"num_logprobs": VOCAB_SIZE + 1}, "logprobs"),
        ({"num_prompt_logprobs": VOCAB_SIZE + 1}, "logprobs"),
        ({"num_logprobs": 0, "logprob_token_ids": (VOCAB_SIZE,)}, "logprobs of token ids"),
    ],
)
def test_what_the_model_cannot_compute_is_refused_by_both_nodes(
    change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill does not rely on decode: whoever is its peer, an id outside of its vocabulary ends no node."""
    pair = Pair()
    pair.start("bad", **{"prompt": prompt_of(10), **change})
    failure = pair.stream("bad").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("invalid", False)
    assert reason in failure.reason
    monkeypatch.setattr(pair.decode.waiting, "_impossible", lambda _: None)
    pair.start("worse", **{"prompt": prompt_of(10), **change})
    failure = pair.stream("worse").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("invalid", False)
    assert reason in failure.reason


def test_a_prompt_longer_than_this_node_takes_is_invalid() -> None:
    """The router may know a longer context than the node was started with."""
    pair = Pair(max_model_len=12)
    pair.start("long", prompt_of(12))
    failure = pair.stream("long").failure
    assert failure is not None
    assert (failure.code, failure.retriable) == ("invalid", False)
    assert "12 tokens" in failure.reason
    pair.start("fits", prompt_of(11))
    pair.finish()
    assert pair.stream("fits").reasons == {0: "length"}
    assert pair.tokens("fits") == expected_tokens(prompt_of(11), 1)


def test_growth_is_counted_when_a_request_is_let_in() -> None:
    pair = Pair(decode_pages=8, conservativeness=NOTHING_IS_RETRACTED)
    pair.start("a", prompt_of(8), max_tokens=13)  # 2 pages now, 5 in the end
    assert pair.decode.allocator.num_free == 6
    assert pair.decode.capacity().pages == 3
    pair.start("b", prompt_of(8, seed=1), max_tokens=9)  # 4: too many
    assert pair.state("b") == "waiting"
    pair.start("c", prompt_of(8, seed=2), max_tokens=5)  # 3: b is overtaken
    assert pair.state("c") == "handoff"
    pair.finish()
    pair.check_answer("b", prompt_of(8, seed=1), 9)


def test_who_was_overtaken_for_long_is_waited_for() -> None:
    pair = Pair(decode_pages=8)
    pair.start("a", prompt_of(8), max_tokens=13)
    pair.start("big", prompt_of(16, seed=1), max_tokens=5)  # 5 pages of 3
    pair.advance(5.5)
    pair.start("small", prompt_of(4, seed=2), max_tokens=1)
    assert pair.state("small") == "waiting"
    pair.finish()
    pair.check_answer("big", prompt_of(16, seed=1), 5)
    pair.check_answer("small", prompt_of(4, seed=2), 1)


def test_at_most_half_of_the_pool_is_exposed_to_one_prefill_node() -> None:
    pair = Pair(decode_pages=8)
    pair.start("a", prompt_of(12), max_tokens=1)
    pair.start("b", prompt_of(8, seed=1), max_tokens=1)
    assert pair.state("b") == "waiting"
    pair.start("c", prompt_of(4, seed=2), max_tokens=1)
    assert pair.state("c") == "handoff"
    assert pair.decode.allocator.counts().exposed == 4
    pair.finish()
    pair.check_answer("b", prompt_of(8, seed=1), 1)


def test_one_request_may_expose_more_than_half() -> None:
    pair = Pair(decode_pages=8)
    pair.start("a", prompt_of(30), max_tokens=3)
    assert pair.decode.allocator.counts().exposed == 8
    pair.finish()
    pair.check_answer("a", prompt_of(30), 3)


def test_who_needs_more_than_half_is_not_overtaken_for_ever() -> None:
    pair = Pair(decode_pages=16)
    pair.start("first", prompt_of(4, seed=1), max_tokens=1)
    pair.start("big", prompt_of(40), max_tokens=1)
    assert pair.state("big") == "waiting"
    pair.advance(5.5)
    pair.start("small", prompt_of(4, seed=2), max_tokens=1)
    assert pair.state("small") == "waiting", "the line waits for big now"
    pair.finish()
    pair.check_answer("big", prompt_of(40), 1)
    pair.check_answer("small", prompt_of(4, seed=2), 1)


def test_a_lost_prefill_node_does_not_block_the_line() -> None:
    """Its pages stay in quarantine, perhaps for ever; who needs them lets the others pass."""
    pair = Pair(decode_pages=16)
    pair.start("lost", prompt_of(24), max_tokens=1)
    successor = msgspec.structs.replace(pair.prefill.identity, incarnation="prefill-2")
    pair.prefill.rooms._identity = successor
    pair.network.cut()
    pair.advance(1.0)
    assert pair.decode.rooms.ready_peers() == {"prefill-2": ADDRESS}
    assert pair.decode.rooms.num_stranded_pages == 6
    assert pair.decode.allocator.counts().quarantined == 6
    pair.start("big", prompt_of(48, seed=1), max_tokens=1, prefill="prefill-2")
    pair.advance(5.5)
    pair.start("small", prompt_of(4, seed=2), max_tokens=1, prefill="prefill-2")
    pair.run()
    pair.check_answer("small", prompt_of(4, seed=2), 1)
    assert pair.state("big") == "waiting"
    pair.decode.handoffs.assert_death("prefill-1", pair.now)
    pair.finish()
    pair.check_answer("big", prompt_of(48, seed=1), 1)
