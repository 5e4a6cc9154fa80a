"""The rate that writes to a peer reach, under a clock of our own."""

from __future__ import annotations

import pytest

from pdserve.transfer.wire_meter import RECENT_S, WireMeter


def test_time_counts_only_while_a_write_is_outstanding() -> None:
    meter = WireMeter()
    meter.submitted(10.0)
    meter.submitted(10.1)  # beside the first: the time counts once
    meter.ended(1000, 10.2)
    meter.ended(1000, 10.4)
    meter.submitted(20.0)
    meter.ended(0, 20.1)  # failed
    traffic = meter.traffic(30.0)
    assert traffic.num_bytes == 2000
    assert traffic.busy_s == pytest.approx(0.5)
    assert traffic.bytes_per_s == pytest.approx(2000 / 0.5, rel=0.1)


def test_the_rate_is_that_of_recent_writes() -> None:
    meter = WireMeter()
    for step in range(100):
        meter.submitted(step)
        meter.ended(100, step + 1.0)
    for step in range(100, 150):
        meter.submitted(step)
        meter.ended(900, step + 1.0)
    assert meter.traffic(200.0).bytes_per_s == pytest.approx(900, rel=0.15)


def test_the_rate_to_a_peer_that_takes_nothing_falls() -> None:
    meter = WireMeter()
    meter.submitted(0.0)
    meter.ended(1000, 1.0)
    meter.submitted(1.0)
    assert meter.traffic(1.0).bytes_per_s == pytest.approx(1000)
    assert meter.traffic(1.0 + 3 * RECENT_S).bytes_per_s < 20


def test_nothing_was_written_yet() -> None:
    assert WireMeter().traffic(5.0).bytes_per_s == 0.0
