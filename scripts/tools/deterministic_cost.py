"""What `--deterministic` costs a forward: prefill and decode against the eager operators, in float32.

    scripts/dev deterministic_cost MODEL [--prompt-tokens 512] [--streams 1 8 16] [--repeats 7]

One process, one thread, the same weights; the versions take turns. Times are CPU seconds of the thread, so
that other work on the machine moves the ratio little; medians of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from pdserve.engine.device import HOST
from pdserve.engine.forward_batch import ForwardBatch
from pdserve.engine.kv_pool import KVPool
from pdserve.engine.model_runner import ModelRunner
from pdserve.engine.model_weights import load_weights
from pdserve.engine.operators import EAGER, deterministic, survey
from pdserve.engine.schedule_batch import ScheduleBatch, ScheduledRow
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.work import Work
from pdserve.models.config import ModelConfig, kv_layout

CPU = torch.device("cpu")
PAGE_SIZE = 16


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()

    torch.set_num_threads(1)
    config = ModelConfig.from_dir(options.model)
    weights = load_weights(options.model, config, torch.float32, CPU)
    layout = kv_layout(config, PAGE_SIZE, "float32")
    pages_per_row = layout.pages_for(options.prompt_tokens + 1)
    pool = KVPool(layout, pages_per_row * max(options.streams), CPU)
    started = time.thread_time()
    found = survey(config, weights)
    print(f"survey: {time.thread_time() - started:.2f} s, row tiles of {', '.join(map(str, found.heights))}")
    runners = {
        operators.name: ModelRunner(config, weights, pool, HOST, operators=operators)
        for operators in (EAGER, deterministic(found))
    }

    def row(index: int, start: int, num_tokens: int) -> ScheduledRow:
        token_ids = tuple(
            (7 * index + 13 * position) % config.vocab_size for position in range(start + num_tokens)
        )
        return ScheduledRow(
            row_id=index,
            work=Work(prompt_ids=token_ids, choices=(0,), sampling=SamplingParams(temperature=0.0)),
            token_ids=token_ids,
            start=start,
            num_tokens=num_tokens,
            pages=range(index * pages_per_row, (index + 1) * pages_per_row),
            choices=(0,),
        )

    cases: dict[str, tuple[int, tuple[ScheduledRow, ...]]] = {
        f"prefill of {options.prompt_tokens}": (options.prompt_tokens, (row(0, 0, options.prompt_tokens),))
    }
    for streams in options.streams:
        rows = tuple(row(index, options.prompt_tokens, 1) for index in range(streams))
        cases[f"decode, {streams} streams"] = (streams, rows)
    print(f"{'':<20} {'eager tok/s':>12} {'deterministic':>14} {'ratio':>6}  (spread of the repeats' ratios)")
    for name, (num_tokens, rows) in cases.items():
        batch = ForwardBatch.build(ScheduleBatch(rows), step=0, config=config, layout=layout)
        seconds: dict[str, list[float]] = {name: [] for name in runners}
        for repeat in range(options.repeats + 1):
            for version, runner in runners.items():
                started = time.thread_time()
                runner.forward(batch)
                if repeat > 0:  # the first one warms up
                    seconds[version].append(time.thread_time() - started)
        eager, exact = seconds["eager"], seconds["deterministic"]
        ratios = [before / after for before, after in zip(eager, exact, strict=True)]
        speeds = (num_tokens / statistics.median(times) for times in (eager, exact))
        print(
            f"{name:<20} {next(speeds):>12.1f} {next(speeds):>14.1f} {statistics.median(ratios):>6.2f}"
            f"  ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
