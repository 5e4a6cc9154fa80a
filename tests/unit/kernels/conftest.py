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
    real = torch.empty_like

    def poisoned(like: torch.Tensor, **options: Any) -> torch.Tensor:  # noqa: ANN401  those of empty_like
        return real(like, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty_like", poisoned)
