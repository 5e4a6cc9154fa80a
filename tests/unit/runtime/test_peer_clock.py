from __future__ import annotations

import pytest

from pdserve.runtime.peer_clock import PeerClock, PeerClocks


def test_the_fastest_round_trip_counts() -> None:
    clock = PeerClock()
    clock.measured(100.0, 100.4, 130.35)  # the answer was slow to come back: 30.15 ± 0.2
    clock.measured(101.0, 101.002, 131.001)
    clock.measured(102.0, 102.4, 132.0)
    assert clock.lead_s == pytest.approx(30.0)


def test_a_lead_within_its_own_error_is_none() -> None:
    clock = PeerClock()
    assert clock.lead_s == 0.0
    clock.measured(100.0, 100.010, 100.009)  # 4 ms ± 5 ms
    assert clock.lead_s == 0.0
    clock.measured(101.0, 101.006, 101.007)  # 4 ms ± 3 ms
    assert clock.lead_s == pytest.approx(0.004)


def test_a_step_of_a_clock_is_followed() -> None:
    clock = PeerClock()
    clock.measured(100.0, 100.001, 100.0005)
    for second in range(101, 117):
        clock.measured(second, second + 0.002, second + 0.001 - 7.0)
    assert clock.lead_s == pytest.approx(-7.0)


def test_only_the_answer_to_the_latest_ping_says_something() -> None:
    clocks = PeerClocks()
    clocks.answered("p", 1, 100.0, 150.0)
    clocks.pinged("p", 1, 100.0)
    clocks.pinged("p", 2, 101.0)
    clocks.answered("p", 1, 101.0, 150.0)
    clocks.answered("p", 2, 101.0, 0.0)  # an older version tells no time
    assert clocks.lead_s("p") == 0.0
    clocks.answered("p", 2, 101.002, 151.001)
    assert clocks.lead_s("p") == pytest.approx(50.0)
    clocks.forget("p")
    assert clocks.lead_s("p") == 0.0
