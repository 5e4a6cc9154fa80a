"""Reinforcement learning with pdserve: torch trains a tiny policy while an `Engine` samples from it.

    .venv/bin/python docs/examples/rl_loop.py --updates 200

The policy is rewarded for even token ids. Clients sample without a pause; after each step of the trainer all
weights are broadcast to the nodes, in the middle of that traffic. What makes it worth reading:

* Every answer says which weights made which of its tokens. The trainer computes all logprobs again under the
  weights that a token is stamped with, and they must agree.
* Half of the clients ask a second router, which knows nothing of the updates and holds nothing back. So
  requests for the old weights reach nodes that have new ones, or are about to. Those must refuse them, and
  the router asks again.

The last line counts. Exit code 1 unless everything agreed, no hand-off crossed two weight versions, and some
attempt was refused for its version.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch
from torch import Tensor
from trainer_group import TrainerGroup  # type: ignore[import-not-found]  # it lies beside this script
from transformers import AutoModelForCausalLM

from pdserve import Engine
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.errors import StartupError
from pdserve.runtime.process import end, spawn

TOLERANCE = 1e-3  # of a logprob; both compute in float32
BATCH_SIZE = 8  # samples that a step of the trainer takes at most
NUM_KEPT = 8  # versions whose weights the trainer keeps: answers in mid-air are a few updates old at most
START_S = 60.0
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "ignore_eos": True}


@dataclass(frozen=True)
class Sample:
    prompt_ids: list[int]
    output_ids: list[int]
    logprobs: list[float]  # of each output id, as the engine says
    spans: list[tuple[int, int, str]]  # output tokens from, to, and the weights that made them

    @classmethod
    def of(cls, prompt_ids: list[int], answer: dict[str, Any]) -> Sample:
        meta, output_ids = answer["meta_info"], answer["output_ids"]
        # Told apart only where the weights changed in mid-answer.
        spans = meta.get("weight_versions", [{"weight_version": meta["weight_version"], "start": 0}])
        ends = [*(span["start"] for span in spans[1:]), len(output_ids)]
        return cls(
            prompt_ids,
            output_ids,
            [logprob for logprob, *_ in meta["output_token_logprobs"]],
            [(span["start"], end, span["weight_version"]) for span, end in zip(spans, ends, strict=True)],
        )


class Policy:
    """The trainer's model, and the weights of its last versions."""

    def __init__(self, path: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=1e-4)
        self.weights: dict[str, dict[str, Tensor]] = {}
        self.keep("default")  # what a node calls the weights that it was started with

    def keep(self, version: str) -> dict[str, Tensor]:
        """The current weights, by the checkpoint's names, under this version."""
        named = {name: value.detach().clone() for name, value in self._model.named_parameters()}
        self.weights[version] = named
        for old in list(self.weights)[:-NUM_KEPT]:
            del self.weights[old]
        return named

    def logprobs(self, sample: Sample, weights: dict[str, Tensor] | None = None) -> Tensor:
        """[len(output_ids)]: of each output token, under these weights or the current ones."""
        ids = torch.tensor([sample.prompt_ids + sample.output_ids])
        called = torch.func.functional_call(
            self._model, weights or dict(self._model.named_parameters()), (ids,)
        )
        rows: Tensor = called.logits[0, len(sample.prompt_ids) - 1 : -1].log_softmax(-1)
        return rows.gather(1, torch.tensor(sample.output_ids)[:, None])[:, 0]

    def train(self, samples: list[Sample]) -> float:
        """One step of REINFORCE; returns the mean reward."""
        rewards = torch.tensor([sum(i % 2 == 0 for i in s.output_ids) / len(s.output_ids) for s in samples])
        advantages = rewards - rewards.mean()
        losses = [
            -advantage * self.logprobs(sample).mean()
            for sample, advantage in zip(samples, advantages, strict=True)
        ]
        self._optimizer.zero_grad()
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return rewards.mean().item()


