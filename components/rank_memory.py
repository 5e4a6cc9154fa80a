"""What one rank holds of its host's memory, weights and KV pool, and how it gives it back for a while.

Every rank of a node has one of these, and all of them move together: see `Node.move` and MemoryOccupation.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ..engine.weight_file import has_memory, read_weights, save_weights, without_memory
from ..engine.weights import Weights
from ..messages.memory_region import MemoryRegion
from ..messages.weights import MemoryTag
from ..runtime.errors import StartupError
from ..transfer.backends.base import TransferBackend


class RankMemory:
    """`region`: the registered pool. `move` belongs to the jobs' thread."""

    def __init__(self, backend: TransferBackend, region: MemoryRegion) -> None:
        self._backend = backend
        self._released: frozenset[MemoryTag] = frozenset()
        self._file: int | None = (
            None  # where the weights are meanwhile: gone with this process, killed or not
        )
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


def _put_away(weights: Weights) -> int:
    """The descriptor of a file on disk that has no name."""
    try:
        with tempfile.TemporaryDirectory(prefix="pdserve-released-") as folder:
            path = Path(folder) / "weights.safetensors"
            save_weights(weights, path)
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StartupError(f"weights cannot be kept in {tempfile.gettempdir()}: {error}") from error
