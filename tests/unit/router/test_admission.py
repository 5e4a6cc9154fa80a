"""The router's queue under a fake clock."""

from __future__ import annotations

import pytest

from pdserve.router.admission import COLD_RATE, AdmissionQueue, Ticket
from pdserve.router.pairing import Pair
from pdserve.runtime.errors import RequestError


@pytest.fixture
def queue() -> AdmissionQueue:
    return AdmissionQueue(max_new=3, patience_s=1.0)


def offer(queue: AdmissionQueue, request_id: str, now: float = 0.0, priority: int = 0) -> Ticket:
    return queue.offer(request_id, (0,), priority, now)


def again(
    queue: AdmissionQueue, request_id: str, arrived_at: float, now: float = 10.0, delay_s: float = 0.0
) -> Ticket:
    return queue.again(request_id, (0,), 0, arrived_at=arrived_at, now=now, delay_s=delay_s)


def due(queue: AdmissionQueue, now: float) -> list[str]:
    return [ticket.request_id for ticket in queue.due(now)]


def test_oldest_first(queue: AdmissionQueue) -> None:
    for name in "abc":
        offer(queue, name)
    assert due(queue, 0.0) == ["a", "b", "c"]


def test_retries_go_first_oldest_first(queue: AdmissionQueue) -> None:
    offer(queue, "new", now=0.0)
    again(queue, "young", arrived_at=5.0)
    again(queue, "old", arrived_at=3.0)
    assert due(queue, 10.0) == ["old", "young", "new"]


def test_higher_priority_goes_before_but_after_retries(queue: AdmissionQueue) -> None:
    offer(queue, "low")
    offer(queue, "high", priority=5)
    again(queue, "retry", arrived_at=1.0)
    assert due(queue, 10.0) == ["retry", "high", "low"]


def test_a_full_queue_refuses_new_requests_never_retries(queue: AdmissionQueue) -> None:
    for name in "abc":
        offer(queue, name, now=1.0)
    with pytest.raises(RequestError) as refused:
        offer(queue, "d", now=6.0)
    assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (429, "queue_full", 5.0)
    again(queue, "e", arrived_at=0.0)
    assert (len(queue), queue.num_new) == (4, 3)


@pytest.mark.parametrize(("waited_s", "retry_after_s"), [(0.0, 1.0), (30.0, 30.0), (500.0, 60.0)])
def test_retry_after_is_what_the_oldest_has_waited_within_bounds(
    queue: AdmissionQueue, waited_s: float, retry_after_s: float
) -> None:
    for name in "abc":
        offer(queue, name)
    with pytest.raises(RequestError) as refused:
        offer(queue, "d", now=waited_s)
    assert refused.value.retry_after_s == retry_after_s


def test_a_taken_ticket_makes_room(queue: AdmissionQueue) -> None:
    tickets = [offer(queue, name) for name in "abc"]
    queue.take(tickets[0], 1.0)
    offer(queue, "d")
    assert due(queue, 1.0) == ["b", "c", "d"]


def test_a_delayed_ticket_lets_others_pass(queue: AdmissionQueue) -> None:
    again(queue, "busy", arrived_at=0.0, now=10.0, delay_s=0.5)
    offer(queue, "new")
    assert due(queue, 10.4) == ["new"]
    assert due(queue, 10.5) == ["busy", "new"]


def test_while_held_only_retries_go(queue: AdmissionQueue) -> None:
    offer(queue, "new").unpaired_since = 0.0
    again(queue, "retry", arrived_at=0.0)
    queue.hold()
    assert due(queue, 10.0) == ["retry"]
    assert queue.starved(100.0, 10.0) == []  # waiting for weights is not waiting for nodes
    queue.release()
    assert due(queue, 10.0) == ["retry", "new"]


