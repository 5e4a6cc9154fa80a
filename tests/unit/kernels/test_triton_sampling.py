"""Triton's gumbel_argmax against the eager version and the reference: the same ids."""

from __future__ import annotations

import pytest
import torch

from pdserve.kernels.sampling import eager, reference
from pdserve.kernels.sampling.triton import gumbel_argmax
from pdserve.tests.kernel_device import DEVICE, NUM_FAR_BLOCKS, far_apart, needs_device

pytestmark = needs_device

EVERYTHING = float("-inf")
SEEDS = (0, 1, -1, 0x123456789ABCDEF0)  # -1: two's complement of 2⁶⁴ − 1
CHOICES = (0, 1, 2, 3)
POSITIONS = (9, 8, 7, 100_000)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 500])
@pytest.mark.parametrize("spread", [0.1, 30.0])
def test_same_ids_as_the_reference(vocab_size: int, spread: float) -> None:
    scaled = torch.randn(4, vocab_size) * spread
    threshold = torch.full((4,), EVERYTHING)
    threshold[1] = scaled[1].median()
    numbers = (ints(*SEEDS), ints(*CHOICES), ints(*POSITIONS))
    drawn = gumbel_argmax(scaled.to(DEVICE), threshold.to(DEVICE), *numbers).tolist()
    assert drawn == eager.gumbel_argmax(scaled, threshold, *(column.cpu() for column in numbers)).tolist()
    for row in range(4):
        kept = {token for token in range(vocab_size) if scaled[row, token] >= threshold[row]}
        expected = reference.draw(
            scaled[row].double().numpy(), kept, SEEDS[row] % (1 << 64), CHOICES[row], POSITIONS[row]
        )
        assert drawn[row] == expected


def test_same_ids_where_the_vocabulary_is_several_blocks() -> None:
    scaled, threshold = torch.randn(2, 2051, device=DEVICE), torch.full((2,), EVERYTHING, device=DEVICE)
    numbers = (ints(7, 8), ints(0, 1), ints(70, 71))
    drawn = gumbel_argmax(scaled, threshold, *numbers)
    assert torch.equal(drawn, eager.gumbel_argmax(scaled, threshold, *numbers))
    assert drawn.amax() >= 1024, "none is of a later block: the test says nothing"


def test_a_token_that_must_not_come_never_does() -> None:
    """Also where it is the first, the last, and where most of a row is forbidden."""
    scaled = torch.full((3, 1025), float("-inf"), device=DEVICE)
    scaled[0, 1024], scaled[1, 0], scaled[2, 511] = 1.0, -1e30, 0.0
    threshold = torch.full((3,), EVERYTHING, device=DEVICE)
    assert gumbel_argmax(scaled, threshold, ints(1, 2, 3), ints(0, 0, 0), ints(5, 6, 7)).tolist() == [
        1024,
        0,
        511,
    ]


def test_rows_that_lie_far_apart() -> None:
    scaled = far_apart(63, dtype=torch.float32)
    scaled.copy_(torch.randn(scaled.shape))
    threshold = torch.full((NUM_FAR_BLOCKS,), EVERYTHING, device=DEVICE)
    numbers = tuple(torch.arange(NUM_FAR_BLOCKS, device=DEVICE) + offset for offset in (3, 0, 70))
    assert torch.equal(
        gumbel_argmax(scaled, threshold, *numbers), eager.gumbel_argmax(scaled, threshold, *numbers)
    )


def test_a_strided_last_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^gumbel_argmax: the last axis of scaled has a stride of 2$"):
        gumbel_argmax(torch.zeros(8, 2, device=DEVICE).T, torch.zeros(2), ints(0), ints(0), ints(0))
