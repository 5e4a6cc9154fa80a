"""The rule of every loop: what one message or one job raises ends that message or job, not the process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import BrokenInvariantError

_log = logging.getLogger(__name__)


class Containment:
    """The one catcher of a loop.

    A message holds what somebody else wrote, so a fault in handling it is no reason to end what everybody
    else has here. `give_up` then lets go of what the message was about, by the way that a cancelled or failed
    request takes anyway, and answers who waits. That leaves the state whole, because handlers look before
    they change: they refuse what cannot be before they touch a part, and each part checks what it is asked
    for before it does it. A part that finds its own state wrong raises BrokenInvariantError (or an assertion
    fails): that is no message's fault, and ends the process. So does what the check of an idle node finds,
    which is the proof that nothing was left behind.
    """

    def __init__(self) -> None:
        self.num_faults = 0

    @contextmanager
    def around(self, kind: str, give_up: Callable[[str], None]) -> Iterator[None]:
        """`kind` names the message or job in the log. `give_up` is told why; what it raises is not caught."""
        try:
            yield
        except (BrokenInvariantError, AssertionError):
            raise
        except Exception as error:
            self.num_faults += 1
            _log.exception("%s failed, and nothing else with it", kind)
            give_up(f"{kind} failed here: {type(error).__name__}: {error}")


def nobody_waits(why: str) -> None:
    """To give up what nobody waits for: the log has it."""
    del why
