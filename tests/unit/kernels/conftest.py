from __future__ import annotations

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

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor: torch.Tensor = real(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(float("nan"))

    monkeypatch.setattr(torch, "empty_like", poisoned)
