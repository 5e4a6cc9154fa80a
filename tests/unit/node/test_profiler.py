"""NodeProfiler: all ranks record, or none does."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from pdserve.engine.step_profiler import ProfileError, StepProfiler
from pdserve.messages.operation import StartProfile
from pdserve.messages.ranks import RankDone, RankTraced
from pdserve.node.profiler import NodeProfiler, Traces
from pdserve.ranks.group import RankCall
from pdserve.runtime.errors import StartupError

PLAN = StartProfile(profile_id="p", output_dir="/d")


class Own:
    def __init__(self) -> None:
        self.is_running = False
        self.error = ""

    def start(self, plan: StartProfile) -> None:
        assert plan == PLAN
        if self.error:
            raise ProfileError(self.error)
        self.is_running = True

    def stop(self) -> tuple[Path, ...]:
        self.is_running = False
        return (Path("/d/own"),)


class Ranks:
    """Two, which answer at once."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.error = ""

    def start_profile(self, plan: StartProfile) -> RankCall:
        assert plan == PLAN
        self.calls.append("start")
        call = RankCall(["TP rank 1", "TP rank 2"])
        call.take("TP rank 1", RankDone(call_id=0))
        call.take("TP rank 2", RankDone(call_id=0, error=self.error))
        return call

    def stop_profile(self) -> RankCall:
        self.calls.append("stop")
        call = RankCall(["TP rank 1", "TP rank 2"])
        if self.error:
            return call  # and is not waited for
        for rank in (2, 1):
            traces = (f"/d/{rank}-decode", f"/d/{rank}-prefill")
            call.take(f"TP rank {rank}", RankTraced(call_id=1, rank=rank, traces=traces))
        return call


class Bench:
    def __init__(self) -> None:
        self.own = Own()
        self.ranks = Ranks()
        self.part = NodeProfiler(cast(StepProfiler, self.own), self.ranks)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_ranks_are_told_at_once_and_their_files_are_named(bench: Bench) -> None:
    start = bench.part.start(PLAN)
    assert (bench.ranks.calls, bench.own.is_running) == (["start"], False)
    start()
    assert bench.own.is_running
    stop = bench.part.stop()
    assert (bench.ranks.calls, bench.own.is_running) == (["start", "stop"], True)
    of_ranks = ((1, "/d/1-decode"), (1, "/d/1-prefill"), (2, "/d/2-decode"), (2, "/d/2-prefill"))
    assert stop() == Traces((Path("/d/own"),), of_ranks)
    assert not bench.own.is_running


def test_a_rank_that_cannot_record_ends_it_everywhere(bench: Bench) -> None:
    bench.ranks.error = "/d: Permission denied"
    with pytest.raises(StartupError, match="TP rank 2: /d: Permission denied"):
        bench.part.start(PLAN)()
    assert (bench.ranks.calls, bench.own.is_running) == (["start", "stop"], False)


def test_without_rank_0_nobody_records(bench: Bench) -> None:
    bench.own.error = "/d: Permission denied"
    with pytest.raises(ProfileError, match="Permission denied"):
        bench.part.start(PLAN)()
    assert bench.ranks.calls == ["start", "stop"]


def test_a_rank_alone_records_alone(bench: Bench) -> None:
    alone = NodeProfiler(cast(StepProfiler, bench.own), None)
    alone.start(PLAN)()
    assert alone.stop()() == Traces((Path("/d/own"),))
    bench.own.error = "a profile is running"
    with pytest.raises(ProfileError):
        alone.start(PLAN)()
    assert bench.ranks.calls == []
