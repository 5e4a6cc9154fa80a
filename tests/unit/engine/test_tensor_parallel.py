"""A model on several ranks, each a thread here, against the same model on one."""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import pytest
import torch

from pdserve.engine.batch_codec import decode_batch, encode_batch
from pdserve.engine.device import HOST
from pdserve.engine.forward_batch import ForwardBatch, RowOutput
from pdserve.engine.kv_pool import TORCH_DTYPES, KVPool
from pdserve.engine.model_runner import ModelRunner
from pdserve.engine.model_weights import Checkpoint, load_weights, tensor_shapes
from pdserve.engine.schedule_batch import ScheduleBatch, ScheduledRow
from pdserve.engine.tensor_parallel import RankCollective, Shard, check_divides
from pdserve.messages.kv_layout import kv_heads_of_rank
from pdserve.messages.sampling import SamplingParams
from pdserve.models.config import ModelConfig, kv_layout
from pdserve.runtime.errors import StartupError

from .conftest import CPU, Harness, RowFields, whole_row

# Heads that divide by 4, with more and with fewer KV heads than 4 ranks; odd vocabularies.
SPLIT = {
    "llama": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "qwen2": {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 96, "vocab_size": 415},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True},
}
PAGE_SIZE = 4
NAMED = (7, 300, 5)
NUM_PAGES = 64


class Replica:
    """Every rank has its own weights, pool and runner; further ranks get the batch as bytes."""

    def __init__(self, folder: Path, size: int, rendezvous: Path) -> None:
        self.config = ModelConfig.from_dir(folder)
        self.size = size
        self.layout = kv_layout(self.config, PAGE_SIZE, "float32")
        self.pools = [KVPool(self.layout.of_rank(size), NUM_PAGES, CPU) for _ in range(size)]
        for pool in self.pools:
            pool.poison(range(NUM_PAGES))
        self.threads = ThreadPoolExecutor(size)
        together = threading.Barrier(size)

        def join(rank: int) -> ModelRunner:
            together.wait(60)
            torch.set_num_threads(1)
            shard = Shard(rank, size)
            weights = load_weights(folder, self.config, TORCH_DTYPES["float32"], CPU, shard)
            collective = RankCollective(shard, rendezvous, 60.0)
            return ModelRunner(
                shard.config(self.config), weights, self.pools[rank], HOST, collective=collective
            )

        self.runners = list(self.threads.map(join, range(size)))
        self.step = 0

    def forward(self, *rows: ScheduledRow) -> dict[str | int, RowOutput]:
        self.step += 1
        batch = ForwardBatch.build(
            ScheduleBatch(rows), step=self.step, config=self.config, layout=self.layout
        )
        payload = encode_batch(batch)
        followers = [
            self.threads.submit(runner.forward, decode_batch(payload)) for runner in self.runners[1:]
        ]
        output = self.runners[0].forward(batch)
        assert [follower.result(60).step for follower in followers] == [self.step] * (self.size - 1)
        return {row.row_id: row for row in output.rows}


@pytest.fixture
def replica(tmp_path: Path) -> Callable[[Path, int], Replica]:
    def make(folder: Path, size: int) -> Replica:
        return Replica(folder, size, tmp_path / f"rendezvous-{size}")

    return make


def row(token_ids: Sequence[int], **changes: Unpack[RowFields]) -> ScheduledRow:
    sampling = SamplingParams(temperature=0.0, num_logprobs=4, num_prompt_logprobs=1, logprob_token_ids=NAMED)
    return replace(whole_row(token_ids, sampling, list(range(NUM_PAGES))), **changes)


def assert_same(got: RowOutput, expected: RowOutput) -> None:
    assert [token.token_id for token in got.tokens] == [token.token_id for token in expected.tokens]
    for ours, theirs in zip(
        [*(token.logprob for token in got.tokens), *got.report.logprobs],
        [*(token.logprob for token in expected.tokens), *expected.report.logprobs],
        strict=True,
    ):
        assert ours is not None
        assert theirs is not None
        assert math.isclose(ours.logprob, theirs.logprob, abs_tol=1e-4)
        assert [token_id for token_id, _ in ours.named] == list(NAMED)
        assert dict(ours.named) == pytest.approx(dict(theirs.named), abs=1e-4)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", SPLIT)
