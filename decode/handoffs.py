"""Requests whose prompt a prefill node computes: their rooms, the pages that it may write, what arrives.

This is the only part that knows a RoomId beside `transfer/`. A hand-off ends in one of four ways: its pages
are in place and the request goes on; its first token was its last; the room fails; nobody wants it any more.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from ..components.load_inquirer import LoadInquirer
from ..components.metrics_reporter import MetricsReporter
from ..components.output_streamer import StreamKey
from ..components.page_allocator import PageAllocator
from ..messages.malformed import head_of
from ..messages.memory_region import MemoryRegion
from ..messages.node import FailureCode, is_same_process
from ..messages.peer import HandoffDone, PeerIdentity, PeerToDecode, RoomId
from ..messages.timeline import covered_s, duration_of
from ..node.loop import Peers
from ..runtime.config import VerifyPages
from ..runtime.containment import Containment
from ..transfer.actions import (
    DecodeAction,
    FirstTokenArrived,
    HandoffComplete,
    PagesReleased,
    RoomEnded,
)
from ..transfer.decode_rooms import DecodeRooms
from ..transfer.page_digests import Digests, DigestWorker, pages_to_verify
from .local_prefill import LocalPrefillPolicy
from .outputs import Outputs
from .peer_links import LinkDown
from .prefill_peers import PrefillPeers
from .request_pages import RequestPages
from .sequence import DecodeRequest, Sequence
from .timeline import Timeline

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Handoff:
    request: DecodeRequest
    room: RoomId
    verified_pages: tuple[int, ...]  # whose digests prefill sends along
    done: HandoffDone | None = None  # every write is in place, and what is in the pages is not compared yet


class Handoffs:
    """`local_prefill` is told what hand-offs cost."""

    def __init__(
        self,
        *,
        rooms: DecodeRooms,
        peers: PrefillPeers,
        allocator: PageAllocator,
        pages: RequestPages,
        digests: DigestWorker,
        verify_pages: VerifyPages,
        outputs: Outputs,
        timeline: Timeline,
        local_prefill: LocalPrefillPolicy,
        load_inquirer: LoadInquirer,
        metrics: MetricsReporter,
    ) -> None:
        self.containment = Containment()
        self._rooms = rooms
        self._peers = peers
        self._allocator = allocator
        self._pages = pages
        self._digests = digests
        self._verify_pages = verify_pages
        self._outputs = outputs
        self._timeline = timeline
        self._local_prefill = local_prefill
        self._load_inquirer = load_inquirer
        self._metrics = metrics
        self._handoffs: dict[RoomId, _Handoff] = {}
        self._rooms_of: dict[StreamKey, RoomId] = {}
        self._complete: list[DecodeRequest] = []  # since the last `poll`

    def __len__(self) -> int:
        return len(self._handoffs)

    def __iter__(self) -> Iterator[DecodeRequest]:
        for handoff in self._handoffs.values():
            yield handoff.request

    def __contains__(self, key: StreamKey) -> bool:
        return key in self._rooms_of

    def state_of(self, request: DecodeRequest) -> str:
        del request
        return "handoff"

    # ---- begun --------------------------------------------------------------------------------------

    def is_ready(self, incarnation: str) -> bool:
        """Whether this prefill node may be used."""
        return self._rooms.ready_address(incarnation) is not None

    def may_start(self, request: DecodeRequest) -> bool:
        """False: half of the pool is enough for one prefill node. It must be ready."""
        address = self._address_of(request)
        num_missing = self._pages.need(request).prompt - len(self._pages.match(request).pages)
        return self._rooms.may_expose(address, num_missing)

    def start(self, request: DecodeRequest, now: float) -> None:
        """Expose the pages of its prompt that are missing to the prefill node that the router chose."""
        message = request.message
        address = self._address_of(request)
        self._timeline.note(request, "decode_queue")
        num_shared = len(self._pages.match(request).pages)
        room = self._rooms.next_room_id
        dest_pages = self._pages.expose(request, room)
        digest_pages = pages_to_verify(self._verify_pages, num_shared, len(dest_pages), room.counter)
        room, actions = self._rooms.open_room(
            address,
            request_id=message.request_id,
            attempt=message.attempt,
            work=request.work,
            dest_pages=tuple(dest_pages),
            num_cached_tokens=request.num_cached,
            deadline_s=request.deadline_s - now,
            now=now,
            digest_pages=digest_pages,
        )
        verified_pages = tuple(dest_pages[index] for index in digest_pages)
        self._handoffs[room] = _Handoff(request, room, verified_pages)
        self._rooms_of[request.key] = room
        request.since_s = now
        self._timeline.note(request, "reserve")
        self._act(actions, now)

    # ---- what comes ---------------------------------------------------------------------------------

    def poll(self, now: float) -> list[DecodeRequest]:
        """Returns the requests whose pages are all in place: they are another stage's from here on."""
        for address, message in self._peers.receive():
            if isinstance(message, LinkDown):
                self._act(self._rooms.on_link_down(address, message.epoch, now, message.reason), now)
                continue
            with self._contained(address, message, now):
                self._peers.note(address, message)
                self._act(self._rooms.on_message(address, message, now), now)
        for incarnation in self._peers.proven_dead():
            self._act(self._rooms.peer_death_proven(incarnation, now), now)
        for digests in self._digests.poll():
            self._compare(digests)
        complete, self._complete = self._complete, []
        return complete

    def tick(self, now: float) -> None:
        self._act(self._rooms.tick(now), now)
        self._peers.watch(self._rooms.suspects())

    def _act(self, actions: list[DecodeAction], now: float) -> None:
        for action in actions:
            match action:
                case FirstTokenArrived():
                    self._take_first_token(action, now)
                case HandoffComplete():
                    self._take_pages(action)
                case RoomEnded():
                    self._end(action)
                case PagesReleased():
                    self._allocator.release_room(action.room)
                case _:
                    self._peers.act(action)

    def _take_first_token(self, action: FirstTokenArrived, now: float) -> None:
        """Streamed at once, while the last pages are in flight."""
        handoff, message = self._handoffs[action.room], action.message
        request = handoff.request
        num_computed = sum(span.num_tokens for span in message.spans)
        self._local_prefill.measured_prefill(num_computed, duration_of("prefill_chunk", message.spans))
        self._timeline.prefilled(request, message.spans, self._address_of(request))
        self._outputs.prompt_done(request, message.report)
        by_choice = {sequence.choice: sequence for sequence in request.live_sequences}
        for sampled in message.tokens:
            if (sequence := by_choice.get(sampled.choice)) is not None:
                self._outputs.take(request, sequence, sampled)
                if sequence.is_finished:
                    self._pages.free(request, sequence)
        if not request.live_sequences:
            self._drop(handoff, now)

    def _take_pages(self, action: HandoffComplete) -> None:
        handoff, message = self._handoffs[action.room], action.message
        self._timeline.handed_off(handoff.request, message.spans, self._address_of(handoff.request))
        wires = [span for span in message.spans if span.name == "wire"]
        self._local_prefill.measured_wire(message.num_bytes, covered_s(wires, 0.0, math.inf))
        if handoff.verified_pages:
            # The pages stay the room's own until it is known what is in them.
            handoff.done = message
            self._digests.submit(action.room, handoff.verified_pages)
        else:
            self._adopt(handoff)

    def _compare(self, computed: Digests) -> None:
        """What arrived with what was sent."""
        handoff = self._handoffs.get(computed.key)
        if handoff is None or handoff.done is None:  # cancelled meanwhile
            return
        pairs = itertools.zip_longest(computed.digests, handoff.done.digests)
        num_corrupt = 0 if computed.error else sum(here != there for here, there in pairs)
        self._metrics.count_verified(num_pages=len(computed.digests), num_corrupt=num_corrupt)
        if not (num_corrupt or computed.error):
            self._adopt(handoff)
            return
        corrupt = f"{num_corrupt} of {len(computed.digests)} verified KV pages arrived corrupt"
        reason = computed.error or corrupt
        _log.error("room %d: %s", handoff.room.counter, reason)
        self._remove(handoff)
        self._allocator.release_room(handoff.room)  # every write is in place: nothing can follow
        self._fail(handoff.request, "transfer_failed", reason, retriable=True)

    def _adopt(self, handoff: _Handoff) -> None:
        """The pages are the request's own."""
        request = handoff.request
        self._remove(handoff)
        self._load_inquirer.count_prompt(
            num_received=request.work.num_tokens - request.num_cached, num_cached=request.num_cached
        )
        self._pages.adopt(request, handoff.room)
        self._complete.append(request)

    def _end(self, action: RoomEnded) -> None:
        handoff = self._handoffs[action.room]
        self._remove(handoff)
        self._give_up_pages(action.room, quarantined=action.quarantined)
        if action.code == "version_skew":
            self._metrics.count_version_refusal()
        if action.code == "aborted":
            self._free(handoff.request, self._outputs.abort(handoff.request))
        else:
            self._fail(handoff.request, action.code, action.reason, retriable=action.retriable)

    def _contained(self, address: str, message: PeerToDecode, now: float) -> AbstractContextManager[None]:
        """What raises in handling it ends its hand-off, and nothing else.

        What was about no room was about the epoch.
        """

        def give_up(why: str) -> None:
            room = head_of(message).room
            if room is None:
                self._act(self._rooms.on_link_down(address, message.epoch, now, why), now)
            elif (handoff := self._handoffs.get(room)) is not None:
                self._fail(handoff.request, "transfer_failed", why, retriable=True)
                self._drop(handoff, now)

        return self.containment.around(str(message.__struct_config__.tag), give_up)

    # ---- nobody wants it any more -------------------------------------------------------------------

    def cancel(self, key: StreamKey, choices: tuple[int, ...], now: float) -> None:
        """These choices, or all of them."""
        handoff = self._handoffs[self._rooms_of[key]]
        self._free(handoff.request, self._outputs.discard(handoff.request, choices))
        if not handoff.request.live_sequences:
            self._drop(handoff, now)

    def abort(self, request: DecodeRequest, now: float) -> None:
        handoff = self._handoffs[self._rooms_of[request.key]]
        self._free(request, self._outputs.abort(request))
        self._drop(handoff, now)

    def fail(
        self, request: DecodeRequest, code: FailureCode, reason: str, now: float, *, retriable: bool
    ) -> None:
        handoff = self._handoffs[self._rooms_of[request.key]]
        self._fail(request, code, reason, retriable=retriable)
        self._drop(handoff, now)

    def _drop(self, handoff: _Handoff, now: float) -> None:
        """Nobody needs what prefill still writes: the pages come back when prefill has drained."""
        self._remove(handoff)
        self._give_up_pages(handoff.room, quarantined=handoff.done is None)
        for action in self._rooms.abort(handoff.room, now):
            self._peers.act(action)

    def _fail(self, request: DecodeRequest, code: FailureCode, reason: str, *, retriable: bool) -> None:
        self._free(request, self._outputs.fail(request, code, reason, retriable=retriable))

    def _free(self, request: DecodeRequest, ended: list[Sequence]) -> None:
        """What is locked and promised; the room's pages are not theirs yet."""
        for sequence in ended:
            self._pages.free(request, sequence)

    def _give_up_pages(self, room: RoomId, *, quarantined: bool) -> None:
        if quarantined:
            self._allocator.quarantine(room)
        else:
            self._allocator.release_room(room)

    def _remove(self, handoff: _Handoff) -> None:
        del self._handoffs[handoff.room]
        del self._rooms_of[handoff.request.key]

    def _address_of(self, request: DecodeRequest) -> str:
        """Of its prefill node; empty while that is not ready."""
        return self._rooms.ready_address(request.message.prefill_incarnation) or ""

    # ---- prefill nodes ------------------------------------------------------------------------------

    def set_peers(self, addresses: set[str], now: float) -> None:
        """These are the prefill nodes; who is not named any more is left."""
        known = {peer.address for peer in self._rooms.peers()}
        for address in sorted(addresses):
            self._act(self._rooms.add_peer(address, now), now)
        for address in sorted(known - addresses):
            self._act(self._rooms.remove_peer(address, now), now)

    def assert_death(self, incarnation: str, now: float) -> tuple[bool, str]:
        """Somebody says that every process of it is gone. Whether that can be, and what follows."""
        for ready, address in self._rooms.ready_peers().items():
            if is_same_process(ready, incarnation):
                return False, f"{incarnation} is alive: it answers at {address}"
        num_pages = self._rooms.quarantined_pages().get(incarnation, 0)
        self._act(self._rooms.peer_death_proven(incarnation, now), now)
        return True, f"{num_pages} pages of {incarnation} were in quarantine; they settle"

    def renew(
        self, identity: PeerIdentity, reason: str, now: float, regions: tuple[MemoryRegion, ...] | None
    ) -> None:
        """Every pair shakes hands again, under this identity."""
        self._act(self._rooms.set_identity(identity, reason, now, regions), now)

    def move_deadlines(self, by_s: float) -> None:
        self._rooms.extend_deadlines(by_s)
        for request in self:
            request.deadline_s += by_s

    # ---- what there is ------------------------------------------------------------------------------

    def peers(self) -> Peers:
        return Peers(
            ready=tuple(self._rooms.ready_peers()),
            refused={peer.address: peer.reason for peer in self._rooms.peers() if peer.is_refused},
            quarantined_pages=self._rooms.quarantined_pages(),
        )

    @property
    def is_drained(self) -> bool:
        """No room is open or in quarantine: no peer can write."""
        return self._rooms.is_idle

    @property
    def num_stranded_pages(self) -> int:
        """Pages in quarantine that may never come back."""
        return self._rooms.num_stranded_pages

    @property
    def pages_come_back(self) -> bool:
        """Whether pages that hand-offs hold will be free at some time."""
        return bool(self._handoffs) or self._rooms.num_quarantined_pages > self._rooms.num_stranded_pages

    def next_deadline(self) -> float:
        return self._rooms.next_deadline()

    def rooms(self) -> set[RoomId]:
        """Of every request here."""
        return set(self._handoffs)

    def room_of(self, key: StreamKey) -> RoomId | None:
        return self._rooms_of.get(key)

    def rooms_in_quarantine(self) -> list[RoomId]:
        """Those that still have a peer to wait for."""
        rooms = self._allocator.quarantined_rooms()
        return [room for room in rooms if self._rooms.state_of(room) is not None]

    def observe(self) -> None:
        self._metrics.observe_quarantine(self._rooms.quarantined_pages())
        self._metrics.observe_crossed_rooms(self._rooms.num_crossed)
