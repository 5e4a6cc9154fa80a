"""Whether the whole cluster answers as `transformers` does on the same weights, in fp32.

    scripts/dev same_answers --family all        # llama, mistral, qwen2, qwen3 and the shipped model
    scripts/dev same_answers --family qwen3 --transfer-backend shm
    scripts/dev same_answers --tensor-parallel     # 1 to 2, 2 to 1, 2 to 4, 4 to 2, shm and Mooncake

For each family: makes a seeded random checkpoint, starts a router, a prefill and a decode node, asks greedy
continuations of prompts around every page and chunk boundary, alone, with n choices and stops, and in batches
of 16, with and without prefix hits, and compares token by token. A differing token is accepted only where
the reference's own two best logits lie within 1e-4: it is counted, the reference's token is forced and the
rest compared. More than one such token in a thousand fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from pdserve.bench.local_cluster import LocalCluster
from pdserve.runtime.config import SHIPPED_MODEL

MAKE_CHECKPOINT = Path(__file__).with_name("make_checkpoint.py")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "shipped")
PAGE_SIZE = 16
CHUNK = 64
TIE = 1e-4
MAX_TIES_PER_TOKEN = 1e-3
NUM_TOKENS = 24
# Ranks of prefill and of decode, KV heads and backend. With two KV heads four ranks hold copies of them.
TENSOR_PARALLEL = tuple(
    (prefill, decode, num_kv_heads, backend)
    for backend in ("shm", "mooncake")
    for prefill, decode in ((1, 2), (2, 1), (2, 4), (4, 2))
    for num_kv_heads in (4, 2)
)


@dataclass
class Tally:
    """What was compared so far."""

    num_equal: int = 0
    num_requests: int = 0
    num_tokens: int = 0
    num_ties: int = 0
    max_logprob_error: float = 0.0
    failures: tuple[str, ...] = ()

    def fail(self, message: str) -> None:
        self.failures = (*self.failures, message)


class Reference:
    """The same checkpoint in `transformers`, fp32."""

    def __init__(self, model_dir: Path) -> None:
        torch.set_num_threads(1)  # more only fight with the cluster's own
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
        self.vocab_size = int(self.model.config.vocab_size)

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        input_ids = torch.tensor([list(prompt)])
        output = self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),  # left out, tokens equal to the pad id are masked
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        return [int(token) for token in output[0, len(prompt) :]]

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[len(token_ids), vocab_size]: row i predicts token i + 1."""
        logits: torch.Tensor = self.model(torch.tensor([list(token_ids)])).logits[0].float()
        return logits


def prompt_lengths() -> list[int]:
    """Around every page and chunk boundary up to a little over three chunks."""
    lengths = {1, 2, 3}
    for boundary in (PAGE_SIZE, 2 * PAGE_SIZE, CHUNK, 2 * CHUNK, 3 * CHUNK):
        lengths |= {boundary - 1, boundary, boundary + 1}
    return sorted(lengths)


def complete(
    cluster: LocalCluster, prompt: list[int], num_tokens: int, **fields: object
) -> list[dict[str, object]]:
    """The choices of one greedy request."""
    body = {
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "return_token_ids": True,
        **fields,
    }
    choices: list[dict[str, object]] = cluster.post("/v1/completions", body)["choices"]
    return choices


def ask(cluster: LocalCluster, prompts: list[list[int]], num_tokens: int) -> list[dict[str, object]]:
    """Greedy continuations of all prompts at once, each as its own request."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: complete(cluster, prompt, num_tokens)[0], prompts))


def compare(
    cluster: LocalCluster, reference: Reference, prompt: list[int], choice: dict[str, object], tally: Tally
) -> None:
    """Compare one answer; at a tie go on from the reference's token."""
    tally.num_requests += 1
    prompt = list(prompt)
    left = NUM_TOKENS
    is_equal = True
    while True:
        token_ids = [int(token) for token in choice["token_ids"]]  # type: ignore[attr-defined]
        logprobs = choice["logprobs"]["token_logprobs"]  # type: ignore[index]
        if len(token_ids) != left:
            tally.fail(f"prompt of {len(prompt)}: {len(token_ids)} tokens instead of {left}")
            return
        expected = reference.generate(prompt, left)
        logits = reference.logits([*prompt, *token_ids])[len(prompt) - 1 : -1]
        chosen = torch.log_softmax(logits, -1)[torch.arange(left), torch.tensor(token_ids)]
        parted = next((i for i in range(left) if token_ids[i] != expected[i]), left)
        for i in range(min(parted + 1, left)):
            error = abs(float(chosen[i]) - logprobs[i])
            tally.max_logprob_error = max(tally.max_logprob_error, error)
        tally.num_tokens += parted
        if parted == left:
            break
        is_equal = False
        best = torch.topk(logits[parted], 2).values
        if float(best[0] - best[1]) >= TIE:
            tally.fail(
                f"prompt of {len(prompt)}: token {parted} is {token_ids[parted]}, not {expected[parted]}"
            )
            return
        tally.num_ties += 1
        prompt = [*prompt, *expected[: parted + 1]]
        left -= parted + 1
        if left == 0:
            break
        choice = ask(cluster, [prompt], left)[0]
    tally.num_equal += is_equal