def test_every_size_computes_what_one_rank_computes(
    checkpoint: Callable[..., Path],
    harness: Callable[..., Harness],
    replica: Callable[[Path, int], Replica],
    prompt: Callable[..., list[int]],
    family: str,
    size: int,
) -> None:
    folder = checkpoint(family, dtype="float32", overrides=SPLIT[family])
    alone = harness(folder, page_size=PAGE_SIZE, num_pages=NUM_PAGES)
    together = replica(folder, size)
    ids = prompt(23)
    first = row(ids, num_tokens=10, choices=())
    rest = row(ids, start=10, num_tokens=13)
    for chunk in (first, rest):
        expected, got = alone.forward(chunk), together.forward(chunk)
        assert_same(got["row"], expected["row"])
    ids.append(expected["row"].tokens[0].token_id)
    decode = row(ids, start=23, num_tokens=1)
    assert_same(together.forward(decode)["row"], alone.forward(decode)["row"])
    # Each rank's pool holds its heads of what the one pool holds.
    for rank, pool in enumerate(together.pools):
        heads = kv_heads_of_rank(together.config.num_kv_heads, size, rank)
        whole = alone.pool.data[:5, heads.start : heads.stop]
        assert torch.allclose(pool.data[:5], whole, atol=1e-5)


def test_two_runs_and_all_ranks_have_the_same_bits(
    checkpoint: Callable[..., Path],
    replica: Callable[[Path, int], Replica],
    prompt: Callable[..., list[int]],
) -> None:
    together = replica(checkpoint("qwen2", dtype="float32", overrides=SPLIT["qwen2"]), 4)
    ids = prompt(19)
    together.forward(row(ids))
    first = [pool.data[:5].clone() for pool in together.pools]
    together.forward(row(ids))
    for pool, before in zip(together.pools, first, strict=True):
        assert torch.equal(pool.data[:4], before[:4])
    assert torch.equal(together.pools[0].data[:4], together.pools[1].data[:4])  # copies of one head


@pytest.mark.parametrize("family", SPLIT)
def test_the_shards_are_the_checkpoint(checkpoint: Callable[..., Path], family: str) -> None:
    """Put side by side, the ranks' parts of every tensor are the tensor; copies are equal."""
    folder = checkpoint(family, dtype="float32", overrides=SPLIT[family])
    config = ModelConfig.from_dir(folder)
    shapes = tensor_shapes(config)
    with Checkpoint(folder) as file:
        for name, shape in shapes.items():
            parts = [Shard(rank, 2).part(name, shape, config) for rank in range(2)]
            whole = file.tensor(name)
            read = [file.tensor(name, part) for part in parts if part]
            if len(read) == 2:
                axis = len(parts[0] or ()) - 1
                assert torch.equal(torch.cat(read, dim=axis), whole), name
            else:
                assert all(not part for part in parts), name


def test_what_does_not_divide_is_refused_in_one_line(checkpoint: Callable[..., Path]) -> None:
    config = ModelConfig.from_dir(checkpoint("llama", dtype="float32"))
    with pytest.raises(
        StartupError, match=r"--tensor-parallel-size 4: the model's 6 query heads do not divide by it"
    ):
        check_divides(config, 4)
    odd = replace(config, num_heads=12, num_kv_heads=4)
    with pytest.raises(StartupError, match="4 KV heads do not divide by it"):
        check_divides(odd, 6)


def test_the_rows_of_the_lm_head_are_all_there_once(checkpoint: Callable[..., Path]) -> None:
    config = replace(ModelConfig.from_dir(checkpoint("llama", dtype="float32")), vocab_size=10)
    rows = [Shard(rank, 4).vocab_rows(config) for rank in range(4)]
    assert rows == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 10)]


def test_the_rendezvous_is_not_needed_once_a_rank_has_joined(tmp_path: Path) -> None:
    """The first to join may remove it, whatever the others are at."""
    folder = tmp_path / "folder"
    folder.mkdir()

    def join(rank: int) -> float:
        collective = RankCollective(Shard(rank, 4), folder / "rendezvous", 60.0)
        shutil.rmtree(folder, ignore_errors=True)
        return float(collective.sum(torch.tensor([float(rank)])))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(join, range(4))) == [6.0] * 4
