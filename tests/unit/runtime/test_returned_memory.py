"""return_memory: asks for memory back once after a burst, not while it grows, and not again in vain."""

from __future__ import annotations

import pytest

from pdserve.runtime.returned_memory import GROWN_BYTES, resident_bytes, return_memory, trim


class OverError(Exception):
    """All sizes are seen."""


MB = 1 << 20
FEW, MANY = 100 * MB, 100 * MB + 2 * GROWN_BYTES


@pytest.mark.parametrize(
    ("seen", "num_trims"),
    [
        ([FEW] * 6, 0),  # nothing has grown
        ([FEW, MANY, MANY + 1, MANY + 2], 0),  # it grows still
        ([FEW, MANY, MANY, FEW, FEW, FEW], 1),  # it stands: then what is free is back
        ([FEW, MANY, MANY, MANY, MANY, MANY], 1),  # nothing was free: it is not asked for again
        ([FEW, MANY, MANY, FEW, FEW, MANY, MANY, FEW, FEW], 2),  # a second burst
    ],
)
async def test_when_memory_is_asked_back(seen: list[int], num_trims: int) -> None:
    sizes = iter(seen)
    trims: list[int] = []

    def resident() -> int:
        size = next(sizes, None)
        if size is None:
            raise OverError
        return size

    with pytest.raises(OverError):
        await return_memory(resident, lambda: trims.append(1), interval_s=0.0)
    assert len(trims) == num_trims


def test_this_process_can_be_asked() -> None:
    assert resident_bytes() > MB
    trim()
