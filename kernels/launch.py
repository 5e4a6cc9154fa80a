"""Launches Triton kernels. Only ``kernels/*/triton.py`` imports this; nothing else needs `triton`.

Whether Triton compiles kernels for a GPU or interprets them in NumPy is decided for the whole process by
``TRITON_INTERPRET``, when a kernel's module is imported. Interpreted kernels take tensors of the host; they
are for tests. Three faults of the interpreter (3.7) are silent, and kernels are written around them: it
computes on bfloat16 as bit patterns, so kernels cast to float32 before arithmetic and, where `INTERPRETED`,
before ``tl.dot`` too; it cuts float32 to bfloat16 where a GPU rounds; and a masked load without ``other``
gives 0, where a GPU gives anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch; `options` are the kernel's constants, ``num_warps`` and ``num_stages``."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Tensor | float, ...]
    options: dict[str, int]


_noted: ContextVar[list[Launch] | None] = ContextVar("noted", default=None)


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """Within, launches are written into the list and not made, whatever device their tensors are on: so a
    function that launches says on the meta device what it would launch, for compilation without a GPU."""
    launches: list[Launch] = []
    token = _noted.set(launches)
    try:
        yield launches
    finally:
        _noted.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | float, **options: int) -> None:  # noqa: ANN401
    """Run `kernel` on every point of `grid`, on the current stream of the GPU that the tensors are on.

    Raises ValueError where they are not on one GPU (where they are not on the host, if kernels are
    interpreted).
    """
    launches = _noted.get()
    if launches is not None:
        launches.append(Launch(kernel, grid, arguments, options))
        return
    name = kernel.__name__
    devices = {argument.device for argument in arguments if isinstance(argument, Tensor)}
    if len(devices) != 1:
        raise ValueError(f"{name}: tensors on {', '.join(sorted(map(str, devices)))} in one launch")
    (device,) = devices
    if INTERPRETED:
        kernel[grid](*arguments, **options)
        return
    if device.type != "cuda":
        raise ValueError(
            f"{name} is a Triton kernel, for GPUs; its tensors are on {device}, where eager operators compute"
        )
    with torch.cuda.device(device):
        kernel[grid](*arguments, **options)
