"""A further rank of a replica: it executes what rank 0 decided, and reports. It decides nothing.

It holds its share of the weights, its heads of every page, and a transfer engine for its own pool. It ends
when its pipe does, and the kernel kills it when rank 0 is gone.
"""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import assert_never

from ..engine.batch_codec import decode_batch
from ..engine.device import create_runtime
from ..engine.dummy_weights import dummy_weights
from ..engine.engine_thread import EngineThread
from ..engine.job import FinishedJob, Job
from ..engine.job_thread import JobThread
from ..engine.kv_pool import TORCH_DTYPES, KVPool
from ..engine.model_runner import ModelRunner
from ..engine.model_weights import Weights, load_weights
from ..engine.named_weights import part_checksums
from ..engine.operators import EAGER, deterministic, survey_with_threads
from ..engine.step_profiler import StepProfiler
from ..engine.tensor_parallel import RankCollective, Shard
from ..engine.weight_file import require_memory
from ..messages.malformed import MalformedMessage, head_of
from ..messages.pipe import Pipe
from ..messages.ranks import (
    CancelRuns,
    CheckShard,
    CopyPages,
    DropShard,
    FillTensors,
    FreezeRankGc,
    KeepShard,
    LeaveRegion,
    LoadShard,
    MeetRegion,
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
    ToRank,
    UpdateShard,
    WriteEnd,
    WriteRun,
    WritesEnded,
)
from ..models.config import ModelConfig, kv_layout
from ..runtime.containment import Containment
from ..runtime.errors import BrokenInvariantError, PdserveError, StartupError
from ..runtime.logs import set_log_level
from ..runtime.process import return_free_memory
from ..runtime.waiting import Waiter
from ..transfer.backends import create_backend
from ..transfer.backends.base import TransferBackend
from ..transfer.copy_plan import Run
from ..weights.loaded import updated_weights
from .memory import RankMemory
from .whole_tensors import write_parts

_LONGEST_SLEEP_S = 10.0


def run_rank(end: socket.socket) -> int:
    """Serve rank 0 at the other end until it closes. Returns the exit code."""
    pipe: Pipe[ToRank] = Pipe(end, ToRank, "rank 0")
    waiter = Waiter()
    waiter.add(pipe.fileno())
    first: list[ToRank | MalformedMessage] = []
    while not first and not pipe.closed:
        waiter.wait(_LONGEST_SLEEP_S)
        first = pipe.receive()
    if not first:
        return 0
    start, *others = first
    assert isinstance(start, RankStart), "rank 0 begins with it"
    try:
        worker = RankWorker(start, pipe)
    except StartupError as error:
        pipe.send(RankFailed(reason=str(error)))
        pipe.close()
        return 1
    for descriptor in worker.descriptors:
        waiter.add(descriptor)
    worker.step(others)
    while not pipe.closed:
        waiter.wait(_LONGEST_SLEEP_S)
        worker.step(pipe.receive())
    worker.close()
    return 0


