"""Rank 0's side of a replica of several ranks: it starts the others, tells them what to do, and hears them.

The others are processes of this host. They die with this one, and when one of them dies or hangs this one
ends: a replica is whole or gone.
"""

from __future__ import annotations

import itertools
import logging
import os
import select
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, assert_never

import msgspec

from ..engine.batch_codec import encode_batch
from ..engine.engine_thread import Progress
from ..engine.forward_batch import ForwardBatch
from ..engine.tensor_parallel import RankCollective, Shard
from ..messages.malformed import Head, MalformedMessage
from ..messages.memory_region import MemoryRegion
from ..messages.operation import StartProfile
from ..messages.pipe import Pipe
from ..messages.ranks import (
    CheckShard,
    CopyPages,
    DropShard,
    FillTensors,
    FreezeRankGc,
    FromRank,
    KeepShard,
    LoadShard,
    MoveMemory,
    PoisonPages,
    RankAnswer,
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
    WritesEnded,
)
from ..messages.weights import MemoryTag
from ..runtime.errors import BrokenInvariantError, StartupError
from ..runtime.logs import LogLevel
from ..runtime.process import end, obituary, spawn, wait_or_kill
from ..runtime.timing import Timing
from ..runtime.waiting import Waiter
from ..transfer.backends.rank import RankMover
from ..weights.updater import LoadFolder, LoadOrder, LoadServed, LoadTensors
from .hang_watch import HangWatch

_log = logging.getLogger(__name__)
T = TypeVar("T")


class LostRankError(BrokenInvariantError):
    """A rank died or hangs; the replica ends."""


@dataclass(slots=True)
class RankProcess:
    """What rank 0 has of a further rank."""

    name: str
    process: subprocess.Popen[bytes]
    pidfd: int
    pipe: Pipe[FromRank]
    mover: RankMover
    region: MemoryRegion | None = None  # None: not ready yet


