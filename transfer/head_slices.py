"""Which rank of a prefill node writes which KV heads of a page into which rank of a decode node.

Both sides split the same heads over their own number of ranks. In a pool the heads of a page lie one behind
the other, each with all of its layers, so any number of neighbouring heads is one run of bytes: different
sizes on the two sides need no staging, only more and shorter writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..messages.kv_layout import KVLayout, kv_heads_of_rank


@dataclass(frozen=True, slots=True)
class HeadSlice:
    """Neighbouring heads that one rank holds and another needs, as bytes of a page in each of the pools."""

    source_rank: int
    dest_rank: int
    source_offset: int  # bytes from the start of the page
    dest_offset: int
    num_bytes: int
    source_stride: int  # bytes from one page to the next
    dest_stride: int

    @property
    def is_whole_page(self) -> bool:
        """On both sides, without padding: then neighbouring pages are one run too."""
        return self.num_bytes == self.source_stride == self.dest_stride


def plan_head_slices(layout: KVLayout, source_tp: int, dest_tp: int) -> tuple[HeadSlice, ...]:
    """The slices that together fill a page of every decode rank, each byte once.

    `layout` is that of all heads. Where several prefill ranks hold a head, copy i of it on the decode side
    is written by copy i modulo their number, so they share the work; with equal sizes each rank writes to its
    counterpart alone.
    """
    source, dest = layout.of_rank(source_tp), layout.of_rank(dest_tp)
    slices = []
    for dest_rank in range(dest_tp):
        heads = kv_heads_of_rank(layout.num_kv_heads, dest_tp, dest_rank)
        head = heads.start
        while head < heads.stop:
            source_rank = _writer(layout.num_kv_heads, source_tp, dest_tp, head, dest_rank)
            held = kv_heads_of_rank(layout.num_kv_heads, source_tp, source_rank)
            end = min(held.stop, heads.stop)
            slices.append(
                HeadSlice(
                    source_rank=source_rank,
                    dest_rank=dest_rank,
                    source_offset=(head - held.start) * layout.head_bytes,
                    dest_offset=(head - heads.start) * layout.head_bytes,
                    num_bytes=(end - head) * layout.head_bytes,
                    source_stride=source.stride_bytes,
                    dest_stride=dest.stride_bytes,
                )
            )
            head = end
    return tuple(slices)


def _writer(num_kv_heads: int, source_tp: int, dest_tp: int, head: int, dest_rank: int) -> int:
    """The prefill rank that writes `head` to this decode rank."""
    if source_tp <= num_kv_heads:
        return next(
            rank for rank in range(source_tp) if head in kv_heads_of_rank(num_kv_heads, source_tp, rank)
        )
    num_source_copies = source_tp // num_kv_heads
    num_dest_copies = max(1, dest_tp // num_kv_heads)
    return head * num_source_copies + dest_rank % num_dest_copies % num_source_copies
