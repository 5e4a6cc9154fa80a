"""What one rank holds of its host's memory, weights and KV pool, and how it gives it back for a while.

Every rank of a node has a RankMemory, and all of them move together. When, MemoryOccupation decides.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ..engine.model_weights import Weights
from ..engine.weight_file import has_memory, read_weights, save_weights, without_memory
from ..messages.memory_region import MemoryRegion
from ..messages.weights import MemoryTag
from ..runtime.errors import BrokenInvariantError, StartupError
from ..transfer.backends.base import TransferBackend
from .group import RankCall, alongside

_log = logging.getLogger(__name__)


class RankMemory:
    """`region`: the registered pool. `move` belongs to the jobs' thread."""

    def __init__(self, backend: TransferBackend, region: MemoryRegion) -> None:
        self._backend = backend
        self._released: frozenset[MemoryTag] = frozenset()
        # Where the weights are meanwhile. It has no name, so it is gone with this process, killed or not.
        self._file: int | None = None
        self.region = region  # the last one that was registered

    def move(self, released: frozenset[MemoryTag], weights: Weights) -> Weights:
        """Release what `released` names, and take back what it does not; what is so already stays so.

        Nothing runs, and no peer writes. Returns `weights` as they are from now on: what is released has
        shapes and no values. Raises StartupError, and then nothing has changed.
        """
        back, away = self._released - released, released - self._released
        file = self._file
        if "weights" in back and not has_memory(weights):  # else others have come in their place
            assert file is not None, "they were put away"
            weights = read_weights(Path(f"/proc/self/fd/{file}"), weights)
        kept = _put_away(weights) if "weights" in away else None
        if "kv_cache" in back:
            self.region = self._backend.register()
        # From here on nothing can fail.
        if "weights" in back and file is not None:
            os.close(file)
            self._file = None
        if kept is not None:
            weights, self._file = without_memory(weights), kept
        if "kv_cache" in away:
            self._backend.release()
        self._released = released
        return weights


class FurtherRanks(Protocol):
    """Of the replica, see RankGroup."""

    def move_memory(self, released: frozenset[MemoryTag]) -> RankCall: ...


def move_together(
    move: Callable[[frozenset[MemoryTag]], None],
    ranks: FurtherRanks | None,
    before: frozenset[MemoryTag],
    after: frozenset[MemoryTag],
) -> Callable[[], None]:
    """A job that leaves `after` released on every rank where `before` was; `move` does it on rank 0.

    For rank 0's loop; the further ranks begin at once. The job raises StartupError when a rank cannot, and
    then all are as they were.
    """
    others = None if ranks is None else ranks.move_memory(after)

    def job() -> None:
        try:
            alongside(others, lambda: move(after))
        except Exception:  # whatever it is, all ranks are to be as they were
            if ranks is not None:
                _move_back(move, ranks, before)
            raise

    return job


def _move_back(
    move: Callable[[frozenset[MemoryTag]], None], ranks: FurtherRanks, before: frozenset[MemoryTag]
) -> None:
    try:
        alongside(ranks.move_memory(before), lambda: move(before))
    except StartupError as error:
        if before:  # some rank keeps what counts as released
            _log.warning("the ranks differ in what they have released: %s", error)
            return
        # A node of which one part has its memory cannot serve: it ends, loudly.
        raise BrokenInvariantError(f"a rank cannot have its memory back: {error}") from error


def _put_away(weights: Weights) -> int:
    """The descriptor of a file on disk that has no name."""
    try:
        with tempfile.TemporaryDirectory(prefix="pdserve-released-") as folder:
            path = Path(folder) / "weights.safetensors"
            save_weights(weights, path)
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StartupError(f"weights cannot be kept in {tempfile.gettempdir()}: {error}") from error
