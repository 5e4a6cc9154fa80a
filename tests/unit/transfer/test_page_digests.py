"""Digests of a pool's pages, and which pages are verified."""

from __future__ import annotations

import select
import zlib

from pdserve.messages.kv_layout import KVLayout
from pdserve.transfer.page_digests import SAMPLE_EVERY, Digests, DigestWorker, pages_to_verify

LAYOUT = KVLayout(num_kv_heads=1, num_layers=1, page_size=4, head_dim=2, dtype="float32")


def test_digests_are_of_the_pages_that_were_named_in_their_order() -> None:
    stride = LAYOUT.stride_bytes
    memory = memoryview(bytearray(index * 7 % 256 for index in range(8 * stride)))
    worker = DigestWorker(memory, LAYOUT)
    assert worker.poll() == []
    worker.submit("a", [5, 0])
    worker.submit("b", ())
    done: list[Digests] = []
    while len(done) < 2:
        assert select.select([worker], [], [], 30)[0]
        done += worker.poll()
    right = [zlib.crc32(memory[page * stride : page * stride + LAYOUT.page_bytes]) for page in range(8)]
    assert done == [Digests("a", (right[5], right[0])), Digests("b", ())]


def test_what_cannot_be_digested_is_told_and_the_next_job_is_done() -> None:
    worker = DigestWorker(memoryview(bytearray(8 * LAYOUT.stride_bytes)), LAYOUT)
    worker.submit("bad", ["no page"])  # type: ignore[list-item]
    worker.submit("good", [1])
    done: list[Digests] = []
    while len(done) < 2:
        assert select.select([worker], [], [], 30)[0]
        done += worker.poll()
    assert (done[0].key, done[0].digests) == ("bad", ())
    assert "TypeError" in done[0].error
    assert (done[1].key, len(done[1].digests), done[1].error) == ("good", 1, "")


def test_off_and_all() -> None:
    assert pages_to_verify("off", 0, 9, 1) == ()
    assert pages_to_verify("all", 2, 5, 1) == (2, 3, 4)


def test_a_sample_moves_and_holds_the_last_page_once() -> None:
    assert pages_to_verify("sample", 3, 3, 0) == ()
    assert pages_to_verify("sample", 0, 1, 0) == (0,)
    seen: set[int] = set()
    for room in range(SAMPLE_EVERY):
        sample = pages_to_verify("sample", 2, 50, room)
        assert sample[-1] == 49
        assert len(set(sample)) == len(sample) <= 4
        seen.update(sample)
    assert seen == set(range(2, 50))
