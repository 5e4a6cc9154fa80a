"""WeightUpdater: two phases, one update at a time, never a mix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from pdserve.engine.job import AnyJob, Job
from pdserve.messages.node import CallReply
from pdserve.messages.weights import (
    LEASE_S,
    CheckWeights,
    CommitWeights,
    DiscardWeights,
    FromDisk,
    FromGpuMemory,
    FromGroup,
    FromPeer,
    FromTensors,
    GetWeights,
    JoinUpdateGroup,
    KeepWeights,
    LeaveUpdateGroup,
    PrepareWeights,
    SaveWeights,
    StageWeights,
    TensorSpec,
    WeightChecksReply,
    WeightsReply,
)
from pdserve.runtime.containment import Containment
from pdserve.runtime.errors import StartupError
from pdserve.tests.present import at_present
from pdserve.weights.gpu import GpuWeights
from pdserve.weights.staged import StagedFile
from pdserve.weights.update_groups import UpdateGroups
from pdserve.weights.updater import (
    AddressedReply,
    LoadFolder,
    LoadOrder,
    LoadServed,
    LoadTensors,
    Prepared,
    Sums,
    TensorHead,
    WeightUpdater,
)


@dataclass(frozen=True)
class FakeCheckpoint:
    path: Path
    given_fingerprint: str = ""

    @property
    def fingerprint(self) -> str:
        return self.given_fingerprint or f"digest of {self.path}"


@dataclass
class FakeStore:
    """What it was told, in order. Its jobs say what they did."""

    told: list[str] = field(default_factory=list)
    served: str = "old"
    reads_tensors: bool = False
    read: dict[str, torch.Tensor] = field(default_factory=dict)

    def load(self, order: LoadOrder) -> Callable[[], FakeCheckpoint]:
        self.told.append("load")

        def job() -> FakeCheckpoint:
            match order:
                case LoadFolder(path):
                    return FakeCheckpoint(path)
                case LoadServed():
                    return FakeCheckpoint(Path(self.served))
                case LoadTensors(file) if self.reads_tensors:
                    self.read = load_file(file)
                    return FakeCheckpoint(Path("/received"), order.fingerprint)
                case LoadTensors(file):
                    return FakeCheckpoint(Path(file.read_text()))

        return job

    def drop(self) -> None:
        self.told.append("drop")

    def check(self) -> Callable[[], Sums]:
        served = self.served
        return lambda: Sums({"t": served}, f"all of {served}")

    def head(self, name: str, num_rows: int) -> Callable[[], TensorHead]:
        return lambda: TensorHead("float32", (9,), [1.0] * num_rows)

    def save(self, target: str, *, is_remote: bool, max_shard_bytes: int) -> Callable[[], None]:
        def job() -> None:
            if is_remote:
                raise StartupError(f"{target} cannot be written")
            self.told.append(f"save {target} in files of {max_shard_bytes}")

        return job


class FakeGroup:
    """Sends bytes 0, 1, 2 and so on, in each buffer."""

    def receive(self, buffers: Sequence[torch.Tensor], timeout_s: float) -> None:
        for buffer in buffers:
            buffer.copy_(torch.arange(len(buffer)))


@dataclass
class Bench:
    """An updater whose jobs run when the test says so."""

    jobs: list[AnyJob[AddressedReply | None]] = field(default_factory=list)
    store: FakeStore = field(default_factory=FakeStore)
    available_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        self.updater: WeightUpdater[FakeCheckpoint] = WeightUpdater(
            self.store,
            self.start_job,
            lambda: f"version of {self.store.served}",
            lambda: self.available_bytes,
            UpdateGroups(self.join, lambda: self.available_bytes),
            GpuWeights(self.read_gpu, lambda: self.available_bytes).stage,
            self.pull,
        )

    def join(self, message: JoinUpdateGroup) -> FakeGroup:
        if message.master_port == 1:
            raise StartupError("nobody listens there")
        return FakeGroup()

    def read_gpu(self, source: FromGpuMemory, target: torch.Tensor) -> None:
        if source.device_uuid == "nowhere":
            raise StartupError("this node does not see the GPU nowhere, but none")
        target.copy_(torch.arange(source.offset, source.offset + len(target)))

    def pull(self, source: FromPeer) -> StagedFile:
        if source.zmq_address == "tcp://nobody:1":
            raise StartupError("the connection is lost")
        file = StagedFile()
        file.append(save({"t": torch.ones(3)}))
        return file

    def start_job(self, job: AnyJob[AddressedReply | None]) -> None:
        self.jobs.append(job)
        self.store.told.append("own job")

    def prepare(self, update_id: str, call_id: int = 1, link: bytes = b"router") -> AddressedReply | None:
        source, version = FromDisk(model_path=f"/models/{update_id}"), f"version of {update_id}"
        return self.updater.prepare(
            link, PrepareWeights(call_id=call_id, update_id=update_id, source=source, weight_version=version)
        )

    def stage(self, update_id: str, data: bytes, offset: int = 0) -> CallReply:
        message = StageWeights(call_id=4, update_id=update_id, offset=offset, data=data)
        reply = self.updater.stage(b"router", message).reply
        assert isinstance(reply, CallReply)
        return reply

    def prepare_tensors(self, update_id: str, num_bytes: int) -> AddressedReply | None:
        source = FromTensors(num_bytes=num_bytes)
        return self.updater.prepare(
            b"router", PrepareWeights(call_id=5, update_id=update_id, source=source, weight_version="v")
        )

    def finish_loading(self) -> AddressedReply:
        answer = self.run_job()
        assert answer is not None
        return answer

    def run_job(self) -> AddressedReply | None:
        return self.jobs.pop(0).do(Containment()).deliver()

    def fail_loading(self, error: StartupError) -> AddressedReply:
        job = self.jobs.pop(0)
        assert isinstance(job, Job)
        answer = job.finish(error)
        assert isinstance(answer, AddressedReply)
        return answer

    def commit(
        self, update_id: str, *, idle: bool = True
    ) -> tuple[CallReply, Prepared[FakeCheckpoint] | None]:
        message = CommitWeights(call_id=2, update_id=update_id)
        answer, swap = self.updater.commit(b"router", message, idle=idle)
        assert answer.link == b"router"
        assert isinstance(answer.reply, CallReply)
        return answer.reply, swap

    def discard(self, update_id: str) -> CallReply:
        reply = self.updater.discard(b"router", DiscardWeights(call_id=3, update_id=update_id)).reply
        assert isinstance(reply, CallReply)
        return reply


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_prepare_loads_off_the_loop_and_answers_when_it_is_done(bench: Bench) -> None:
    assert bench.prepare("u1", call_id=7) is None
    assert [job.name for job in bench.jobs] == ["load weights"]
    expected = AddressedReply(b"router", CallReply(call_id=7, success=True, message="digest of /models/u1"))
    assert bench.finish_loading() == expected
    assert not bench.jobs


def test_commit_gives_what_was_prepared_once(bench: Bench) -> None:
    bench.prepare("u1")
    bench.finish_loading()
    reply, swap = bench.commit("u1")
    assert reply == CallReply(call_id=2, success=True, message="version of u1")
    assert swap == Prepared("u1", "version of u1", FakeCheckpoint(Path("/models/u1")))
    reply, swap = bench.commit("u1")
    assert (reply.success, swap) == (True, None), "the first answer may have been lost"
    reply, swap = bench.commit("u0")
    assert (reply.success, reply.message, swap) == (False, "update u0 is not prepared here", None)


def test_a_busy_node_says_no_and_keeps_the_update(bench: Bench) -> None:
    bench.prepare("u1")
    bench.finish_loading()
    reply, swap = bench.commit("u1", idle=False)
    assert (reply.success, reply.message, swap) == (False, "the node is not idle", None)
    assert bench.updater.awaits_swap
    reply, swap = bench.commit("u1")
    assert reply.success
    assert swap is not None


def test_a_checkpoint_that_cannot_serve_is_refused_with_the_reason(bench: Bench) -> None:
    bench.prepare("u1", call_id=7)
    answer = bench.fail_loading(StartupError("its vocab_size is 5, not 4"))
    expected = CallReply(call_id=7, success=False, message="its vocab_size is 5, not 4")
    assert answer == AddressedReply(b"router", expected)
    assert not bench.jobs
    assert not bench.commit("u1")[0].success


def test_one_update_loads_at_a_time(bench: Bench) -> None:
    bench.prepare("u1")
    answer = bench.prepare("u2", call_id=8, link=b"other")
    refusal = CallReply(call_id=8, success=False, message="update u1 is being prepared")
    assert answer == AddressedReply(b"other", refusal)
    assert len(bench.jobs) == 1
    assert bench.finish_loading().link == b"router"
    assert bench.commit("u1")[0].success


def test_nothing_is_committed_while_it_loads(bench: Bench) -> None:
    bench.prepare("u1")
    assert bench.commit("u1")[1] is None


def test_a_newer_update_replaces_one_that_nobody_committed(bench: Bench) -> None:
    bench.prepare("u1")
    bench.finish_loading()
    assert bench.prepare("u2") is None
    assert bench.commit("u1")[1] is None, "its memory is given back before the newer one loads"
    bench.finish_loading()
    assert bench.commit("u2")[1] is not None


def test_what_was_discarded_cannot_be_committed(bench: Bench) -> None:
    bench.prepare("u1")
    bench.finish_loading()
    assert bench.discard("another").success
    assert bench.discard("u1") == CallReply(call_id=3, success=True)
    assert bench.commit("u1")[1] is None
    assert bench.discard("u1").success, "again is fine"


def test_what_is_discarded_while_it_loads_is_dropped(bench: Bench) -> None:
    bench.prepare("u1", call_id=7)
    assert bench.discard("u1").success
    assert len(bench.jobs) == 1, "a load cannot be stopped"
    answer = bench.finish_loading()
    assert answer.reply == CallReply(call_id=7, success=False, message="update u1 was discarded")
    assert not bench.jobs
    assert bench.commit("u1")[1] is None
    bench.prepare("u1")
    assert succeeds(bench.finish_loading()), "the same update may be asked for again"


def test_discarding_another_update_leaves_the_one_that_loads(bench: Bench) -> None:
    bench.prepare("u2")
    bench.discard("u1")
    assert succeeds(bench.finish_loading())


def test_other_ranks_let_go_of_what_is_not_committed(bench: Bench) -> None:
    bench.prepare("u1")
    bench.finish_loading()
    bench.discard("u1")
    assert bench.store.told.count("drop") == 1
    bench.prepare("u2")
    bench.discard("u2")
    assert bench.store.told.count("drop") == 1  # it is still loading
    bench.finish_loading()
    assert bench.store.told.count("drop") == 2
    bench.prepare("u3")
    bench.fail_loading(StartupError("no such file"))
    assert bench.store.told.count("drop") == 3
    bench.prepare("u4")
    bench.finish_loading()
    bench.commit("u4")
    assert bench.store.told.count("drop") == 3


# ---- when the coordinator falls silent --------------------------------------------------------------


def prepared(bench: Bench, now: float = 100.0) -> None:
    bench.prepare("u1")
    bench.finish_loading()
    assert bench.updater.poll(now, idle=True) is None


def test_what_nobody_commits_is_rolled_back_at_the_end_of_its_lease(bench: Bench) -> None:
    prepared(bench)
    assert bench.updater.deadline == 100.0 + LEASE_S
    assert bench.updater.poll(100.0 + LEASE_S - 0.1, idle=True) is None
    assert bench.store.told.count("drop") == 0
    assert bench.updater.poll(100.0 + LEASE_S, idle=True) is None
    assert bench.store.told.count("drop") == 1
    assert bench.updater.deadline == math.inf
    assert not bench.commit("u1")[0].success


def test_a_coordinator_that_lives_keeps_it(bench: Bench) -> None:
    prepared(bench)
    bench.updater.keep(KeepWeights(update_id="u1", lease_s=50.0), 120.0)
    bench.updater.keep(KeepWeights(update_id="u0", lease_s=500.0), 120.0)
    assert bench.updater.poll(169.0, idle=True) is None
    assert bench.commit("u1")[1] is not None


def test_what_another_node_serves_is_committed_as_soon_as_this_one_is_idle(bench: Bench) -> None:
    prepared(bench)
    bench.updater.heard({"", "u0"})
    assert not at_present(bench.updater.awaits_swap)
    bench.updater.heard({"", "u1"})
    assert at_present(bench.updater.awaits_swap)
    assert bench.updater.poll(1e6, idle=False) is None, "no lease ends what is decided"
    swap = bench.updater.poll(1e6, idle=True)
    assert swap is not None
    assert swap.update_id == "u1"
    assert not bench.updater.awaits_swap
    assert bench.commit("u1")[0].success, "the coordinator may still ask"


def test_a_commit_that_came_too_early_is_done_without_being_asked_again(bench: Bench) -> None:
    prepared(bench)
    bench.commit("u1", idle=False)
    assert bench.updater.poll(1e6, idle=False) is None
    assert bench.updater.poll(1e6, idle=True) is not None


def test_what_is_decided_gives_way_to_no_other_update(bench: Bench) -> None:
    prepared(bench)
    assert bench.prepare("u2") is None, "nothing is decided yet: the later one counts"
    bench.finish_loading()
    bench.commit("u2", idle=False)
    refused = bench.prepare("u3")
    assert refused == AddressedReply(
        b"router", CallReply(call_id=1, success=False, message="update u2 is decided and comes first")
    )
    swap = bench.updater.poll(1e6, idle=True)
    assert swap is not None
    assert swap.update_id == "u2"
    assert bench.prepare("u3") is None


# ---- tensors ----------------------------------------------------------------------------------------


def test_staged_parts_are_one_file_for_the_load_and_gone_after_it(bench: Bench) -> None:
    assert bench.stage("u1", b"/ten").success
    assert bench.stage("u1", b"sors", offset=4).success
    assert bench.prepare_tensors("u1", 8) is None
    assert succeeds(bench.finish_loading())
    _, swap = bench.commit("u1")
    assert swap is not None
    assert swap.checkpoint == FakeCheckpoint(Path("/tensors"))
    assert bench.stage("u1", b"x", offset=8).message == "byte 8 came where 0 was next"


def test_a_part_that_is_not_the_next_one_is_refused(bench: Bench) -> None:
    assert bench.stage("u1", b"/ten").success
    assert bench.stage("u1", b"x", offset=5).message == "byte 5 came where 4 was next"
    assert bench.stage("u1", b"sors", offset=4).success
    answer = bench.prepare_tensors("u1", 9)
    assert answer is not None
    assert reason(answer) == "8 of 9 bytes of the update were staged"
    assert not bench.jobs


def test_another_update_takes_the_place_of_what_was_staged(bench: Bench) -> None:
    bench.stage("u1", b"old")
    assert bench.stage("u2", b"/new").success
    answer = bench.prepare_tensors("u1", 3)
    assert answer is not None
    assert not succeeds(answer)
    assert bench.prepare_tensors("u2", 4) is None
    busy = bench.stage("u3", b"x")
    assert (busy.success, busy.message) == (False, "update u2 is being prepared")
    assert succeeds(bench.finish_loading()), "its file was left alone"


def test_what_does_not_fit_is_refused_and_dropped(bench: Bench) -> None:
    bench.stage("u1", b"1234")
    bench.available_bytes = 5
    assert "does not fit: this host has 0 MiB left" in bench.stage("u1", b"5678", offset=4).message
    bench.available_bytes = 1 << 30
    assert not bench.stage("u1", b"x", offset=4).success, "it begins again"


def test_discarding_drops_what_is_staged(bench: Bench) -> None:
    bench.stage("u1", b"1234")
    bench.discard("u1")
    answer = bench.prepare_tensors("u1", 4)
    assert answer is not None
    assert not succeeds(answer)


# ---- what a trainer broadcasts ----------------------------------------------------------------------


def join_message(port: int = 5) -> JoinUpdateGroup:
    return JoinUpdateGroup(
        call_id=6,
        group_name="g",
        backend="gloo",
        master_address="trainer",
        master_port=port,
        rank=1,
        world_size=2,
        timeout_s=1.0,
    )


def from_group(*, is_one_bucket: bool = False) -> PrepareWeights:
    tensors = (
        TensorSpec("a", "float32", (2, 3)),
        TensorSpec("b", "bfloat16", ()),
        TensorSpec("c", "int8", (0,)),
    )
    source = FromGroup(group_name="g", tensors=tensors, is_one_bucket=is_one_bucket, timeout_s=1.0)
    return PrepareWeights(call_id=7, update_id="u1", source=source, weight_version="v")


@pytest.mark.parametrize("is_one_bucket", [False, True])
def test_what_is_received_is_then_loaded_as_a_file(bench: Bench, is_one_bucket: bool) -> None:
    bench.store.reads_tensors = True
    bench.updater.join(b"trainer", join_message())
    assert bench.finish_loading() == AddressedReply(b"trainer", CallReply(call_id=6, success=True))
    assert bench.updater.prepare(b"router", from_group(is_one_bucket=is_one_bucket)) is None
    assert bench.store.told == ["own job", "own job"], "further ranks begin when the tensors are here"
    assert bench.run_job() is None
    assert succeeds(bench.finish_loading())
    row = torch.arange(26, dtype=torch.uint8)
    assert torch.equal(bench.store.read["a"], row[:24].view(torch.float32).view(2, 3))
    expected = row[24:26] if is_one_bucket else row[:2]
    assert torch.equal(bench.store.read["b"].flatten().view(torch.uint8), expected)
    assert bench.store.read["c"].shape == (0,)
    _, swap = bench.commit("u1")
    assert swap is not None
    bench.updater.leave(b"trainer", LeaveUpdateGroup(call_id=8, group_name="g"))
    assert succeeds(bench.finish_loading())


def test_what_lies_in_memory_of_a_gpu_is_copied_and_then_loaded_as_a_file(bench: Bench) -> None:
    bench.store.reads_tensors = True

    def prepare(device_uuid: str) -> AddressedReply | None:
        tensors = (TensorSpec("a", "uint8", (2, 2)), TensorSpec("b", "bfloat16", (1,)))
        source = FromGpuMemory(device_uuid=device_uuid, handle=b"h" * 64, offset=7, tensors=tensors)
        message = PrepareWeights(call_id=6, update_id=device_uuid, source=source, weight_version="v")
        return bench.updater.prepare(b"router", message)

    assert prepare("nowhere") is None
    assert bench.run_job() == AddressedReply(
        b"router",
        CallReply(call_id=6, success=False, message="this node does not see the GPU nowhere, but none"),
    )
    assert prepare("gpu") is None
    assert bench.run_job() is None
    answer = bench.run_job()
    assert answer is not None
    assert succeeds(answer)
    assert torch.equal(bench.store.read["a"], torch.tensor([[7, 8], [9, 10]], dtype=torch.uint8))
    assert bench.store.read["b"].view(torch.uint8).tolist() == [11, 12]
    bench.available_bytes = 11
    assert prepare("small") is None
    refused = bench.run_job()
    assert refused is not None
    assert "the update does not fit: this host has 0 MiB left" in reason(refused)


def test_an_update_is_one_from_its_first_byte_on(bench: Bench) -> None:
    bench.store.reads_tensors = True
    bench.updater.join(b"trainer", join_message())
    bench.finish_loading()
    bench.updater.prepare(b"router", from_group())
    busy = bench.prepare("u2")
    assert busy is not None
    assert reason(busy) == "update u1 is being prepared"
    bench.updater.check(b"asker", CheckWeights(call_id=9))
    assert bench.run_job() is None
    busy = bench.prepare("u2")
    assert busy is not None
    assert reason(busy) == "update u1 is being prepared"
    assert bench.finish_loading().link == b"asker"
    assert bench.finish_loading().link == b"router"


def test_what_is_discarded_while_it_is_received_is_not_loaded(bench: Bench) -> None:
    bench.updater.join(b"trainer", join_message())
    bench.finish_loading()
    bench.updater.prepare(b"router", from_group())
    assert bench.discard("u1").success
    assert reason(bench.finish_loading()) == "update u1 was discarded"
    assert not bench.jobs
    assert not bench.jobs


def test_a_group_that_does_not_come_together_or_is_not_there_is_an_answer(bench: Bench) -> None:
    bench.updater.join(b"trainer", join_message(port=1))
    assert reason(bench.finish_loading()) == "nobody listens there"
    bench.updater.prepare(b"router", from_group())
    assert "init_weights_update_group comes first" in reason(bench.finish_loading())
    bench.updater.leave(b"trainer", LeaveUpdateGroup(call_id=8, group_name="g"))
    assert reason(bench.finish_loading()) == "there is no group 'g'"
    for _ in range(2):
        bench.updater.join(b"trainer", join_message())
    assert succeeds(bench.finish_loading())
    assert reason(bench.finish_loading()) == "group 'g' is there already: destroy it first"
    bench.available_bytes = 30
    bench.updater.prepare(b"router", from_group())
    assert "the update does not fit" in reason(bench.finish_loading())


# ---- questions --------------------------------------------------------------------------------------


def test_a_check_is_of_the_weights_that_served_when_it_was_asked_for(bench: Bench) -> None:
    bench.prepare("u1")
    bench.updater.check(b"asker", CheckWeights(call_id=9))
    bench.store.served = "new"
    bench.finish_loading()
    answer = bench.finish_loading()
    assert answer == AddressedReply(
        b"asker",
        WeightChecksReply(
            call_id=9, success=True, weight_version="version of old", tensors={"t": "old"}, whole="all of old"
        ),
    )


def test_questions_are_answered_in_turn_and_failures_are_answers(bench: Bench) -> None:
    bench.updater.get(b"asker", GetWeights(call_id=9, name="t", truncate_size=2))
    bench.updater.check(b"asker", CheckWeights(call_id=10))
    answer = bench.finish_loading()
    expected = WeightsReply(call_id=9, success=True, dtype="float32", shape=(9,), values=[1.0, 1.0])
    assert answer == AddressedReply(b"asker", expected)
    failed = bench.fail_loading(StartupError("why"))
    assert failed == AddressedReply(b"asker", WeightChecksReply(call_id=10, success=False, message="why"))
    bench.updater.get(b"asker", GetWeights(call_id=11, name="t", truncate_size=2))
    assert bench.updater.prepare(b"router", prepare_message()) is None, (
        "a question does not keep an update out"
    )
    failed = bench.fail_loading(StartupError("no tensor"))
    assert failed == AddressedReply(b"asker", WeightsReply(call_id=11, success=False, message="no tensor"))
    assert succeeds(bench.finish_loading())


def prepare_message() -> PrepareWeights:
    return PrepareWeights(call_id=1, update_id="u", source=FromDisk(model_path="/m"), weight_version="v")


def succeeds(answer: AddressedReply) -> bool:
    return answer.reply.success


def reason(answer: AddressedReply) -> str:
    assert not answer.reply.success
    return answer.reply.message


def test_saving_is_a_job_whose_end_is_answered(bench: Bench) -> None:
    def save(call_id: int, target: str, *, is_remote: bool) -> CallReply:
        message = SaveWeights(call_id=call_id, target=target, is_remote=is_remote, max_shard_bytes=9)
        bench.updater.save(b"router", message)
        answer = bench.run_job()
        assert answer is not None
        assert isinstance(answer.reply, CallReply)
        return answer.reply

    assert save(1, "/new", is_remote=False) == CallReply(call_id=1, success=True)
    assert bench.store.told[-1] == "save /new in files of 9"
    assert save(2, "s3://b", is_remote=True) == CallReply(
        call_id=2, success=False, message="s3://b cannot be written"
    )
    assert not bench.jobs


def test_what_is_prepared_already_is_not_loaded_again(bench: Bench) -> None:
    bench.prepare("u1")
    bench.finish_loading()
    assert bench.prepare("u1", call_id=9) == AddressedReply(
        b"router", CallReply(call_id=9, success=True, message="digest of /models/u1")
    )
    assert not bench.jobs
    assert bench.commit("u1")[1] is not None


def test_what_serves_already_is_not_loaded_again(bench: Bench) -> None:
    """Who asks has not heard of it yet: to read it once more would be work for nothing."""
    bench.prepare("u1")
    bench.finish_loading()
    assert bench.commit("u1")[1] is not None
    assert bench.prepare("u1", call_id=9) == AddressedReply(
        b"router", CallReply(call_id=9, success=True, message="digest of /models/u1")
    )
    assert not bench.jobs
    reply, swap = bench.commit("u1")
    assert (reply.success, swap) == (True, None)


def test_a_node_that_rejoins_serves_under_the_fingerprint_of_its_peer(bench: Bench) -> None:
    bench.store.reads_tensors = True
    source = FromPeer(zmq_address="tcp://peer:1", update_id="u", fingerprint="the peer's")
    message = PrepareWeights(call_id=6, update_id="u", source=source, weight_version="v")
    assert bench.updater.prepare(b"router", message) is None
    assert bench.run_job() is None
    answer = bench.run_job()
    assert answer == AddressedReply(b"router", CallReply(call_id=6, success=True, message="the peer's"))


def test_what_a_peer_serves_is_received_and_then_loaded(bench: Bench) -> None:
    bench.store.reads_tensors = True

    def prepare(update_id: str, address: str) -> AddressedReply | None:
        source = FromPeer(zmq_address=address)
        message = PrepareWeights(call_id=6, update_id=update_id, source=source, weight_version="v")
        return bench.updater.prepare(b"router", message)

    assert prepare("u1", "tcp://nobody:1") is None
    assert bench.run_job() == AddressedReply(
        b"router", CallReply(call_id=6, success=False, message="the connection is lost")
    )
    assert prepare("u2", "tcp://peer:1") is None
    assert bench.run_job() is None
    assert [job.name for job in bench.jobs] == ["load weights"]
    assert bench.run_job() == AddressedReply(
        b"router", CallReply(call_id=6, success=True, message="digest of /received")
    )
    assert bench.store.read["t"].tolist() == [1.0, 1.0, 1.0]
    assert bench.commit("u2")[1] is not None
