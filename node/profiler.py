"""Records the forwards of a node, on each of its ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..engine.step_profiler import StepProfiler
from ..messages.operation import StartProfile
from ..messages.ranks import RankTraced
from ..ranks.group import RankCall, alongside
from ..runtime.errors import PdserveError


class FurtherRanks(Protocol):
    """Of the replica, see RankGroup."""

    def start_profile(self, plan: StartProfile) -> RankCall: ...

    def stop_profile(self) -> RankCall: ...


@dataclass(frozen=True, slots=True)
class Traces:
    """Chrome traces, one for each stage that was recorded."""

    own: tuple[Path, ...]
    of_ranks: tuple[tuple[int, str], ...] = ()  # of further ranks: which one, and its file


class NodeProfiler:
    """`start` and `stop` belong to the loop and return jobs for the engine's thread, which must be submitted
    at once: every rank begins and ends between the same two forwards. Jobs raise PdserveError."""

    def __init__(self, own: StepProfiler, ranks: FurtherRanks | None) -> None:
        """`own` is that of the engine's thread."""
        self._own = own
        self._ranks = ranks

    def start(self, plan: StartProfile) -> Callable[[], None]:
        ranks = self._ranks
        others = None if ranks is None else ranks.start_profile(plan)

        def job() -> None:
            try:
                alongside(others, lambda: self._own.start(plan))
            except PdserveError:
                if ranks is not None:
                    ranks.stop_profile()  # not waited for: their forwards before it need this thread
                with contextlib.suppress(PdserveError):
                    self._own.stop()
                raise

        return job

    def stop(self) -> Callable[[], Traces]:
        others = None if self._ranks is None else self._ranks.stop_profile()

        def job() -> Traces:
            own, answers = alongside(others, self._own.stop)
            of_ranks = [
                (answer.rank, path)
                for answer in answers
                if isinstance(answer, RankTraced)
                for path in answer.traces
            ]
            return Traces(own, tuple(sorted(of_ranks)))

        return job
