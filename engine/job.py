"""A job: work for a thread beside the loop, and what its owner does on the loop with what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

from ..runtime.containment import Containment
from ..runtime.errors import PdserveError, UnexpectedError

T = TypeVar("T")
R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True, slots=True)
class FinishedJob(Generic[R_co]):
    """A job that its thread is done with."""

    name: str
    deliver: Callable[[], R_co]  # on the loop, once: gives the outcome to the owner, who says what follows


class AnyJob(Protocol[R_co]):
    """A Job, whatever it makes: all that a thread knows of it."""

    @property
    def name(self) -> str: ...

    def do(self, containment: Containment) -> FinishedJob[R_co]: ...


@dataclass(frozen=True, slots=True)
class Job(Generic[T, R_co]):
    """Makes a T beside the loop. Only logs and `Progress` read its name.

    Give `finish` as a lambda or a method: mypy does not compare what a `partial` takes with what `run` makes.
    """

    name: str
    run: Callable[[], T]  # on the thread
    finish: Callable[[T | PdserveError], R_co]  # on the loop: takes what was made, or why nothing was

    def do(self, containment: Containment) -> FinishedJob[R_co]:
        """On the thread. What it raises is its outcome, for its owner alone; what a broken invariant raises
        is raised on."""
        outcome = containment.value_of(f"the job {self.name!r}", self._run, UnexpectedError)
        return FinishedJob(self.name, partial(self.finish, outcome))

    def _run(self) -> T | PdserveError:
        try:
            return self.run()
        except PdserveError as error:
            return error