def test_a_hold_that_ends_in_a_pause_does_not_end_it(queue: AdmissionQueue) -> None:
    offer(queue, "new")
    again(queue, "retry", arrived_at=0.0)
    queue.pause(new_only=True)
    assert due(queue, 10.0) == ["retry"]
    queue.hold()
    queue.release()
    assert due(queue, 10.0) == ["retry"]
    queue.resume()
    assert due(queue, 10.0) == ["retry", "new"]


def test_while_paused_nothing_goes_and_nothing_starves(queue: AdmissionQueue) -> None:
    offer(queue, "new").unpaired_since = 0.0
    again(queue, "retry", arrived_at=0.0).unpaired_since = 0.0
    queue.pause()
    assert due(queue, 10.0) == []
    assert queue.starved(100.0, 10.0) == []
    queue.resume()
    assert due(queue, 10.0) == ["retry", "new"]


def test_the_head_is_overdue_when_nothing_has_gone_for_a_while(queue: AdmissionQueue) -> None:
    first, second = offer(queue, "a", now=0.0), offer(queue, "b", now=0.0)
    assert not queue.is_overdue(first, 1.0)
    assert queue.is_overdue(first, 1.1)
    queue.take(first, 1.1)
    assert not queue.is_overdue(second, 2.1)
    assert queue.is_overdue(second, 2.2)


def test_tickets_without_a_pair_starve(queue: AdmissionQueue) -> None:
    ticket = offer(queue, "a", now=0.0)
    offer(queue, "b", now=0.0)
    ticket.unpaired_since = 2.0
    assert queue.starved(11.9, 10.0) == []
    assert queue.starved(12.0, 10.0) == [ticket]


def test_a_request_or_one_choice_of_it_leaves(queue: AdmissionQueue) -> None:
    queue.offer("a", (0, 1), 0, 0.0)
    queue.again("b", (0,), 0, arrived_at=0.0, now=0.0, avoid=(Pair("p", "d"),))
    queue.again("b", (1,), 0, arrived_at=0.0, now=0.0)
    queue.remove_choice("a", 0)
    assert [ticket.choices for ticket in queue.of_request("a")] == [(1,)]
    queue.remove_choice("a", 1)
    assert (queue.of_request("a"), queue.num_new) == ([], 0)
    queue.remove_request("b", 0.0)
    assert len(queue) == 0


# ---- by expected wait -------------------------------------------------------------------------------------


def served(rate: float, num_waiting: int, *, max_wait_s: float = 5.0) -> tuple[AdmissionQueue, float]:
    """A queue of which this rate was served for long, and in which so many wait at its end; and the time."""
    queue = AdmissionQueue(max_new=10_000, patience_s=1.0, max_wait_s=max_wait_s)
    num_answered = int(rate * 20)
    for number in range(num_answered + num_waiting):
        offer(queue, str(number))
    for number in range(num_answered):
        now = (number + 1) / rate
        queue.take(queue.of_request(str(number))[0], now)
        queue.answered(str(number), now)
    return queue, 20.0


@pytest.mark.parametrize(
    ("rate", "num_waiting", "is_refused"), [(10, 49, False), (10, 60, True), (100, 400, False)]
)
def test_a_request_that_would_wait_for_too_long_is_refused(
    rate: float, num_waiting: int, is_refused: bool
) -> None:
    queue, now = served(rate, num_waiting)
    if not is_refused:
        queue.check_wait("", now)
        return
    with pytest.raises(RequestError) as refused:
        queue.check_wait("", now)
    assert (refused.value.status, refused.value.code) == (429, "queue_wait")


def test_who_was_dispatched_and_has_no_token_yet_waits_too() -> None:
    queue, now = served(10, 60)
    for ticket in list(queue):
        queue.take(ticket, now)
    with pytest.raises(RequestError, match="60 requests go first"):
        queue.check_wait("", now)
    for number in range(200, 215):
        queue.remove_request(str(number), now)  # given up
    queue.check_wait("", now)


def test_retry_after_is_when_few_enough_will_wait() -> None:
    queue, now = served(10, 200)
    with pytest.raises(RequestError) as refused:
        queue.check_wait("", now)
    assert refused.value.retry_after_s == pytest.approx(200 / 10 - 5, rel=0.05)


