"""What one message raises ends that message; what a part says of itself ends the process."""

from __future__ import annotations

import logging

import pytest

from pdserve.runtime.containment import Containment, FaultLog, nobody_waits
from pdserve.runtime.errors import BrokenInvariantError


class PanicException(BaseException):
    """As PyO3 makes it: no Exception."""


def fail(error: BaseException) -> None:
    raise error


def fault_log() -> FaultLog:
    """That has shown nothing yet: the process's own may have, of the same kind."""
    return FaultLog()


def test_what_a_message_raises_is_told_and_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    containment, told = Containment(fault_log()), list[str]()
    with caplog.at_level(logging.ERROR), containment.around("generate", told.append):
        fail(KeyError("room"))
    assert told == ["generate failed here: KeyError: 'room'"]
    assert containment.num_faults == 1
    assert "generate failed" in caplog.text
    assert "Traceback" in caplog.text


def test_nothing_is_given_up_without_a_fault() -> None:
    containment, told = Containment(), list[str]()
    with containment.around("generate", told.append):
        pass
    assert (told, containment.num_faults) == ([], 0)


@pytest.mark.parametrize("error", [BrokenInvariantError("a page has two owners"), AssertionError("no")])
def test_a_broken_invariant_is_no_fault_of_a_message(error: Exception) -> None:
    with pytest.raises(type(error)), Containment().around("generate", nobody_waits):
        raise error


def test_what_ends_a_process_on_purpose_passes() -> None:
    with pytest.raises(SystemExit), Containment().around("generate", nobody_waits):
        raise SystemExit(1)


def test_a_panic_of_a_library_in_rust_is_contained() -> None:
    told = list[str]()
    with Containment(fault_log()).around("tokens", told.append):
        fail(PanicException("index out of bounds"))
    assert told == ["tokens failed here: PanicException: index out of bounds"]


def test_the_value_is_what_was_computed_or_what_is_made_of_the_reason() -> None:
    containment = Containment(fault_log())
    assert containment.value_of("a write", lambda: 3, len) == 3
    assert containment.value_of("a write", lambda: fail(KeyError("x")), str) == (
        "a write failed here: KeyError: 'x'"
    )


def test_a_flood_of_faults_is_no_flood_of_lines(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    faults = FaultLog(lambda: now)
    with caplog.at_level(logging.ERROR):
        for _ in range(1000):
            faults.caught("tokens", KeyError("x"))
        faults.caught("roster", KeyError("x"))
        assert [record.getMessage() for record in caplog.records] == [
            "tokens failed, and nothing else with it",
            "roster failed, and nothing else with it",
        ]
        now += 5.0
        faults.caught("tokens", KeyError("x"))
    last = caplog.records[-1].getMessage()
    assert last == "tokens failed, and nothing else with it; so did 999 before that are not shown"
    assert faults.num_faults == 1002


def test_kinds_without_end_are_told_as_one(caplog: pytest.LogCaptureFixture) -> None:
    """As they are where a kind holds what somebody else wrote."""
    faults = FaultLog(lambda: 0.0)
    with caplog.at_level(logging.ERROR):
        for number in range(2000):
            faults.caught(f"kind {number}", KeyError("x"))
    assert len(caplog.records) < 300
    assert faults.num_faults == 2000
