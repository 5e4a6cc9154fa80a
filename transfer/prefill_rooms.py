"""Prefill's side of the hand-off: links, epochs and rooms.

Life cycle of a link (one connection of a decode node; one epoch):

    hello ─> refused                                   a mismatch; the link is forgotten
          └> pinged ─pong─> meeting ─written─> ready   rooms may open
                                    └failed─> refused
    any state ─newer hello, silence, new identity─> ended: its rooms fail

So each state ends by silence at the latest (`moves_on_at`); in `pinged` a ping is no answer to the one
question that is open. What a link has heard is forgotten with it: whoever spoke in a decode node's name, with
whatever numbers, is no hindrance to that node once the link is silent.

Life cycle of a room:

    request ─> busy, skew or invalid: answered at once, nothing was written
            └> open ─all pages written, first token sent─> done
                    └abort, failure, deadline, end of epoch─> draining ─no write outstanding─> drained

A state machine without I/O: `on_message`, `on_write_result` and `tick` take what happened and the time, and
return actions for the loop. It names the writes; the backend reports by the same names.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from ..messages.memory_region import MemoryRegion
from ..messages.node import FailureCode, PeerTraffic
from ..messages.peer import (
    AbortRoom,
    ContactPing,
    ContactPong,
    Drained,
    FirstToken,
    HandoffDone,
    PeerHello,
    PeerIdentity,
    PeerPing,
    PeerPong,
    PeerRefused,
    PeerToPrefill,
    PeerWelcome,
    PrefillRequest,
    RoomBusy,
    RoomFailed,
    RoomId,
)
from ..messages.report import NOTHING_TOLD, PromptReport, SampledToken
from ..messages.timeline import Span
from ..runtime.timing import Timing
from .actions import (
    AdmitRoom,
    CancelWrites,
    DisconnectPeer,
    MeetPeer,
    PrefillAction,
    ReleaseRoom,
    SendToDecode,
    SubmitWrite,
)
from .backends.base import WriteResult, WriteState
from .compatibility import refusal
from .copy_plan import MAX_RUN_BYTES, plan_runs
from .head_slices import HeadSlice, plan_head_slices
from .wire_meter import WireMeter

# While a first contact hangs, the engine serves nobody: one that failed is not repeated before this many
# times as long, so a peer that cannot be reached takes a fifth of the engine's time at most.
CONTACT_PAUSE = 4.0


class LinkState(enum.Enum):
    PINGED = "pinged"
    MEETING = "meeting"
    READY = "ready"


@dataclass(slots=True)
class _Link:
    link: bytes
    hello: PeerHello
    heard: float
    slices: tuple[HeadSlice, ...]  # what of a page which of our ranks writes to which of its
    state: LinkState = LinkState.PINGED
    meeting_since: float = 0.0
    meetings: set[int] = field(default_factory=set)  # handles of first contacts without a result
    mark: int = 0  # highest room counter seen on it; requests at or below it are old

    @property
    def incarnation(self) -> str:
        return self.hello.identity.incarnation

    @property
    def epoch(self) -> int:
        return self.hello.epoch

    @property
    def pairs(self) -> dict[tuple[int, int], MemoryRegion]:
        """(our rank, its rank) -> memory of the latter, for each pair that has something to write."""
        ranks = ((heads.source_rank, heads.dest_rank) for heads in self.slices)
        return {(ours, theirs): self.hello.regions[theirs] for ours, theirs in ranks}


@dataclass(slots=True)
class _Decode:
    """What outlives the epochs of one decode incarnation."""

    link: _Link | None = None  # of the highest epoch that is alive
    # Memory known to the backends, by (our rank, its rank).
    met: dict[tuple[int, int], MemoryRegion] = field(default_factory=dict)
    no_contact_before: float = 0.0
    meter: WireMeter = field(default_factory=WireMeter)


@dataclass(slots=True)
class _Chunk:
    """The pages that became ready together: their writes."""

    submitted: float
    num_bytes: int
    num_outstanding: int
    ended: float = 0.0


@dataclass(slots=True)
class _Room:
    request: PrefillRequest
    decode: _Decode
    regions: tuple[MemoryRegion, ...]  # of each decode rank
    slices: tuple[HeadSlice, ...]
    deadline: float
    next_page: int  # index into dest_pages; those before it are submitted, or were held by decode
    outstanding: dict[int, int] = field(default_factory=dict)  # writes of all ranks: handle -> bytes
    chunks: list[_Chunk] = field(default_factory=list)  # in the order of their pages
    sent_first_token: bool = False
    digests: dict[int, int] = field(default_factory=dict)  # by index into dest_pages, where asked for
    is_draining: bool = False
    has_failed_write: bool = False


@dataclass(frozen=True, slots=True)
class DecodePeerView:
    """One link, for people to look at."""

    incarnation: str
    epoch: int
    state: LinkState
    num_rooms: int


class PrefillRooms:
    def __init__(
        self,
        identity: PeerIdentity,
        timing: Timing,
        *,
        settle_s: float,
        transfer_addresses: tuple[str, ...] = (),
        unix_minus_monotonic_s: float = 0.0,
        max_run_bytes: int = MAX_RUN_BYTES,
    ) -> None:
        self._identity = identity
        self._timing = timing
        self._settle_s = settle_s
        self._transfer_addresses = transfer_addresses
        self._unix_minus_monotonic_s = unix_minus_monotonic_s
        self._max_run_bytes = max_run_bytes
        self._links: dict[bytes, _Link] = {}
        self._decodes: dict[str, _Decode] = {}  # by incarnation; one small entry per start of a decode node
        self._rooms: dict[RoomId, _Room] = {}
        self._meetings: dict[int, _Link] = {}  # by handle of a first contact
        self._room_of_write: dict[int, tuple[RoomId, _Chunk]] = {}
        self._last_handle = 0
        self._busy_until = 0.0
        self._due = float("inf")

    # ---- what the scheduler asks --------------------------------------------------------------------

    @property
    def identity(self) -> PeerIdentity:
        return self._identity

    @property
    def num_open_rooms(self) -> int:
        return sum(not room.is_draining for room in self._rooms.values())

    @property
    def num_draining_rooms(self) -> int:
        return sum(room.is_draining for room in self._rooms.values())

    @property
    def is_idle(self) -> bool:
        return not self._rooms

    def is_open(self, room_id: RoomId) -> bool:
        room = self._rooms.get(room_id)
        return room is not None and not room.is_draining

    def room_of_write(self, handle: int) -> RoomId:
        """The room that a write without a result belongs to."""
        room, _ = self._room_of_write[handle]
        return room

    def next_deadline(self) -> float:
        """When `tick` is due at the latest; infinity while there is nothing to wait for."""
        return self._due

    def peers(self) -> list[DecodePeerView]:
        return [
            DecodePeerView(
                incarnation=link.incarnation,
                epoch=link.epoch,
                state=link.state,
                num_rooms=sum(room.decode.link is link for room in self._rooms.values()),
            )
            for link in self._links.values()
        ]

    def moves_on_at(self) -> dict[str, float]:
        """Incarnation at the other end of each link -> when the link ends, if nothing more is heard on it."""
        return {link.incarnation: link.heard + self._timing.decode_silence_s for link in self._links.values()}

    def traffic(self, now: float) -> dict[str, PeerTraffic]:
        """What was written to each decode incarnation that is linked now."""
        links = self._links.values()
        return {link.incarnation: self._decodes[link.incarnation].meter.traffic(now) for link in links}

    # ---- control messages ---------------------------------------------------------------------------

    def on_message(
        self, link_id: bytes, message: PeerToPrefill, now: float, *, queue_has_room: bool
    ) -> list[PrefillAction]:
        if isinstance(message, PeerHello):
            return self._on_hello(link_id, message, now)
        link = self._links.get(link_id)
        if link is None or link.epoch != message.epoch:
            return self._on_stranger(link_id, message)
        if link.state is not LinkState.PINGED or isinstance(message, ContactPong):
            link.heard = now
        match message:
            case PeerPing():
                return [self._pong(link, message.seq, now)]
            case ContactPong():
                return self._on_contact_pong(link, now)
            case PrefillRequest():
                return self._on_request(link, message, now, queue_has_room)
            case AbortRoom():
                return self._on_abort(link, message)
            case _:
                assert_never(message)

    def _on_stranger(self, link_id: bytes, message: PeerToPrefill) -> list[PrefillAction]:
        """A message of an ended epoch is dropped; a ping is told, so that its sender connects again."""
        match message:
            case PeerPing(epoch=epoch):
                return [self._refused(link_id, epoch, f"epoch {epoch} is over here; connect again")]
            case PrefillRequest() if message.weight_version != self._identity.weight_version:
                # Weights changed while it was on its way, and its sender is told that by a PeerRefused.
                reason = self._skew(message)
                return [
                    SendToDecode(
                        link_id,
                        RoomFailed(
                            room=message.room,
                            epoch=message.epoch,
                            reason=reason,
                            code="version_skew",
                            retriable=True,
                        ),
                    )
                ]
            case _:
                return []

    def _on_hello(self, link_id: bytes, hello: PeerHello, now: float) -> list[PrefillAction]:
        decode = self._decodes.setdefault(hello.identity.incarnation, _Decode())
        if decode.link is not None and hello.epoch <= decode.link.epoch:
            return []
        actions: list[PrefillAction] = []
        for old in (self._links.get(link_id), decode.link):
            if old is not None:
                actions += self._end_epoch(old, "peer_lost", f"epoch {hello.epoch} began")
        reason = refusal(self._identity, hello)
        if reason is None and (pause_s := decode.no_contact_before - now) > 0:
            reason = f"the first contact failed after long; the next one is made in {pause_s:.0f} s"
        if reason is not None:
            actions.append(self._refused(link_id, hello.epoch, reason))
            return actions + self._disconnect_if_unused(decode)
        slices = plan_head_slices(self._identity.layout, self._identity.tp_size, hello.identity.tp_size)
        decode.link = self._links[link_id] = _Link(link_id, hello, now, slices)
        self._wake_by(now + self._timing.decode_silence_s)
        actions.append(SendToDecode(link_id, ContactPing(epoch=hello.epoch)))
        return actions

    def _on_contact_pong(self, link: _Link, now: float) -> list[PrefillAction]:
        if link.state is not LinkState.PINGED:
            return []
        link.state = LinkState.MEETING
        link.meeting_since = now
        actions: list[PrefillAction] = []
        for (rank, _), region in link.pairs.items():
            handle = self._new_handle()
            self._meetings[handle] = link
            link.meetings.add(handle)
            actions.append(MeetPeer(handle, region, rank))
        self._decodes[link.incarnation].met = link.pairs
        return actions

    def _on_request(
        self, link: _Link, request: PrefillRequest, now: float, queue_has_room: bool
    ) -> list[PrefillAction]:
        decode = self._decodes[link.incarnation]
        room_id = request.room
        if room_id.decode_incarnation != link.incarnation or room_id.counter <= link.mark:
            return []
        link.mark = room_id.counter
        if link.state is not LinkState.READY:
            return self._reject(link, request, "not_ready", f"the link is still {link.state.value}")
        if request.weight_version != self._identity.weight_version:
            return self._reject(link, request, "version_skew", self._skew(request))
        invalid = self._invalid(link, request)
        if invalid is not None:
            return self._reject(link, request, "invalid", invalid)
        if not queue_has_room:
            return [SendToDecode(link.link, RoomBusy(room=room_id, epoch=link.epoch))]
        deadline = now + request.deadline_s
        self._rooms[room_id] = _Room(
            request=request,
            decode=decode,
            regions=link.hello.regions,
            slices=link.slices,
            deadline=deadline,
            next_page=request.num_cached_tokens // self._identity.layout.page_size,
        )
        self._wake_by(deadline)
        return [AdmitRoom(request)]

    def _invalid(self, link: _Link, request: PrefillRequest) -> str | None:
        page_size = self._identity.layout.page_size
        num_tokens = request.work.num_tokens
        num_pages = self._identity.layout.pages_for(num_tokens)
        if not request.work.prompt_ids or not request.work.choices:
            return "a request needs a prompt and a choice"
        if len(request.dest_pages) != num_pages:
            return f"{num_tokens} tokens need {num_pages} pages, {len(request.dest_pages)} were given"
        if request.num_cached_tokens % page_size or not 0 <= request.num_cached_tokens <= num_tokens:
            return f"{request.num_cached_tokens} cached tokens are no whole pages of the prompt"
        if not all(0 <= page < link.hello.num_pages for page in request.dest_pages):
            return f"a destination page lies outside of decode's {link.hello.num_pages} pages"
        if len(set(request.dest_pages)) != num_pages:
            return "a destination page is named twice"
        if not set(request.digest_pages) <= set(range(num_pages)):
            return f"a digest was asked for of a page outside of {num_pages}"
        return None

    def _skew(self, request: PrefillRequest) -> str:
        ours = self._identity.weight_version
        return f"prefill serves weights {ours!r}, the request wants {request.weight_version!r}"

    def _reject(
        self, link: _Link, request: PrefillRequest, code: FailureCode, reason: str
    ) -> list[PrefillAction]:
        room, epoch = request.room, link.epoch
        failed = RoomFailed(room=room, epoch=epoch, reason=reason, code=code, retriable=code != "invalid")
        return [
            SendToDecode(link.link, failed),
            SendToDecode(link.link, Drained(room=room, epoch=epoch, clean=True)),
        ]

    def _on_abort(self, link: _Link, abort: AbortRoom) -> list[PrefillAction]:
        # A decode node that took a new incarnation still has rooms of the one before to ask about.
        decode = self._decodes.get(abort.room.decode_incarnation)
        if decode is not None and decode.link not in (None, link):
            return []
        if abort.room.decode_incarnation == link.incarnation:
            link.mark = max(link.mark, abort.room.counter)
        room = self._rooms.get(abort.room)
        if room is None:
            # It never came, or it is over and its end was lost on the way: what became of it is not known.
            return [SendToDecode(link.link, Drained(room=abort.room, epoch=link.epoch, clean=False))]
        return [] if room.is_draining else self._drain(room, "aborted by decode", is_aborted=True)

    # ---- the scheduler's own events -----------------------------------------------------------------

    def pages_ready(
        self, room_id: RoomId, first_page: int, source_pages: Sequence[int], now: float
    ) -> list[PrefillAction]:
        """The pages from index `first_page` of the prompt on are computed: send those not sent before.

        Pages that decode holds are skipped. No page may be left out: a gap is a ValueError. The last page of
        the prompt is sent whole when it is only partly filled.
        """
        room = self._rooms.get(room_id)
        if room is None or room.is_draining:
            return []
        if first_page > room.next_page:
            raise ValueError(f"room {room_id}: page {room.next_page} was left out before page {first_page}")
        end = first_page + len(source_pages)
        if end > len(room.request.dest_pages):
            raise ValueError(f"room {room_id}: page {end - 1} of {len(room.request.dest_pages)}")
        if end <= room.next_page:
            return []
        source_pages = source_pages[room.next_page - first_page :]
        dest_pages = room.request.dest_pages[room.next_page : end]
        room.next_page = end
        runs = [
            (heads, run)
            for heads in room.slices
            for run in plan_runs(source_pages, dest_pages, heads, self._max_run_bytes)
        ]
        chunk = _Chunk(now, sum(run.num_bytes for _, run in runs), len(runs))
        room.chunks.append(chunk)
        actions: list[PrefillAction] = []
        for heads, run in runs:
            handle = self._new_handle()
            self._room_of_write[handle] = (room_id, chunk)
            room.outstanding[handle] = run.num_bytes
            room.decode.meter.submitted(now)
            actions.append(SubmitWrite(handle, room.regions[heads.dest_rank], run, heads.source_rank))
        return actions

    def digests_ready(self, room_id: RoomId, digests: Mapping[int, int], now: float) -> list[PrefillAction]:
        """Digests of source pages, by index: those that the request asks for leave with HandoffDone."""
        room = self._rooms.get(room_id)
        if room is None or room.is_draining:
            return []
        room.digests.update(digests)
        return self._complete_if_done(room, now)

    def first_token(
        self,
        room_id: RoomId,
        tokens: tuple[SampledToken, ...],
        now: float,
        *,
        report: PromptReport = NOTHING_TOLD,
        spans: tuple[Span, ...] = (),
    ) -> list[PrefillAction]:
        """The first token of each choice is sampled: decode may stream it while pages are in flight."""
        room = self._rooms.get(room_id)
        if room is None or room.is_draining or room.sent_first_token:
            return []
        room.sent_first_token = True
        link = self._link_of(room)
        message = FirstToken(
            room=room_id,
            epoch=link.epoch,
            weight_version=self._identity.weight_version,
            tokens=tokens,
            report=report,
            spans=spans,
        )
        return [SendToDecode(link.link, message), *self._complete_if_done(room, now)]

    def fail_room(
        self, room_id: RoomId, code: FailureCode, reason: str, *, retriable: bool = True
    ) -> list[PrefillAction]:
        """The scheduler cannot go on with this room."""
        room = self._rooms.get(room_id)
        if room is None or room.is_draining:
            return []
        return self._fail(room, code, reason, retriable=retriable)

    def extend_deadlines(self, by_s: float) -> None:
        """The node stood still for so long on purpose."""
        for room in self._rooms.values():
            room.deadline += by_s

    def fail_all(self, code: FailureCode, reason: str) -> list[PrefillAction]:
        open_rooms = [room for room in self._rooms.values() if not room.is_draining]
        return [action for room in open_rooms for action in self._fail(room, code, reason)]

    def set_identity(self, identity: PeerIdentity, reason: str) -> list[PrefillAction]:
        """Other weights, or another incarnation: every pair must shake hands again."""
        code: FailureCode = "not_ready"
        if identity.weight_version != self._identity.weight_version:
            code = "version_skew"
        self._identity = identity
        actions: list[PrefillAction] = []
        for link in list(self._links.values()):
            for room in [room for room in self._rooms.values() if room.decode.link is link]:
                if not room.is_draining:
                    actions += self._fail(room, code, reason)
            actions.append(self._refused(link.link, link.epoch, reason, code))
            actions += self._end_epoch(link, code, reason)
        return actions

    def announce_busy(self, until: float, now: float) -> list[PrefillAction]:
        """The process will be held until then (a weight load, say): peers shall not suspect it."""
        self._busy_until = until
        return [self._pong(link, 0, now) for link in self._links.values()]

    # ---- results of writes, and time ----------------------------------------------------------------

    def on_write_result(self, result: WriteResult, now: float) -> list[PrefillAction]:
        link = self._meetings.pop(result.handle, None)
        if link is not None:
            return self._on_met(link, result, now)
        room_id, chunk = self._room_of_write.pop(result.handle)
        room = self._rooms[room_id]
        num_bytes = room.outstanding.pop(result.handle)
        room.decode.meter.ended(num_bytes if result.state is WriteState.DONE else 0, now)
        chunk.num_outstanding -= 1
        if not chunk.num_outstanding:
            chunk.ended = now
        match result.state:
            case WriteState.DONE:
                pass
            case WriteState.CANCELLED:
                assert room.is_draining, "only a draining room's writes are cancelled"
            case WriteState.FAILED:
                room.has_failed_write = True
                if not room.is_draining:
                    return self._fail(room, "transfer_failed", result.reason)
            case _:
                assert_never(result.state)
        return self._close_if_drained(room) if room.is_draining else self._complete_if_done(room, now)

    def _on_met(self, link: _Link, result: WriteResult, now: float) -> list[PrefillAction]:
        decode = self._decodes[link.incarnation]
        link.meetings.discard(result.handle)
        if result.state is not WriteState.DONE:
            pause_s = CONTACT_PAUSE * (now - link.meeting_since)
            decode.no_contact_before = now + min(pause_s, self._timing.max_contact_pause_s)
        if decode.link is not link:
            return self._disconnect_if_unused(decode)
        if result.state is WriteState.DONE and link.meetings:
            return []  # other ranks are still meeting
        if result.state is WriteState.DONE:
            link.state = LinkState.READY
            welcome = PeerWelcome(
                epoch=link.epoch,
                identity=self._identity,
                contact_s=now - link.meeting_since,
                settle_s=self._settle_s,
                transfer_addresses=self._transfer_addresses,
            )
            return [SendToDecode(link.link, welcome)]
        reason = f"the first contact failed: {result.reason}"
        refused = self._refused(link.link, link.epoch, reason)
        return [refused, *self._end_epoch(link, "transfer_failed", reason)]

    def tick(self, now: float) -> list[PrefillAction]:
        """Ends what has waited too long. Feed received messages first: a held loop has unread pings."""
        if now < self._due:
            return []
        was_held = now - self._due > self._timing.late_tick_s
        actions: list[PrefillAction] = []
        for link in list(self._links.values()):
            if was_held:
                link.heard = now
            if now - link.heard >= self._timing.decode_silence_s:
                reason = f"decode was silent for {now - link.heard:.0f} s"
                actions += self._end_epoch(link, "peer_lost", reason)
        for room in list(self._rooms.values()):
            if now >= room.deadline and not room.is_draining:
                actions += self._fail(
                    room, "deadline", f"over its deadline on prefill by {now - room.deadline:.1f} s"
                )
        self._due = min(
            (
                *self.moves_on_at().values(),
                *(room.deadline for room in self._rooms.values() if not room.is_draining),
            ),
            default=float("inf"),
        )
        return actions

    # ---- how things end -----------------------------------------------------------------------------

    def _end_epoch(self, link: _Link, code: FailureCode, reason: str) -> list[PrefillAction]:
        if self._links.get(link.link) is not link:
            return []
        del self._links[link.link]
        decode = self._decodes[link.incarnation]
        rooms = [room for room in self._rooms.values() if room.decode is decode and not room.is_draining]
        decode.link = None  # so nothing is sent on it
        actions = [action for room in rooms for action in self._fail(room, code, reason)]
        return actions + self._disconnect_if_unused(decode)

    def _fail(
        self, room: _Room, code: FailureCode, reason: str, *, retriable: bool = True
    ) -> list[PrefillAction]:
        actions: list[PrefillAction] = []
        link = room.decode.link
        if link is not None:
            failed = RoomFailed(
                room=room.request.room, epoch=link.epoch, reason=reason, code=code, retriable=retriable
            )
            actions.append(SendToDecode(link.link, failed))
        return actions + self._drain(room, reason)

    def _drain(self, room: _Room, reason: str, *, is_aborted: bool = False) -> list[PrefillAction]:
        room.is_draining = True
        actions: list[PrefillAction] = [
            ReleaseRoom(room.request.room, completed=False, reason=reason, is_aborted=is_aborted)
        ]
        if room.outstanding:
            actions.append(CancelWrites(tuple(sorted(room.outstanding))))
        return actions + self._close_if_drained(room)

    def _close_if_drained(self, room: _Room) -> list[PrefillAction]:
        if room.outstanding:
            return []
        room_id = room.request.room
        del self._rooms[room_id]
        link = room.decode.link
        if link is None:
            return self._disconnect_if_unused(room.decode)
        drained = Drained(room=room_id, epoch=link.epoch, clean=not room.has_failed_write)
        return [SendToDecode(link.link, drained)]

    def _complete_if_done(self, room: _Room, now: float) -> list[PrefillAction]:
        has_all_pages = room.next_page == len(room.request.dest_pages)
        has_all_digests = room.digests.keys() >= set(room.request.digest_pages)
        if not has_all_pages or room.outstanding or not room.sent_first_token or not has_all_digests:
            return []
        room_id = room.request.room
        del self._rooms[room_id]
        num_bytes = sum(chunk.num_bytes for chunk in room.chunks)
        wires = tuple(
            self._span("wire", chunk.submitted, chunk.ended, chunk.num_bytes) for chunk in room.chunks
        )
        link = self._link_of(room)
        started = room.chunks[0].submitted if room.chunks else now
        # The hand-off of a prompt of several chunks spans their computing; the wire is busy for less of it.
        handoff = self._span("handoff", started, now, num_bytes)
        done = HandoffDone(
            room=room_id,
            epoch=link.epoch,
            num_bytes=num_bytes,
            spans=(handoff, *wires),
            digests=tuple(room.digests[index] for index in room.request.digest_pages),
        )
        return [SendToDecode(link.link, done), ReleaseRoom(room_id, completed=True)]

    def _disconnect_if_unused(self, decode: _Decode) -> list[PrefillAction]:
        if not decode.met or decode.link is not None:
            return []
        if any(room.decode is decode for room in self._rooms.values()):
            return []
        if any(self._decodes[link.incarnation] is decode for link in self._meetings.values()):
            return []
        regions, decode.met = decode.met, {}
        return [DisconnectPeer(region, rank) for (rank, _), region in regions.items()]

    def _link_of(self, room: _Room) -> _Link:
        assert room.decode.link is not None, "an open room's epoch is alive"
        return room.decode.link

    def _refused(
        self, link_id: bytes, epoch: int, reason: str, code: FailureCode = "peer_lost"
    ) -> SendToDecode:
        message = PeerRefused(epoch=epoch, reason=reason, code=code, update_id=self._identity.update_id)
        return SendToDecode(link_id, message)

    def _pong(self, link: _Link, seq: int, now: float) -> SendToDecode:
        busy_until_s = max(0.0, self._busy_until - now)
        return SendToDecode(link.link, PeerPong(epoch=link.epoch, seq=seq, busy_until_s=busy_until_s))

    def _span(self, name: str, start: float, end: float, num_bytes: int) -> Span:
        return Span(name, self._unix_minus_monotonic_s + start, end - start, num_bytes)

    def _new_handle(self) -> int:
        self._last_handle += 1
        return self._last_handle

    def _wake_by(self, when: float) -> None:
        self._due = min(self._due, when)
