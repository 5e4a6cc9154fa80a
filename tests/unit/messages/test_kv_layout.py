"""Arithmetic of the KV layout."""

from __future__ import annotations

import msgspec
import pytest

from pdserve.messages.kv_layout import DTYPE_BYTES, KVLayout

LAYOUT = KVLayout(num_kv_heads=3, num_layers=5, page_size=16, head_dim=24, dtype="bfloat16")


def test_a_page_is_its_heads_and_a_head_is_all_its_layers() -> None:
    assert LAYOUT.head_bytes == 5 * 2 * 16 * 24 * 2
    assert LAYOUT.page_bytes == 3 * LAYOUT.head_bytes


@pytest.mark.parametrize(("dtype", "num_bytes"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_bytes_of_each_dtype(dtype: str, num_bytes: int) -> None:
    assert DTYPE_BYTES[dtype] == num_bytes
    layout = msgspec.structs.replace(LAYOUT, dtype=dtype)
    assert layout.page_bytes == 3 * 5 * 2 * 16 * 24 * num_bytes


def test_pages_are_dense_unless_a_stride_is_given() -> None:
    assert LAYOUT.stride_bytes == LAYOUT.page_bytes
    padded = msgspec.structs.replace(LAYOUT, page_stride_bytes=32768)
    assert (padded.stride_bytes, padded.page_bytes) == (32768, LAYOUT.page_bytes)


@pytest.mark.parametrize(
    ("num_tokens", "num_pages"),
    [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3), (10**9, 62500000)],
)
def test_a_started_page_is_a_page(num_tokens: int, num_pages: int) -> None:
    assert LAYOUT.pages_for(num_tokens) == num_pages


def test_layouts_are_compared_field_by_field() -> None:
    # The handshake refuses a pair whose layouts differ, also where the sizes happen to agree.
    transposed = msgspec.structs.replace(LAYOUT, num_kv_heads=5, num_layers=3)
    assert transposed.page_bytes == LAYOUT.page_bytes
    assert transposed != LAYOUT
