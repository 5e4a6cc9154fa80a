"""Replaces the weights of a running node, in two phases: prepare beside the old ones, then swap.

Weights that cannot be served are refused while the old ones go on; a node never holds a mix. The coordinator
(the router) prepares every node before it commits any. Questions about the weights are answered here too.

What takes long is a job on a thread of its own; its end, on the loop, gives the answer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeAlias, TypeVar, assert_never

from ..engine.job import AnyJob, Job
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
from ..runtime.errors import PdserveError
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
class _Preparing:
    """An update that a job receives or loads, and who waits for it."""

    link: bytes
    message: PrepareWeights
    is_discarded: bool = False


@dataclass(frozen=True, slots=True)
class _Staged:
    update_id: str
    file: StagedFile


class WeightUpdater(Generic[C]):
    """At most one update at a time; one that nobody commits can be replaced by a newer one.

    Prepared weights are committed when the coordinator says so or another node is heard to serve them, and
    rolled back when neither happens and the coordinator falls silent for the lease.

    `read_gpu` and `pull` read what lies in a GPU's memory and what a peer serves, in a job. `start_job` has
    jobs done one by one. `weight_version` is that of the weights that serve.
    """

    def __init__(
        self,
        store: WeightStore[C],
        start_job: Callable[[AnyJob[AddressedReply | None]], None],
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
        self._preparing: _Preparing | None = None
        self._staged: _Staged | None = None
        self._waiting: _Waiting[C] | None = None
        self._served_update = ""  # the one that was committed last
        self._served_fingerprint = ""

    # ---- an update ----------------------------------------------------------------------------------

    def stage(self, link: bytes, message: StageWeights) -> AddressedReply:
        """Keep a part of an update. Another update's first part takes the place of what was staged."""
        if self._preparing is not None:
            return _no(link, message, f"update {self._preparing.message.update_id} is being prepared")
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
        """Start loading; the answer comes with a job, or now when it cannot begin."""
        if self._preparing is not None:
            return _no(link, message, f"update {self._preparing.message.update_id} is being prepared")
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
        self._load(_Preparing(link, message), order)
        return None

    def _receive(self, link: bytes, message: PrepareWeights, run: Callable[[], StagedFile]) -> None:
        """Its file is loaded when it is here."""
        self._drop_staged()
        self._waiting = None
        self._preparing = preparing = _Preparing(link, message)
        self._start_job(Job("receive weights", run, lambda file: self._received(preparing, file)))

    def _received(self, preparing: _Preparing, file: StagedFile | PdserveError) -> AddressedReply | None:
        if isinstance(file, PdserveError):
            return self._loaded(preparing, file)
        self._preparing = None
        message = preparing.message
        if preparing.is_discarded:
            file.close()
            return _no(preparing.link, message, f"update {message.update_id} was discarded")
        self._staged = _Staged(message.update_id, file)
        fingerprint = message.source.fingerprint if isinstance(message.source, FromPeer) else ""
        self._load(preparing, LoadTensors(file.path, _told(message.source), fingerprint))
        return None

    def _load(self, preparing: _Preparing, order: LoadOrder) -> None:
        run = self._store.load(order)
        self._preparing = preparing
        self._start_job(Job("load weights", run, lambda loaded: self._loaded(preparing, loaded)))

    def _loaded(self, preparing: _Preparing, checkpoint: C | PdserveError) -> AddressedReply:
        self._preparing = None
        link, message = preparing.link, preparing.message
        if self._staged is not None and self._staged.update_id == message.update_id:
            self._drop_staged()
        if isinstance(checkpoint, PdserveError):
            self._store.drop()
            return _no(link, message, str(checkpoint))
        if preparing.is_discarded:
            self._store.drop()
            return _no(link, message, f"update {message.update_id} was discarded")
        prepared = Prepared(message.update_id, message.weight_version, checkpoint)
        self._waiting = _Waiting(prepared, message.lease_s)
        return _yes(link, message, checkpoint.fingerprint)

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
    def deadline(self) -> float:
        """When `poll` has something to do by time alone; infinity: never."""
        waiting = self._waiting
        if waiting is None or waiting.is_committed or waiting.lease_until is None:
            return math.inf
        return waiting.lease_until

    def discard(self, link: bytes, message: DiscardWeights) -> AddressedReply:
        if self._preparing is not None and self._preparing.message.update_id == message.update_id:
            self._preparing.is_discarded = True  # it cannot be stopped; what it loads is dropped
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
        """The answer comes with a job: every bit is read."""
        version = self._weight_version()
        run = self._store.check()
        self._start_job(Job("check weights", run, lambda sums: _checked(link, message, version, sums)))

    def get(self, link: bytes, message: GetWeights) -> None:
        """The answer comes with a job."""
        run = self._store.head(message.name, message.truncate_size)
        self._start_job(Job("read weights", run, lambda head: _shown(link, message, head)))

    def save(self, link: bytes, message: SaveWeights) -> None:
        """The answer comes with a job: every bit is written."""
        run = self._store.save(
            message.target, is_remote=message.is_remote, max_shard_bytes=message.max_shard_bytes
        )
        self._start_job(Job("save weights", run, lambda error: _done(link, message, error)))

    # ---- groups that trainers send over -------------------------------------------------------------

    def join(self, link: bytes, message: JoinUpdateGroup) -> None:
        """The answer comes with a job, when every rank has joined or has not in time."""
        run = partial(self._groups.join, message)
        self._start_job(Job("join update group", run, lambda error: _done(link, message, error)))

    def leave(self, link: bytes, message: LeaveUpdateGroup) -> None:
        """The answer comes with a job."""
        run = partial(self._groups.leave, message.group_name)
        self._start_job(Job("leave update group", run, lambda error: _done(link, message, error)))

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


def _done(link: bytes, message: _Call, error: PdserveError | None) -> AddressedReply:
    return _yes(link, message) if error is None else _no(link, message, str(error))


def _checked(link: bytes, message: CheckWeights, version: str, sums: Sums | PdserveError) -> AddressedReply:
    """`version`: of the weights whose sums they are."""
    if isinstance(sums, PdserveError):
        reply = WeightChecksReply(call_id=message.call_id, success=False, message=str(sums))
    else:
        reply = WeightChecksReply(
            call_id=message.call_id,
            success=True,
            weight_version=version,
            tensors=sums.tensors,
            whole=sums.whole,
        )
    return AddressedReply(link, reply)


def _shown(link: bytes, message: GetWeights, head: TensorHead | PdserveError) -> AddressedReply:
    if isinstance(head, PdserveError):
        reply = WeightsReply(call_id=message.call_id, success=False, message=str(head))
    else:
        reply = WeightsReply(
            call_id=message.call_id, success=True, dtype=head.dtype, shape=head.shape, values=head.values
        )
    return AddressedReply(link, reply)
