"""A further rank as it is, its loop in a thread, against rank 0 played by the test."""

from __future__ import annotations

import gc
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pdserve.engine.batch_codec import encode_batch
from pdserve.engine.device import HOST
from pdserve.engine.forward_batch import ForwardBatch
from pdserve.engine.kv_pool import KVPool
from pdserve.engine.model_runner import ModelRunner
from pdserve.engine.model_weights import Checkpoint, load_weights, tensor_shapes
from pdserve.engine.schedule_batch import ScheduleBatch, ScheduledRow
from pdserve.engine.tensor_parallel import RankCollective, Shard
from pdserve.messages.malformed import MalformedMessage
from pdserve.messages.operation import StartProfile
from pdserve.messages.pipe import Pipe
from pdserve.messages.ranks import (
    CancelRuns,
    CheckShard,
    CopyPages,
    DropShard,
    FillTensors,
    FreezeRankGc,
    FromRank,
    LeaveRegion,
    LoadShard,
    MeetRegion,
    MoveMemory,
    PoisonPages,
    RankChecked,
    RankDone,
    RankFailed,
    RankMoved,
    RankReady,
    RankStart,
    RankTraced,
    RunForward,
    SetRankLogLevel,
    StartRankProfile,
    StopRankProfile,
    SwapShard,
    UpdateShard,
    WriteEnd,
    WriteRun,
    WritesEnded,
)
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.weights import TensorSpec
from pdserve.messages.work import Work
from pdserve.models.config import ModelConfig, kv_layout
from pdserve.ranks.whole_tensors import mapped_tensors
from pdserve.ranks.worker import run_rank
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.logs import log_level, set_log_level
from pdserve.transfer.backends.shm import ShmBackend
from pdserve.weights.staged import staged_file

CPU = torch.device("cpu")
NUM_PAGES = 8
DOWN = "model.layers.1.mlp.down_proj.weight"
CONFIG = ModelConfig.from_dir(SHIPPED_MODEL)
LAYOUT = kv_layout(CONFIG, 16, "float32")
RANK_LAYOUT = LAYOUT.of_rank(2)


class Rank0:
    """The pipe to rank 1, and, once joined, a runner of its own."""

    def __init__(self, rendezvous: Path, model: Path) -> None:
        ours, theirs = socket.socketpair()
        self.codes: list[int] = []
        self.thread = threading.Thread(target=lambda: self.codes.append(run_rank(theirs)))
        self.thread.start()
        self.pipe: Pipe[FromRank] = Pipe(ours, FromRank, "rank 0")
        self.rendezvous = rendezvous
        self.received: list[FromRank] = []
        start = RankStart(
            rank=1,
            size=2,
            model_path=str(model),
            load_format="auto",
            device="cpu",
            dtype="float32",
            page_size=16,
            num_pages=NUM_PAGES,
            transfer_backend="shm",
            transport="shm",
            host="127.0.0.1",
            ib_device="",
            faults="",
            deterministic=False,
            num_threads=1,
            rendezvous=str(rendezvous),
            join_s=60.0,
            trace_name="test-rank1",
        )
        self.pipe.send(start)

    def next(self) -> FromRank:
        while not self.received:
            assert not self.pipe.closed
            assert select.select([self.pipe.fileno()], [], [], 60)[0], "rank 1 says nothing"
            self.received += [m for m in self.pipe.receive() if not isinstance(m, MalformedMessage)]
        return self.received.pop(0)

    def join(self) -> None:
        shard = Shard(0, 2)
        weights = load_weights(SHIPPED_MODEL, CONFIG, torch.float32, CPU, shard)
        pool = KVPool(RANK_LAYOUT, NUM_PAGES, CPU)
        collective = RankCollective(shard, self.rendezvous, 60.0)
        self.runner = ModelRunner(shard.config(CONFIG), weights, pool, HOST, collective=collective)

    def forward(self) -> int:
        batch = forward_batch()
        self.pipe.send(RunForward(batch=encode_batch(batch)))
        return self.runner.forward(batch).rows[0].tokens[0].token_id

    def leave(self) -> int:
        self.pipe.close()
        self.thread.join(60)
        return self.codes[0]


