"""Stands for what a node does beside its forwards: page digests, the search for proofs of death, weights that
others read."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import msgspec

from ..engine.job import AnyJob, FinishedJob
from ..messages.operation import StartProfile
from ..node.profiler import Traces
from ..transfer.page_digests import Digests
from ..weights.images import ImageReplies
from .tokens import Pool


class FakeDeathProbe:
    """Proves what it is told to; remembers who is suspected."""

    def __init__(self) -> None:
        self.suspects: Mapping[str, tuple[str, ...]] = {}
        self.proven: list[str] = []

    def watch(self, suspects: Mapping[str, tuple[str, ...]]) -> None:
        self.suspects = suspects

    def poll(self) -> list[str]:
        proven, self.proven = self.proven, []
        return proven


class FakeDigests:
    """Digests of what is in the pool when the result is taken; none is while `is_held`. `on_submitted` is
    called for each piece of work."""

    def __init__(self, pool: Pool, on_submitted: Callable[[], None] | None = None) -> None:
        self.pool = pool
        self.jobs: list[tuple[object, tuple[int, ...]]] = []
        self.is_held = False
        self._on_submitted = on_submitted

    def submit(self, key: object, pages: Sequence[int]) -> None:
        self.jobs.append((key, tuple(pages)))
        if self._on_submitted is not None:
            self._on_submitted()

    def poll(self) -> list[Digests]:
        if self.is_held:
            return []
        jobs, self.jobs = self.jobs, []
        return [
            Digests(key, tuple(zlib.crc32(repr(self.pool.pages[page]).encode()) for page in pages))
            for key, pages in jobs
        ]


class NoProfiler:
    """In place of the engine's: there are no forwards to record."""

    def start(self, plan: StartProfile) -> Callable[[], None]:
        del plan
        return lambda: None

    def stop(self) -> Callable[[], Traces]:
        return lambda: Traces(())


class NoImageJobs:
    """Nobody reads weights here."""

    def submit(self, job: AnyJob[ImageReplies]) -> None:
        raise AssertionError(f"{job.name}: no simulated node is asked for its weights")

    def poll(self) -> list[FinishedJob[ImageReplies]]:
        return []


class NoOutbox:
    """No simulated node writes its weights to others."""

    def poll(self) -> list[tuple[bytes, msgspec.Struct]]:
        return []
