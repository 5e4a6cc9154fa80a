from __future__ import annotations

from multiprocessing import shared_memory

import pytest
import torch

from pdserve.engine.kv_pool import KVPool, pool_bytes
from pdserve.messages.kv_layout import KVLayout

CPU = torch.device("cpu")


def layout(page_stride_bytes: int = 0, dtype: str = "bfloat16") -> KVLayout:
    return KVLayout(
        num_kv_heads=3,
        num_layers=2,
        page_size=5,
        head_dim=6,
        dtype=dtype,
        page_stride_bytes=page_stride_bytes,
    )


PAGE = layout().page_bytes


@pytest.mark.parametrize("stride", [0, PAGE + 2, 4096])
def test_a_page_is_one_run_and_a_head_is_one_run_in_it(stride: int) -> None:
    pool = KVPool(layout(stride), 4, CPU)
    assert pool.data.shape == (4, 3, 2, 2, 5, 6)
    assert pool.nbytes == pool_bytes(layout(stride), 4) == pool.view_bytes().numel() == 4 * (stride or PAGE)
    assert pool.data.stride(0) * 2 == (stride or PAGE)
    assert pool.data[1].is_contiguous()
    assert pool.data[1, 2].numel() * 2 == layout().head_bytes
    pool.data[2] = 1.5
    one_page = pool.view_bytes()[2 * (stride or PAGE) :][:PAGE].view(torch.bfloat16)
    assert bool((one_page == 1.5).all())
    assert int(pool.view_bytes().count_nonzero()) == PAGE


def test_layer_is_a_view() -> None:
    pool = KVPool(layout(4096), 4, CPU)
    pool.layer(1)[3, 2, 0, 4] = 7
    assert pool.layer(1).shape == (4, 3, 2, 5, 6)
    assert bool((pool.data[3, 2, 1, 0, 4] == 7).all())


def test_given_memory_is_used() -> None:
    shared = shared_memory.SharedMemory(create=True, size=8192)
    assert shared.buf is not None
    try:
        pool = KVPool(layout(), 3, CPU, memory=shared.buf)
        pool.data[0] = 1.0
        assert bytes(shared.buf[:PAGE]) == bytes([0x80, 0x3F]) * (PAGE // 2)
        del pool
    finally:
        shared.close()
        shared.unlink()
    tensor = torch.zeros(2000, dtype=torch.uint8)
    pool = KVPool(layout(), 1, CPU, memory=tensor)
    assert pool.data_ptr == tensor.data_ptr()


def test_what_cannot_be_a_pool() -> None:
    with pytest.raises(ValueError, match="bytes of memory"):
        KVPool(layout(), 3, CPU, memory=torch.zeros(3 * PAGE - 1, dtype=torch.uint8))
    for stride in (PAGE - 2, PAGE + 1):
        with pytest.raises(ValueError, match="page stride"):
            KVPool(layout(stride), 3, CPU)


def test_copied_pages_are_read_before_any_is_written() -> None:
    pool = KVPool(layout(4096), 4, CPU)
    for page in range(4):
        pool.data[page] = page
    pool.copy_pages([0, 1], [1, 3])
    assert [set(pool.data[page].flatten().tolist()) for page in range(4)] == [{0}, {0}, {2}, {1}]


def test_poison() -> None:
    pool = KVPool(layout(4096), 4, CPU)
    pool.poison([1, 3])
    assert [bool(pool.data[page].isnan().all()) for page in range(4)] == [False, True, False, True]
