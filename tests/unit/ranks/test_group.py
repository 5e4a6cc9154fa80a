"""Rank 0's view of another rank: here a process that sleeps, whose end of the pipe the test holds."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from pdserve.engine.engine_thread import Progress
from pdserve.engine.tensor_parallel import RankCollective, Shard
from pdserve.messages.malformed import MalformedMessage
from pdserve.messages.memory_region import MemoryRegion
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
    LoadShard,
    MeetRegion,
    MoveMemory,
    RankAnswer,
    RankChecked,
    RankDone,
    RankFailed,
    RankMoved,
    RankReady,
    RankTraced,
    SetRankLogLevel,
    StartRankProfile,
    StopRankProfile,
    SwapShard,
    ToRank,
    UpdateShard,
    WriteEnd,
    WriteRun,
    WritesEnded,
)
from pdserve.ranks.group import LostRankError, RankCall, RankGroup, RankProcess, alongside
from pdserve.runtime.errors import StartupError
from pdserve.runtime.timing import UNSCALED
from pdserve.tests.deadline import DEADLINE_S
from pdserve.transfer.backends.base import WriteResult, WriteState
from pdserve.transfer.backends.rank import RankMover
from pdserve.transfer.copy_plan import Run
from pdserve.weights.updater import LoadFolder, LoadTensors

pytestmark = pytest.mark.process

REGION = MemoryRegion(session="s", address=0, num_bytes=1, scratch_address=0)


class OtherRank:
    """What the group believes to be rank 1."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(["sleep", "600"])
        pipe: Pipe[FromRank] = Pipe(ours, FromRank, "test")
        self.rank = RankProcess(
            "TP rank 1", self.process, os.pidfd_open(self.process.pid), pipe, RankMover(pipe.send)
        )
        self.end: Pipe[ToRank] = Pipe(theirs, ToRank, "rank 1")

    def next(self) -> ToRank:
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            if messages := self.end.receive():
                (message,) = messages
                assert not isinstance(message, MalformedMessage)
                return message
            time.sleep(0.001)
        raise AssertionError("nothing came")


@pytest.fixture
def other() -> Iterator[OtherRank]:
    other = OtherRank()
    yield other
    other.process.kill()
    other.process.wait()
    other.end.close()


@pytest.fixture
def group(other: OtherRank) -> RankGroup:
    return RankGroup([other.rank], tempfile.TemporaryDirectory(), UNSCALED)


