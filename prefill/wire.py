"""What the rooms of a prefill node ask of its sockets and its transfer engines, carried out and counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias, assert_never

import msgspec

from ..components.metrics_reporter import MetricsReporter
from ..messages.peer import HandoffDone, PeerPong, RoomBusy, RoomFailed
from ..messages.timeline import SpanClock, covered_s
from ..transfer.actions import CancelWrites, DisconnectPeer, MeetPeer, SendToDecode, SubmitWrite
from ..transfer.backends.base import Mover, WriteResult, WriteState
from .last_chunk import LastChunk

WireAction: TypeAlias = SendToDecode | MeetPeer | SubmitWrite | CancelWrites | DisconnectPeer


class Wire:
    """`movers`: of each rank. `last_chunk` is told what each hand-off took. `stuck_after_s`: so long a first
    contact may take."""

    def __init__(
        self,
        send: Callable[[bytes, msgspec.Struct], bool],
        movers: Sequence[Mover],
        last_chunk: LastChunk,
        metrics: MetricsReporter,
        clock: SpanClock,
        *,
        stuck_after_s: float,
    ) -> None:
        self._send = send
        self._movers = movers
        self._last_chunk = last_chunk
        self._metrics = metrics
        self._clock = clock
        self._stuck_after_s = stuck_after_s

    def act(self, action: WireAction) -> None:
        match action:
            case SendToDecode():
                self._send_to_decode(action)
            case MeetPeer():
                self._movers[action.rank].first_contact(action.handle, action.region)
            case SubmitWrite():
                self._movers[action.rank].submit(action.handle, action.region, action.run)
                self._metrics.count_run()
            case CancelWrites():
                for mover in self._movers:
                    mover.cancel(action.handles)
            case DisconnectPeer():
                self._movers[action.rank].disconnect(action.region)
            case _:
                assert_never(action)

    def results(self) -> Iterator[WriteResult]:
        """Of writes that have ended since the last call."""
        for mover in self._movers:
            for result in mover.poll():
                if result.state is WriteState.FAILED:
                    self._metrics.count_failed_write()
                yield result

    def is_stuck(self, now: float) -> bool:
        """Whether a transfer engine hangs in a call."""
        return any(mover.stuck_s(now) > self._stuck_after_s for mover in self._movers)

    def _send_to_decode(self, action: SendToDecode) -> None:
        message = action.message
        if isinstance(message, PeerPong):
            message = msgspec.structs.replace(message, unix_s=self._clock.unix_now())
        self._send(action.link, message)
        match message:
            case HandoffDone():
                wires = [span for span in message.spans if span.name == "wire"]
                busy_s = covered_s(wires, 0.0, math.inf)
                self._metrics.count_transfer(message.num_bytes, busy_s)
                self._last_chunk.measured_wire(message.num_bytes, busy_s)
                self._metrics.count_room("done")
            case RoomBusy():
                self._metrics.count_room("busy")
            case RoomFailed(code="version_skew"):
                self._metrics.count_version_refusal()
            case _:
                pass
