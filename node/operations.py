"""What an operator asks of a running node besides serving: settings, log level, slow motion, profiles."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias, assert_never

import psutil

from ..engine.job import AnyJob, Job
from ..messages.node import CallReply
from ..messages.operation import (
    DEFAULT_PROFILE_STEPS,
    MAX_FORWARD_SLEEP_S,
    ConfigureLogging,
    FreezeGc,
    GetInternalState,
    InternalState,
    InternalStateReply,
    ProfileReply,
    SetInternalState,
    SlowDown,
    StartProfile,
    StopProfile,
)
from ..runtime.errors import PdserveError
from ..runtime.logs import LogLevel, log_level, set_log_level
from .live_settings import LiveSettings
from .loop_times import LoopTimes
from .profiler import Traces


class SlowEngine(Protocol):
    """The engine's thread, as far as it is asked for slow motion and work beside forwards."""

    forward_sleep_s: float

    def submit_job(self, job: AnyJob[OperationReply]) -> None: ...


class Profiler(Protocol):
    """Of all ranks, see NodeProfiler: what it returns is submitted at once. Jobs raise PdserveError."""

    def start(self, plan: StartProfile) -> Callable[[], None]: ...

    def stop(self) -> Callable[[], Traces]: ...


class FurtherRanks(Protocol):
    """Of the replica, see RankGroup."""

    @property
    def pids(self) -> tuple[int, ...]: ...

    def set_log_level(self, level: LogLevel) -> None: ...

    def freeze_gc(self) -> None: ...


ToNodeOperations: TypeAlias = (
    GetInternalState | SetInternalState | ConfigureLogging | SlowDown | FreezeGc | StartProfile | StopProfile
)
Reply: TypeAlias = CallReply | InternalStateReply | ProfileReply


@dataclass(frozen=True, slots=True)
class OperationReply:
    """And the link of the caller that waits for it."""

    link: bytes
    reply: Reply


@dataclass(slots=True)
class _Profile:
    """What is known of the profiler, which the engine's thread owns."""

    is_running: bool = False
    is_changing: bool = False  # a job of its start or its end is on its way


class NodeOperations:
    """`ranks`: the further ones; None: there are none."""

    def __init__(
        self,
        *,
        settings: LiveSettings,
        engine: SlowEngine,
        profiler: Profiler,
        loop_times: LoopTimes,
        ranks: FurtherRanks | None,
    ) -> None:
        self._settings = settings
        self._loop_times = loop_times
        self._engine = engine
        self._profiler = profiler
        self._ranks = ranks
        self._profile = _Profile()
        self._is_gc_frozen = False
        further = () if ranks is None else ranks.pids
        self._processes = [psutil.Process(), *map(psutil.Process, further)]  # rank by rank

    def handle(
        self, link: bytes, message: ToNodeOperations, *, requests: Mapping[str, int], pause: str
    ) -> OperationReply | None:
        """None: the reply comes with a job's end. `requests`: how many are in each state."""
        match message:
            case GetInternalState():
                state = self._state(requests, pause)
                return OperationReply(link, InternalStateReply(call_id=message.call_id, state=state))
            case SetInternalState():
                reason = self._settings.change(message.settings)
                return _answer(link, message.call_id, not reason, reason or "set")
            case ConfigureLogging():
                set_log_level(message.log_level)
                if self._ranks is not None:
                    self._ranks.set_log_level(message.log_level)
                return _answer(link, message.call_id, True, f"log level {message.log_level}")
            case SlowDown():
                return self._slow_down(link, message)
            case FreezeGc():
                gc.freeze()  # counting what is frozen would take the loop 18 ms
                if self._ranks is not None:
                    self._ranks.freeze_gc()
                self._is_gc_frozen = True
                return _answer(link, message.call_id, True, "frozen")
            case StartProfile():
                if self._profile.is_running or self._profile.is_changing:
                    return _answer(link, message.call_id, False, "a profile is running")
                self._start_profile(link, message)
                return None
            case StopProfile():
                if not self._profile.is_running or self._profile.is_changing:
                    text = "no profile is running"
                    return OperationReply(
                        link, ProfileReply(call_id=message.call_id, success=False, message=text)
                    )
                self._stop_profile(link, message)
                return None
            case _:
                assert_never(message)

    def _start_profile(self, link: bytes, message: StartProfile) -> None:
        num_steps = message.num_steps or DEFAULT_PROFILE_STEPS

        def finish(error: PdserveError | None) -> OperationReply:
            self._profile = _Profile(is_running=error is None)
            text = f"profiling: {num_steps} forwards at most" if error is None else str(error)
            return _answer(link, message.call_id, error is None, text)

        run = self._profiler.start(message)
        self._profile.is_changing = True
        self._engine.submit_job(Job("start profile", run, finish))

    def _stop_profile(self, link: bytes, message: StopProfile) -> None:
        def finish(traces: Traces | PdserveError) -> OperationReply:
            self._profile = _Profile()
            if isinstance(traces, PdserveError):
                reply = ProfileReply(call_id=message.call_id, success=False, message=str(traces))
            else:
                reply = ProfileReply(
                    call_id=message.call_id,
                    success=True,
                    traces=tuple(map(str, traces.own)),
                    rank_traces=traces.of_ranks,
                )
            return OperationReply(link, reply)

        run = self._profiler.stop()
        self._profile.is_changing = True
        self._engine.submit_job(Job("stop profile", run, finish))

    def _slow_down(self, link: bytes, message: SlowDown) -> OperationReply:
        seconds = message.forward_sleep_s
        if not (math.isfinite(seconds) and seconds <= MAX_FORWARD_SLEEP_S):
            text = f"a forward sleeps {MAX_FORWARD_SLEEP_S:g} s at most"
            return _answer(link, message.call_id, False, text)
        self._engine.forward_sleep_s = max(0.0, seconds)
        text = f"each forward sleeps {seconds:g} s before" if seconds > 0 else "forwards do not sleep"
        return _answer(link, message.call_id, True, text)

    def _state(self, requests: Mapping[str, int], pause: str) -> InternalState:
        rss_bytes = tuple(map(_rss_bytes, self._processes))
        return InternalState(
            settings=self._settings.values(),
            requests=dict(requests),
            pause=pause,
            forward_sleep_s=self._engine.forward_sleep_s,
            is_profiling=self._profile.is_running,
            log_level=log_level(),
            is_gc_frozen=self._is_gc_frozen,
            memory_rss_bytes=sum(rss_bytes),
            rank_rss_bytes=rss_bytes,
            loop_times=self._loop_times.summary(),
        )


def _rss_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # a rank has died, and this node is about to end
        return 0


def _answer(link: bytes, call_id: int, success: bool, message: str) -> OperationReply:
    return OperationReply(link, CallReply(call_id=call_id, success=success, message=message))
