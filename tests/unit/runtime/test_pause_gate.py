"""PauseGate: how long computing stood still, each second told once."""

from __future__ import annotations

from pdserve.runtime.pause_gate import PauseGate


def test_each_second_of_a_pause_is_told_once() -> None:
    gate = PauseGate()
    assert (gate.mode, gate.stood_still_s(5.0)) == ("", 0.0)
    gate.pause("in_place", 10.0)
    assert (gate.mode, gate.is_paused) == ("in_place", True)
    assert gate.stood_still_s(11.5) == 1.5
    gate.pause("retract", 12.0)  # goes on
    assert (gate.mode, gate.stood_still_s(13.0)) == ("retract", 1.5)
    assert gate.resume()
    assert gate.stood_still_s(20.0) == 0.0
    assert not gate.resume()
    gate.pause("abort", 30.0)
    assert gate.stood_still_s(31.0) == 1.0, "a pause begins when it begins"