@dataclass
class Tally:
    num_samples: int = 0
    num_tokens: int = 0
    num_mixed: int = 0  # samples whose weights changed in mid-answer
    max_delta: float = 0.0
    max_other_delta: float = 0.0  # under other weights than a sample is stamped with: must not agree
    failures: list[str] = field(default_factory=list)

    @torch.no_grad()
    def check(self, sample: Sample, policy: Policy) -> None:
        """Every token's logprob, under the weights that the engine says it had."""
        self.num_samples += 1
        self.num_mixed += len(sample.spans) > 1
        for start, stop, version in sample.spans:
            if version not in policy.weights:
                self.failures.append(f"a sample of version {version!r}, which is not kept")
                continue
            delta = self._delta(sample, policy, version, start, stop)
            self.num_tokens += stop - start
            self.max_delta = max(self.max_delta, delta)
            if not delta <= TOLERANCE:
                self.failures.append(f"tokens {start} to {stop} under {version!r} are off by {delta:.2g}")

    @torch.no_grad()
    def compare(self, sample: Sample, policy: Policy) -> None:
        """That the check could fail: the weights before those of the sample give other logprobs."""
        start, stop, version = sample.spans[0]
        for before, after in pairwise(policy.weights):
            if after == version:
                delta = self._delta(sample, policy, before, start, stop)
                self.max_other_delta = max(self.max_other_delta, delta)

    @staticmethod
    def _delta(sample: Sample, policy: Policy, version: str, start: int, stop: int) -> float:
        ours = policy.logprobs(sample, policy.weights[version])[start:stop]
        return (ours - torch.tensor(sample.logprobs)[start:stop]).abs().max().item()


async def sample_for_ever(engine: Engine, samples: asyncio.Queue[Sample], rng: random.Random) -> None:
    while True:
        prompt_ids = [rng.randrange(1, 256) for _ in range(rng.randrange(20, 80))]
        sampling = {**SAMPLING, "max_new_tokens": rng.randrange(8, 48), "sampling_seed": rng.randrange(2**31)}
        answer = await engine.aio.generate(
            input_ids=prompt_ids, sampling_params=sampling, return_logprob=True
        )
        await samples.put(Sample.of(prompt_ids, answer))