def test_the_rate_is_that_of_the_last_seconds_with_a_backlog() -> None:
    """What was fast and stands still now is slow: no first token came in the last 5 s."""
    queue, now = served(100, 100)
    queue.check_wait("", now)
    with pytest.raises(RequestError) as refused:
        queue.check_wait("", now + 6.0)
    assert refused.value.retry_after_s == 60.0


def test_idle_time_does_not_change_the_rate() -> None:
    queue, now = served(10, 0)
    later = now + 3600.0
    for number in range(60):
        queue.offer(f"later {number}", (0,), 0, later)
    with pytest.raises(RequestError, match="60 requests go first"):
        queue.check_wait("", later)


def test_as_long_as_no_rate_is_known_a_burst_is_taken() -> None:
    queue = AdmissionQueue(max_new=10_000, patience_s=1.0, max_wait_s=5.0)
    for number in range(int(5 * COLD_RATE) + 1):
        queue.check_wait("", 7.0)
        offer(queue, str(number), now=7.0)
    with pytest.raises(RequestError):
        queue.check_wait("", 7.0)
    queue.serve_with(2, 7.0)
    queue.check_wait("", 7.0)  # two nodes take twice as many


def test_few_that_wait_are_no_overload_however_slow() -> None:
    queue, now = served(0.1, 15)
    queue.check_wait("", now)
    queue, now = served(0.1, 30)
    with pytest.raises(RequestError):
        queue.check_wait("", now)
    queue.serve_with(2, now)
    queue.check_wait("", now)


@pytest.mark.parametrize("why", ["held", "paused", "no pair"])
def test_while_requests_are_kept_on_purpose_none_is_refused(why: str) -> None:
    queue, now = served(10, 200)
    match why:
        case "held":
            queue.hold()
        case "paused":
            queue.pause()
        case _:
            for ticket in queue:
                ticket.unpaired_since = now
    queue.check_wait("", now)
    queue.check_wait("", now + 100.0)
    if why == "no pair":
        for ticket in queue:
            ticket.unpaired_since = None
        with pytest.raises(RequestError, match=r"takes about (19|20)\.\d s"):  # as before
            queue.check_wait("", now + 100.0)
    else:
        queue.release()
        queue.resume()
        for number in range(200, 350):
            queue.remove_request(str(number), now)
        queue.check_wait("", now)  # what was measured before tells nothing now


def test_clients_take_turns() -> None:
    queue = AdmissionQueue(max_new=100, patience_s=1.0)
    for number in range(4):
        queue.offer(f"a{number}", (0,), 0, 0.0, "a")
    for number in range(2):
        queue.offer(f"b{number}", (0,), 0, 1.0, "b")
    assert due(queue, 1.0) == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_a_client_that_comes_late_goes_next_and_gains_nothing_by_having_waited() -> None:
    queue = AdmissionQueue(max_new=100, patience_s=1.0)
    tickets = [queue.offer(f"a{number}", (0,), 0, 0.0, "a") for number in range(5)]
    for ticket in tickets[:3]:
        queue.take(ticket, 1.0)
    for number in range(3):
        queue.offer(f"b{number}", (0,), 0, 2.0, "b")
    assert due(queue, 2.0) == ["a3", "b0", "a4", "b1", "b2"]


def test_a_quiet_client_is_not_refused_for_what_another_one_asks() -> None:
    queue = AdmissionQueue(max_new=10_000, patience_s=1.0, max_wait_s=5.0)
    tickets = [queue.offer(str(number), (0,), 0, 0.0, "loud") for number in range(300)]
    for number, ticket in enumerate(tickets[:100]):
        queue.take(ticket, (number + 1) / 10)
        queue.answered(str(number), (number + 1) / 10)
    with pytest.raises(RequestError):
        queue.check_wait("loud", 10.0)
    queue.check_wait("quiet", 10.0)
