"""The loop of a scheduler's process: one for both roles.

A turn, `RoleLoop.step`:

1. What came is handled: messages of clients and peers, what ended beside the loop, forwards that are done.
2. What is due by time alone is done.
3. What can be computed next is handed to the engine, unless computing is paused.
4. What this turn has for others leaves.
5. Calls that waited for the node to be idle are answered; an idle node checks itself.

What every node is asked is answered here: pings, control calls, pauses, aborts, where a request is. All else
is the role's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeAlias, TypeVar, assert_never

import msgspec

from ..components.invariant_checker import IdleCheck
from ..components.metrics_reporter import MetricsReporter
from ..components.request_receiver import RequestReceiver, refusals
from ..engine.forward_batch import ForwardOutput
from ..engine.job import FinishedJob
from ..messages.malformed import head_of
from ..messages.memory_region import MemoryRegion
from ..messages.node import AbortRequests, CallReply, GetRequestState, NodeLoad, Ping, RequestStateReply
from ..messages.operation import ContinueGeneration, PauseGeneration
from ..messages.order import Order
from ..messages.peer import PeerIdentity
from ..messages.weights import PrepareWeights
from ..runtime.containment import PROCESS_FAULTS, Containment, nobody_waits
from ..runtime.pause_gate import PauseGate
from ..runtime.timing import Timing
from ..weights.updater import C, Prepared
from .control import ControlCall, ControlResult, JobEnd, NodeControl
from .loop_times import LoopTimes
from .status import NodeStatus

CommonCall: TypeAlias = (
    Ping | ControlCall | PauseGeneration | ContinueGeneration | AbortRequests | GetRequestState
)
M = TypeVar("M", bound=msgspec.Struct)  # what only this role is told
M_contra = TypeVar("M_contra", bound=msgspec.Struct, contravariant=True)


@dataclass(frozen=True, slots=True)
class Peers:
    """What a node's pongs say of the other side of the hand-off; a decode node alone has something to say."""

    ready: tuple[str, ...] = ()  # incarnations
    refused: Mapping[str, str] = field(default_factory=dict)  # address -> why
    quarantined_pages: Mapping[str, int] = field(default_factory=dict)  # by incarnation


@dataclass(frozen=True, slots=True)
class RequestView:
    """Where a request stands on this node, for people to look at."""

    state: str
    since_s: float
    waits_for: str
    details: Mapping[str, int]


class Role(Protocol[M_contra]):
    """What is different between a prefill and a decode node. `now`: monotonic seconds."""

    is_draining: bool  # takes nothing new: the process is to end

    def handle(self, link: bytes, message: M_contra, now: float) -> None: ...

    def give_up(self, link: bytes, message: msgspec.Struct, why: str, now: float) -> bool:
        """Handling it raised: let go of what it was about. True: who waits for an answer has one."""
        ...

    def poll(self, now: float) -> None:
        """What came from peers, and from threads other than the engine's."""
        ...

    def apply(self, output: ForwardOutput, now: float) -> None: ...

    def tick(self, now: float) -> None:
        """What is due by time alone."""
        ...

    def schedule(self, now: float) -> None:
        """Admit who waits, and hand to the engine what it can compute next."""
        ...

    def flush(self, now: float) -> None:
        """This turn's output leaves."""
        ...

    def abort(self, request_id: str | None, now: float) -> int:
        """End all of this request, or of every one where it is None; returns how many."""
        ...

    def give_back(self, now: float) -> None:
        """End everything retriably: the node is paused, others may take it."""
        ...

    def fail_open_requests(self) -> None:
        """This process ends: what is left may be tried elsewhere. It leaves at once."""
        ...

    def renew(
        self, identity: PeerIdentity, reason: str, now: float, regions: tuple[MemoryRegion, ...] | None
    ) -> None:
        """Idle, and other weights or another memory (at `regions`) from now on: what was cached is worth
        nothing, and every pair shakes hands again."""
        ...

    def may_be_held(self, until_s: float, now: float) -> None:
        """This process may be held until then: it is not to be taken for dead."""
        ...

    def move_deadlines(self, by_s: float) -> None:
        """The node stood still for so long on purpose."""
        ...

    @property
    def is_idle(self) -> bool:
        """Covers every queue. Pages in quarantine are no work: they are left out."""
        ...

    @property
    def is_drained(self) -> bool:
        """Beyond `is_idle`, no peer can write into this node's memory."""
        ...

    def next_deadline(self) -> float: ...

    def check_invariants(self) -> None:
        """Idle: raises BrokenInvariantError if anything is held that nobody has."""
        ...


