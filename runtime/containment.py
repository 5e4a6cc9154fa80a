"""The rule of every loop: what one message or one job raises ends that message or job, not the process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TypeVar

from .errors import BrokenInvariantError, is_panic
from .logs import Throttle

_log = logging.getLogger(__name__)
R = TypeVar("R")

_MAX_KINDS = 256  # that are told apart in the log; what is beyond is told as one


class FaultLog:
    """What was contained: counted, and told so that a flood of faults is no flood of lines. Any thread may.

    Of each kind the log has the first with its traceback, and then one every few seconds, with how many more
    there were.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._throttles: dict[str, Throttle] = {}  # by kind; "" is of those beyond the bound
        self.num_faults = 0

    def caught(self, kind: str, error: BaseException) -> None:
        with self._lock:
            self.num_faults += 1
            known = kind if kind in self._throttles or len(self._throttles) < _MAX_KINDS else ""
            num_new = self._throttles.setdefault(known, Throttle()).add(self._clock())
        if num_new == 1:
            _log.error("%s failed, and nothing else with it", kind, exc_info=error)
        elif num_new:
            _log.error(
                "%s failed, and nothing else with it; so did %d before that are not shown",
                kind,
                num_new - 1,
                exc_info=error,
            )


PROCESS_FAULTS = FaultLog()  # there is one log a process, and one count in its metrics


class Containment:
    """The one catcher of a loop, or of a thread beside it.

    A message holds what somebody else wrote, so a fault in handling it is no reason to end what everybody
    else has here. `give_up` then lets go of what the message was about, by the way that a cancelled or failed
    request takes anyway, and answers who waits. That leaves the state whole, because handlers look before
    they change: they refuse what cannot be before they touch a part, and each part checks what it is asked
    for before it does it. A part that finds its own state wrong raises BrokenInvariantError (or an assertion
    fails): that is no message's fault, and ends the process. So does what the check of an idle node finds,
    which is the proof that nothing was left behind.
    """

    def __init__(self, faults: FaultLog = PROCESS_FAULTS) -> None:
        self._faults = faults
        self.num_faults = 0

    def around(self, kind: str, give_up: Callable[[str], None]) -> AbstractContextManager[None]:
        """`kind` names the message or job in the log. `give_up` is told why; what it raises is not caught."""
        return _Around(self, kind, give_up)

    def caught(self, kind: str, error: BaseException) -> None:
        self.num_faults += 1
        self._faults.caught(kind, error)

    def value_of(self, kind: str, run: Callable[[], R], failed: Callable[[str], R]) -> R:
        """What `run` returns; where it raises, what `failed` makes of the reason."""
        outcome: list[R] = []
        with self.around(kind, lambda why: outcome.append(failed(why))):
            outcome.append(run())
        return outcome[0]


class _Around(AbstractContextManager[None]):
    """A class, as it is entered for every token of every stream: a generator takes three times as long."""

    __slots__ = ("_containment", "_give_up", "_kind")

    def __init__(self, containment: Containment, kind: str, give_up: Callable[[str], None]) -> None:
        self._containment = containment
        self._kind = kind
        self._give_up = give_up

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if error is None or isinstance(error, (BrokenInvariantError, AssertionError)):
            return False
        if not (isinstance(error, Exception) or is_panic(error)):
            return False
        self._containment.caught(self._kind, error)
        self._give_up(f"{self._kind} failed here: {type(error).__name__}: {error}")
        return True


def nobody_waits(why: str) -> None:
    """To give up what nobody waits for: the log has it."""
    del why
