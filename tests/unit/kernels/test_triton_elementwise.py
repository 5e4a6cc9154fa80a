"""Triton's kernels but attention's and sampling's against their references, at odd sizes, on strided views,
over NaN and beyond 2³² elements; and where kernels are not launched at all."""

from __future__ import annotations

import re

import pytest
import torch

from pdserve.kernels import launch
from pdserve.kernels.rms_norm import reference as rms_norm_reference
from pdserve.kernels.rms_norm.triton import rms_norm
from pdserve.kernels.rotary import reference as rotary_reference
from pdserve.kernels.rotary.triton import rotary_
from pdserve.kernels.rotate_and_store import reference as fused_reference
from pdserve.kernels.rotate_and_store.triton import rotate_and_store_
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


def nan_layer(
    num_kv_heads: int, head_dim: int, padding: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool of NaN with `padding` elements between pages, and its second of three layers."""
    num_pages, num_layers, page_size = 7, 3, 5
    shape = (num_kv_heads, num_layers, 2, page_size, head_dim)
    inner = torch.empty(shape, device="meta")
    stride = inner.numel() + padding
    pool = torch.full((num_pages * stride,), float("nan"), dtype=dtype, device=DEVICE)
    return pool, pool.as_strided((num_pages, *shape), (stride, *inner.stride()))[:, :, 1]


def some_slots(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages and offsets of `nan_layer`, none twice."""
    slots = torch.randperm(7 * 5)[:num_tokens].to(DEVICE)
    return slots // 5, slots % 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [0, 3], ids=["dense", "padded-stride"])
@pytest.mark.parametrize(("num_tokens", "num_kv_heads", "head_dim"), [(1, 1, 2), (5, 3, 18), (4, 2, 64)])
def test_store_kv(
    num_tokens: int, num_kv_heads: int, head_dim: int, padding: int, dtype: torch.dtype
) -> None:
    """All else in the pool stays NaN, padding between pages and other layers included."""
    (pool, layer), (expected, reference_layer) = (
        nan_layer(num_kv_heads, head_dim, padding, dtype) for _ in range(2)
    )
    fused = randn(num_tokens, 4 * num_kv_heads, head_dim, dtype=dtype)
    kv = fused[:, 2 * num_kv_heads :].view(num_tokens, 2, num_kv_heads, head_dim)
    page, offset = some_slots(num_tokens)
    store_kv_(layer, kv, page, offset)
    store_reference.store_kv_(reference_layer, kv, page, offset)
    torch.testing.assert_close(pool, expected, rtol=0, atol=0, equal_nan=True)
    assert int(pool.isfinite().sum()) == kv.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim"), [(1, 1, 1, 2), (5, 7, 3, 18), (3, 4, 2, 64)]
)
def test_rotate_and_store(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, has_norms: bool, dtype: torch.dtype
) -> None:
    """Keys and values of the projection stay as they are, and the pool NaN but for the tokens' slots."""
    (pool, layer), (expected, reference_layer) = (
        nan_layer(num_kv_heads, head_dim, 3, dtype) for _ in range(2)
    )
    heads = randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    reference_heads = heads.clone()
    (cos, sin), (page, offset) = angles_of(num_tokens, head_dim // 2, dtype), some_slots(num_tokens)
    q_norm, k_norm = (randn(head_dim, dtype=dtype) if has_norms else None for _ in range(2))
    rotate_and_store_(heads, layer, cos, sin, page, offset, q_norm, k_norm, 1e-6)
    fused_reference.rotate_and_store_(
        reference_heads, reference_layer, cos, sin, page, offset, q_norm, k_norm, 1e-6
    )
    # The reference rounds between its steps.
    tolerance = 2 * TOLERANCE[dtype]
    torch.testing.assert_close(heads, reference_heads, rtol=tolerance, atol=tolerance)
    assert torch.equal(heads[:, num_heads:], reference_heads[:, num_heads:])
    torch.testing.assert_close(pool, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert int(pool.isfinite().sum()) == num_tokens * 2 * num_kv_heads * head_dim


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

    layer, zeros = far_apart(1, 2, 1, 32), torch.zeros_like(page)
    fused = far.flatten(1)[:, :96].view(NUM_FAR_BLOCKS, 3, 32)  # [NUM_FAR_BLOCKS, 3, 32]
    expected, expected_layer = fused.clone(), torch.zeros_like(layer)
    cos, sin = angles_of(NUM_FAR_BLOCKS, 16, BFLOAT16)
    rotate_and_store_(fused, layer, cos, sin, page, zeros, None, None, 1e-6)
    fused_reference.rotate_and_store_(expected, expected_layer, cos, sin, page, zeros, None, None, 1e-6)
    assert_close(fused, expected)
    assert_close(layer, expected_layer)


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
