"""Replaces the weights of a running node, in two phases: prepare beside the old ones, then swap.

Weights that cannot be served are refused while the old ones go on; a node never holds a mix. The coordinator
(the router) prepares every node before it commits any. Questions about the weights are answered here too.

What takes long is a job on a thread of its own; `finish` takes its result, on the loop.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, assert_never

from ..messages.node import CallReply
from ..messages.weights import (
    CheckWeights,
    CommitWeights,
    DiscardWeights,
    FromDisk,
    FromGpuMemory,
    FromGroup,
    FromPeer,
    FromServed,
    FromSharedMemory,
    FromTensors,
    GetWeights,
    JoinUpdateGroup,
    KeepWeights,
    LeaveUpdateGroup,
    PrepareWeights,
    SaveWeights,
    StageWeights,
    WeightChecksReply,
    WeightSource,
    WeightsReply,
)
from ..runtime.errors import BrokenInvariantError, PdserveError
from .staged import StagedFile
from .update_groups import UpdateGroups


class LoadedWeights(Protocol):
    """What an update has made ready to be served."""

    @property
    def fingerprint(self) -> str: ...


_log = logging.getLogger(__name__)
SHARED_MEMORY = Path("/dev/shm")
C = TypeVar("C", bound=LoadedWeights)
C_co = TypeVar("C_co", bound=LoadedWeights, covariant=True)


@dataclass(frozen=True, slots=True)
class LoadFolder:
    """A checkpoint in place of the weights that serve."""

    path: Path


@dataclass(frozen=True, slots=True)
class LoadTensors:
    """The tensors of a safetensors file in place of those that serve."""

    file: Path
    source: str  # where they came from, for a person
    fingerprint: str = ""  # of them, where it does not follow from the file


@dataclass(frozen=True, slots=True)
class LoadServed:
    """Nothing: those that serve go on, under another version."""


LoadOrder: TypeAlias = LoadFolder | LoadTensors | LoadServed


@dataclass(frozen=True, slots=True)
class Sums:
    """Checksums, 16 hex digits each."""

    tensors: dict[str, str]  # by name
    whole: str


@dataclass(frozen=True, slots=True)
class TensorHead:
    """The first rows of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    values: list[float | list[float]]


class WeightStore(Protocol[C_co]):
    """The weights of a node, on all its ranks. Methods are called on the loop. The jobs that they return run
    later, on the jobs' thread, each once and in order; they raise StartupError that says why they cannot."""

    def load(self, order: LoadOrder) -> Callable[[], C_co]:
        """Further ranks begin at once; the job waits for them."""

    def drop(self) -> None:
        """A load failed somewhere, or what was loaded is not wanted."""

    def check(self) -> Callable[[], Sums]:
        """Of the weights that serve now. Further ranks begin at once; the job waits for them."""

    def head(self, name: str, num_rows: int) -> Callable[[], TensorHead]:
        """Of the weights that serve now."""

    def save(self, target: str, *, is_remote: bool, max_shard_bytes: int) -> Callable[[], None]:
        """As a checkpoint, those that serve now: into a new folder, or to a URL."""


Reply: TypeAlias = CallReply | WeightsReply | WeightChecksReply


@dataclass(frozen=True, slots=True)
class AddressedReply:
    """A reply, and the link of the caller that waits for it."""

    link: bytes
    reply: Reply


@dataclass(frozen=True, slots=True)
class Prepared(Generic[C]):
    update_id: str
    weight_version: str
    checkpoint: C


@dataclass(slots=True)
class _Waiting(Generic[C]):
    """Prepared weights that no commit has been done of."""

    prepared: Prepared[C]
    lease_s: float
    lease_until: float | None = None  # None: from the next turn of the loop on
    is_committed: bool = False  # decided on: no lease ends it


@dataclass(slots=True)
class _Job:
    """On the jobs' thread, and who waits for it."""

    link: bytes
    message: PrepareWeights | GetWeights | CheckWeights | SaveWeights | JoinUpdateGroup | LeaveUpdateGroup
    weight_version: str = ""  # that a check is of
    is_received: bool = True  # what is to be prepared: from a trainer or a peer, else it was here
    is_discarded: bool = False


@dataclass(frozen=True, slots=True)
class _Staged:
    update_id: str
    file: StagedFile