class RankCall:
    """What every further rank was asked to do. The loop hears the answers, another thread waits for them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.awaited = set(names)  # ranks that have not answered
        self._answers: list[RankAnswer] = []
        self._errors: list[str] = []
        self._is_over = threading.Event()

    def take(self, name: str, answer: RankAnswer) -> None:
        if isinstance(answer, RankDone) and answer.error:
            self._errors.append(f"{name}: {answer.error}")
        self._answers.append(answer)
        self.awaited.discard(name)
        if not self.awaited:
            self._is_over.set()

    @property
    def is_over(self) -> bool:
        return self._is_over.is_set()

    def wait(self) -> None:
        """Blocks until every rank has answered."""
        self._is_over.wait()

    def answers(self) -> list[RankAnswer]:
        """Blocks until every rank has answered. Raises StartupError when a rank could not do it."""
        self.wait()
        if self._errors:
            raise StartupError("; ".join(self._errors))
        return self._answers


def alongside(call: RankCall | None, own: Callable[[], T]) -> tuple[T, list[RankAnswer]]:
    """What `own` returns, and what the further ranks (None: there are none) did meanwhile. All have ended
    when this returns or raises StartupError, with the reason of the first that has one. A job."""
    try:
        value = own()
    finally:
        if call is not None:
            call.wait()
    return value, [] if call is None else call.answers()


class RankGroup:
    """Its methods belong to the loop's thread, where they do not say otherwise. The calls that they return
    are for jobs to wait for."""

    def __init__(
        self, ranks: Sequence[RankProcess], rendezvous: tempfile.TemporaryDirectory[str], timing: Timing
    ) -> None:
        self._ranks = list(ranks)
        self._timing = timing
        self._rendezvous = rendezvous
        self._call_ids = itertools.count()
        self._calls: dict[int, RankCall] = {}  # not answered by every rank yet
        self._hang_watch = HangWatch(timing)

    @classmethod
    def start(
        cls, arguments: Sequence[str], starts: Callable[[int, str], RankStart], size: int, timing: Timing
    ) -> RankGroup:
        """Starts ranks 1 to `size` - 1. `starts(rank, rendezvous)` is what each is told; `arguments` are
        given to each process beside its own."""
        folder = tempfile.TemporaryDirectory(prefix="pdserve-ranks-")
        ranks = []
        for number in range(1, size):
            ours, theirs = socket.socketpair()
            process = spawn(
                ["tp-worker", "--rank", str(number), "--pipe-fd", str(theirs.fileno()), *arguments],
                pass_fds=(theirs.fileno(),),
            )
            theirs.close()
            name = f"TP rank {number}"
            pipe: Pipe[FromRank] = Pipe(ours, FromRank, name)
            pipe.send(starts(number, str(Path(folder.name) / "rendezvous")))
            ranks.append(RankProcess(name, process, os.pidfd_open(process.pid), pipe, RankMover(pipe.send)))
        return cls(ranks, folder, timing)

    # ---- start --------------------------------------------------------------------------------------

    def wait_ready(self) -> tuple[MemoryRegion, ...]:
        """The pools of the further ranks, when all have loaded their share. Raises StartupError."""
        deadline = time.monotonic() + self._timing.rank_start_s
        while missing := [rank for rank in self._ranks if rank.region is None]:
            self._sleep(missing, deadline)
            for rank in missing:
                for message in rank.pipe.receive():
                    if isinstance(message, RankFailed):
                        raise StartupError(message.reason)
                    self._take(rank, message)
            self._check_alive(StartupError)
            if time.monotonic() > deadline:
                raise StartupError(
                    f"{missing[0].name} was not ready within {self._timing.rank_start_s:.0f} s"
                )
        return self.regions

    def join(self) -> RankCollective:
        """Rank 0 joins the others, who wait for it."""
        path = Path(self._rendezvous.name) / "rendezvous"
        try:
            collective = RankCollective(Shard(0, len(self._ranks) + 1), path, self._timing.rank_join_s)
        except RuntimeError as error:
            self._check_alive(StartupError)
            raise StartupError(f"the ranks could not meet: {str(error).splitlines()[0]}") from error
        self._rendezvous.cleanup()  # now, as a node that is killed cannot
        return collective

    def wake(self, waiter: Waiter) -> None:
        """End the loop's sleep when a rank says something, or dies."""
        for rank in self._ranks:
            waiter.add(rank.pipe.fileno())
            waiter.add(rank.pidfd)

    # ---- the loop -----------------------------------------------------------------------------------

    @property
    def movers(self) -> tuple[RankMover, ...]:
        return tuple(rank.mover for rank in self._ranks)

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(rank.process.pid for rank in self._ranks)

    def poll(self, now: float, progress: Progress | None) -> None:
        """Hear what the ranks have to say. Raises LostRankError when one is dead, or the engine hangs."""
        for rank in self._ranks:
            for message in rank.pipe.receive():
                self._take(rank, message)
        self._check_alive(LostRankError)
        if (hung_s := self._hang_watch.hung_s(progress, now)) > 0:
            raise LostRankError(f"a step has hung for {hung_s:.0f} s: a TP rank does not answer")

    def forward(self, batch: ForwardBatch) -> None:
        """The others compute `batch` too."""
        message = RunForward(batch=encode_batch(batch))
        for rank in self._ranks:
            rank.pipe.send(message)

    def copy_pages(self, source: Sequence[int], dest: Sequence[int]) -> None:
        """Waits until every rank has: the source may be given to another request right after."""
        self._wait(
            self._call(lambda call_id: CopyPages(call_id=call_id, source=tuple(source), dest=tuple(dest)))
        )

    def poison(self, pages: Sequence[int]) -> None:
        """Waits until every rank has: a peer may write the pages right after."""
        self._wait(self._call(lambda call_id: PoisonPages(call_id=call_id, pages=tuple(pages))))

    def load_shards(self, order: LoadOrder) -> RankCall:
        """Every rank loads its share. One load at a time."""
        match order:
            case LoadFolder(path):
                return self._call(lambda call_id: LoadShard(call_id=call_id, model_path=str(path)))
            case LoadTensors(file, source):
                return self._call(lambda call_id: UpdateShard(call_id=call_id, file=str(file), source=source))
            case LoadServed():
                return self._call(lambda call_id: KeepShard(call_id=call_id))
            case _:
                assert_never(order)

    def swap_shards(self) -> None:
        self._tell(SwapShard())

    def drop_shards(self) -> None:
        self._tell(DropShard())

    def check_shards(self) -> RankCall:
        """Every rank computes checksums of its share."""
        return self._call(lambda call_id: CheckShard(call_id=call_id))

    def fill_tensors(self, file: Path) -> RankCall:
        """Every rank writes its parts of the tensors that the file was laid out for."""
        return self._call(lambda call_id: FillTensors(call_id=call_id, file=str(file)))

    def move_memory(self, released: frozenset[MemoryTag]) -> RankCall:
        """Every rank releases this and takes back the other. Any thread may call it."""
        tags = tuple(sorted(released))
        return self._call(lambda call_id: MoveMemory(call_id=call_id, released=tags))

    def start_profile(self, plan: StartProfile) -> RankCall:
        """Every rank records its forwards from the next one on."""
        return self._call(lambda call_id: StartRankProfile(call_id=call_id, plan=plan))

    def stop_profile(self) -> RankCall:
        """Any thread may call it."""
        return self._call(lambda call_id: StopRankProfile(call_id=call_id))

    def set_log_level(self, level: LogLevel) -> None:
        self._tell(SetRankLogLevel(level=level))

    def freeze_gc(self) -> None:
        self._tell(FreezeRankGc())

    @property
    def regions(self) -> tuple[MemoryRegion, ...]:
        """The pools of the further ranks, as they were registered last."""
        return tuple(rank.region for rank in self._ranks if rank.region is not None)

    # ---- the end ------------------------------------------------------------------------------------

    def cause(self, error: Exception) -> Exception:
        """Why the replica ends. A collective fails before the process it failed on is known to be dead."""
        deadline = time.monotonic() + self._timing.rank_reap_s
        while not isinstance(error, LostRankError) and time.monotonic() < deadline:
            try:
                self._check_alive(LostRankError)
            except LostRankError as lost:
                return lost
            time.sleep(0.01)
        return error

    def kill(self) -> None:
        """At once, frozen ones too."""
        for rank in self._ranks:
            rank.process.kill()

    def close(self) -> None:
        """The ranks end when they see their pipe closed."""
        for rank in self._ranks:
            rank.pipe.close()
        for rank in self._ranks:
            if rank.region is None:  # still loading, with no eye on its pipe
                end(rank.process, grace_s=1.0)
            wait_or_kill(rank.process, grace_s=5.0)
            os.close(rank.pidfd)
        self._rendezvous.cleanup()

    # ---- inside -------------------------------------------------------------------------------------

    def _call(self, message: Callable[[int], msgspec.Struct]) -> RankCall:
        """Ask every rank something. The call is known before any rank can answer it."""
        call_id = next(self._call_ids)
        call = self._calls[call_id] = RankCall(rank.name for rank in self._ranks)
        self._tell(message(call_id))
        return call

    def _tell(self, message: msgspec.Struct) -> None:
        for rank in self._ranks:
            rank.pipe.send(message)

    def _take(self, rank: RankProcess, message: FromRank | MalformedMessage) -> None:
        match message:
            case MalformedMessage(error=error, head=Head(call_id=int() as call_id)):
                self._answered(rank, RankDone(call_id=call_id, error=f"its answer is malformed: {error}"))
            case MalformedMessage():
                raise LostRankError(f"{rank.name} says what is no message: {message.error}")
            case RankReady():
                rank.region = message.region
            case RankMoved():
                rank.region = message.region
                self._answered(rank, message)
            case RankDone() | RankChecked() | RankTraced():
                self._answered(rank, message)
            case WritesEnded():
                rank.mover.take(message)
            case RankFailed():
                raise LostRankError(f"{rank.name}: {message.reason}")
            case _:
                assert_never(message)

    def _answered(self, rank: RankProcess, message: RankAnswer) -> None:
        call = self._calls[message.call_id]
        call.take(rank.name, message)
        if call.is_over:
            del self._calls[message.call_id]

    def _wait(self, call: RankCall) -> None:
        """The loop itself waits: for what takes a rank well under a millisecond."""
        deadline = time.monotonic() + self._timing.rank_call_s
        while not call.is_over:
            self._sleep(self._ranks, deadline)
            for rank in self._ranks:
                for message in rank.pipe.receive():
                    self._take(rank, message)
            self._check_alive(LostRankError)
            if time.monotonic() > deadline:
                who = ", ".join(sorted(call.awaited))
                raise LostRankError(f"{who} did not answer for {self._timing.rank_call_s:.0f} s")

    def _check_alive(self, kind: type[Exception]) -> None:
        for rank in self._ranks:
            if rank.process.poll() is not None:
                raise kind(obituary(rank.name, rank.process))

    @staticmethod
    def _sleep(ranks: Sequence[RankProcess], deadline: float) -> None:
        sources = [source for rank in ranks for source in (rank.pipe.fileno(), rank.pidfd)]
        select.select(sources, [], [], max(0.0, deadline - time.monotonic()))
