"""Decode's side of the hand-off: prefill peers, epochs, rooms, and the quarantine of pages.

Life cycle of a peer (a prefill node, known by the address of its control socket):

    waiting ─retry─> connecting ─welcome─> ready
       ^                │ refused, silence, link down
       └────────────────┴──────────────────────┘      every connect is a new epoch on a new socket

No state waits for a message that may be lost: `waiting` ends by its retry, the others by silence at the
latest (`moves_on_at`), `connecting` also by time: pongs say that a peer lives, not that a welcome comes. A
node refuses a ping of an epoch that it does not know, so silence is not hidden.

Life cycle of a room:

    open ─HandoffDone─> complete             its pages are the request's own
      ├─RoomBusy─> ended, pages free         nothing was written
      └─RoomFailed, abort, deadline, peer lost─> draining ─Drained(clean)─> released
                                                    └─Drained(failed), or death proven─> settling ─> released

Pages of a draining or settling room are quarantined. No timeout ends `draining`: only the peer's own word,
or the proof that the peer is dead. The process is asked, whatever incarnation it has come to: one whose
memory came back still knows what it wrote. `settling` counts ticks of this loop, not the wall clock: when
this process is frozen, bytes wait with it, and land when it goes on.

A state machine without I/O, as PrefillRooms is.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import assert_never

from ..messages.memory_region import MemoryRegion
from ..messages.node import FailureCode, is_same_process
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
    PeerToDecode,
    PeerWelcome,
    PrefillRequest,
    RoomBusy,
    RoomFailed,
    RoomId,
)
from ..messages.work import Work
from ..runtime.timing import Timing
from .actions import (
    CloseLink,
    DecodeAction,
    FirstTokenArrived,
    HandoffComplete,
    OpenLink,
    PagesReleased,
    PeerLost,
    PeerReady,
    RoomEnded,
    SendToPrefill,
)


class PeerState(enum.Enum):
    WAITING = "waiting"
    CONNECTING = "connecting"
    READY = "ready"


class RoomState(enum.Enum):
    OPEN = "open"
    DRAINING = "draining"
    SETTLING = "settling"


@dataclass(slots=True)
class _Peer:
    address: str
    retry_s: float  # before the next connection, when this one is lost
    state: PeerState = PeerState.WAITING
    epoch: int = -1
    incarnation: str = ""  # of this epoch; known once ready
    settle_s: float = 0.0
    transfer_addresses: tuple[str, ...] = ()
    contact_s: float = 0.0
    retry_at: float = 0.0
    next_ping: float = 0.0
    last_seq: int = 0
    heard: float = 0.0
    busy_until: float = 0.0
    connect_by: float = 0.0
    reason: str = ""  # why it is not ready
    is_refused: bool = False


@dataclass(slots=True)
class _Room:
    room: RoomId
    address: str
    incarnation: str  # of the prefill node that may write
    transfer_addresses: tuple[str, ...]  # of that incarnation
    exposed: tuple[int, ...]
    settle_s: float
    deadline: float
    abort_s: float  # before its abort is sent again
    state: RoomState = RoomState.OPEN
    has_first_token: bool = False
    next_abort: float = 0.0
    settled_s: float = 0.0  # counted so far
    counted_at: float = 0.0


@dataclass(frozen=True, slots=True)
class PrefillPeerView:
    """One prefill peer, for people to look at."""

    address: str
    incarnation: str
    state: PeerState
    reason: str
    is_refused: bool
    contact_s: float
    num_open_rooms: int
    num_exposed_pages: int
    num_quarantined_pages: int


class DecodeRooms:
    def __init__(
        self, identity: PeerIdentity, regions: tuple[MemoryRegion, ...], num_pages: int, timing: Timing
    ) -> None:
        self._identity = identity
        self._regions = regions  # of each rank
        self._num_pages = num_pages
        self._timing = timing
        self._peers: dict[str, _Peer] = {}
        self._rooms: dict[RoomId, _Room] = {}
        self._last_epoch = 0
        self._last_counter = 0
        self._due = float("inf")
        self.num_crossed = 0  # rooms that other weights than ours computed; each has failed

    # ---- what the scheduler asks --------------------------------------------------------------------

    def next_deadline(self) -> float:
        """When `tick` is due at the latest; infinity while there is nothing to wait for.

        To be late with it costs nothing but time: it is taken for a freeze, and counts begin again.
        """
        return self._due

    def ready_peers(self) -> dict[str, str]:
        """Incarnation -> address of the prefill nodes that may be used."""
        return {peer.incarnation: peer.address for peer in self._peers.values() if _is_ready(peer)}

    def ready_address(self, incarnation: str) -> str | None:
        for peer in self._peers.values():
            if _is_ready(peer) and peer.incarnation == incarnation:
                return peer.address
        return None

    def may_expose(self, address: str, num_pages: int) -> bool:
        """Whether `num_pages` more may be named to this prefill node: half of the pool, or one request.

        What is in quarantine counts: one node that keeps failing can take no more than its half.
        """
        exposed = self.num_exposed_pages(address)
        return exposed == 0 or exposed + num_pages <= self._num_pages // 2

    def num_exposed_pages(self, address: str) -> int:
        """Pages that this node may still write, those in quarantine included."""
        return sum(len(room.exposed) for room in self._rooms.values() if room.address == address)

    @property
    def num_quarantined_pages(self) -> int:
        return sum(len(room.exposed) for room in self._rooms.values() if room.state is not RoomState.OPEN)

    @property
    def num_stranded_pages(self) -> int:
        """Pages in quarantine for a peer that is not there to be asked: they may never come back."""
        return sum(
            len(room.exposed)
            for room in self._rooms.values()
            if room.state is RoomState.DRAINING and not self._can_ask(room)
        )

    def quarantined_pages(self) -> dict[str, int]:
        """Incarnation of a prefill node -> pages in quarantine because of it."""
        pages: dict[str, int] = {}
        for room in self._rooms.values():
            if room.state is not RoomState.OPEN:
                pages[room.incarnation] = pages.get(room.incarnation, 0) + len(room.exposed)
        return pages

    def suspects(self) -> dict[str, tuple[str, ...]]:
        """Incarnations that may still write and cannot be asked, with the addresses that only they can hold.

        The first is that of the control socket, the others are of the transfer engines. When the host refuses
        all of them, the incarnation is dead: `peer_death_proven`.
        """
        return {
            room.incarnation: (room.address.removeprefix("tcp://"), *room.transfer_addresses)
            for room in self._rooms.values()
            if room.state is RoomState.DRAINING and not self._can_ask(room)
        }

    @property
    def is_idle(self) -> bool:
        """No room, open or in quarantine."""
        return not self._rooms

    def state_of(self, room_id: RoomId) -> RoomState | None:
        room = self._rooms.get(room_id)
        return None if room is None else room.state

    def moves_on_at(self) -> dict[str, float]:
        """Address of each peer -> when it leaves its state at the latest, if nothing more is heard of it."""
        return {peer.address: self._moves_on_at(peer) for peer in self._peers.values()}

    def peers(self) -> list[PrefillPeerView]:
        """Every peer, and every address that is no peer any more but still holds pages in quarantine."""
        addresses = dict.fromkeys([*self._peers, *(room.address for room in self._rooms.values())])
        return [self._view(address) for address in addresses]

    # ---- peers --------------------------------------------------------------------------------------

    def add_peer(self, address: str, now: float) -> list[DecodeAction]:
        """A prefill node joined the cluster. Known ones are left alone."""
        if address in self._peers:
            return []
        peer = self._peers[address] = _Peer(address, self._timing.peer_retry_s)
        return self._connect(peer, now)

    def remove_peer(self, address: str, now: float) -> list[DecodeAction]:
        """A prefill node left the cluster. What it may still write stays in quarantine."""
        peer = self._peers.get(address)
        if peer is None:
            return []
        actions = self._lose(peer, "removed from the cluster", now)
        del self._peers[address]
        return actions

    def on_link_down(
        self, address: str, epoch: int, now: float, reason: str = "the connection was closed"
    ) -> list[DecodeAction]:
        """The connection of this epoch is gone, or nothing that comes on it can be relied on."""
        peer = self._peers.get(address)
        if peer is None or peer.epoch != epoch:
            return []
        return self._lose(peer, reason, now)

    def set_identity(
        self,
        identity: PeerIdentity,
        reason: str,
        now: float,
        regions: tuple[MemoryRegion, ...] | None = None,
    ) -> list[DecodeAction]:
        """Other weights, or another incarnation, whose memory is at `regions`: shake hands with every peer
        again."""
        self._identity = identity
        if regions is not None:
            self._regions = regions
        actions: list[DecodeAction] = []
        for peer in self._peers.values():
            actions += self._lose(peer, reason, now)
            actions += self._connect(peer, now)
        return actions

    def peer_death_proven(self, incarnation: str, now: float) -> list[DecodeAction]:
        """Every process of this prefill incarnation, and of those it had before, is known to be gone, or an
        operator says so.

        What it sent before may be on its way, so its pages settle like those of a failed room.
        """
        actions: list[DecodeAction] = []
        for peer in self._peers.values():
            if is_same_process(peer.incarnation, incarnation):
                actions += self._lose(peer, "its death is proven", now)
        for room in [each for each in self._rooms.values() if is_same_process(each.incarnation, incarnation)]:
            actions += self._settle(room, now)
        return actions

    # ---- rooms --------------------------------------------------------------------------------------

    @property
    def next_room_id(self) -> RoomId:
        """The room that the next `open_room` opens; its pages are reserved under this name before."""
        return RoomId(self._identity.incarnation, self._last_counter + 1)

    def open_room(
        self,
        address: str,
        *,
        request_id: str,
        attempt: int,
        work: Work,
        dest_pages: tuple[int, ...],
        num_cached_tokens: int,
        deadline_s: float,
        now: float,
        digest_pages: tuple[int, ...] = (),
    ) -> tuple[RoomId, list[DecodeAction]]:
        """Asks a ready peer to prefill into reserved pages.

        From now on the pages behind the first `num_cached_tokens` are exposed. They come back by exactly one
        of HandoffComplete, RoomEnded without quarantine, and PagesReleased.
        """
        peer = self._peers[address]
        assert _is_ready(peer), f"{address} is not ready"
        room_id = self.next_room_id
        self._last_counter = room_id.counter
        self._rooms[room_id] = _Room(
            room=room_id,
            address=address,
            incarnation=peer.incarnation,
            transfer_addresses=peer.transfer_addresses,
            exposed=dest_pages[num_cached_tokens // self._identity.layout.page_size :],
            settle_s=peer.settle_s,
            deadline=now + deadline_s,
            abort_s=self._timing.room_abort_retry_s,
        )
        self._wake_by(now + deadline_s)
        request = PrefillRequest(
            room=room_id,
            epoch=peer.epoch,
            request_id=request_id,
            attempt=attempt,
            work=work,
            dest_pages=dest_pages,
            num_cached_tokens=num_cached_tokens,
            weight_version=self._identity.weight_version,
            deadline_s=deadline_s,
            digest_pages=digest_pages,
        )
        return room_id, [SendToPrefill(address, request)]

    def extend_deadlines(self, by_s: float) -> None:
        """The node stood still for so long on purpose."""
        for room in self._rooms.values():
            room.deadline += by_s

    def abort(self, room_id: RoomId, now: float) -> list[SendToPrefill]:
        """The request needs this room no more. Its pages come back by PagesReleased, unless it is over."""
        room = self._rooms.get(room_id)
        if room is None or room.state is not RoomState.OPEN:
            return []
        return self._drain(room, now)

    def on_message(self, address: str, message: PeerToDecode, now: float) -> list[DecodeAction]:
        """What a prefill node says. Anything of another epoch, or of a room that is over, is dropped."""
        peer = self._peers.get(address)
        if peer is None or peer.state is PeerState.WAITING or message.epoch != peer.epoch:
            return []
        peer.heard = max(peer.heard, now)
        match message:
            case ContactPing():
                return [SendToPrefill(address, ContactPong(epoch=peer.epoch))]
            case PeerWelcome():
                return self._on_welcome(peer, message, now)
            case PeerRefused():
                return self._lose(peer, message.reason, now, message.code, is_refused=True)
            case PeerPong():
                peer.busy_until = now + message.busy_until_s
                return []
            case FirstToken() | HandoffDone() | RoomBusy() | RoomFailed() | Drained():
                room = self._rooms.get(message.room)
                # Another process at the same address cannot speak for the one that may write.
                if room is None or not is_same_process(room.incarnation, peer.incarnation):
                    return []
                return self._on_room_message(room, message, now)
            case _:
                assert_never(message)

    def tick(self, now: float) -> list[DecodeAction]:
        """Does what is due. Feed received messages first: a held loop has unread pongs."""
        if now < self._due:
            return []
        late_s = now - self._due
        if late_s > self._timing.late_tick_s:
            self._forgive(late_s, now)
        actions: list[DecodeAction] = []
        for peer in self._peers.values():
            actions += self._tick_peer(peer, now)
        for room in list(self._rooms.values()):
            actions += self._tick_room(room, now)
        self._due = min(
            (
                *(self._peer_due(peer) for peer in self._peers.values()),
                *(self._room_due(room, now) for room in self._rooms.values()),
            ),
            default=float("inf"),
        )
        return actions

    # ---- peers, inside ------------------------------------------------------------------------------

    def _connect(self, peer: _Peer, now: float) -> list[DecodeAction]:
        self._last_epoch += 1
        peer.state = PeerState.CONNECTING
        peer.epoch = self._last_epoch
        peer.heard = now
        peer.busy_until = 0.0
        peer.connect_by = now + self._timing.welcome_timeout_s
        peer.next_ping = now + self._timing.peer_ping_interval_s
        self._wake_by(peer.next_ping)
        hello = PeerHello(
            epoch=peer.epoch, identity=self._identity, regions=self._regions, num_pages=self._num_pages
        )
        return [OpenLink(peer.address, peer.epoch), SendToPrefill(peer.address, hello)]

    def _on_welcome(self, peer: _Peer, welcome: PeerWelcome, now: float) -> list[DecodeAction]:
        if peer.state is not PeerState.CONNECTING:
            return []
        peer.state = PeerState.READY
        peer.incarnation = welcome.identity.incarnation
        peer.settle_s = welcome.settle_s
        peer.transfer_addresses = welcome.transfer_addresses
        peer.contact_s = welcome.contact_s
        peer.retry_s = self._timing.peer_retry_s
        peer.reason = ""
        peer.is_refused = False
        actions: list[DecodeAction] = [PeerReady(peer.address, peer.incarnation)]
        for room in self._rooms.values():
            # Rooms of earlier epochs whose end was not told: ask this epoch.
            if room.state is RoomState.DRAINING and self._can_ask(room):
                room.abort_s = self._timing.room_abort_retry_s
                actions += self._send_abort(room, now)
        return actions

    def _lose(
        self,
        peer: _Peer,
        reason: str,
        now: float,
        code: FailureCode = "peer_lost",
        *,
        is_refused: bool = False,
    ) -> list[DecodeAction]:
        """Ends the epoch: its open rooms fail, and a new epoch is tried after a while."""
        if peer.state is PeerState.WAITING:
            return []
        actions: list[DecodeAction] = []
        was_ready, incarnation = _is_ready(peer), peer.incarnation
        peer.state = PeerState.WAITING
        peer.incarnation = ""
        peer.reason = reason
        peer.is_refused = is_refused
        peer.retry_at = now + peer.retry_s
        peer.retry_s = min(2 * peer.retry_s, self._timing.max_peer_retry_s)
        self._wake_by(peer.retry_at)
        for room in list(self._rooms.values()):
            if room.address == peer.address and room.state is RoomState.OPEN:
                actions += self._end(room, code, f"prefill {peer.address}: {reason}", True, now)
        if was_ready:
            actions.append(PeerLost(peer.address, incarnation, reason))
        actions.append(CloseLink(peer.address, peer.epoch))
        return actions

    def _tick_peer(self, peer: _Peer, now: float) -> list[DecodeAction]:
        if peer.state is PeerState.WAITING:
            return self._connect(peer, now) if now >= peer.retry_at else []
        if now >= self._silent_at(peer):
            return self._lose(peer, f"no answer for {now - peer.heard:.1f} s", now)
        if now >= self._moves_on_at(peer):
            return self._lose(peer, f"no welcome within {self._timing.welcome_timeout_s:.0f} s", now)
        if now < peer.next_ping:
            return []
        peer.next_ping = now + self._timing.peer_ping_interval_s
        peer.last_seq += 1
        return [SendToPrefill(peer.address, PeerPing(epoch=peer.epoch, seq=peer.last_seq))]

    def _forgive(self, late_s: float, now: float) -> None:
        """This process was held: peers were not silent meanwhile, and bytes may only now be landing."""
        for peer in self._peers.values():
            peer.heard = min(peer.heard + late_s, now)  # not later than now, if it was heard since
        for room in self._rooms.values():
            room.settled_s = 0.0
            room.counted_at = now

    # ---- rooms, inside ------------------------------------------------------------------------------

    def _on_room_message(
        self, room: _Room, message: FirstToken | HandoffDone | RoomBusy | RoomFailed | Drained, now: float
    ) -> list[DecodeAction]:
        match message:
            case FirstToken():
                if room.state is not RoomState.OPEN or room.has_first_token:
                    return []
                if self._crosses_versions(message):
                    self.num_crossed += 1
                    reason = f"prefill computed it with weights {message.weight_version!r}"
                    return self._end(room, "version_skew", reason, True, now)
                room.has_first_token = True
                return [FirstTokenArrived(room.room, message)]
            case HandoffDone():
                return self._on_done(room, message, now)
            case RoomBusy():
                return self._on_busy(room)
            case RoomFailed():
                if room.state is not RoomState.OPEN:
                    return []
                # Drained follows by itself; an Abort asks for it only if it does not come.
                return self._end(room, message.code, message.reason, message.retriable, now, ask=False)
            case Drained():
                return self._on_drained(room, message, now)
            case _:
                assert_never(message)

    def _crosses_versions(self, message: FirstToken) -> bool:
        """Whether other weights than ours made it. Nodes swap when they hold no room: it is a bug then."""
        return message.weight_version != self._identity.weight_version

    def _on_done(self, room: _Room, done: HandoffDone, now: float) -> list[DecodeAction]:
        match room.state:
            case RoomState.OPEN if room.has_first_token:
                del self._rooms[room.room]
                return [HandoffComplete(room.room, done)]
            case RoomState.OPEN:
                del self._rooms[room.room]
                reason = "prefill ended the hand-off without a first token"
                return [RoomEnded(room.room, "transfer_failed", reason, retriable=True, quarantined=False)]
            case RoomState.DRAINING:
                return self._release(room)
            case RoomState.SETTLING:
                return []
            case _:
                assert_never(room.state)

    def _on_busy(self, room: _Room) -> list[DecodeAction]:
        match room.state:
            case RoomState.OPEN:
                del self._rooms[room.room]
                return [RoomEnded(room.room, "busy", "prefill's queue is full", True, quarantined=False)]
            case RoomState.DRAINING:
                return self._release(room)
            case RoomState.SETTLING:
                return []
            case _:
                assert_never(room.state)

    def _on_drained(self, room: _Room, drained: Drained, now: float) -> list[DecodeAction]:
        actions: list[DecodeAction] = []
        if room.state is RoomState.OPEN:
            reason = "prefill drained the room without a word"
            actions += self._end(room, "transfer_failed", reason, True, now, ask=False)
        if room.state is RoomState.SETTLING:
            return actions
        return actions + (self._release(room) if drained.clean else self._settle(room, now))

    def _end(
        self, room: _Room, code: FailureCode, reason: str, retriable: bool, now: float, *, ask: bool = True
    ) -> list[DecodeAction]:
        ended = RoomEnded(room.room, code, reason, retriable, quarantined=True)
        return [ended, *self._drain(room, now, ask=ask)]

    def _drain(self, room: _Room, now: float, *, ask: bool = True) -> list[SendToPrefill]:
        room.state = RoomState.DRAINING
        if ask and self._can_ask(room):
            return self._send_abort(room, now)
        room.next_abort = now + room.abort_s
        self._wake_by(room.next_abort)
        return []

    def _send_abort(self, room: _Room, now: float) -> list[SendToPrefill]:
        room.next_abort = now + room.abort_s
        room.abort_s = min(2 * room.abort_s, self._timing.max_room_abort_retry_s)
        self._wake_by(room.next_abort)
        epoch = self._peers[room.address].epoch
        return [SendToPrefill(room.address, AbortRoom(room=room.room, epoch=epoch))]

    def _can_ask(self, room: _Room) -> bool:
        """Whether the process that may write this room's pages is there to be asked."""
        peer = self._peers.get(room.address)
        return peer is not None and _is_ready(peer) and is_same_process(peer.incarnation, room.incarnation)

    def _settle(self, room: _Room, now: float) -> list[DecodeAction]:
        if room.settle_s == 0.0:
            return self._release(room)
        if room.state is not RoomState.SETTLING:
            room.state = RoomState.SETTLING
            room.counted_at = now
            self._wake_by(now + self._timing.settle_tick_s)
        return []

    def _release(self, room: _Room) -> list[DecodeAction]:
        del self._rooms[room.room]
        return [PagesReleased(room.room, room.exposed)]

    def _tick_room(self, room: _Room, now: float) -> list[DecodeAction]:
        match room.state:
            case RoomState.OPEN:
                if now < room.deadline:
                    return []
                return self._end(room, "deadline", "the hand-off is over its deadline", True, now)
            case RoomState.DRAINING:
                is_due = now >= room.next_abort and self._can_ask(room)
                return [*self._send_abort(room, now)] if is_due else []
            case RoomState.SETTLING:
                room.settled_s += min(now - room.counted_at, self._timing.settle_tick_s)
                room.counted_at = now
                return (
                    self._release(room)
                    if room.settled_s >= room.settle_s + self._timing.settle_margin_s
                    else []
                )
            case _:
                assert_never(room.state)

    def _room_due(self, room: _Room, now: float) -> float:
        match room.state:
            case RoomState.OPEN:
                return room.deadline
            case RoomState.DRAINING:
                return room.next_abort if self._can_ask(room) else float("inf")
            case RoomState.SETTLING:
                return now + self._timing.settle_tick_s
            case _:
                assert_never(room.state)

    def _view(self, address: str) -> PrefillPeerView:
        peer = self._peers.get(address) or _Peer(address, 0.0, reason="removed from the cluster")
        rooms = [room for room in self._rooms.values() if room.address == address]
        held = [room for room in rooms if room.state is not RoomState.OPEN]
        return PrefillPeerView(
            address=address,
            incarnation=peer.incarnation,
            state=peer.state,
            reason=peer.reason,
            is_refused=peer.is_refused,
            contact_s=peer.contact_s,
            num_open_rooms=len(rooms) - len(held),
            num_exposed_pages=sum(len(room.exposed) for room in rooms),
            num_quarantined_pages=sum(
                len(room.exposed) for room in rooms if room.state is not RoomState.OPEN
            ),
        )

    def _peer_due(self, peer: _Peer) -> float:
        if peer.state is PeerState.WAITING:
            return peer.retry_at
        return min(peer.next_ping, self._moves_on_at(peer))

    def _silent_at(self, peer: _Peer) -> float:
        """When its silence ends the epoch: later while it is busy, but not as late as it may say."""
        if peer.busy_until <= peer.heard + self._timing.peer_silence_s:
            return peer.heard + self._timing.peer_silence_s
        return min(
            peer.busy_until + self._timing.peer_silence_s, peer.heard + self._timing.busy_peer_silence_s
        )

    def _moves_on_at(self, peer: _Peer) -> float:
        match peer.state:
            case PeerState.WAITING:
                return peer.retry_at
            case PeerState.CONNECTING:
                return min(self._silent_at(peer), peer.connect_by)
            case PeerState.READY:
                return self._silent_at(peer)
            case _:
                assert_never(peer.state)

    def _wake_by(self, when: float) -> None:
        self._due = min(self._due, when)


def _is_ready(peer: _Peer) -> bool:
    return peer.state is PeerState.READY