class RankWorker:
    """The parts of a rank, joined with the other ranks."""

    def __init__(self, start: RankStart, pipe: Pipe[ToRank]) -> None:
        """Raises StartupError when the share cannot be loaded or the pool not registered."""
        self._pipe = pipe
        self._shard = Shard(start.rank, start.size)
        self._dtype = TORCH_DTYPES[start.dtype]
        self._runtime = create_runtime(start.device)
        path = Path(start.model_path)
        # Without the EOS ids that flags of rank 0 may add: ranks sample nothing.
        self._config = ModelConfig.from_dir(path)
        layout = kv_layout(self._config, start.page_size, start.dtype).of_rank(start.size)
        self._backend: TransferBackend = create_backend(
            start.transfer_backend, start.transport, start.host, start.ib_device, start.faults
        )
        memory = self._backend.allocate(start.num_pages * layout.stride_bytes)
        self._pool = KVPool(layout, start.num_pages, self._runtime.device, memory=memory)
        self._memory = RankMemory(self._backend, self._backend.register())
        self._weights = (
            dummy_weights(self._config, self._dtype, self._runtime.device, self._shard)
            if start.load_format == "dummy"
            else self._load(path)
        )
        pipe.send(RankReady(region=self._memory.region))
        collective = RankCollective(self._shard, Path(start.rendezvous), start.join_s)
        config = self._shard.config(self._config)
        operators = EAGER
        if start.deterministic:
            operators = deterministic(survey_with_threads(config, self._weights, start.num_threads))
        self._runner = ModelRunner(
            config, self._weights, self._pool, self._runtime, operators=operators, collective=collective
        )
        self._profiler = StepProfiler(start.trace_name)
        self._engine = EngineThread[RankAnswer](self._runner, start.num_threads, profiler=self._profiler)
        self._jobs = JobThread[RankAnswer]()
        self._loaded: Weights | None = None
        self._containment = Containment()

    @property
    def descriptors(self) -> tuple[int, ...]:
        return self._engine.fileno(), self._jobs.fileno(), self._backend.fileno()

    def step(self, messages: list[ToRank | MalformedMessage]) -> None:
        for message in messages:
            if isinstance(message, MalformedMessage):
                self._refuse(message)
                continue
            kind = str(message.__struct_config__.tag)
            with self._containment.around(kind, partial(self._give_up, message)):
                self._handle(message)
        ends = tuple(
            WriteEnd(result.handle, result.state.value, result.reason) for result in self._backend.poll()
        )
        if ends:
            self._pipe.send(WritesEnded(ends=ends))
        for finished in (*self._engine.poll(), *self._jobs.poll()):
            if isinstance(finished, FinishedJob):
                self._pipe.send(finished.deliver())

    def close(self) -> None:
        self._backend.close()

    def _handle(self, message: ToRank) -> None:
        match message:
            case RunForward():
                self._engine.submit(decode_batch(message.batch))
            case WriteRun():
                run = Run(message.source, message.dest, message.num_bytes)
                self._backend.submit(message.handle, message.region, run)
            case CancelRuns():
                self._backend.cancel(message.handles)
            case MeetRegion():
                self._backend.first_contact(message.handle, message.region)
            case LeaveRegion():
                self._backend.disconnect(message.region)
            case CopyPages():
                self._pool.copy_pages(message.source, message.dest)
                self._pipe.send(RankDone(call_id=message.call_id))
            case PoisonPages():
                self._pool.poison(message.pages)
                self._pipe.send(RankDone(call_id=message.call_id))
            case LoadShard():
                self._loaded, path, weights = None, Path(message.model_path), self._weights
                self._start(message.call_id, lambda: self._load_beside(message.call_id, path, weights))
            case KeepShard():
                self._loaded = self._weights
                self._pipe.send(RankDone(call_id=message.call_id))
            case UpdateShard():
                self._loaded, weights = None, self._weights
                self._start(message.call_id, lambda: self._update_beside(message, weights))
            case CheckShard():
                weights = self._weights
                self._start(message.call_id, lambda: self._check(message.call_id, weights))
            case FillTensors():
                file, weights = Path(message.file), self._weights
                self._start(message.call_id, lambda: self._fill(message.call_id, file, weights))
            case MoveMemory():
                self._start(message.call_id, lambda: self._move(message))
            case StartRankProfile():
                job = _answering(message.call_id, lambda: self._start_profile(message))
                self._engine.submit_job(job)
            case StopRankProfile():
                job = _answering(message.call_id, lambda: self._stop_profile(message))
                self._engine.submit_job(job)
            case SetRankLogLevel():
                set_log_level(message.level)
            case FreezeRankGc():
                gc.freeze()
            case SwapShard():
                assert self._loaded is not None, "rank 0 swaps what every rank has loaded"
                self._weights, self._loaded = self._loaded, None
                self._runner.swap_weights(self._weights)
            case DropShard():
                self._loaded = None
            case RankStart():
                raise BrokenInvariantError("rank 0 starts a rank once")
            case _:
                assert_never(message)

    def _refuse(self, message: MalformedMessage) -> None:
        """What asks for an answer gets one. Without the rest this rank is not what rank 0 takes it for."""
        why = f"rank {self._shard.rank} does not understand {message.head.type!r}: {message.error}"
        if message.head.call_id is None:
            raise BrokenInvariantError(why)
        self._pipe.send(RankDone(call_id=message.head.call_id, error=why))

    def _give_up(self, message: ToRank, why: str) -> None:
        """Rank 0 hears why. Without a forward or a swap this rank is not what rank 0 takes it for."""
        match message:
            case MeetRegion() | WriteRun():
                self._pipe.send(WritesEnded(ends=(WriteEnd(message.handle, "failed", why),)))
            case RunForward() | SwapShard():
                raise BrokenInvariantError(f"this rank cannot follow rank 0: {why}")
            case _:
                if (call_id := head_of(message).call_id) is not None:
                    self._pipe.send(RankDone(call_id=call_id, error=why))

    def _start(self, call_id: int, run: Callable[[], RankAnswer]) -> None:
        self._jobs.submit(_answering(call_id, run))

    # ---- jobs of the engine's thread --------------------------------------------------------------------

    def _start_profile(self, message: StartRankProfile) -> RankDone:
        self._profiler.start(message.plan)
        return RankDone(call_id=message.call_id)

    def _stop_profile(self, message: StopRankProfile) -> RankTraced:
        traces = tuple(str(path) for path in self._profiler.stop())
        return RankTraced(call_id=message.call_id, rank=self._shard.rank, traces=traces)

    # ---- jobs: with the weights that served when rank 0 asked ------------------------------------------

    def _load_beside(self, call_id: int, path: Path, weights: Weights) -> RankDone:
        require_memory(weights)
        self._loaded = self._load(path)
        return RankDone(call_id=call_id)

    def _update_beside(self, message: UpdateShard, weights: Weights) -> RankDone:
        require_memory(weights)
        self._loaded = updated_weights(Path(message.file), weights, self._config, self._shard, message.source)
        return RankDone(call_id=message.call_id)

    def _check(self, call_id: int, weights: Weights) -> RankChecked:
        require_memory(weights)
        sums = part_checksums(weights, self._config, self._shard)
        return RankChecked(call_id=call_id, sums={name: f"{value:x}" for name, value in sums.items()})

    def _fill(self, call_id: int, file: Path, weights: Weights) -> RankDone:
        write_parts(file, weights, self._config, self._shard)
        return RankDone(call_id=call_id)

    def _move(self, message: MoveMemory) -> RankMoved:
        """Rank 0 has the results of all forwards, so nothing is read or written here any more."""
        self._weights = self._memory.move(frozenset(message.released), self._weights)
        self._runner.swap_weights(self._weights)
        return_free_memory()
        return RankMoved(call_id=message.call_id, region=self._memory.region)

    def _load(self, path: Path) -> Weights:
        try:
            return load_weights(path, self._config, self._dtype, self._runtime.device, self._shard)
        except RuntimeError as error:  # how torch reports that memory is out
            raise StartupError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error


def _answering(call_id: int, run: Callable[[], RankAnswer]) -> Job[RankAnswer, RankAnswer]:
    """A job whose failure is an answer too."""

    def finish(answer: RankAnswer | PdserveError) -> RankAnswer:
        return RankDone(call_id=call_id, error=str(answer)) if isinstance(answer, PdserveError) else answer

    return Job("rank 0's", run, finish)
