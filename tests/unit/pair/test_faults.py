"""Anything that can go wrong, in any order: every request still ends once, and every page comes back."""

from __future__ import annotations

from typing import TypeAlias

from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.messages.node import AbortRequests

from .cluster import Pair, expected_tokens, prompt_of

# A name, and an amount: of tokens, writes or tenths of a second; for some it picks a request.
Step: TypeAlias = tuple[str, int]

NAMES = (
    "request",
    "request",
    "compute",
    "compute",
    "write",
    "write",
    "fail a write",
    "late writes land",
    "cut",
    "time",
    "cancel",
    "cancel one choice",
    "abort",
    "hold to decode",
    "hold to prefill",
    "let go",
    "cancels come too late",
    "freeze",
)
MAX_TOKENS = 6


class Trouble:
    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.prompts: list[tuple[int, ...]] = []
        self.cancelled: set[tuple[int, int]] = set()  # request, choice

    def do(self, name: str, amount: int) -> None:
        pair = self.pair
        index = amount % max(1, len(self.prompts))
        match name:
            case "request":
                self.prompts.append(prompt_of(amount + 1, seed=amount % 3))
                self.start(len(self.prompts) - 1)
            case "compute":
                pair.compute()
            case "write":
                pair.write(1 + amount % 3)
            case "fail a write":
                pair.backend.fail(1)
                pair.settle()
            case "late writes land":
                pair.backend.land_late()
            case "cut":
                pair.network.cut()
                pair.settle()
            case "time":
                self.advance(amount / 10)
            case "cancel":
                self.cancelled |= {(index, 0), (index, 1)}
                pair.cancel(f"r{index}")
            case "cancel one choice":
                if pair.state(f"r{index}"):
                    self.cancelled.add((index, amount % 2))
                    pair.cancel(f"r{index}", amount % 2)
            case "abort":
                pair.to_decode(AbortRequests(call_id=1, request_id=f"r{index}"), b"admin")
            case "hold to decode":
                pair.network.holds_to_decode = True
            case "hold to prefill":
                pair.network.holds_to_prefill = True
            case "let go":
                self.let_go()
            case "cancels come too late":
                pair.backend.has_started = not pair.backend.has_started
            case "freeze":
                pair.backend.land_late()  # what was on the wire waits in the frozen host's buffers
                pair.now += amount
                pair.settle()
            case _:
                raise AssertionError(name)

    def start(self, index: int) -> None:
        self.pair.start(f"r{index}", self.prompts[index], max_tokens=MAX_TOKENS, choices=(0, 1))

    def advance(self, seconds: float) -> None:
        """A failed write lands within the settling time, if ever."""
        self.pair.backend.land_late()
        self.pair.advance(seconds)

    def let_go(self) -> None:
        self.pair.network.holds_to_decode = self.pair.network.holds_to_prefill = False
        self.pair.settle()

    def end(self) -> None:
        self.let_go()
        for _ in range(20):
            self.pair.run()
            self.advance(1.0)
        self.pair.finish()
        for index in range(len(self.prompts)):
            self.check(index)

    def check(self, index: int) -> None:
        stream = self.pair.stream(f"r{index}")
        for choice in (0, 1):
            right = expected_tokens(self.prompts[index], MAX_TOKENS, choice)
            got = stream.tokens.get(choice, [])
            assert got == right[: len(got)], "no attempt ever shows a wrong token"
            if (finish := stream.finishes.get(choice)) is not None:
                assert (finish.reason == "length") == (len(got) == MAX_TOKENS)
            else:
                assert stream.failure is not None or (index, choice) in self.cancelled, "it never ended"


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 29)), max_size=40),
    decode_pages=st.integers(16, 40),
    chunk_tokens=st.integers(3, 12),
)
def test_every_request_ends_once_and_every_page_comes_back(
    steps: list[Step], decode_pages: int, chunk_tokens: int
) -> None:
    """The backend asserts that no write lands on a page that is somebody's, the engine that no forward reads
    or writes a wrong one, `settle` the invariants of both nodes."""
    trouble = Trouble(Pair(decode_pages=decode_pages, chunk_tokens=chunk_tokens))
    for name, amount in steps:
        trouble.do(name, amount)
    trouble.end()