class WeightUpdater(Generic[C]):
    """At most one update at a time; one that nobody commits can be replaced by a newer one.

    Prepared weights are committed when the coordinator says so or another node is heard to serve them, and
    rolled back when neither happens and the coordinator falls silent for the lease.

    `read_gpu` and `pull` read what lies in a GPU's memory and what a peer serves, in a job. `start_job(name,
    run)` runs jobs one by one. `weight_version` is that of the weights that serve.
    """

    def __init__(
        self,
        store: WeightStore[C],
        start_job: Callable[[str, Callable[[], Any]], None],
        weight_version: Callable[[], str],
        available_bytes: Callable[[], int],
        groups: UpdateGroups,
        read_gpu: Callable[[FromGpuMemory], StagedFile],
        pull: Callable[[FromPeer], StagedFile],
    ) -> None:
        self._store = store
        self._start_job = start_job
        self._weight_version = weight_version
        self._available_bytes = available_bytes
        self._groups = groups
        self._read_gpu = read_gpu
        self._pull = pull
        self._jobs: deque[_Job] = deque()  # in order
        self._staged: _Staged | None = None
        self._waiting: _Waiting[C] | None = None
        self._served_update = ""  # the one that was committed last
        self._served_fingerprint = ""

    # ---- an update ----------------------------------------------------------------------------------

    def stage(self, link: bytes, message: StageWeights) -> AddressedReply:
        """Keep a part of an update. Another update's first part takes the place of what was staged."""
        if self._loading is not None:
            return _no(link, message, f"update {self._loading.update_id} is being prepared")
        if self._staged is not None and self._staged.update_id != message.update_id:
            self._drop_staged()
        staged = self._staged or _Staged(message.update_id, StagedFile())
        self._staged = staged
        if message.offset != staged.file.num_bytes:
            return _no(link, message, f"byte {message.offset} came where {staged.file.num_bytes} was next")
        # Prepared weights are held beside the staged file.
        if (left := self._available_bytes()) < 2 * len(message.data):
            self._drop_staged()
            return _no(link, message, f"the update does not fit: this host has {left >> 20} MiB left")
        staged.file.append(message.data)
        return _yes(link, message)

    def prepare(self, link: bytes, message: PrepareWeights) -> AddressedReply | None:
        """Start loading; the answer comes from `finish`, or now when it cannot begin."""
        if self._loading is not None:
            return _no(link, message, f"update {self._loading.update_id} is being prepared")
        if message.update_id == self._served_update:  # who asks has not heard of it yet
            return _yes(link, message, self._served_fingerprint)
        if self._waiting is not None and self._waiting.prepared.update_id == message.update_id:
            return _yes(link, message, self._waiting.prepared.checkpoint.fingerprint)
        if self._waiting is not None and self._waiting.is_committed:
            return _no(link, message, f"update {self._waiting.prepared.update_id} is decided and comes first")
        match message.source:
            case FromDisk(model_path=path):
                order: LoadOrder = LoadFolder(Path(path))
            case FromTensors(num_bytes=num_bytes):
                if self._staged is None or self._staged.update_id != message.update_id:
                    return _no(link, message, f"nothing is staged for update {message.update_id}")
                if self._staged.file.num_bytes != num_bytes:
                    there = self._staged.file.num_bytes
                    return _no(link, message, f"{there} of {num_bytes} bytes of the update were staged")
                order = LoadTensors(self._staged.file.path, _told(message.source))
            case FromSharedMemory(name=name):
                file = SHARED_MEMORY / name
                if not file.is_file():
                    return _no(link, message, f"there is no file {file} on this node's host")
                order = LoadTensors(file, _told(message.source))
            case FromServed():
                order = LoadServed()
            case FromGroup() as group:
                self._receive(link, message, lambda: self._groups.receive(group))
                return None
            case FromGpuMemory() as memory:
                self._receive(link, message, lambda: self._read_gpu(memory))
                return None
            case FromPeer() as peer:
                self._receive(link, message, lambda: self._pull(peer))
                return None
            case _:
                assert_never(message.source)
        self._waiting = None
        self._submit("load weights", _Job(link, message), self._store.load(order))
        return None

    def _receive(self, link: bytes, message: PrepareWeights, run: Callable[[], StagedFile]) -> None:
        """Its file is loaded when it is here."""
        self._drop_staged()
        self._waiting = None
        self._submit("receive weights", _Job(link, message, is_received=False), run)

    def keep(self, message: KeepWeights, now: float) -> None:
        waiting = self._waiting
        if waiting is not None and waiting.prepared.update_id == message.update_id:
            waiting.lease_until = now + message.lease_s

    def commit(
        self, link: bytes, message: CommitWeights, *, idle: bool
    ) -> tuple[AddressedReply, Prepared[C] | None]:
        """The answer, and for a yes what to swap in. A busy node says no, and swaps once it is idle."""
        if message.update_id == self._served_update:
            return _yes(link, message, self._weight_version()), None
        waiting = self._waiting
        if waiting is None or waiting.prepared.update_id != message.update_id:
            why = f"update {message.update_id} is not prepared here"
            reply = CallReply(call_id=message.call_id, success=False, message=why, code="not_prepared")
            return AddressedReply(link, reply), None
        waiting.is_committed = True
        if not idle:
            return _no(link, message, "the node is not idle"), None
        return _yes(link, message, waiting.prepared.weight_version), self._take_waiting(waiting)

    def heard(self, update_ids: Collection[str]) -> None:
        """Updates that other nodes are seen to serve."""
        if self._waiting is not None and self._waiting.prepared.update_id in update_ids:
            self._waiting.is_committed = True

    def poll(self, now: float, *, idle: bool) -> Prepared[C] | None:
        """What to swap in now; also rolls back what nobody keeps any more."""
        waiting = self._waiting
        if waiting is None:
            return None
        if waiting.is_committed:
            return self._take_waiting(waiting) if idle else None
        if waiting.lease_until is None:
            waiting.lease_until = now + waiting.lease_s
        elif now >= waiting.lease_until:
            _log.warning("update %s is rolled back: nobody committed it", waiting.prepared.update_id)
            self._waiting = None
            self._store.drop()
        return None

    @property
    def awaits_swap(self) -> bool:
        return self._waiting is not None and self._waiting.is_committed

    @property
    def deadline(self) -> float | None:
        """When `poll` has something to do by time alone."""
        return None if self._waiting is None or self._waiting.is_committed else self._waiting.lease_until

    def discard(self, link: bytes, message: DiscardWeights) -> AddressedReply:
        for job in self._jobs:
            if isinstance(job.message, PrepareWeights) and job.message.update_id == message.update_id:
                job.is_discarded = True  # it cannot be stopped; what it loads is dropped
                return _yes(link, message)
        if self._waiting is not None and self._waiting.prepared.update_id == message.update_id:
            self._waiting = None
            self._store.drop()
        if self._staged is not None and self._staged.update_id == message.update_id:
            self._drop_staged()
        return _yes(link, message)

    def _take_waiting(self, waiting: _Waiting[C]) -> Prepared[C]:
        self._waiting = None
        self._served_update = waiting.prepared.update_id
        self._served_fingerprint = waiting.prepared.checkpoint.fingerprint
        return waiting.prepared

    # ---- questions ----------------------------------------------------------------------------------

    def check(self, link: bytes, message: CheckWeights) -> None:
        """The answer comes from `finish`: every bit is read."""
        job = _Job(link, message, self._weight_version())
        self._submit("check weights", job, self._store.check())

    def get(self, link: bytes, message: GetWeights) -> None:
        """The answer comes from `finish`."""
        job = self._store.head(message.name, message.truncate_size)
        self._submit("read weights", _Job(link, message), job)

    def save(self, link: bytes, message: SaveWeights) -> None:
        """The answer comes from `finish`: every bit is written."""
        job = self._store.save(
            message.target, is_remote=message.is_remote, max_shard_bytes=message.max_shard_bytes
        )
        self._submit("save weights", _Job(link, message), job)

    # ---- groups that trainers send over -------------------------------------------------------------

    def join(self, link: bytes, message: JoinUpdateGroup) -> None:
        """The answer comes from `finish`, when every rank has joined or has not in time."""
        self._submit("join update group", _Job(link, message), lambda: self._groups.join(message))

    def leave(self, link: bytes, message: LeaveUpdateGroup) -> None:
        """The answer comes from `finish`."""
        self._submit(
            "leave update group", _Job(link, message), lambda: self._groups.leave(message.group_name)
        )

    # ---- jobs ---------------------------------------------------------------------------------------

    def finish(self, value: Any, error: PdserveError | None) -> AddressedReply | None:  # noqa: ANN401
        """The oldest job is done: it returned `value`, or raised `error`. None: another one follows it."""
        if not self._jobs:
            raise BrokenInvariantError("a job is done that nobody asked for")
        job = self._jobs.popleft()
        match job.message:
            case PrepareWeights():
                if not job.is_received and error is None:
                    return self._received(job, job.message, value)
                return self._loaded(job, job.message, value, error)
            case JoinUpdateGroup() | LeaveUpdateGroup() | SaveWeights():
                if error is not None:
                    return _no(job.link, job.message, str(error))
                return _yes(job.link, job.message)
            case CheckWeights(call_id=call_id):
                if error is not None:
                    return AddressedReply(
                        job.link, WeightChecksReply(call_id=call_id, success=False, message=str(error))
                    )
                sums: Sums = value
                return AddressedReply(
                    job.link,
                    WeightChecksReply(
                        call_id=call_id,
                        success=True,
                        weight_version=job.weight_version,
                        tensors=sums.tensors,
                        whole=sums.whole,
                    ),
                )
            case GetWeights(call_id=call_id):
                if error is not None:
                    return AddressedReply(
                        job.link, WeightsReply(call_id=call_id, success=False, message=str(error))
                    )
                head: TensorHead = value
                return AddressedReply(
                    job.link,
                    WeightsReply(
                        call_id=call_id,
                        success=True,
                        dtype=head.dtype,
                        shape=head.shape,
                        values=head.values,
                    ),
                )
            case _:
                assert_never(job.message)

    def _received(self, job: _Job, message: PrepareWeights, file: StagedFile) -> AddressedReply | None:
        if job.is_discarded:
            file.close()
            return _no(job.link, message, f"update {message.update_id} was discarded")
        self._staged = _Staged(message.update_id, file)
        job.is_received = True
        fingerprint = message.source.fingerprint if isinstance(message.source, FromPeer) else ""
        order = LoadTensors(file.path, _told(message.source), fingerprint)
        self._submit("load weights", job, self._store.load(order))
        return None

    def _loaded(
        self, job: _Job, message: PrepareWeights, checkpoint: C, error: PdserveError | None
    ) -> AddressedReply:
        if self._staged is not None and self._staged.update_id == message.update_id:
            self._drop_staged()
        if error is not None:
            self._store.drop()
            return _no(job.link, message, str(error))
        if job.is_discarded:
            self._store.drop()
            return _no(job.link, message, f"update {message.update_id} was discarded")
        prepared = Prepared(message.update_id, message.weight_version, checkpoint)
        self._waiting = _Waiting(prepared, message.lease_s)
        return _yes(job.link, message, checkpoint.fingerprint)

    @property
    def _loading(self) -> PrepareWeights | None:
        for job in self._jobs:
            if isinstance(job.message, PrepareWeights):
                return job.message
        return None

    def _submit(self, name: str, job: _Job, run: Callable[[], Any]) -> None:
        self._jobs.append(job)
        self._start_job(name, run)

    def _drop_staged(self) -> None:
        if self._staged is not None:
            self._staged.file.close()
            self._staged = None


_Call: TypeAlias = (
    StageWeights
    | PrepareWeights
    | CommitWeights
    | DiscardWeights
    | JoinUpdateGroup
    | LeaveUpdateGroup
    | SaveWeights
)


def _told(source: WeightSource) -> str:
    """For a person."""
    match source:
        case FromDisk(model_path=path):
            return path
        case FromTensors():
            return "an update that was sent as tensors"
        case FromGroup(group_name=name):
            return f"an update over the group {name!r}"
        case FromSharedMemory(name=name):
            return f"an update from {SHARED_MEMORY / name}"
        case FromGpuMemory(device_uuid=device):
            return f"an update from memory of GPU {device}"
        case FromPeer(zmq_address=address):
            return f"the weights of {address}"
        case FromServed():
            return "the weights that serve"
        case _:
            assert_never(source)


def _yes(link: bytes, message: _Call, text: str = "") -> AddressedReply:
    return AddressedReply(link, CallReply(call_id=message.call_id, success=True, message=text))


def _no(link: bytes, message: _Call, why: str) -> AddressedReply:
    return AddressedReply(link, CallReply(call_id=message.call_id, success=False, message=why))
