"""What sampling costs the processor in one decode step: packing what the rows ask, choosing, telling.

    scripts/dev sampler_cost [--rows 1 16 64] [--vocab-size 32000] [--repeats 100]

Logits are random with a peak, as a model's are; rows have a prompt of 500 tokens and 100 of output. One
thread; median microseconds of a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from pdserve.engine.sampler import sample, told_tokens
from pdserve.engine.sampling_batch import Entry, SamplingBatch
from pdserve.engine.schedule_batch import ScheduledRow
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.work import Work

NUM_PROMPT, NUM_OUTPUT = 500, 100
NUM_WARMUP = 5
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "top_k 20": {"top_k": 20},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    "logprobs 5": {"temperature": 0.0, "num_logprobs": 5},
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()

    torch.set_num_threads(1)
    print("| asked | " + " | ".join(f"{num_rows} rows" for num_rows in options.rows) + " |")
    for name, asked in CASES.items():
        times = [_median_s(asked, num_rows, options.vocab_size, options.repeats) for num_rows in options.rows]
        print(f"| {name} | " + " | ".join(f"{1e6 * seconds:.0f}" for seconds in times) + " |", flush=True)
    return 0


def _median_s(asked: dict[str, Any], num_rows: int, vocab_size: int, repeats: int) -> float:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rows, vocab_size, generator=generator).mul_(2)
    logits[:, : vocab_size // 100] += 8
    entries = [_entry(index, vocab_size, asked) for index in range(num_rows)]
    times = []
    with torch.inference_mode():
        for _ in range(NUM_WARMUP + repeats):
            started = time.perf_counter()
            batch = SamplingBatch.build(entries, (2,), vocab_size)
            told_tokens(sample(logits, batch), batch)
            times.append(time.perf_counter() - started)
    return statistics.median(times[NUM_WARMUP:])


def _entry(index: int, vocab_size: int, asked: dict[str, Any]) -> Entry:
    token_ids = [(7919 * index + 31 * place) % vocab_size for place in range(NUM_PROMPT + NUM_OUTPUT)]
    sampling = SamplingParams(seed=index, **asked)
    row = ScheduledRow(
        row_id=index,
        work=Work(prompt_ids=tuple(token_ids[:NUM_PROMPT]), choices=(0,), sampling=sampling),
        token_ids=token_ids,
        start=len(token_ids) - 1,
        num_tokens=1,
        pages=(),
        choices=(0,),
    )
    return Entry(row_index=index, logits_index=index, choice=0, row=row)


if __name__ == "__main__":
    raise SystemExit(main())
