"""Answers the control calls that prefill and decode nodes have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, assert_never

import msgspec

from ..components.flush_wrapper import FlushDecision, FlushNow, FlushRefused, FlushWrapper
from ..components.metrics_reporter import MetricsReporter
from ..engine.job import FinishedJob
from ..messages.node import (
    ControlMessage,
    FlushCache,
    GetMetrics,
    GetServerInfo,
    MetricsReply,
    NodeLoad,
)
from ..messages.weights import (
    CheckWeights,
    CommitWeights,
    DiscardWeights,
    GetWeights,
    JoinUpdateGroup,
    KeepWeights,
    LeaveUpdateGroup,
    MeetInbox,
    OfferInbox,
    OpenWeights,
    PrepareWeights,
    ReadWeights,
    ReleaseMemory,
    ResumeMemory,
    SaveWeights,
    StageWeights,
    WriteWeights,
)
from ..weights.images import WeightImage, WeightImages
from ..weights.outbox import WeightOutbox
from ..weights.updater import AddressedReply, C, Prepared, WeightUpdater
from .memory_occupation import Announced, Done, MemoryOccupation
from .operations import NodeOperations, OperationReply, ToNodeOperations
from .status import NodeStatus

ControlCall: TypeAlias = ControlMessage | ToNodeOperations
JobEnd: TypeAlias = AddressedReply | OperationReply | Done | None  # what an owner makes of its job's outcome


@dataclass(slots=True)
class ControlResult(Generic[C]):
    """Replies to send, the weights to swap in now, and who the node is now where that has changed."""

    replies: list[tuple[bytes, msgspec.Struct]] = field(default_factory=list)
    swap: Prepared[C] | None = None
    announced: Announced | None = None


class NodeControl(Generic[C]):
    """`drop_cache` empties the prefix cache and says whether it could."""

    def __init__(
        self,
        *,
        status: NodeStatus,
        flush: FlushWrapper,
        weights: WeightUpdater[C],
        images: WeightImages,
        outbox: WeightOutbox,
        memory: MemoryOccupation,
        operations: NodeOperations,
        metrics: MetricsReporter,
        drop_cache: Callable[[], bool],
    ) -> None:
        self._status = status
        self._flush = flush
        self._weights = weights
        self._images = images
        self._outbox = outbox
        self._memory = memory
        self._operations = operations
        self._metrics = metrics
        self._drop_cache = drop_cache

    def handle(
        self,
        link: bytes,
        message: ControlCall,
        now: float,
        *,
        load: NodeLoad,
        idle: bool,
        requests: Mapping[str, int],
        pause: str,
    ) -> ControlResult[C]:
        """`idle`: nothing runs, waits or is being handed off here (quarantine left out). `requests`: how many
        are in each state. `pause`: its mode; empty: it computes."""
        result: ControlResult[C] = ControlResult()
        match message:
            case FlushCache():
                self._decide(self._flush.handle(message, link, now, idle), result)
            case StageWeights():
                self._answer(self._weights.stage(link, message), result)
            case GetWeights():
                self._weights.get(link, message)
            case JoinUpdateGroup():
                self._weights.join(link, message)
            case LeaveUpdateGroup():
                self._weights.leave(link, message)
            case ReleaseMemory():
                self._images.drop()
                self._take(self._memory.release(link, message, now), result)
            case ResumeMemory():
                self._take(self._memory.resume(link, message), result)
            case CheckWeights():
                self._weights.check(link, message)
            case OpenWeights():
                if (opened := self._images.open(link, message)) is not None:
                    result.replies.append((link, opened))
            case ReadWeights():
                result.replies.append((link, self._images.read(message)))
            case OfferInbox() | MeetInbox():
                self._outbox.ask(link, message)
            case WriteWeights():
                lent = self._images.lend(message)
                if isinstance(lent, WeightImage):
                    self._outbox.write(link, message, lent)
                else:
                    result.replies.append((link, lent))
            case SaveWeights():
                self._weights.save(link, message)
            case PrepareWeights():
                self._answer(self._weights.prepare(link, message), result)
            case KeepWeights():
                self._weights.keep(message, now)
            case CommitWeights():
                answer, result.swap = self._weights.commit(link, message, idle=idle)
                self._answer(answer, result)
            case DiscardWeights():
                self._answer(self._weights.discard(link, message), result)
            case GetServerInfo():
                result.replies.append((link, self._status.server_info(message.call_id, load)))
            case GetMetrics():
                self._metrics.observe_load(load)
                reply = MetricsReply(call_id=message.call_id, text=self._metrics.render())
                result.replies.append((link, reply))
            case _ if isinstance(message, ToNodeOperations):
                self._answer(self._operations.handle(link, message, requests=requests, pause=pause), result)
            case _:
                assert_never(message)
        return result

    def finish_job(self, job: FinishedJob[JobEnd]) -> ControlResult[C]:
        """Something that a call had done beside the loop is done."""
        result: ControlResult[C] = ControlResult()
        end = job.deliver()
        if isinstance(end, Done):
            self._take(end, result)
        else:
            self._answer(end, result)
        return result

    def poll(self, now: float, *, idle: bool, is_drained: bool) -> ControlResult[C]:
        """What has become due: a flush or new weights that waited for the node to be idle, or a deadline.

        `is_drained`: beyond `idle`, no page is in quarantine, so no peer can write.
        """
        result: ControlResult[C] = ControlResult()
        self._decide(self._flush.poll(now, idle), result)
        result.swap = self._weights.poll(now, idle=idle)
        result.replies += self._images.poll(now)
        result.replies += self._outbox.poll()
        self._take(self._memory.poll(now, idle=idle and is_drained), result)
        return result

    def heard(self, update_ids: Collection[str]) -> None:
        """What other nodes serve: an update that one of them has committed is committed."""
        self._weights.heard(update_ids)

    @property
    def awaits_swap(self) -> bool:
        """New weights are decided on."""
        return self._weights.awaits_swap

    @property
    def takes_work(self) -> bool:
        """Not while new weights are decided on or memory is wanted back: new work would keep this node from
        being idle."""
        return not self.awaits_swap and self._memory.takes_work

    @property
    def has_its_memory(self) -> bool:
        return not self._memory.is_released

    @property
    def deadline(self) -> float:
        """When `poll` has something to do by time alone; infinity: never."""
        return min(self._flush.deadline, self._weights.deadline, self._images.deadline, self._memory.deadline)

    def _decide(self, decision: FlushDecision | None, result: ControlResult[C]) -> None:
        match decision:
            case FlushNow():
                result.replies.append((decision.client, decision.reply(flushed=self._drop_cache())))
            case FlushRefused():
                result.replies.append((decision.client, decision.reply))
            case None:
                pass
            case _:
                assert_never(decision)

    @staticmethod
    def _take(done: Done, result: ControlResult[C]) -> None:
        if done.link is not None and done.reply is not None:
            result.replies.append((done.link, done.reply))
        result.announced = done.announced or result.announced

    @staticmethod
    def _answer(answer: AddressedReply | OperationReply | None, result: ControlResult[C]) -> None:
        if answer is not None:
            result.replies.append((answer.link, answer.reply))
