"""linear and row_sum against their references; the tiles, and a row's bits in any company."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdserve.kernels.linear import HEIGHTS, cover, linear, reference, row_tiled_linear
from pdserve.kernels.row_sum import reference as row_sum_reference
from pdserve.kernels.row_sum import row_sum


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("num_rows", "num_in", "num_out"), [(1, 1, 1), (3, 7, 5), (33, 63, 17), (300, 100, 129)]
)
def test_linear(num_rows: int, num_in: int, num_out: int, has_bias: bool) -> None:
    x, weight = torch.randn(num_rows, num_in), torch.randn(num_out, num_in)
    bias = torch.randn(num_out) if has_bias else None
    expected = reference.linear(x, weight, bias)
    for actual in (
        linear(x, weight, bias),
        *(row_tiled_linear(x, weight, bias, h) for h in (HEIGHTS, (16,))),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("num_in", "num_out"), [(256, 384), (63, 500)])
def test_a_row_has_the_same_bits_among_any_number(num_threads: int, num_in: int, num_out: int) -> None:
    """With one height, so it holds on machines too where not all heights agree."""
    torch.set_num_threads(num_threads)
    x, weight = torch.randn(70, num_in), torch.randn(num_out, num_in)
    whole = row_tiled_linear(x, weight, None, (16,))
    for num_rows in range(1, 34, num_threads * num_threads):
        for first in (0, 37):
            rows = slice(first, first + num_rows)
            assert torch.equal(row_tiled_linear(x[rows], weight, None, (16,)), whole[rows])


def test_the_eager_version_computes_a_row_differently_in_company() -> None:
    """The control: without it the test above might hold of everything."""
    x, weight = torch.randn(64, 256), torch.randn(384, 256)
    whole = linear(x, weight, None)
    if all(torch.equal(linear(x[:count], weight, None), whole[:count]) for count in range(1, 34)):
        pytest.skip("this machine's matrix products give a row the same bits at every number of rows")


@given(st.integers(0, 3000), st.sets(st.sampled_from(HEIGHTS), min_size=1))
def test_tiles_cover_every_row_once_in_few_passes(num_rows: int, heights: set[int]) -> None:
    tiles = list(cover(num_rows, tuple(sorted(heights))))
    assert all(height in heights for _, height in tiles)
    ends = [start + height for start, height in tiles]
    assert [start for start, _ in tiles] == [0, *ends][: len(tiles)]
    assert num_rows == 0 or ends[-1] >= num_rows > tiles[-1][0]
    if heights == set(HEIGHTS):
        assert not tiles or ends[-1] < 2 * num_rows + 4
        assert len(tiles) <= num_rows // max(HEIGHTS) + 3


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 4095, 4096, 4097, 150_001])
def test_row_sum(length: int) -> None:
    x = torch.randn(3, 2, length)
    torch.testing.assert_close(row_sum(x), row_sum_reference.row_sum(x), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("length", [32, 768, 33_000])
def test_a_row_sums_to_the_same_bits_among_any_number_and_on_any_threads(length: int) -> None:
    x = torch.randn(40, length)
    torch.set_num_threads(1)
    whole = row_sum(x)
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        for num_rows in (1, 2, 3, 4, 5, 8, 33):
            assert torch.equal(row_sum(x[3 : 3 + num_rows]), whole[3 : 3 + num_rows])
