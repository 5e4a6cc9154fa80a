"""How scattered pages are on pools in use: runs per hand-off, the real allocators on both sides.

Requests of random lengths come and go in random order until both pools have been turned over many times; of
each hand-off the runs are counted that neighbours on both sides make. No process is started, nothing written.
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import dataclass

from ..components.page_allocator import PageAllocator
from ..messages.kv_layout import KVLayout
from ..messages.peer import RoomId
from ..transfer.copy_plan import plan_runs
from ..transfer.head_slices import plan_head_slices

_PAGE = KVLayout(num_kv_heads=1, num_layers=1, page_size=16, head_dim=1, dtype="float32")
_MAX_GROWTH = 16  # pages that a sequence may grow by


@dataclass(frozen=True, slots=True)
class Scattered:
    """Of the hand-offs after the pools were churned."""

    fill: float
    num_handoffs: int
    pages: float  # mean of a hand-off
    runs: float  # mean
    runs_p90: int
    share_whole: float  # of hand-offs that were one run


def churn(num_pages: int, max_pages: int, fill: float, num_handoffs: int, seed: int) -> Scattered:
    """`fill`: the share of both pools that is in use once they are warm."""
    rng = random.Random(seed)
    (whole,) = plan_head_slices(_PAGE, 1, 1)
    prefill, decode = PageAllocator(num_pages), PageAllocator(num_pages)
    held: list[int] = []  # numbers of requests on both sides
    runs: list[int] = []
    pages: list[int] = []
    for number in range(2 * num_handoffs):
        length = rng.randint(1, max_pages)
        while held and max(
            num_pages - prefill.num_free, num_pages - decode.num_free
        ) + length + _MAX_GROWTH > (fill * num_pages):
            gone = held.pop(rng.randrange(len(held)))
            prefill.free_private(gone)
            decode.free_private(gone)
        room = RoomId("decode", number + 1)
        source = prefill.allocate_private(number, length)
        dest = decode.reserve_exposed(room, length)
        assert source is not None, "the fill leaves room for every request"
        assert dest is not None, "the fill leaves room for every request"
        decode.exposed_to_private(room, number)
        last = dest[-1]
        for _ in range(rng.randint(0, _MAX_GROWTH)):
            (last,) = decode.allocate_private(number, 1, near=last) or (last,)
        held.append(number)
        if number >= num_handoffs:
            runs.append(len(plan_runs(source, dest, whole)))
            pages.append(length)
    return Scattered(
        fill=fill,
        num_handoffs=len(runs),
        pages=statistics.mean(pages),
        runs=statistics.mean(runs),
        runs_p90=sorted(runs)[int(0.9 * len(runs))],
        share_whole=sum(count == 1 for count in runs) / len(runs),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pages", type=int, default=4096, metavar="N", help="of each pool")
    parser.add_argument("--max-prompt-pages", type=int, default=128, metavar="N")
    parser.add_argument("--handoffs", type=int, default=2000, metavar="N", help="counted, after as many")
    parser.add_argument("--fill", type=float, nargs="+", default=[0.5, 0.8, 0.95], metavar="X")
    parser.add_argument("--seed", type=int, default=1, metavar="N")


def main(options: argparse.Namespace) -> int:
    """Prints a Markdown table."""
    print("| pools in use | pages a hand-off | runs, mean | runs, p90 | pages a run | one run |")
    print("|---|---|---|---|---|---|")
    for fill in options.fill:
        found = churn(options.pages, options.max_prompt_pages, fill, options.handoffs, options.seed)
        print(
            f"| {100 * found.fill:.0f} % | {found.pages:.1f} | {found.runs:.1f} | {found.runs_p90} "
            f"| {found.pages / found.runs:.1f} | {100 * found.share_whole:.0f} % |"
        )
    return 0
