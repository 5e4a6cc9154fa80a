"""What one step of a decode node's scheduler costs the loop, by how many requests are running.

    scripts/dev step_cost [--running 1 64 1024 4096] [--steps 20] [--repeats 5]

The real scheduler and its parts, composed as in the simulation, with pages of four tokens. The engine
computes nothing: every forward is done when the next step begins. What is sent goes nowhere. So a step takes
a token of every request, streams it, and launches the next forward. Times are CPU time of the thread; of
each repeat, which has a node of its own, the median step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import msgspec

from pdserve.decode.peer_links import LinkDown
from pdserve.engine.forward_batch import ForwardOutput, RowOutput
from pdserve.engine.schedule_batch import ScheduleBatch
from pdserve.messages.node import ClientToNode, GenerateRequest
from pdserve.messages.peer import PeerToDecode, PeerToPrefill
from pdserve.messages.report import SampledToken
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.work import Work
from pdserve.simulation import nodes
from pdserve.simulation.engine import FakeEngine
from pdserve.simulation.nodes import Place, Settings
from pdserve.simulation.tokens import PAGE_SIZE

CLIENT = b"router"
NUM_PROMPT_TOKENS = 16
NUM_WARMUP = 5
MOST_STEPS_TO_START = 400
STEP_S = 0.01  # on the node's clock
TOKEN = 7
NUM_FIRST_IDS = 900  # prompts differ in their first two tokens


class Inbox:
    """In place of the node's socket."""

    def __init__(self) -> None:
        self.messages: list[tuple[bytes, ClientToNode]] = []

    def receive(self) -> Iterator[tuple[bytes, ClientToNode]]:
        while self.messages:
            yield self.messages.pop()

    def send(self, link: bytes, message: msgspec.Struct) -> bool:
        del link, message
        return True


class NoLinks:
    """There is no prefill node: the prompts are computed here."""

    def open(self, address: str, epoch: int) -> None:
        raise AssertionError(f"{address} is not there")

    def close(self, address: str) -> None:
        raise AssertionError(f"{address} is not there")

    def send(self, address: str, message: PeerToPrefill) -> None:
        raise AssertionError(f"{address} is not there")

    def receive(self) -> Iterator[tuple[str, PeerToDecode | LinkDown]]:
        return iter(())


class ReadyEngine(FakeEngine):
    """Samples the same token always, and looks at no page."""

    @staticmethod
    def build(batch: ScheduleBatch) -> ScheduleBatch:
        return batch

    def submit(self, batch: ScheduleBatch) -> None:
        self.batches = [batch]

    def finish(self) -> bool:
        for batch in self.batches:
            rows = tuple(
                RowOutput(row.row_id, tuple(SampledToken(choice, TOKEN) for choice in row.choices))
                for row in batch.rows
            )
            self.results.append(ForwardOutput(0, rows, self.clock(), self.clock()))
        self.batches = []
        return bool(self.results)

    @property
    def num_decoding(self) -> int:
        """Rows of the batch that waits, if all of them decode; else 0."""
        rows = [row for batch in self.batches for row in batch.rows]
        return len(rows) if all(row.num_tokens == 1 for row in rows) else 0


def request(number: int, max_tokens: int) -> GenerateRequest:
    first, second = divmod(number, NUM_FIRST_IDS)
    return GenerateRequest(
        request_id=f"cmpl-{number:032x}",
        attempt=1,
        work=Work(
            prompt_ids=(1 + first, 1 + second, *range(1, NUM_PROMPT_TOKENS - 1)),
            choices=(0,),
            sampling=SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens),
        ),
        prefill_incarnation="",
        deadline_s=1e6,
    )


class Node:
    """A decode node on which so many requests run, for at most `num_steps` more."""

    def __init__(self, num_running: int, num_steps: int) -> None:
        self._now = 100.0
        max_tokens = MOST_STEPS_TO_START + num_steps
        inbox = Inbox()
        settings = Settings(
            is_colocated=True,
            decode_pages=num_running * ((NUM_PROMPT_TOKENS + max_tokens) // PAGE_SIZE + 2),
            chunk_tokens=8192,
            local_prefill_chunk=8192,
            max_running=num_running,
            max_model_len=NUM_PROMPT_TOKENS + max_tokens + 1,
        )
        place = Place(name="decode", incarnation="decode-1")
        with mock.patch.object(nodes, "FakeEngine", ReadyEngine):
            node = nodes.DecodeNode(place, inbox, NoLinks(), settings, clock=lambda: self._now)
        assert isinstance(node.engine, ReadyEngine)
        self._engine = node.engine
        self._step = node.loop.step
        inbox.messages += [(CLIENT, request(number, max_tokens)) for number in range(num_running)]
        for _ in range(MOST_STEPS_TO_START):
            self.step_s()
            if self.num_decoding == num_running:
                return
        raise RuntimeError(f"{num_running} requests do not run after {MOST_STEPS_TO_START} steps")

    @property
    def num_decoding(self) -> int:
        return self._engine.num_decoding

    def step_s(self) -> float:
        """CPU seconds of one step, which finds the results of the forward before."""
        self._engine.finish()
        self._now += STEP_S
        started = time.thread_time()
        self._step(self._now)
        return time.thread_time() - started


def measure(num_running: int, num_steps: int) -> float:
    """Median seconds of a step."""
    node = Node(num_running, NUM_WARMUP + num_steps)
    times = [node.step_s() for _ in range(NUM_WARMUP + num_steps)][NUM_WARMUP:]
    if node.num_decoding != num_running:
        raise RuntimeError(f"{node.num_decoding} of {num_running} requests run at the end")
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("--running", nargs="+", default=[1, 64, 1024, 4096], help="requests", **numbers)
    parser.add_argument("--steps", default=20, help="of a repeat [20]", **numbers)
    parser.add_argument("--repeats", default=5, help="[5]", **numbers)
    options = parser.parse_args()
    print("| running | µs a step | lowest to highest | µs a request |\n|---|---|---|---|")
    for num_running in options.running:
        times = [1e6 * measure(num_running, options.steps) for _ in range(options.repeats)]
        median = statistics.median(times)
        spread = f"{min(times):.0f} to {max(times):.0f}"
        print(f"| {num_running} | {median:.0f} | {spread} | {median / num_running:.2f} |", flush=True)


if __name__ == "__main__":
    main()
