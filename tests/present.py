"""Looking twice at what changes in between."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def at_present(value: T) -> T:
    """For an attribute in an `assert`: mypy takes it to stay what it was asserted to be, whatever is called
    afterwards, and the next `assert` for one that always fails. It does not so with what is returned here."""
    return value
