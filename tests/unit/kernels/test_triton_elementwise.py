"""Triton's rms_norm, rotary, silu_and_mul and store_kv against their references, at odd sizes, on strided
views, over NaN and beyond 2³² elements; and where kernels are not launched at all."""

from __future__ import annotations

import re

import pytest
import torch

from pdserve.kernels import launch
from pdserve.kernels.rms_norm import reference as rms_norm_reference
from pdserve.kernels.rms_norm.triton import rms_norm
from pdserve.kernels.rotary import reference as rotary_reference
from pdserve.kernels.rotary.triton import rotary_
from pdserve.kernels.silu_and_mul import reference as silu_reference
from pdserve.kernels.silu_and_mul.triton import silu_and_mul
from pdserve.kernels.store_kv import reference as store_reference
from pdserve.kernels.store_kv.triton import store_kv_
from pdserve.tests.kernel_device import DEVICE, NUM_FAR_BLOCKS, far_apart, needs_device

pytestmark = needs_device

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Two units in the last place: the interpreter cuts where a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
BFLOAT16 = torch.bfloat16


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).mul(3).to(DEVICE, dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def angles_of(num_tokens: int, half: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(num_tokens, half) * 100
    return angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 63), (2, 5000)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
    assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference.rms_norm(x, weight, 1e-6))


def test_rms_norm_of_some_heads_of_a_fused_projection() -> None:
    fused, weight = randn(3, 5, 18), randn(18)
    heads = fused[:, 1:4]
    assert_close(rms_norm(heads, weight, 1e-6), rms_norm_reference.rms_norm(heads, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "intermediate"), [(1, 1), (3, 63), (2, 1030)])
def test_silu_and_mul(num_tokens: int, intermediate: int, dtype: torch.dtype) -> None:
    x = randn(num_tokens, 2 * intermediate, dtype=dtype)
    assert_close(silu_and_mul(x), silu_reference.silu_and_mul(x))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter's NumPy
def test_a_gate_that_overflows_the_exponential_is_closed() -> None:
    x = torch.tensor([[-1000.0, 1000.0, -0.0, 3.0, 2.0, 1.0]], device=DEVICE)
    assert silu_and_mul(x).tolist() == [[0.0, 2000.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "num_heads", "head_dim"), [(1, 1, 2), (5, 3, 18), (2, 9, 64)])
def test_rotary_on_part_of_a_fused_projection(
    num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    fused = randn(num_tokens, num_heads + 2, head_dim, dtype=dtype)
    cos, sin = angles_of(num_tokens, head_dim // 2, dtype)
    before = fused.clone()
    rotary_(fused[:, :num_heads], cos, sin)
    assert_close(fused[:, :num_heads], rotary_reference.rotary(before[:, :num_heads], cos, sin))
    assert torch.equal(fused[:, num_heads:], before[:, num_heads:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [0, 3], ids=["dense", "padded-stride"])
@pytest.mark.parametrize(("num_tokens", "num_kv_heads", "head_dim"), [(1, 1, 2), (5, 3, 18), (4, 2, 64)])
def test_store_kv(
    num_tokens: int, num_kv_heads: int, head_dim: int, padding: int, dtype: torch.dtype
) -> None:
    """All else in the pool stays NaN, padding between pages and other layers included."""
    num_pages, num_layers, page_size = 7, 3, 5
    shape = (num_kv_heads, num_layers, 2, page_size, head_dim)
    inner = torch.empty(shape, device="meta")
    pools = [
        torch.full((num_pages * (inner.numel() + padding),), float("nan"), dtype=dtype, device=DEVICE)
        for _ in range(2)
    ]
    layers = [
        pool.as_strided((num_pages, *shape), (inner.numel() + padding, *inner.stride()))[:, :, 1]
        for pool in pools
    ]
    fused = randn(num_tokens, 4 * num_kv_heads, head_dim, dtype=dtype)
    kv = fused[:, 2 * num_kv_heads :].view(num_tokens, 2, num_kv_heads, head_dim)
    slots = torch.randperm(num_pages * page_size)[:num_tokens].to(DEVICE)
    store_kv_(layers[0], kv, slots // page_size, slots % page_size)
    store_reference.store_kv_(layers[1], kv, slots // page_size, slots % page_size)
    torch.testing.assert_close(pools[0], pools[1], rtol=0, atol=0, equal_nan=True)
    assert int(pools[0].isfinite().sum()) == kv.numel()


def test_offsets_beyond_32_bits() -> None:
    """Of tokens and of pages: each operator reads or writes blocks that lie 2³⁰ elements apart."""
    far = far_apart(2, 2, 4, 16)  # pages of a layer
    kv = randn(NUM_FAR_BLOCKS, 2, 2, 16, dtype=BFLOAT16)
    page, offset = (
        torch.randperm(NUM_FAR_BLOCKS, device=DEVICE),
        torch.arange(NUM_FAR_BLOCKS, device=DEVICE) % 4,
    )
    store_kv_(far, kv, page.int(), offset.int())
    assert torch.equal(far[page, :, :, offset], kv.transpose(1, 2))
    assert int(far.count_nonzero()) == kv.numel()

    heads = far.flatten(2)[:, :, :64]  # [NUM_FAR_BLOCKS, 2, 64]
    heads.copy_(randn(*heads.shape, dtype=BFLOAT16))
    weight, (cos, sin) = randn(64, dtype=BFLOAT16), angles_of(NUM_FAR_BLOCKS, 32, BFLOAT16)
    assert_close(rms_norm(heads, weight, 1e-6), rms_norm_reference.rms_norm(heads, weight, 1e-6))
    assert_close(silu_and_mul(heads[:, 1]), silu_reference.silu_and_mul(heads[:, 1]))
    expected = rotary_reference.rotary(heads, cos, sin)
    rotary_(heads, cos, sin)
    assert_close(heads, expected)


def test_a_kernel_computes_nothing_for_no_tokens() -> None:
    assert rms_norm(randn(0, 8), randn(8), 1e-6).shape == (0, 8)
    assert silu_and_mul(randn(0, 8)).shape == (0, 4)
    rotary_(randn(0, 2, 8), *angles_of(0, 4, torch.float32))


def test_a_strided_last_axis_is_refused() -> None:
    for refused in (
        lambda: rms_norm(randn(8, 3).T, randn(8), 1e-6),
        lambda: silu_and_mul(randn(8, 3).T),
        lambda: rotary_(randn(3, 8, 2).transpose(1, 2), *angles_of(3, 4, torch.float32)),
    ):
        with pytest.raises(ValueError, match="the last axis of x has a stride of"):
            refused()


def test_tensors_of_the_host_are_refused_but_by_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    told = "_silu_and_mul is a Triton kernel, for GPUs; its tensors are on cpu, where eager operators compute"
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        silu_and_mul(torch.ones(1, 2))


def test_tensors_of_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^_rms_norm: tensors on .*, meta in one launch$"):
        rms_norm(randn(1, 8), torch.ones(8, device="meta"), 1e-6)


def test_what_would_be_launched_is_noted_on_the_meta_device() -> None:
    with launch.noted() as launches:
        silu_and_mul(torch.empty((3, 4096), device="meta"))
    assert [(noted.grid, noted.options["SIZE"]) for noted in launches] == [((3, 2), 2048)]
