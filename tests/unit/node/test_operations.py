"""NodeOperations: what is answered at once, and what when a job of the engine's thread has ended."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pdserve.engine.job import AnyJob
from pdserve.messages.node import CallReply
from pdserve.messages.operation import (
    ConfigureLogging,
    FreezeGc,
    GetInternalState,
    InternalState,
    InternalStateReply,
    ProfileReply,
    SlowDown,
    StartProfile,
    StopProfile,
)
from pdserve.node.live_settings import LiveSettings
from pdserve.node.loop_times import LoopTimes
from pdserve.node.operations import NodeOperations, OperationReply, ToNodeOperations
from pdserve.node.profiler import Traces
from pdserve.runtime.containment import Containment
from pdserve.runtime.errors import StartupError
from pdserve.runtime.logs import LogLevel, log_level

pytestmark = pytest.mark.usefixtures("logging_as_it_was")
LINK = b"link"
START = StartProfile(call_id=1, profile_id="p", output_dir="/d")


class Engine:
    """Does a job when it is told to."""

    def __init__(self) -> None:
        self.forward_sleep_s = 0.0
        self.jobs: list[AnyJob[OperationReply]] = []

    def submit_job(self, job: AnyJob[OperationReply]) -> None:
        self.jobs.append(job)

    def finish(self) -> OperationReply:
        return self.jobs.pop(0).do(Containment()).deliver()


class Profiler:
    def __init__(self) -> None:
        self.plans: list[StartProfile] = []
        self.error = ""

    def start(self, plan: StartProfile) -> Callable[[], None]:
        def job() -> None:
            if self.error:
                raise StartupError(self.error)
            self.plans.append(plan)

        return job

    def stop(self) -> Callable[[], Traces]:
        def job() -> Traces:
            if self.error:
                raise StartupError(self.error)
            return Traces((Path("/d/p.json"),), ((1, "/d/p-rank1.json"),))

        return job


class Ranks:
    def __init__(self) -> None:
        self.told: list[str] = []
        self.pids = (os.getppid(),)

    def set_log_level(self, level: LogLevel) -> None:
        self.told.append(level)

    def freeze_gc(self) -> None:
        self.told.append("freeze")


class Bench:
    def __init__(self) -> None:
        self.engine = Engine()
        self.profiler = Profiler()
        self.loop_times = LoopTimes()
        self.ranks = Ranks()
        self.part = NodeOperations(
            settings=LiveSettings([]),
            engine=self.engine,
            profiler=self.profiler,
            loop_times=self.loop_times,
            ranks=self.ranks,
        )

    def ask(self, message: ToNodeOperations) -> object:
        """The reply, or None while it waits for a job."""
        operated = self.part.handle(LINK, message, requests={"waiting": 2}, pause="in_place")
        if operated is None:
            return None
        assert operated.link == LINK
        return operated.reply

    def finish(self) -> object:
        return self.engine.finish().reply

    def state(self) -> InternalState:
        reply = self.ask(GetInternalState(call_id=9))
        assert isinstance(reply, InternalStateReply)
        assert reply.call_id == 9
        return reply.state


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_the_state_tells_what_held_the_loop(bench: Bench) -> None:
    bench.loop_times.add("flush", 0.25, 0.125)
    assert bench.state().loop_times["flush"].max_s == 0.25


def test_the_state_is_what_was_set(bench: Bench) -> None:
    bench.ask(SlowDown(call_id=1, forward_sleep_s=0.5))
    bench.ask(ConfigureLogging(call_id=2, log_level="debug"))
    state = bench.state()
    assert (state.forward_sleep_s, state.log_level, state.requests) == (0.5, "debug", {"waiting": 2})
    assert state.pause == "in_place"
    assert min(state.rank_rss_bytes) > 100_000
    assert (len(state.rank_rss_bytes), sum(state.rank_rss_bytes)) == (2, state.memory_rss_bytes)
    assert log_level() == "debug"
    assert bench.ranks.told == ["debug"]
    bench.ask(SlowDown(call_id=1, forward_sleep_s=0.0))
    assert bench.engine.forward_sleep_s == 0.0


@pytest.mark.parametrize("seconds", [61.0, float("inf"), float("nan")])
def test_a_sleep_that_would_look_like_a_hang_is_refused(bench: Bench, seconds: float) -> None:
    reply = bench.ask(SlowDown(call_id=1, forward_sleep_s=seconds))
    assert isinstance(reply, CallReply)
    assert not reply.success
    assert bench.engine.forward_sleep_s == 0.0


def test_what_lives_is_frozen(bench: Bench) -> None:
    assert not bench.state().is_gc_frozen
    num_frozen = gc.get_freeze_count()
    reply = bench.ask(FreezeGc(call_id=1))
    assert isinstance(reply, CallReply)
    assert reply.success
    assert bench.state().is_gc_frozen
    assert gc.get_freeze_count() > num_frozen
    assert bench.ranks.told == ["freeze"]


def test_a_profile_begins_and_ends_on_the_engine(bench: Bench) -> None:
    assert bench.ask(START) is None
    assert bench.finish() == CallReply(call_id=1, success=True, message="profiling: 32 forwards at most")
    assert bench.profiler.plans == [START]
    assert bench.state().is_profiling
    again = bench.ask(START)
    assert again == CallReply(call_id=1, success=False, message="a profile is running")
    assert bench.ask(StopProfile(call_id=2)) is None
    done = bench.finish()
    assert isinstance(done, ProfileReply)
    assert (done.call_id, done.success) == (2, True)
    assert done.all_traces == ["/d/p.json", "/d/p-rank1.json"]
    assert not bench.state().is_profiling


def test_a_profile_that_cannot_begin_or_be_written_says_why(bench: Bench) -> None:
    bench.profiler.error = "/d: Permission denied"
    assert bench.ask(START) is None
    assert bench.finish() == CallReply(call_id=1, success=False, message="/d: Permission denied")
    bench.profiler.error = ""
    bench.ask(START)
    bench.finish()
    bench.profiler.error = "the disk is full"
    assert bench.ask(StopProfile(call_id=2)) is None
    assert bench.finish() == ProfileReply(call_id=2, success=False, message="the disk is full")
    assert not bench.state().is_profiling, "or nobody could begin another one"


def test_calls_while_one_waits_are_refused(bench: Bench) -> None:
    stop = bench.ask(StopProfile(call_id=2))
    assert stop == ProfileReply(call_id=2, success=False, message="no profile is running")
    bench.ask(START)
    for message in (START, StopProfile(call_id=3)):
        reply = bench.ask(message)
        assert isinstance(reply, CallReply | ProfileReply)
        assert not reply.success
    assert len(bench.engine.jobs) == 1
