"""rms_norm, rotary and silu_and_mul against their references, at odd sizes; the deterministic versions in
float32, also a row alone against the same row among others."""

from __future__ import annotations

import pytest
import torch

from pdserve.kernels.rms_norm import deterministic_rms_norm, rms_norm
from pdserve.kernels.rms_norm import reference as rms_norm_reference
from pdserve.kernels.rotary import deterministic_rotary_, rotary_
from pdserve.kernels.rotary import reference as rotary_reference
from pdserve.kernels.silu_and_mul import deterministic_silu_and_mul, silu_and_mul
from pdserve.kernels.silu_and_mul import reference as silu_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half of a unit in the last place for each of the few roundings, relative to values around 1.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 4, 63), (2, 500)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).mul(3).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    expected = rms_norm_reference.rms_norm(x, weight, 1e-6)
    assert_close(rms_norm(x, weight, 1e-6), expected)
    if dtype == torch.float32:
        assert_close(deterministic_rms_norm(x, weight, 1e-6), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "intermediate"), [(1, 1), (3, 63), (17, 500)])
def test_silu_and_mul(num_tokens: int, intermediate: int, dtype: torch.dtype) -> None:
    x = torch.randn(num_tokens, 2 * intermediate).mul(3).to(dtype)
    assert_close(silu_and_mul(x), silu_reference.silu_and_mul(x))
    if dtype == torch.float32:
        assert_close(deterministic_silu_and_mul(x), silu_reference.silu_and_mul(x))


def test_a_gate_that_overflows_the_exponential_is_closed() -> None:
    gate, up = torch.tensor([[-1000.0, 1000.0, -0.0]]), torch.tensor([[3.0, 2.0, 1.0]])
    assert deterministic_silu_and_mul(torch.cat((gate, up), dim=1)).tolist() == [[0.0, 2000.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "num_heads", "head_dim"), [(1, 1, 2), (5, 3, 18), (33, 7, 64)])
def test_rotary_on_part_of_a_fused_projection(
    num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    fused = torch.randn(num_tokens, num_heads + 2, head_dim).to(dtype)
    angles = torch.rand(num_tokens, head_dim // 2) * 100
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    before = fused.clone()
    for version in (rotary_, deterministic_rotary_):
        fused.copy_(before)
        version(fused[:, :num_heads], cos, sin)
        assert_close(fused[:, :num_heads], rotary_reference.rotary(before[:, :num_heads], cos, sin))
        assert torch.equal(fused[:, num_heads:], before[:, num_heads:])


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("width", [18, 64, 768])
def test_a_row_has_the_same_bits_among_any_number(width: int, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    x, weight, angles = torch.randn(128, width) * 3, torch.randn(width), torch.rand(128, width // 2)
    cos, sin = angles.cos(), angles.sin()

    def rotated(first: int, last: int) -> torch.Tensor:
        fused = torch.stack((x, -x, x * 2), dim=1)[first:last]  # [T, 3, D]
        deterministic_rotary_(fused[:, :2], cos[first:last], sin[first:last])
        return fused

    def all_of(first: int, last: int) -> tuple[torch.Tensor, ...]:
        rows = x[first:last]
        normed = deterministic_rms_norm(rows, weight, 1e-6)
        return normed, deterministic_silu_and_mul(rows), rotated(first, last)

    whole = all_of(0, 128)
    for num_rows in (*range(1, 34, num_threads * num_threads), 100):
        for first in (0, 1, 13):
            part = all_of(first, first + num_rows)
            for alone, among in zip(part, whole, strict=True):
                assert torch.equal(alone, among[first : first + num_rows])
