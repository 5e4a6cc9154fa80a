"""Overload in virtual time: what a cluster answers in time, whatever is asked of it.

Requests come at random and pass the router's door (`check_wait`), lie with the tokenizer for a moment, pass
it again, wait in the queue, and then on a node, which gives one first token after another. Some of what the
node can do goes into refusals, as on a machine that both share.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from pdserve.router.admission import SHORT_QUEUE, AdmissionQueue
from pdserve.runtime.errors import RequestError

RATE = 40.0  # first tokens a second
SLO_S = 2.0
NUM_ON_NODE = 20  # dispatched, without a first token
TOKENIZE_S = 0.02
REFUSAL_S = 0.0002  # of the node's time


@dataclass
class Run:
    """One run; `rate` is what the node can do at a time."""

    arrivals: Iterator[float]
    max_wait_s: float = 1.0
    rate: Callable[[float], float] = lambda now: RATE
    client: Callable[[int], str] = lambda number: ""
    duration_s: float = 30.0
    ttfts: dict[str, list[float]] = field(default_factory=dict, repr=False)  # by client
    num_refused: int = 0
    retry_after_s: list[float] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.queue = AdmissionQueue(max_new=1024, patience_s=1e9, max_wait_s=self.max_wait_s)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._on_node: list[str] = []
        self._came_at: dict[str, tuple[float, str]] = {}
        self._node_owes_s = 0.0
        self._next_arrival(0)
        while self._events and self._events[0][0] < self.duration_s:
            now, _, act = heapq.heappop(self._events)
            act(now)

    @property
    def goodput(self) -> float:
        good = sum(ttft <= SLO_S for ttfts in self.ttfts.values() for ttft in ttfts)
        return good / self.duration_s

    def _at(self, when: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), act))

    def _next_arrival(self, number: int) -> None:
        when = next(self.arrivals, None)
        if when is not None:
            self._at(when, lambda now: self._arrive(now, number))

    def _arrive(self, now: float, number: int) -> None:
        self._next_arrival(number + 1)
        client, request_id = self.client(number), str(number)
        if self._enters(client, now):
            self._came_at[request_id] = now, client
            self._at(now + TOKENIZE_S, lambda now: self._offer(now, request_id, client))

    def _enters(self, client: str, now: float) -> bool:
        try:
            self.queue.check_wait(client, now)
        except RequestError as refusal:
            self.num_refused += 1
            self.retry_after_s.append(refusal.retry_after_s or 0.0)
            self._node_owes_s += REFUSAL_S
            return False
        return True

    def _offer(self, now: float, request_id: str, client: str) -> None:
        if self._enters(client, now):
            self.queue.offer(request_id, (0,), 0, now, client)
            self._dispatch(now)

    def _dispatch(self, now: float) -> None:
        for ticket in self.queue.due(now):
            if len(self._on_node) == NUM_ON_NODE:
                break
            self.queue.take(ticket, now)
            self._on_node.append(ticket.request_id)
            if len(self._on_node) == 1:
                self._work(now)

    def _work(self, now: float) -> None:
        owed_s, self._node_owes_s = self._node_owes_s, 0.0
        self._at(now + owed_s + 1.0 / self.rate(now), self._first_token)

    def _first_token(self, now: float) -> None:
        request_id = self._on_node.pop(0)
        came_at, client = self._came_at.pop(request_id)
        self.ttfts.setdefault(client, []).append(now - came_at)
        self.queue.answered(request_id, now)
        if self._on_node:
            self._work(now)
        self._dispatch(now)


def poisson(rate: float, seed: int = 0) -> Iterator[float]:
    rng = random.Random(seed)
    now = 0.0
    while True:
        now += rng.expovariate(rate)
        yield now


@pytest.mark.parametrize("factor", [0.8, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_goodput_stays_at_its_peak(factor: float, seed: int) -> None:
    """Peak: of rates up to the capacity. Less is lost under more load than a tenth."""
    peak = max(Run(poisson(share * RATE, seed)).goodput for share in (0.8, 0.9, 1.0))
    run = Run(poisson(factor * RATE, seed))
    assert run.goodput >= 0.9 * min(peak, factor * RATE)
    if factor > 1:
        assert all(ttft <= SLO_S for ttft in run.ttfts[""])


def test_below_capacity_nothing_is_refused() -> None:
    assert Run(poisson(0.8 * RATE)).num_refused == 0


@pytest.mark.parametrize("num_at_once", [200, 2000])
def test_many_at_once_find_a_router_that_has_measured_nothing(num_at_once: int) -> None:
    run = Run(iter([0.0] * num_at_once), duration_s=10.0)
    assert all(ttft <= SLO_S for ttft in run.ttfts[""])
    assert len(run.ttfts[""]) >= SHORT_QUEUE


def test_a_cluster_that_becomes_slow_lets_in_fewer() -> None:
    run = Run(poisson(3 * RATE), rate=lambda now: RATE if now < 10.0 else RATE / 2)
    late = sum(ttft > SLO_S for ttft in run.ttfts[""])
    assert late <= 2 * RATE, "only those that were let in before"
    assert run.goodput >= 0.9 * (10 * RATE + 20 * RATE / 2) / 30


def test_who_comes_back_when_told_is_let_in() -> None:
    """A second of requests at ten times the capacity, then none: as told, the queue is short enough again."""
    burst = [number / (10 * RATE) for number in range(int(10 * RATE))]
    probe = Run(iter(burst), duration_s=1.0)
    back_at = 1.0 + probe.retry_after_s[-1]
    without, again = (Run(iter(arrivals), duration_s=9.0) for arrivals in (burst, [*burst, back_at]))
    assert again.num_refused == without.num_refused
    assert len(again.ttfts[""]) == len(without.ttfts[""]) + 1


def test_a_quiet_client_is_served_beside_a_loud_one() -> None:
    """It asks for a quarter of what the node can do, and gets it; the loud one gets the rest."""
    run = Run(poisson(10 * RATE), client=lambda number: "quiet" if number % 40 == 0 else "loud")
    assert len(run.ttfts["quiet"]) >= 0.95 * 30 * RATE / 4
    assert all(ttft <= SLO_S for ttfts in run.ttfts.values() for ttft in ttfts)