async def push(
    engine: Engine, group: TrainerGroup, weights: dict[str, Tensor], version: str, mode: str
) -> None:
    """All tensors as one row of bytes, to all nodes; the engine says what comes while it is sent."""
    tensors = list(weights.values())
    told = engine.aio.update_weights_from_distributed(
        list(weights),
        [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
        [list(tensor.shape) for tensor in tensors],
        load_format="flattened_bucket",
        weight_version=version,
        mode=mode,  # type: ignore[arg-type]
    )
    outcome, _ = await asyncio.gather(told, asyncio.to_thread(group.send, tensors, is_one_bucket=True))
    if not outcome.success:
        raise RuntimeError(f"update {version}: {outcome.message}")


async def train(
    engine: Engine, routers: list[Engine], policy: Policy, num_updates: int, num_clients: int, tally: Tally
) -> None:
    port, num_nodes = free_port(), len(node_urls(engine))
    group, _ = await asyncio.gather(
        asyncio.to_thread(TrainerGroup, "weight_update_group", port, 1 + num_nodes),
        engine.aio.init_weights_update_group("127.0.0.1", port, 1, 1 + num_nodes),
    )
    samples: asyncio.Queue[Sample] = asyncio.Queue()  # clients never wait: updates come in mid-traffic
    clients = [
        asyncio.create_task(sample_for_ever(routers[number % len(routers)], samples, random.Random(number)))
        for number in range(num_clients)
    ]
    try:
        for number in range(1, num_updates + 2):
            batch = [await next_sample(samples, clients)]
            while not samples.empty():
                batch.append(samples.get_nowait())
            for sample in batch:
                await asyncio.to_thread(tally.check, sample, policy)
            await asyncio.to_thread(tally.compare, batch[0], policy)
            if number > num_updates:
                break  # these came after the last update
            reward = await asyncio.to_thread(policy.train, batch[-BATCH_SIZE:])
            # What runs ends before the swap, or stops and goes on with the new weights.
            mode = "retract" if number % 2 else "wait"
            version = f"step-{number}"
            started_s = time.monotonic()
            await push(engine, group, policy.keep(version), version, mode)
            took_s = time.monotonic() - started_s
            print(
                f"{version}: {len(batch)} samples, reward {reward:.3f}, updated in {took_s:.2f} s", flush=True
            )
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        group.close()


async def next_sample(samples: asyncio.Queue[Sample], clients: list[asyncio.Task[None]]) -> Sample:
    """Raises what a client has failed of."""
    waiting = asyncio.create_task(samples.get())
    await asyncio.wait([waiting, *clients], return_when=asyncio.FIRST_COMPLETED)
    for client in clients:
        if client.done():
            client.result()
    return await waiting


# ---- the cluster ------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def node_urls(engine: Engine) -> dict[str, str]:
    """Of each node: its role."""
    info = engine.get_server_info()
    return {node["url"]: role for role in ("prefill", "decode") for node in info[role]}


@contextmanager
def second_router(model: Path, engine: Engine) -> Iterator[Engine]:
    """Another router for the same nodes, as clusters have that must not depend on one."""
    port = free_port()
    nodes = [word for url, role in node_urls(engine).items() for word in (f"--{role}", url)]
    process = spawn(["router", str(model), "--port", str(port), "--log-level", "warning", *nodes])
    try:
        with connected(f"http://127.0.0.1:{port}") as router:
            yield router
    finally:
        end(process, grace_s=10.0)


def connected(url: str) -> Engine:
    deadline = time.monotonic() + START_S
    while True:
        try:
            return Engine(url=url)
        except StartupError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def counted(engine: Engine, name: str) -> int:
    """The sum of a metric over all nodes."""
    total = 0.0
    for url in node_urls(engine):
        text = urlopen(f"{url}/metrics").read().decode()
        total += sum(map(float, re.findall(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE)))
    return int(total)


def run(model: Path, num_updates: int, num_clients: int) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    policy, tally = Policy(model), Tally()
    # No decode node prefills: every prompt is handed off.
    with (
        Engine(model, dtype="float32", num_threads=1, local_prefill_threshold=0) as engine,
        second_router(model, engine) as other,
    ):
        asyncio.run(train(engine, [engine, other], policy, num_updates, num_clients, tally))
        checked = engine.check_weights()
        num_transfers = counted(engine, "pd_kv_transfer_seconds_count")
        num_crossed = counted(engine, "pd_crossed_rooms_total")
        num_refused = counted(engine, "pd_version_refusals_total")
    if not checked["success"]:
        tally.failures.append(f"nodes differ in the end: {checked['message']}")
    if not tally.max_other_delta > TOLERANCE:
        tally.failures.append("weights hardly changed: nothing is shown")
    for failure in tally.failures[:20]:
        print(failure, file=sys.stderr)
    print(
        f"UPDATES {num_updates} SAMPLES {tally.num_samples} MIXED {tally.num_mixed} TOKENS {tally.num_tokens}"
        f" MAX_DELTA {tally.max_delta:.1e} UNDER_OTHERS {tally.max_other_delta:.1e}"
        f" ROOMS {num_transfers} CROSSED {num_crossed} REFUSED {num_refused} FAILURES {len(tally.failures)}"
    )
    return 0 if not tally.failures and num_crossed == 0 and num_refused > 0 else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=200, metavar="N")
    parser.add_argument("--clients", type=int, default=6, metavar="N")
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL, metavar="DIR")
    options = parser.parse_args()
    return run(options.model, options.updates, options.clients)


if __name__ == "__main__":
    raise SystemExit(main())
