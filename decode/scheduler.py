"""What a decode node does, turn by turn of the loop in `node/loop.py`.

Life cycle of a request here; one stage has it, and owns all that it holds:

1. **Waiting** (`waiting.py`): a GenerateRequest arrived. It waits for a place in the batch and for pages.
   When it is admitted, what the prefix cache holds of its prompt is locked, the rest of the prompt is
   reserved at once, and the growth that is expected of its output is counted.
2. **Handoff** (`handoffs.py`): the missing pages are exposed to the prefill node that the router chose. The
   first token arrives and is streamed while the last pages are still in flight; if it ends the request, it
   ends here. (**Local prefill** instead, in `running.py`, where that is cheaper, on a colocated node, and
   when no prefill node is alive: the chunks ride along in the decode batch, short ones while others decode.)
3. **Running** (`running.py`): all pages are in place. The prompt's join the prefix cache and choices fork:
   whole pages are shared, the partial one is copied. Each step samples one token of every choice. When there
   are too few pages for all to grow, the youngest is **retracted**: its attempt fails retriably, its pages
   stay cached.
4. Gone: finished, cancelled or failed. Its whole pages stay in the prefix cache until others need them; those
   that a peer may still write are quarantined.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TypeAlias, assert_never

import msgspec

from ..components.output_streamer import StreamKey
from ..engine.forward_batch import ForwardOutput
from ..messages.memory_region import MemoryRegion
from ..messages.node import (
    AssertPeerDeath,
    CallReply,
    CancelRequest,
    GenerateRequest,
    ResendFrom,
    Roster,
)
from ..messages.operation import CloseSession
from ..messages.peer import PeerIdentity
from ..node.control import NodeControl
from ..node.status import NodeStatus
from ..runtime.timing import Timing
from ..weights.loaded import LoadedModel
from .handoffs import Handoffs
from .local_prefill import LocalPrefillPolicy
from .outputs import Outputs
from .request_pages import RequestPages
from .rosters import Rosters
from .running import Running
from .sequence import DecodeRequest
from .session_pins import SessionPins
from .stage import Stage
from .waiting import Waiting

DecodeMessage: TypeAlias = (  # what a decode node alone is told, or answers in its own way
    GenerateRequest | CancelRequest | ResendFrom | AssertPeerDeath | Roster | CloseSession
)

_DEADLINE_CHECK_S = 0.25


class DecodeScheduler:
    """A `Role`. Moves requests from stage to stage."""

    def __init__(
        self,
        *,
        waiting: Waiting,
        handoffs: Handoffs,
        running: Running,
        outputs: Outputs,
        pages: RequestPages,
        pins: SessionPins,
        local_prefill: LocalPrefillPolicy,
        control: NodeControl[LoadedModel],
        status: NodeStatus,
        send: Callable[[bytes, msgspec.Struct], bool],
        timing: Timing,
    ) -> None:
        self.is_draining = False
        self._waiting = waiting
        self._handoffs = handoffs
        self._running = running
        self._outputs = outputs
        self._pages = pages
        self._pins = pins
        self._local_prefill = local_prefill
        self._control = control
        self._status = status
        self._send = send
        self._stages: tuple[Stage, ...] = (waiting, handoffs, running)
        self._rosters = Rosters(timing.roster_life_s)
        self._next_deadline_check = 0.0

    # ---- the turn -----------------------------------------------------------------------------------

    def handle(self, link: bytes, message: DecodeMessage, now: float) -> None:
        match message:
            case GenerateRequest():
                self._accept(link, message, now)
            case CancelRequest():
                key = StreamKey(link, message.request_id, message.attempt)
                if message.aborts:
                    self._abort(lambda request: request.key == key, now)
                else:
                    self._cancel(key, message.choices, now)
            case ResendFrom():
                key = StreamKey(link, message.request_id, message.attempt)
                if not self._outputs.resend(key, message.choice, message.position):
                    why = "this output is not on record any more"
                    self._outputs.refuse(link, message, "peer_lost", why)
            case AssertPeerDeath():
                success, text = self._handoffs.assert_death(message.incarnation, now)
                self._send(link, CallReply(call_id=message.call_id, success=success, message=text))
            case Roster():
                self._control.heard({node.update_id for node in message.nodes})
                named = self._rosters.heard(message, now)
                if not self._status.entry.colocated:
                    self._handoffs.set_peers(named, now)
            case CloseSession():
                held = "its pages are let go" if self._pins.close(message.session_id) else "it held no pages"
                self._send(link, CallReply(call_id=message.call_id, success=True, message=held))
            case _:
                assert_never(message)

    def give_up(self, link: bytes, message: msgspec.Struct, why: str, now: float) -> bool:
        del why
        if isinstance(message, GenerateRequest):
            self._cancel(StreamKey(link, message.request_id, message.attempt), (), now)
        return False

    def poll(self, now: float) -> None:
        for request in self._handoffs.poll(now):
            self._running.decode(request, now)

    def apply(self, output: ForwardOutput, now: float) -> None:
        self._running.apply(output, now)

    def tick(self, now: float) -> None:
        self._handoffs.tick(now)
        self._expire(now)
        self._pins.poll(now)

    def schedule(self, now: float) -> None:
        self._admit(now)
        self._running.launch(lambda: self._handoffs.pages_come_back)

    def flush(self, now: float) -> None:
        self._outputs.flush(now)
        for key in self._outputs.keys_of_gone_clients():
            self._cancel(key, (), now)

    # ---- from stage to stage ------------------------------------------------------------------------

    def _accept(self, link: bytes, message: GenerateRequest, now: float) -> None:
        # The router names none where it knows of none that is alive, and to a colocated node.
        incarnation = message.prefill_incarnation
        has_prefill = not incarnation or self._handoffs.is_ready(incarnation)
        self._waiting.accept(link, message, now, has_prefill=has_prefill, is_draining=self.is_draining)
        if message.session_id and StreamKey(link, message.request_id, message.attempt) in self._waiting:
            self._pins.touch(message.session_id)

    def _admit(self, now: float) -> None:
        awaited: set[str] = set()  # prefill nodes that an old request waits for: younger ones let it pass
        stranded = self._handoffs.num_stranded_pages if self._waiting else 0
        admissible = self._waiting.admissible(
            (self._handoffs, self._running), num_stranded_pages=stranded, now=now
        )
        for request in admissible:
            incarnation = request.message.prefill_incarnation
            if self._is_local(request):
                self._waiting.remove(request)
                self._running.prefill(request, now)
            elif incarnation in awaited:
                continue
            elif not self._handoffs.is_ready(incarnation):
                why = "the prefill node is not connected any more"
                self._waiting.fail(request, "not_ready", why, now, retriable=True)
            elif self._handoffs.may_start(request):
                self._waiting.remove(request)
                self._handoffs.start(request, now)
            elif self._waiting.is_old(request, now):
                awaited.add(incarnation)

    def _is_local(self, request: DecodeRequest) -> bool:
        """Whether this node computes the prompt itself."""
        if not request.message.prefill_incarnation:
            return True
        num_tokens = request.work.num_tokens
        return self._local_prefill.is_local(
            num_tokens=num_tokens,
            num_cached=self._pages.match(request).num_tokens,
            num_ahead_on_prefill=request.message.num_prefill_tokens_ahead or num_tokens,
            num_running=self._running.num_decoding,
        )

    def _expire(self, now: float) -> None:
        """Rooms have their own deadlines; who waits or runs is looked at here."""
        if now < self._next_deadline_check:
            return
        self._next_deadline_check = now + _DEADLINE_CHECK_S
        for stage in (self._waiting, self._running):
            for request in [request for request in stage if now >= request.deadline_s]:
                why = f"over its deadline while {stage.state_of(request)}"
                stage.fail(request, "deadline", why, now, retriable=False)

    def _cancel(self, key: StreamKey, choices: tuple[int, ...], now: float) -> None:
        """The client wants no more of these choices (of all, when none is named)."""
        for stage in self._stages:
            if key in stage:
                stage.cancel(key, choices, now)
                return
        self._outputs.forget(key, choices)

    def _abort(self, is_meant: Callable[[DecodeRequest], bool], now: float) -> int:
        """Returns how many."""
        num_before = self._num_requests
        for stage in self._stages:
            for request in list(filter(is_meant, stage)):
                stage.abort(request, now)
        return num_before - self._num_requests

    @property
    def _num_requests(self) -> int:
        return sum(map(len, self._stages))

    # ---- what every role can do, see Role -----------------------------------------------------------

    def abort(self, request_id: str | None, now: float) -> int:
        return self._abort(lambda each: request_id in (None, each.key.request_id), now)

    def give_back(self, now: float) -> None:
        for stage in self._stages:
            for request in list(stage):
                stage.fail(request, "paused", "the decode node is paused", now, retriable=True)

    def renew(
        self, identity: PeerIdentity, reason: str, now: float, regions: tuple[MemoryRegion, ...] | None
    ) -> None:
        self._pages.drop_cache()
        self._handoffs.renew(identity, reason, now, regions)

    def may_be_held(self, until_s: float, now: float) -> None:
        """A decode node asks prefill nodes for signs of life, and gives none unasked."""

    def move_deadlines(self, by_s: float) -> None:
        self._handoffs.move_deadlines(by_s)
        for stage in (self._waiting, self._running):
            for request in stage:
                request.deadline_s += by_s

    def fail_open_requests(self) -> None:
        """This process ends: what is left may be tried elsewhere."""
        for request in itertools.chain.from_iterable(self._stages):
            self._outputs.fail(request, "shutting_down", "the decode node shuts down", retriable=True)
        self._outputs.flush(0.0)

    @property
    def is_idle(self) -> bool:
        """No request in any stage, no forward, nothing left to send. An open room has its request."""
        return not (self._num_requests or self._running.has_forward) and self._outputs.is_idle

    @property
    def is_drained(self) -> bool:
        return self._handoffs.is_drained

    def next_deadline(self) -> float:
        return min(
            self._handoffs.next_deadline(),
            self._outputs.next_expiry or math.inf,
            self._pins.deadline or math.inf,
            self._next_deadline_check if self._num_requests else math.inf,
        )

    def check_invariants(self) -> None:
        """Nothing may be held but the cache and quarantine. A violation is a bug, and ends the process."""
        self._pages.check_idle(self._handoffs.rooms_in_quarantine())
