"""What one message raises ends that message; what a part says of itself ends the process."""

from __future__ import annotations

import logging

import pytest

from pdserve.runtime.containment import Containment, nobody_waits
from pdserve.runtime.errors import BrokenInvariantError


def fail(error: Exception) -> None:
    raise error


def test_what_a_message_raises_is_told_and_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    containment, told = Containment(), list[str]()
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