def check_stops(cluster: LocalCluster, prompt: list[int], tally: Tally) -> None:
    """A stop token ends the answer behind itself, a stop string before itself; the rest is as without."""
    whole = complete(cluster, prompt, NUM_TOKENS)[0]
    token_ids, text = list(whole["token_ids"]), str(whole["text"])  # type: ignore[call-overload]
    stop_id = token_ids[NUM_TOKENS // 2]
    stopped = complete(cluster, prompt, NUM_TOKENS, stop_token_ids=[stop_id])[0]
    if (stopped["token_ids"], stopped["finish_reason"]) != (
        token_ids[: token_ids.index(stop_id) + 1],
        "stop",
    ):
        tally.fail(f"prompt of {len(prompt)}: stop token {stop_id} gave {stopped['token_ids']}")
    if stop := text[len(text) // 2 : len(text) // 2 + 2]:
        stopped = complete(cluster, prompt, NUM_TOKENS, stop=[stop])[0]
        if (stopped["text"], stopped["finish_reason"]) != (text[: text.index(stop)], "stop"):
            tally.fail(f"prompt of {len(prompt)}: stop string {stop!r} gave {stopped['text']!r}")


def run_family(
    family: str,
    work_dir: Path,
    arguments: Sequence[str] = (),
    *,
    quick: bool = False,
    changes: Sequence[str] = (),
) -> Tally:
    """Everything of one family; `quick` leaves out most prompt lengths and one of the batches. `changes` are
    settings of the checkpoint's config, KEY=JSON."""
    model_dir = SHIPPED_MODEL if family == "shipped" else work_dir / family
    if family != "shipped":
        maker = [sys.executable, "-P", str(MAKE_CHECKPOINT), family, str(model_dir)]
        maker += ["--dtype", "float32", *(f"--set={change}" for change in changes)]
        subprocess.run(maker, check=True, stdout=subprocess.DEVNULL)
    reference = Reference(model_dir)
    rng = np.random.default_rng(0)
    tally = Tally()
    flags = ["--dtype", "float32", "--page-size", str(PAGE_SIZE), "--chunked-prefill-size", str(CHUNK)]
    flags += ["--poison-reserved-pages", "--log-level", "warning", *arguments]
    with LocalCluster([str(model_dir), *flags], log_path=work_dir / f"{family}.log") as cluster:
        lengths = prompt_lengths()[:: 4 if quick else 1]
        prompts = [[int(t) for t in rng.integers(0, reference.vocab_size, n)] for n in lengths]
        for prompt in prompts:  # alone
            compare(cluster, reference, prompt, complete(cluster, prompt, NUM_TOKENS)[0], tally)
        for prompt in prompts[-3:]:
            for choice in complete(cluster, prompt, NUM_TOKENS, n=3):
                compare(cluster, reference, prompt, choice, tally)
            check_stops(cluster, prompt, tally)
        # Mixed batches of 16, half of them beginning like a prompt that is cached now.
        for _ in range(1 if quick else 2):
            batch = []
            for index in range(16):
                tail = [
                    int(t) for t in rng.integers(0, reference.vocab_size, int(rng.integers(1, 3 * CHUNK)))
                ]
                head = prompts[int(rng.integers(len(prompts)))] if index % 2 else []
                batch.append([*head, *tail])
            for prompt, choice in zip(batch, ask(cluster, batch, NUM_TOKENS), strict=True):
                compare(cluster, reference, prompt, choice, tally)
        cluster.wait_idle(timeout_s=10.0)
        cluster.flush()
    if tally.max_logprob_error > TIE:
        tally.fail(f"a logprob differs by {tally.max_logprob_error:.2e}")
    if tally.num_ties > MAX_TIES_PER_TOKEN * tally.num_tokens:
        tally.fail(f"{tally.num_ties} ties in {tally.num_tokens} tokens")
    return tally


def run_tensor_parallel(
    prefill: int, decode: int, num_kv_heads: int, backend: str, work_dir: Path, *, quick: bool = False
) -> Tally:
    """A model of 8 query heads, split over `prefill` ranks on one side and `decode` on the other."""
    config = work_dir / "ranks.yaml"
    config.write_text(f"prefill: {{tp: {prefill}}}\ndecode: {{tp: {decode}}}\n")
    arguments = ["--config", str(config), "--transfer-backend", backend]
    changes = ["num_attention_heads=8", f"num_key_value_heads={num_kv_heads}"]
    return run_family("llama", work_dir, arguments, quick=quick, changes=changes)


def show(name: str, tally: Tally) -> bool:
    print(
        f"{name:<8} {tally.num_equal}/{tally.num_requests} equal "
        f"({tally.num_tokens} tokens, {tally.num_ties} ties, logprobs within {tally.max_logprob_error:.1e})",
        flush=True,
    )
    for failure in tally.failures:
        print(f"  {failure}", file=sys.stderr)
    return not tally.failures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", default="all", choices=("all", *FAMILIES))
    parser.add_argument("--tensor-parallel", action="store_true", help="the pairs of TP sizes instead")
    parser.add_argument("--quick", action="store_true", help="fewer prompts of each kind")
    options, arguments = parser.parse_known_args()
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    is_good = True
    with tempfile.TemporaryDirectory() as work_dir:
        if options.tensor_parallel:
            for prefill, decode, num_kv_heads, backend in TENSOR_PARALLEL:
                tally = run_tensor_parallel(
                    prefill, decode, num_kv_heads, backend, Path(work_dir), quick=options.quick
                )
                name = f"TP {prefill} to {decode}, {num_kv_heads} KV heads, {backend:<8}"
                is_good = show(name, tally) and is_good
            return 0 if is_good else 1
        for family in FAMILIES if options.family == "all" else (options.family,):
            tally = run_family(family, Path(work_dir), arguments, quick=options.quick)
            is_good = show(family, tally) and is_good
    return 0 if is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
