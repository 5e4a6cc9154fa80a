"""What the simulated device saw that a real one would make the host wait for, and where."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pdserve

_ROOT = Path(pdserve.__file__).resolve().parent
_TESTS = _ROOT / "tests"


class Kind(Enum):
    HOST_READ = "host read"  # a value of the device decides something on the host, which waits for it
    BLOCKING_COPY = "blocking copy"  # between host and device, and the host waits for its end
    MIXED_DEVICES = "mixed devices"  # one operator on tensors of both: an error on a real device


@dataclass(frozen=True, slots=True)
class Place:
    """In the product: tests and torch are not where something is mended."""

    file: str  # from the root, such as engine/sampler.py
    line: int
    function: str


@dataclass(frozen=True, slots=True)
class Finding:
    kind: Kind
    operator: str
    place: Place

    def __str__(self) -> str:
        place = self.place
        return f"{place.file}:{place.line} {place.function}: {self.kind.value} by {self.operator}"

    @property
    def summary(self) -> str:
        """Without the line, which any change above it moves."""
        return f"{self.place.file} {self.place.function}: {self.kind.value}"


class MixedDevicesError(RuntimeError):
    """What a real device raises for an operator on tensors of two devices."""


def here() -> Place:
    """The innermost line of the product on this thread's stack."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_ROOT) and not path.is_relative_to(_TESTS) and ".venv" not in path.parts:
            return Place(str(path.relative_to(_ROOT)), frame.f_lineno, frame.f_code.co_name)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return Place("a test", 0, "")
