"""rms_norm, rotary and silu_and_mul against their references, at odd sizes."""

from __future__ import annotations

import pytest
import torch

from pdserve.kernels.rms_norm import reference as rms_norm_reference
from pdserve.kernels.rms_norm import rms_norm
from pdserve.kernels.rotary import reference as rotary_reference
from pdserve.kernels.rotary import rotary_
from pdserve.kernels.silu_and_mul import reference as silu_reference
from pdserve.kernels.silu_and_mul import silu_and_mul

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
    assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "intermediate"), [(1, 1), (3, 63), (17, 500)])
def test_silu_and_mul(num_tokens: int, intermediate: int, dtype: torch.dtype) -> None:
    x = torch.randn(num_tokens, 2 * intermediate).mul(3).to(dtype)
    assert_close(silu_and_mul(x), silu_reference.silu_and_mul(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "num_heads", "head_dim"), [(1, 1, 2), (5, 3, 18), (33, 7, 64)])
def test_rotary_on_part_of_a_fused_projection(
    num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    fused = torch.randn(num_tokens, num_heads + 2, head_dim).to(dtype)
    angles = torch.rand(num_tokens, head_dim // 2) * 100
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    before = fused.clone()
    rotary_(fused[:, :num_heads], cos, sin)
    assert_close(fused[:, :num_heads], rotary_reference.rotary(before[:, :num_heads], cos, sin))
    assert torch.equal(fused[:, num_heads:], before[:, num_heads:])
