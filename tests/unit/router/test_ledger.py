"""The estimates between pongs."""

from __future__ import annotations

from typing import Any

import pytest

from pdserve.messages.node import NodeLoad
from pdserve.router.ledger import Attempt, Ledger
from pdserve.router.pairing import Pair


def attempt(number: int = 1, **changes: object) -> Attempt:
    values: dict[str, Any] = {
        "request_id": "r",
        "number": number,
        "pair": Pair("p", "d"),
        "open_choices": {0},
        "num_uncached_tokens": 100,
        "num_pages": 10,
    }
    return Attempt(**{**values, **changes})


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger()
    for node in ("p", "d"):
        ledger.add_node(node)
    ledger.ping("d")
    ledger.pong("d", NodeLoad(num_total_pages=100, num_free_pages=100))
    return ledger


def figures(ledger: Ledger) -> tuple[int, int, int]:
    return ledger.queued_tokens("p"), ledger.num_active("d"), ledger.num_free_pages("d")


def test_own_attempts_count_at_once_and_until_they_end(ledger: Ledger) -> None:
    first = attempt()
    ledger.open(first)
    assert figures(ledger) == (100, 1, 90)
    ledger.first_token(first)
    assert figures(ledger) == (0, 1, 90)
    assert ledger.close(first)
    assert figures(ledger) == (0, 0, 100)


def test_closing_is_idempotent_and_releases_an_unfinished_prefill(ledger: Ledger) -> None:
    first = attempt()
    ledger.open(first)
    assert [ledger.close(first), ledger.close(first)] == [True, False]
    ledger.first_token(first)
    assert figures(ledger) == (0, 0, 100)


def test_a_pong_replaces_what_was_known_when_its_ping_left(ledger: Ledger) -> None:
    ledger.open(attempt(1))
    ledger.ping("p")
    ledger.ping("d")
    ledger.open(attempt(2))  # behind the ping: not in the pong's figures
    ledger.pong("p", NodeLoad(num_queued_tokens=70))  # 30 of the first are computed
    ledger.pong("d", NodeLoad(num_total_pages=100, num_free_pages=85, num_running_reqs=1, num_waiting_reqs=2))
    assert figures(ledger) == (170, 4, 75)


def test_others_work_is_seen_and_ended_work_is_taken_off(ledger: Ledger) -> None:
    first = attempt()
    ledger.open(first)
    ledger.ping("d")
    ledger.pong("d", NodeLoad(num_total_pages=100, num_free_pages=50, num_running_reqs=4))
    ledger.close(first)
    assert (ledger.num_active("d"), ledger.num_free_pages("d")) == (3, 60)


def test_no_estimate_is_negative(ledger: Ledger) -> None:
    first = attempt()
    ledger.open(first)
    ledger.ping("p")
    ledger.pong("p", NodeLoad(num_queued_tokens=0))
    ledger.close(first)
    assert ledger.queued_tokens("p") == 0


def test_busy_is_believed_until_something_moves(ledger: Ledger) -> None:
    first = attempt()
    ledger.open(first)
    ledger.full("p")
    assert ledger.is_full("p")
    ledger.first_token(first)
    assert not ledger.is_full("p")
    ledger.full("p")
    ledger.pong("p", NodeLoad())
    assert not ledger.is_full("p")


def test_local_prefill_is_the_decode_nodes_queue(ledger: Ledger) -> None:
    ledger.open(attempt(pair=Pair("", "d")))
    assert (ledger.queued_tokens("p"), ledger.queued_tokens("d")) == (0, 100)


def test_dispatches_order_the_nodes_by_last_use(ledger: Ledger) -> None:
    ledger.add_node("q")
    ledger.open(attempt(1))
    ledger.open(attempt(2, pair=Pair("q", "d")))
    assert ledger.last_used("p") < ledger.last_used("q") == ledger.last_used("d")


def test_attempts_outlive_a_forgotten_node(ledger: Ledger) -> None:
    first = attempt()
    ledger.open(first)
    ledger.forget_node("d")
    ledger.forget_node("p")
    assert ledger.on_decode("d") == [first]
    assert ledger.close(first)
    assert len(ledger) == 0
