from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write is NaN, not whatever the allocator left there."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def poisoned(*args: Any, real: Any = real, **options: Any) -> torch.Tensor:  # noqa: ANN401  the real one's
            tensor: torch.Tensor = real(*args, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-1)

        monkeypatch.setattr(torch, name, poisoned)
