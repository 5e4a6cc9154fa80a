"""How far the reading of a checkpoint is: a bar on a terminal, a line a file in a log."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

_log = logging.getLogger(__name__)


class LoadProgress:
    """Of a checkpoint's tensors that will be read: the file that each is in, and its bytes, by name.

    Nothing is said where messages of level info are not shown, or when it is `silent`.
    """

    def __init__(
        self,
        path: Path,
        file_of: Mapping[str, Path],
        num_bytes: Mapping[str, int],
        *,
        stream: TextIO | None = None,
        silent: bool = False,
    ) -> None:
        stream = stream or sys.stderr
        self._file_of = file_of
        self._num_bytes = num_bytes
        self._left = Counter(file_of.values())  # tensors that are not read yet
        self._num_files = len(self._left)
        self._bytes_read = 0
        speaks = not silent and _log.isEnabledFor(logging.INFO)
        self._has_lines = speaks and not stream.isatty()
        self._bar = None
        if speaks and stream.isatty():
            total = sum(num_bytes.values())
            name = f"reading {path.name}"
            self._bar = tqdm(total=total, desc=name, unit="B", unit_scale=True, file=stream)

    def __enter__(self) -> LoadProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def read(self, name: str) -> None:
        """This tensor is in memory now."""
        file = self._file_of[name]
        self._bytes_read += self._num_bytes[name]
        if self._bar is not None:
            self._bar.update(self._num_bytes[name])
        self._left[file] -= 1
        if self._left[file] == 0:
            del self._left[file]
            if self._has_lines:
                num_read = self._num_files - len(self._left)
                gib = self._bytes_read / 2**30
                _log.info("%s is read, %d of %d files, %.2f GiB", file, num_read, self._num_files, gib)