def forward_batch() -> ForwardBatch:
    row = ScheduledRow(
        row_id="r",
        work=Work(prompt_ids=tuple(range(1, 41)), choices=(0,), sampling=SamplingParams(temperature=0.0)),
        token_ids=tuple(range(1, 41)),
        start=0,
        num_tokens=40,
        pages=[0, 1, 2],
        choices=(0,),
    )
    return ForwardBatch.build(ScheduleBatch((row,)), step=1, config=CONFIG, layout=LAYOUT)


@pytest.fixture
def rank0(tmp_path: Path) -> Iterator[Rank0]:
    torch.set_num_threads(1)
    rank0 = Rank0(tmp_path / "rendezvous", SHIPPED_MODEL)
    yield rank0
    assert rank0.leave() == 0


@pytest.fixture
def call(rank0: Rank0) -> Callable[[object], RankDone]:
    def send(message: object) -> RankDone:
        rank0.pipe.send(message)  # type: ignore[arg-type]
        answer = rank0.next()
        assert isinstance(answer, RankDone)
        return answer

    return send


def test_a_rank_computes_copies_moves_and_swaps(
    rank0: Rank0, call: Callable[[object], RankDone], tmp_path: Path
) -> None:
    ready = rank0.next()
    assert isinstance(ready, RankReady)
    assert ready.region.scratch_address == NUM_PAGES * RANK_LAYOUT.stride_bytes
    rank0.join()

    alone = ModelRunner(
        CONFIG,
        load_weights(SHIPPED_MODEL, CONFIG, torch.float32, CPU),
        KVPool(LAYOUT, NUM_PAGES, CPU),
        HOST,
    )
    expected = alone.forward(forward_batch()).rows[0].tokens[0].token_id
    assert rank0.forward() == expected

    # Its pages are read through its own mover, into memory of a peer: this process.
    peer = ShmBackend()
    memory = peer.allocate(NUM_PAGES * RANK_LAYOUT.stride_bytes)
    region = peer.register()
    rank0.pipe.send(MeetRegion(handle=1, region=region))
    assert rank0.next() == WritesEnded(ends=(WriteEnd(1, "done"),))

    def page(number: int) -> np.ndarray:
        offset, size = number * RANK_LAYOUT.stride_bytes, RANK_LAYOUT.page_bytes
        write = WriteRun(handle=2, region=region, source=offset, dest=offset, num_bytes=size)
        rank0.pipe.send(write)
        assert rank0.next() == WritesEnded(ends=(WriteEnd(2, "done"),))
        return np.frombuffer(memory, np.float32, size // 4, offset).copy()

    computed = page(0)
    assert np.any(computed)
    assert call(PoisonPages(call_id=1, pages=(5, 6))) == RankDone(call_id=1)
    assert np.all(np.isnan(page(5)))
    assert call(CopyPages(call_id=2, source=(0,), dest=(5,))) == RankDone(call_id=2)
    assert np.array_equal(page(5), computed)
    rank0.pipe.send(CancelRuns(handles=(77,)))  # another rank's
    rank0.pipe.send(LeaveRegion(region=region))

    refused = call(LoadShard(call_id=3, model_path=str(tmp_path)))
    assert refused.call_id == 3
    assert "model.safetensors" in refused.error
    assert rank0.forward() == expected
    assert call(LoadShard(call_id=4, model_path=str(SHIPPED_MODEL))) == RankDone(call_id=4)
    rank0.pipe.send(DropShard())
    assert call(LoadShard(call_id=5, model_path=str(SHIPPED_MODEL))) == RankDone(call_id=5)
    rank0.pipe.send(SwapShard())
    assert rank0.forward() == expected

    file = tmp_path / "update.safetensors"
    save_file({"model.norm.weight": torch.zeros(CONFIG.hidden_size)}, file)
    rank0.pipe.send(CheckShard(call_id=6))
    before = rank0.next()
    assert isinstance(before, RankChecked)
    assert call(UpdateShard(call_id=7, file=str(file), source="a test")) == RankDone(call_id=7)
    rank0.pipe.send(CheckShard(call_id=8))
    assert rank0.next() == RankChecked(call_id=8, sums=before.sums), "it is beside what serves"
    rank0.pipe.send(SwapShard())
    rank0.pipe.send(CheckShard(call_id=9))
    after = rank0.next()
    assert isinstance(after, RankChecked)
    assert after.sums == before.sums, "rank 0 counts what every rank has"
    refused = call(UpdateShard(call_id=10, file=str(tmp_path / "none"), source="a test"))
    assert refused.error

    with staged_file() as whole:
        whole.lay_out([TensorSpec(DOWN, "float32", tensor_shapes(CONFIG)[DOWN])])
    assert call(FillTensors(call_id=17, file=str(whole.path))) == RankDone(call_id=17)
    half = tensor_shapes(CONFIG)[DOWN][1] // 2
    with Checkpoint(SHIPPED_MODEL) as checkpoint:
        expected_half = checkpoint.tensor(DOWN).float()[:, half:]
    filled = mapped_tensors(whole.path)[DOWN]
    assert torch.equal(filled[:, half:], expected_half)
    assert not filled[:, :half].any(), "rank 0's part"
    whole.close()
    assert "cannot be opened" in call(FillTensors(call_id=18, file=str(tmp_path / "none"))).error

    plan = StartProfile(profile_id="p", output_dir=str(tmp_path), activities=("CPU",))
    assert call(StartRankProfile(call_id=19, plan=plan)) == RankDone(call_id=19)
    assert call(StartRankProfile(call_id=20, plan=plan)).error == "a profile is running"
    assert rank0.forward() == expected
    rank0.pipe.send(StopRankProfile(call_id=21))
    trace = tmp_path / "p-test-rank1-all.trace.json.gz"
    assert rank0.next() == RankTraced(call_id=21, rank=1, traces=(str(trace),))
    assert trace.stat().st_size > 1000
    level, num_frozen = log_level(), gc.get_freeze_count()
    rank0.pipe.send(SetRankLogLevel(level="error"))
    rank0.pipe.send(FreezeRankGc())
    assert call(PoisonPages(call_id=22, pages=(5,))) == RankDone(call_id=22)
    assert (log_level(), gc.get_freeze_count() > num_frozen) == ("error", True)
    set_log_level(level)

    # Its memory goes and comes back; what it computed is gone, what it computes with is the same.
    rank0.pipe.send(MoveMemory(call_id=11, released=("kv_cache", "weights")))
    assert rank0.next() == RankMoved(call_id=11, region=ready.region)
    assert call(CheckShard(call_id=12)).error == "the memory of the weights is released: resume it first"
    assert call(UpdateShard(call_id=13, file=str(file), source="a test")).error
    assert call(LoadShard(call_id=14, model_path=str(SHIPPED_MODEL))).error
    rank0.pipe.send(MoveMemory(call_id=15, released=()))
    assert rank0.next() == RankMoved(call_id=15, region=ready.region)
    rank0.pipe.send(CheckShard(call_id=16))
    assert rank0.next() == RankChecked(call_id=16, sums=before.sums)
    rank0.pipe.send(MeetRegion(handle=1, region=region))
    assert rank0.next() == WritesEnded(ends=(WriteEnd(1, "done"),))
    assert not np.any(page(1))
    peer.close()


def test_a_rank_that_cannot_start_says_why_and_ends(tmp_path: Path) -> None:
    rank0 = Rank0(tmp_path / "rendezvous", tmp_path)
    failed = rank0.next()
    assert isinstance(failed, RankFailed)
    assert "config.json: cannot be read" in failed.reason
    assert rank0.leave() == 1


def test_a_rank_that_is_never_started_ends_with_its_pipe() -> None:
    ours, theirs = socket.socketpair()
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run_rank(theirs)))
    thread.start()
    ours.close()
    thread.join(60)
    assert codes == [0]