def poll_until(group: RankGroup, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        group.poll(time.monotonic(), None)
        assert time.monotonic() < deadline


def test_nothing_is_left_in_the_file_system_once_all_have_joined(other: OtherRank) -> None:
    folder = tempfile.TemporaryDirectory()
    group = RankGroup([other.rank], folder, UNSCALED)
    with ThreadPoolExecutor(1) as threads:
        rank_1 = threads.submit(RankCollective, Shard(1, 2), Path(folder.name) / "rendezvous", DEADLINE_S)
        group.join()
        rank_1.result(DEADLINE_S)
    assert not Path(folder.name).exists(), "which a node that is killed would leave"


def test_ranks_are_ready_when_each_has_told_its_memory(group: RankGroup, other: OtherRank) -> None:
    other.end.send(RankReady(region=REGION))
    assert group.wait_ready() == (REGION,)


def test_a_rank_that_cannot_start_says_why(group: RankGroup, other: OtherRank) -> None:
    other.end.send(RankFailed(reason="no model at /x"))
    with pytest.raises(StartupError, match="no model at /x"):
        group.wait_ready()


def test_a_rank_that_dies_while_it_starts_is_told(group: RankGroup, other: OtherRank) -> None:
    other.process.kill()
    with pytest.raises(StartupError, match=r"TP rank 1 \(pid \d+\) was ended by SIGKILL"):
        group.wait_ready()


def answers_of(group: RankGroup, call: RankCall) -> list[RankAnswer]:
    """A job waits while the loop hears."""
    found: list[RankAnswer | StartupError] = []

    def job() -> None:
        try:
            found.extend(call.answers())
        except StartupError as error:
            found.append(error)

    jobs = threading.Thread(target=job)
    jobs.start()
    poll_until(group, lambda: not jobs.is_alive())
    for answer in found:
        if isinstance(answer, StartupError):
            raise answer
    return [answer for answer in found if not isinstance(answer, StartupError)]


def test_calls_are_answered_in_any_order(group: RankGroup, other: OtherRank) -> None:
    calls = []
    messages = []
    for _ in range(2):
        calls.append(group.check_shards())
        message = other.next()
        assert isinstance(message, CheckShard)
        messages.append(message)
    replies = [
        RankChecked(call_id=message.call_id, sums={"t": digits})
        for message, digits in zip(messages, ("ff", "1"), strict=True)
    ]
    for reply in reversed(replies):
        other.end.send(reply)
    assert [answers_of(group, call) for call in calls] == [[reply] for reply in replies]


def test_an_answer_that_is_malformed_fails_its_call(group: RankGroup, other: OtherRank) -> None:
    call = group.check_shards()
    message = other.next()
    assert isinstance(message, CheckShard)
    other.end.send(RankDone(call_id=message.call_id, error="x" * ((1 << 20) + 1)))
    with pytest.raises(StartupError, match="its answer is malformed"):
        answers_of(group, call)


def test_a_rank_that_says_what_is_no_message_ends_the_replica(group: RankGroup, other: OtherRank) -> None:
    other.end.send(RankFailed(reason="x" * ((1 << 20) + 1)))
    with pytest.raises(LostRankError, match="says what is no message"):
        poll_until(group, lambda: False)


def test_an_update_of_some_tensors_reaches_every_rank(group: RankGroup, other: OtherRank) -> None:
    call = group.load_shards(LoadTensors(Path("/proc/1/fd/2"), "a test"))
    message = other.next()
    assert isinstance(message, UpdateShard)
    assert message.file == "/proc/1/fd/2"
    other.end.send(RankDone(call_id=message.call_id, error="it has no such tensor"))
    with pytest.raises(StartupError, match="TP rank 1: it has no such tensor"):
        answers_of(group, call)


def test_a_rank_whose_memory_is_registered_again_has_a_new_region(group: RankGroup, other: OtherRank) -> None:
    other.end.send(RankReady(region=REGION))
    group.wait_ready()
    call = group.move_memory(frozenset({"kv_cache", "weights"}))
    assert other.next() == MoveMemory(call_id=0, released=("kv_cache", "weights"))
    moved = RankMoved(call_id=0, region=msgspec.structs.replace(REGION, session="s2"))
    other.end.send(moved)
    assert answers_of(group, call) == [moved]
    assert group.regions == (moved.region,)


def test_what_an_operator_sets_is_set_on_every_rank(group: RankGroup, other: OtherRank) -> None:
    group.set_log_level("debug")
    assert other.next() == SetRankLogLevel(level="debug")
    group.freeze_gc()
    assert other.next() == FreezeRankGc()
    plan = StartProfile(profile_id="p", output_dir="/d")
    call = group.start_profile(plan)
    assert other.next() == StartRankProfile(call_id=0, plan=plan)
    other.end.send(RankDone(call_id=0))
    assert answers_of(group, call) == [RankDone(call_id=0)]
    call = group.stop_profile()
    assert other.next() == StopRankProfile(call_id=1)
    traced = RankTraced(call_id=1, rank=1, traces=("/d/p",))
    other.end.send(traced)
    assert answers_of(group, call) == [traced]
    call = group.fill_tensors(Path("/proc/1/fd/2"))
    assert other.next() == FillTensors(call_id=2, file="/proc/1/fd/2")
    assert not call.is_over


def test_what_rank_0_does_ends_with_the_others_and_the_first_reason_is_told() -> None:
    call = RankCall(["TP rank 1", "TP rank 2"])
    call.take("TP rank 1", RankDone(call_id=0))
    ended: list[str] = []

    def own() -> int:
        raise StartupError("rank 0 has no room")

    def job() -> None:
        with pytest.raises(StartupError, match="rank 0 has no room"):
            alongside(call, own)
        ended.append("raised")

    thread = threading.Thread(target=job)
    thread.start()
    thread.join(0.05)
    assert not ended, "rank 2 is at it still"
    call.take("TP rank 2", RankDone(call_id=0, error="nor has this one"))
    thread.join(DEADLINE_S)
    assert ended == ["raised"]
    with pytest.raises(StartupError, match="TP rank 2: nor has this one"):
        alongside(call, lambda: 1)
    assert alongside(None, lambda: 1) == (1, [])


def test_a_dead_rank_ends_the_replica_with_the_reason(group: RankGroup, other: OtherRank) -> None:
    group.poll(1.0, None)
    other.process.kill()
    other.process.wait()
    with pytest.raises(LostRankError, match="was ended by SIGKILL"):
        group.poll(1.0, None)
    # A collective may have failed first; the death is the cause all the same.
    assert "was ended by SIGKILL" in str(group.cause(RuntimeError("connection reset")))


def test_an_error_that_is_no_rank_s_stays_what_it_is(group: RankGroup) -> None:
    error = RuntimeError("a bug")
    assert group.cause(error) is error


def test_a_step_that_hangs_ends_the_replica(group: RankGroup) -> None:
    progress = Progress(step=1, name="forward", started=0.0, expected_s=0.001)
    for tick in range(20):
        group.poll(tick * 0.5, progress)
    group.poll(10.0, progress)
    with pytest.raises(LostRankError, match="does not answer"):
        group.poll(10.5, progress)


def test_a_copy_of_pages_is_waited_for(group: RankGroup, other: OtherRank) -> None:
    seen: list[ToRank] = []

    def answer() -> None:
        message = other.next()
        assert isinstance(message, CopyPages)
        seen.append(message)
        time.sleep(0.05)
        seen.append(message)
        other.end.send(RankDone(call_id=message.call_id))

    rank = threading.Thread(target=answer)
    rank.start()
    group.copy_pages([3], [7])
    assert len(seen) == 2
    assert seen[0] == CopyPages(call_id=0, source=(3,), dest=(7,))
    rank.join()


def test_a_rank_that_dies_while_it_is_waited_for_ends_the_replica(group: RankGroup, other: OtherRank) -> None:
    threading.Timer(0.1, other.process.kill).start()
    with pytest.raises(LostRankError, match="was ended by SIGKILL"):
        group.poison([1])


def test_what_was_loaded_is_swapped_in_or_dropped(group: RankGroup, other: OtherRank) -> None:
    call = group.load_shards(LoadFolder(Path("/models/next")))
    assert other.next() == LoadShard(call_id=0, model_path="/models/next")
    other.end.send(RankDone(call_id=0))
    assert answers_of(group, call) == [RankDone(call_id=0)]
    group.drop_shards()
    assert other.next() == DropShard()
    group.swap_shards()
    assert other.next() == SwapShard()


def test_writes_are_asked_for_and_reported_by_the_same_handles(group: RankGroup, other: OtherRank) -> None:
    (mover,) = group.movers
    mover.first_contact(1, REGION)
    assert other.next() == MeetRegion(handle=1, region=REGION)
    assert mover.stuck_s(100.0) == 0.0
    assert mover.stuck_s(103.0) == 3.0
    mover.submit(2, REGION, Run(16, 32, 8))
    assert other.next() == WriteRun(handle=2, region=REGION, source=16, dest=32, num_bytes=8)
    mover.cancel([2])
    assert other.next() == CancelRuns(handles=(2,))
    other.end.send(WritesEnded(ends=(WriteEnd(1, "done"), WriteEnd(2, "failed", "cable"))))
    results: list[WriteResult] = []

    def has_both() -> bool:
        results.extend(mover.poll())
        return len(results) == 2

    poll_until(group, has_both)
    assert results == [WriteResult(1, WriteState.DONE), WriteResult(2, WriteState.FAILED, "cable")]
    assert mover.stuck_s(200.0) == 0.0


def test_a_rank_that_does_not_leave_is_killed(group: RankGroup, other: OtherRank) -> None:
    other.end.send(RankReady(region=REGION))
    group.wait_ready()
    group.close()  # `sleep` does not look at its pipe
    assert other.process.poll() is not None
