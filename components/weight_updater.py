"""Replaces the weights of a running node, in two phases: prepare beside the old ones, then swap.

A checkpoint that cannot be served is refused while the old weights go on; a node never holds a mix. The
coordinator (the router) prepares every node before it commits any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from ..messages.node import CallReply, CommitWeights, DiscardWeights, PrepareWeights
from ..runtime.errors import PdserveError


class Checkpoint(Protocol):
    """Loaded weights that could be served."""

    @property
    def fingerprint(self) -> str: ...


class ShardLoader(Protocol):
    """The further ranks of a node."""

    def load_shards(self, path: Path) -> None:
        """Each loads its share beside the one that serves. The node's own `load` waits for them."""

    def drop_shards(self) -> None:
        """A load failed somewhere, or what was loaded is not wanted."""


C = TypeVar("C", bound=Checkpoint)


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply, and the link of the caller that waits for it."""

    link: bytes
    reply: CallReply


@dataclass(frozen=True, slots=True)
class Prepared(Generic[C]):
    update_id: str
    model_path: str
    weight_version: str
    checkpoint: C


@dataclass(frozen=True, slots=True)
class _Loading:
    link: bytes
    message: PrepareWeights


class WeightUpdater(Generic[C]):
    """At most one update at a time; one that nobody commits can be replaced by a newer one.

    `load` reads and checks a checkpoint and raises StartupError when it cannot be served in place of the
    current one; it runs on the engine thread (`start_job`), so the loop goes on.
    """

    def __init__(
        self,
        load: Callable[[Path], C],
        start_job: Callable[[str, Callable[[], C]], None],
        ranks: ShardLoader | None = None,
    ) -> None:
        self._load = load
        self._start_job = start_job
        self._ranks = ranks
        self._loading: _Loading | None = None
        self._is_discarded = False  # the update that is loading
        self._prepared: Prepared[C] | None = None

    @property
    def is_idle(self) -> bool:
        return self._loading is None

    def prepare(self, link: bytes, message: PrepareWeights) -> Answer | None:
        """Start loading; the answer comes from `loaded` or `failed`, or now if one is loading already."""
        if self._loading is not None:
            busy = f"update {self._loading.message.update_id} is being prepared"
            return Answer(link, CallReply(call_id=message.call_id, success=False, message=busy))
        self._prepared = None
        self._loading = _Loading(link, message)
        self._is_discarded = False
        path = Path(message.model_path)
        if self._ranks is not None:
            # Before the job is queued, so that it has the same place among the forwards on every rank.
            self._ranks.load_shards(path)
        self._start_job("load weights", lambda: self._load(path))
        return None

    def loaded(self, checkpoint: C) -> Answer:
        loading = self._take_loading()
        message = loading.message
        if self._is_discarded:
            self._drop_shards()
            return self._no(loading.link, message.call_id, f"update {message.update_id} was discarded")
        self._prepared = Prepared(message.update_id, message.model_path, message.weight_version, checkpoint)
        return Answer(loading.link, CallReply(call_id=message.call_id, success=True, message="prepared"))

    def failed(self, error: PdserveError) -> Answer:
        loading = self._take_loading()
        self._drop_shards()
        reply = CallReply(call_id=loading.message.call_id, success=False, message=str(error))
        return Answer(loading.link, reply)

    def commit(self, link: bytes, message: CommitWeights, *, idle: bool) -> tuple[Answer, Prepared[C] | None]:
        """The answer, and what to swap in when it is a yes. A busy node says no and keeps the update."""
        prepared = self._prepared
        if prepared is None or prepared.update_id != message.update_id:
            return self._no(link, message.call_id, f"update {message.update_id} is not prepared here"), None
        if not idle:
            return self._no(link, message.call_id, "the node is not idle"), None
        self._prepared = None
        reply = CallReply(call_id=message.call_id, success=True, message=prepared.weight_version)
        return Answer(link, reply), prepared

    def discard(self, link: bytes, message: DiscardWeights) -> Answer:
        if self._loading is not None and self._loading.message.update_id == message.update_id:
            self._is_discarded = True  # it cannot be stopped; what it loads is dropped
        if self._prepared is not None and self._prepared.update_id == message.update_id:
            self._prepared = None
            self._drop_shards()
        return Answer(link, CallReply(call_id=message.call_id, success=True))

    def _drop_shards(self) -> None:
        if self._ranks is not None:
            self._ranks.drop_shards()

    def _take_loading(self) -> _Loading:
        if self._loading is None:
            raise RuntimeError("a checkpoint was loaded that nobody asked for")
        loading, self._loading = self._loading, None
        return loading

    @staticmethod
    def _no(link: bytes, call_id: int, why: str) -> Answer:
        return Answer(link, CallReply(call_id=call_id, success=False, message=why))