class Report(Protocol):
    """What is told of a node, to routers, to metrics and to people. `now`: monotonic seconds."""

    def load(self, now: float) -> NodeLoad: ...

    def observe(self) -> None:
        """Set the gauges that only this role has."""
        ...

    def num_in_states(self) -> dict[str, int]: ...

    def find(self, request_id: str) -> RequestView | None: ...

    def peers(self) -> Peers: ...


class Computing(Protocol):
    """The engine's thread, as far as the loop reads it."""

    def poll(self) -> Sequence[ForwardOutput | FinishedJob[JobEnd]]: ...


class SideJobs(Protocol):
    """A thread of jobs, as far as the loop reads it."""

    def poll(self) -> Sequence[FinishedJob[JobEnd]]: ...


class RoleLoop(Generic[M, C]):
    """Drives a Role. Whoever runs it calls `step` whenever something came, and by `next_deadline`.

    `swap` makes prepared weights those that serve, and returns the identity to shake hands with.
    """

    def __init__(
        self,
        role: Role[M],
        report: Report,
        *,
        receiver: RequestReceiver[CommonCall | M],
        send: Callable[[bytes, msgspec.Struct], bool],
        engine: Computing,
        side_jobs: SideJobs,
        control: NodeControl[C],
        swap: Callable[[Prepared[C]], PeerIdentity],
        status: NodeStatus,
        metrics: MetricsReporter,
        loop_times: LoopTimes,
        unix_now: Callable[[], float],
        timing: Timing,
    ) -> None:
        self.role = role
        self.report = report
        self.gate = PauseGate()
        self.containment = Containment()
        self._receiver = receiver
        self._send = send
        self._engine = engine
        self._side_jobs = side_jobs
        self._control = control
        self._swap = swap
        self._status = status
        self._metrics = metrics
        self._loop_times = loop_times
        self._unix_now = unix_now
        self._timing = timing
        self._idle_check = IdleCheck()

    def step(self, now: float) -> None:
        if stood_still_s := self.gate.stood_still_s(now):
            self.role.move_deadlines(stood_still_s)
        for link, message in self._receiver.receive():
            with self._loop_times.handling(message), self._contained(link, message, now):
                self._handle(link, message, now)
        self.role.poll(now)
        for finished in self._engine.poll():
            if isinstance(finished, FinishedJob):
                self._finish_job(finished, now)
            else:
                self.role.apply(finished, now)
        for job in self._side_jobs.poll():
            self._finish_job(job, now)
            self.role.may_be_held(now, now)  # no more
        self.role.tick(now)
        if not self.gate.is_paused:
            self.role.schedule(now)
        self.role.flush(now)
        is_idle, is_drained = self.role.is_idle, self.role.is_drained
        self._reply(self._control.poll(now, idle=is_idle, is_drained=is_drained), now)
        if self._idle_check.is_due(now, idle=is_idle):
            self.role.check_invariants()

    def next_deadline(self) -> float:
        """When `step` is due although nothing happens, monotonic seconds; infinity: nothing is waited for."""
        return min(self.role.next_deadline(), self._control.deadline, self._idle_check.deadline)

    # ---- what every node is asked -------------------------------------------------------------------

    def _handle(self, link: bytes, message: CommonCall | M, now: float) -> None:
        match message:
            case Ping():
                self._send(link, self._pong(message, now))
            case Order() if message.is_over(self._unix_now()):
                text = "it came when nobody waited for it any more"
                self._send(link, CallReply(call_id=message.call_id, success=False, message=text))
            case PauseGeneration():
                self._pause(link, message, now)
            case ContinueGeneration():
                text = "continued" if self.gate.resume() else "it was not paused"
                self._answer(link, message.call_id, text)
            case AbortRequests():
                num_aborted = self.role.abort(None if message.all_requests else message.request_id, now)
                self._answer(link, message.call_id, f"{num_aborted} requests aborted")
            case GetRequestState():
                self._send(link, self._request_state(message, now))
            case _ if isinstance(message, ControlCall):
                self._call(link, message, now)
            case _:
                self.role.handle(link, message, now)

    def _call(self, link: bytes, message: ControlCall, now: float) -> None:
        if isinstance(message, PrepareWeights):
            self.role.may_be_held(now + self._timing.loading_s, now)
        self._metrics.observe_faults(
            num_contained=PROCESS_FAULTS.num_faults, num_malformed=self._receiver.num_malformed
        )
        self.report.observe()
        result = self._control.handle(
            link,
            message,
            now,
            load=self.report.load(now),
            idle=self.role.is_idle,
            requests=self.report.num_in_states(),
            pause=self.gate.mode,
        )
        self._reply(result, now)

    def _pong(self, message: Ping, now: float) -> msgspec.Struct:
        peers = self.report.peers()
        return self._status.pong(
            message.call_id,
            self.report.load(now),
            ready_peers=peers.ready,
            refused_peers=peers.refused,
            quarantined_pages=peers.quarantined_pages,
            is_draining=self.role.is_draining or not self._control.has_its_memory,
            unix_s=self._unix_now(),
        )

    def _pause(self, link: bytes, message: PauseGeneration, now: float) -> None:
        self.gate.pause(message.mode, now)
        match message.mode:
            case "abort":
                self.role.abort(None, now)
            case "retract":
                self.role.give_back(now)
            case "in_place":
                pass
            case _:
                assert_never(message.mode)
        self._answer(link, message.call_id, "paused")

    def _request_state(self, message: GetRequestState, now: float) -> RequestStateReply:
        view = self.report.find(message.request_id)
        if view is None:
            return RequestStateReply(call_id=message.call_id)
        return RequestStateReply(
            call_id=message.call_id,
            state=view.state,
            age_s=now - view.since_s,
            waits_for=view.waits_for,
            details=dict(view.details),
        )

    def _answer(self, link: bytes, call_id: int, text: str) -> None:
        self._send(link, CallReply(call_id=call_id, success=True, message=text))

    # ---- what ended ---------------------------------------------------------------------------------

    def _finish_job(self, job: FinishedJob[JobEnd], now: float) -> None:
        with self.containment.around(f"the end of {job.name!r}", nobody_waits):
            self._reply(self._control.finish_job(job), now)

    def _reply(self, result: ControlResult[C], now: float) -> None:
        if result.swap is not None:
            identity = self._swap(result.swap)
            self.role.renew(identity, f"weights are {identity.weight_version} now", now, None)
        if (announced := result.announced) is not None:  # memory comes or goes: idle too
            self.role.renew(announced.identity, "memory is released or resumed", now, announced.regions)
        for link, message in result.replies:
            self._send(link, message)

    def _contained(self, link: bytes, message: CommonCall | M, now: float) -> AbstractContextManager[None]:
        """What raises in handling it ends what it was about, and nothing else."""

        def give_up(why: str) -> None:
            if not self.role.give_up(link, message, why, now):
                for answer in refusals(head_of(message), why):
                    self._send(link, answer)

        return self.containment.around(str(message.__struct_config__.tag), give_up)
