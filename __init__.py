"""pdserve: large language model serving with prefill and decode on different nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:  # noqa: ANN401  what a module's attributes are
    """`Engine` is imported when it is asked for: every process of pdserve imports this package."""
    if name == "Engine":
        from .client.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
