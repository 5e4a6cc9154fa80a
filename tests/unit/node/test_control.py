"""NodeControl: each control call gets its answer, now or when it is due."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import torch

from pdserve.components.flush_wrapper import FlushWrapper
from pdserve.components.metrics_reporter import MetricsReporter
from pdserve.engine.job import AnyJob, FinishedJob
from pdserve.messages.kv_layout import KVLayout
from pdserve.messages.node import (
    CallReply,
    FlushCache,
    GetMetrics,
    GetServerInfo,
    MetricsReply,
    ModelInfo,
    NodeEntry,
    NodeLoad,
    ServerInfoReply,
)
from pdserve.messages.operation import GetInternalState, InternalStateReply, SlowDown, StartProfile
from pdserve.messages.weights import (
    CommitWeights,
    DiscardWeights,
    FromDisk,
    FromGpuMemory,
    FromPeer,
    JoinUpdateGroup,
    MemoryTag,
    OpenWeights,
    PrepareWeights,
    TransferKind,
    WeightImageReply,
)
from pdserve.node.control import ControlCall, ControlResult, JobEnd, NodeControl
from pdserve.node.live_settings import LiveSettings
from pdserve.node.loop_times import LoopTimes
from pdserve.node.memory_occupation import Announced, MemoryOccupation
from pdserve.node.operations import NodeOperations
from pdserve.node.status import NodeStatus
from pdserve.runtime.command_line import node_config
from pdserve.runtime.containment import Containment
from pdserve.runtime.errors import StartupError
from pdserve.runtime.timing import UNSCALED
from pdserve.simulation.side_work import NoProfiler
from pdserve.transfer.backends.shm import ShmBackend
from pdserve.weights.images import ImageReplies, WeightImage, WeightImages
from pdserve.weights.outbox import WeightOutbox
from pdserve.weights.staged import StagedFile
from pdserve.weights.update_groups import Group, UpdateGroups
from pdserve.weights.updater import LoadFolder, LoadOrder, Sums, TensorHead, WeightUpdater

LINK = b"router"
LAYOUT = KVLayout(num_kv_heads=2, num_layers=2, page_size=16, head_dim=8, dtype="float32")


@dataclass(frozen=True)
class FakeCheckpoint:
    path: Path
    fingerprint: str = "new digest"


def no_gpu(source: FromGpuMemory) -> StagedFile:
    raise StartupError(source.device_uuid)


def no_peer(source: FromPeer) -> StagedFile:
    raise StartupError(source.zmq_address)


def no_group(message: JoinUpdateGroup) -> Group:
    raise StartupError(message.group_name)


class FakeMemory:
    def move(self, before: frozenset[MemoryTag], after: frozenset[MemoryTag]) -> Callable[[], None]:
        raise AssertionError("nobody moves memory here")

    def announce(self, *, is_released: bool) -> Announced:
        raise AssertionError("nobody moves memory here")


class FakeStore:
    def load(self, order: LoadOrder) -> Callable[[], FakeCheckpoint]:
        assert isinstance(order, LoadFolder)
        return lambda: FakeCheckpoint(order.path)

    def drop(self) -> None:
        pass

    def check(self) -> Callable[[], Sums]:
        return lambda: Sums({}, "")

    def head(self, name: str, num_rows: int) -> Callable[[], TensorHead]:
        return lambda: TensorHead("float32", (1,), [0.0])

    def save(self, target: str, *, is_remote: bool, max_shard_bytes: int) -> Callable[[], None]:
        return lambda: None


def make_status() -> NodeStatus:
    entry = NodeEntry(
        url="http://d",
        role="decode",
        incarnation="d1",
        zmq_address="tcp://d:1",
        model_name="tiny",
        model_fingerprint="digest",
        weight_version="w1",
    )
    model = ModelInfo(
        model_name="tiny",
        model_path="/models/tiny",
        model_type="qwen3",
        architectures=(),
        vocab_size=9,
        max_model_len=64,
        eos_token_ids=(),
        dtype="float32",
        weight_version="w1",
        model_fingerprint="digest",
    )
    return NodeStatus(entry, model, node_config("decode", {}), LAYOUT, "shm")


@dataclass
class Bench:
    jobs: list[AnyJob[JobEnd]] = field(default_factory=list)
    forward_sleep_s: float = 0.0
    can_drop: bool = True
    num_drops: int = 0
    image_jobs: list[FinishedJob[ImageReplies]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights: WeightUpdater[FakeCheckpoint] = WeightUpdater(
            FakeStore(),
            self.submit_job,
            lambda: "w1",
            lambda: 1 << 30,
            UpdateGroups(no_group, lambda: 1 << 30),
            no_gpu,
            no_peer,
        )
        self.control = NodeControl(
            status=make_status(),
            flush=FlushWrapper(),
            weights=self.weights,
            images=WeightImages(
                lambda: lambda: WeightImage({"t": torch.arange(4.0)}), lambda: "", self, idle_s=60.0
            ),
            outbox=WeightOutbox(TransferKind("shm", "shm"), ShmBackend, UNSCALED),
            memory=MemoryOccupation(FakeMemory(), self.submit_job),
            operations=NodeOperations(
                settings=LiveSettings([]),
                engine=self,
                profiler=NoProfiler(),
                loop_times=LoopTimes(),
                ranks=None,
            ),
            metrics=MetricsReporter("tiny", "decode"),
            drop_cache=self.drop_cache,
        )

    def submit(self, job: AnyJob[ImageReplies]) -> None:
        """A job that makes an image of weights."""
        self.image_jobs.append(job.do(Containment()))

    def poll(self) -> list[FinishedJob[ImageReplies]]:
        results, self.image_jobs = self.image_jobs, []
        return results

    def submit_job(self, job: AnyJob[JobEnd]) -> None:
        self.jobs.append(job)

    def finish_job(self) -> ControlResult[FakeCheckpoint]:
        return self.control.finish_job(self.jobs.pop().do(Containment()))

    def drop_cache(self) -> bool:
        self.num_drops += 1
        return self.can_drop

    def handle(
        self, message: ControlCall, now: float = 0.0, *, idle: bool = True
    ) -> ControlResult[FakeCheckpoint]:
        load = NodeLoad(num_running_reqs=0 if idle else 3, num_generated_tokens=11)
        return self.control.handle(
            LINK, message, now, load=load, idle=idle, requests={"waiting": 2}, pause=""
        )


@pytest.fixture
def bench() -> Bench:
    return Bench()


def reply(result: ControlResult[FakeCheckpoint]) -> msgspec.Struct:
    ((link, message),) = result.replies
    assert link == LINK
    return message


def outcome(result: ControlResult[FakeCheckpoint]) -> tuple[int, bool]:
    message = reply(result)
    assert isinstance(message, CallReply)
    assert message.message
    return message.call_id, message.success


def test_an_idle_node_flushes_at_once(bench: Bench) -> None:
    assert outcome(bench.handle(FlushCache(call_id=1))) == (1, True)
    assert bench.num_drops == 1


def test_a_cache_that_could_not_be_dropped_is_told(bench: Bench) -> None:
    bench.can_drop = False
    assert outcome(bench.handle(FlushCache(call_id=1))) == (1, False)


def test_a_busy_node_without_a_timeout_refuses_and_drops_nothing(bench: Bench) -> None:
    assert outcome(bench.handle(FlushCache(call_id=1), idle=False)) == (1, False)
    assert bench.num_drops == 0
    assert bench.control.deadline == math.inf


def test_a_flush_waits_for_the_node_to_be_idle(bench: Bench) -> None:
    assert bench.handle(FlushCache(call_id=1, timeout_s=5.0), 100.0, idle=False).replies == []
    assert bench.control.deadline == 105.0
    assert bench.control.poll(104.0, idle=False, is_drained=True).replies == []
    assert outcome(bench.handle(FlushCache(call_id=2, timeout_s=5.0), 104.0, idle=False)) == (2, False)
    assert outcome(bench.control.poll(104.0, idle=True, is_drained=True)) == (1, True)
    assert bench.num_drops == 1
    assert bench.control.poll(200.0, idle=True, is_drained=True).replies == []
    assert bench.control.deadline == math.inf


def test_a_flush_that_waited_too_long_is_told_and_drops_nothing(bench: Bench) -> None:
    bench.handle(FlushCache(call_id=1, timeout_s=5.0), 100.0, idle=False)
    assert outcome(bench.control.poll(105.0, idle=False, is_drained=True)) == (1, False)
    assert bench.num_drops == 0


def test_weights_are_prepared_then_swapped(bench: Bench) -> None:
    prepare = PrepareWeights(
        call_id=1, update_id="u", source=FromDisk(model_path="/models/next"), weight_version="w2"
    )
    assert bench.handle(prepare).replies == []
    assert outcome(bench.handle(prepare)) == (1, False)
    assert outcome(bench.finish_job()) == (1, True)

    refused = bench.handle(CommitWeights(call_id=2, update_id="u"), idle=False)
    assert (outcome(refused), refused.swap) == ((2, False), None)
    done = bench.handle(CommitWeights(call_id=3, update_id="u"))
    assert outcome(done) == (3, True)
    assert done.swap is not None
    assert (done.swap.checkpoint.path, done.swap.weight_version) == (Path("/models/next"), "w2")
    assert bench.num_drops == 0, "the cache goes with the swap, which is the scheduler's"


def test_discarded_weights_are_not_swapped(bench: Bench) -> None:
    bench.handle(
        PrepareWeights(call_id=1, update_id="u", source=FromDisk(model_path="/m"), weight_version="w2")
    )
    bench.finish_job()
    discarded = bench.handle(DiscardWeights(call_id=2, update_id="u"))
    assert reply(discarded) == CallReply(call_id=2, success=True)
    assert bench.handle(CommitWeights(call_id=3, update_id="u")).swap is None


def test_weights_for_others_to_read_are_there_in_another_turn_of_the_loop(bench: Bench) -> None:
    assert bench.handle(OpenWeights(call_id=7)).replies == []
    opened = reply(bench.control.poll(1.0, idle=True, is_drained=True))
    assert isinstance(opened, WeightImageReply)
    assert (opened.call_id, opened.success) == (7, True)
    again = reply(bench.handle(OpenWeights(call_id=8)))
    assert isinstance(again, WeightImageReply)
    assert again.success, "the same weights are there already"
    assert bench.control.deadline == 61.0


def test_an_operation_is_answered_at_once_or_with_its_job(bench: Bench) -> None:
    assert outcome(bench.handle(SlowDown(call_id=1, forward_sleep_s=0.5))) == (1, True)
    assert bench.forward_sleep_s == 0.5
    state = reply(bench.handle(GetInternalState(call_id=2)))
    assert isinstance(state, InternalStateReply)
    assert (state.state.requests, state.state.forward_sleep_s) == ({"waiting": 2}, 0.5)
    assert bench.handle(StartProfile(call_id=3, profile_id="p", output_dir="/d")).replies == []
    assert outcome(bench.finish_job()) == (3, True)


def test_server_info_carries_the_load(bench: Bench) -> None:
    info = reply(bench.handle(GetServerInfo(call_id=4), idle=False))
    assert isinstance(info, ServerInfoReply)
    assert (info.call_id, info.load.num_running_reqs, info.model.model_name) == (4, 3, "tiny")


def test_metrics_are_as_new_as_the_load(bench: Bench) -> None:
    metrics = reply(bench.handle(GetMetrics(call_id=5), idle=False))
    assert isinstance(metrics, MetricsReply)
    assert metrics.call_id == 5
    assert 'pd_num_running_reqs{model_name="tiny",role="decode"} 3.0' in metrics.text
    assert 'pd_sampled_tokens_total{model_name="tiny",role="decode"} 11.0' in metrics.text
