"""From lists of pages to few long writes.

A transfer engine's cost is per write, not per byte, as long as writes are short, so pages that lie side by
side on *both* nodes travel as one run.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .head_slices import HeadSlice

MAX_RUN_BYTES = 64 << 20  # long enough to be at wire speed, short enough for peers to take turns


@dataclass(frozen=True, slots=True)
class Run:
    """One contiguous write. Offsets are in bytes from the start of each side's pool."""

    source: int
    dest: int
    num_bytes: int


def plan_runs(
    source_pages: Sequence[int],
    dest_pages: Sequence[int],
    heads: HeadSlice,
    max_run_bytes: int = MAX_RUN_BYTES,
) -> list[Run]:
    """The fewest runs that carry these heads of ``source_pages[i]`` to ``dest_pages[i]``, in order.

    Neighbouring pages are one run only where the heads are the whole page on both sides. Padding between
    pages is never written: with a padded stride each page is a run of its own. A run is cut at whole pages,
    so one page longer than `max_run_bytes` still travels whole.
    """
    if len(source_pages) != len(dest_pages):
        raise ValueError(f"{len(source_pages)} source pages for {len(dest_pages)} destination pages")
    if not source_pages:
        return []
    source = np.asarray(source_pages, dtype=np.int64)
    dest = np.asarray(dest_pages, dtype=np.int64)
    max_pages = max(1, max_run_bytes // heads.num_bytes) if heads.is_whole_page else 1
    is_break = (np.diff(source) != 1) | (np.diff(dest) != 1)
    starts = np.concatenate(([0], np.flatnonzero(is_break) + 1, [source.size])).tolist()
    return [
        Run(
            source=int(source[first]) * heads.source_stride + heads.source_offset,
            dest=int(dest[first]) * heads.dest_stride + heads.dest_offset,
            num_bytes=min(max_pages, end - first) * heads.num_bytes,
        )
        for start, end in itertools.pairwise(starts)
        for first in range(start, end, max_pages)
    ]
