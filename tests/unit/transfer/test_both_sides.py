"""Both state machines against each other, over links and a backend that do the worst that is allowed.

Links deliver in order or break; writes finish late, fail, and land after they failed; either process is
frozen; prefill dies and comes back as another incarnation. Held throughout: no page that a write can still
reach is ever given back. Held at the end, when everything is well again: no page and no room is left over.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, assert_never

import pytest

from pdserve.messages.peer import PeerToDecode, PeerToPrefill, RoomId
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.work import Work
from pdserve.runtime.timing import UNSCALED
from pdserve.transfer.actions import (
    AdmitRoom,
    CancelWrites,
    CloseLink,
    DecodeAction,
    DisconnectPeer,
    FirstTokenArrived,
    HandoffComplete,
    MeetPeer,
    OpenLink,
    PagesReleased,
    PeerLost,
    PeerReady,
    PrefillAction,
    ReleaseRoom,
    RoomEnded,
    SendToDecode,
    SendToPrefill,
    SubmitWrite,
)
from pdserve.transfer.backends.base import WriteResult, WriteState
from pdserve.transfer.decode_rooms import DecodeRooms, PeerState
from pdserve.transfer.prefill_rooms import PrefillRooms

if TYPE_CHECKING:
    from .conftest import Factory

ADDRESS = "tcp://10.0.0.1:9000"
SETTLE_S = 2.0


@dataclasses.dataclass
class Link:
    epoch: int
    prefill: str  # the incarnation it is connected to
    to_prefill: deque[PeerToPrefill] = dataclasses.field(default_factory=deque)
    to_decode: deque[PeerToDecode] = dataclasses.field(default_factory=deque)


@dataclasses.dataclass
class WireWrite:
    """A write that can still reach decode's pages. `landing_s`: it failed, and lands for so much longer."""

    handle: int
    prefill: str
    pages: frozenset[int]
    is_contact: bool = False
    is_sent: bool = True
    landing_s: float | None = None
    is_dead: bool = False  # its sender died: nobody will report it


class Pair:
    def __init__(self, make: Factory, rng: random.Random) -> None:
        self.rng = rng
        self.make = make
        self.now = 100.0
        self.links: dict[int, Link] = {}
        self.wire: list[WireWrite] = []
        self.deaths: list[str] = []
        self.num_starts = 0
        self.seen: Counter[str] = Counter()
        self.admitted: dict[RoomId, int] = {}  # room -> next page to compute, on the living prefill
        self.requests: dict[RoomId, AdmitRoom] = {}
        self.free = set(range(self.make.num_pages))
        self.held: dict[RoomId, tuple[int, ...]] = {}  # exposed or quarantined
        self.private: dict[RoomId, tuple[int, ...]] = {}
        self.is_frozen = False
        self.start_prefill()
        self.decode = DecodeRooms(
            self.make.identity("D1"), (self.make.region(),), self.make.num_pages, UNSCALED
        )

    def join(self) -> None:
        self.run_decode(self.decode.add_peer(ADDRESS, self.now))
        self.all_messages_arrive()
        (contact,) = self.own_writes()
        self.report(contact, WriteState.DONE)
        self.all_messages_arrive()

    # ---- executing actions --------------------------------------------------------------------------

    def start_prefill(self) -> None:
        self.num_starts += 1
        self.incarnation = f"P{self.num_starts}"
        self.prefill = PrefillRooms(self.make.identity(self.incarnation), UNSCALED, settle_s=SETTLE_S)
        self.admitted.clear()
        self.requests.clear()

    def run_prefill(self, actions: list[PrefillAction]) -> None:
        for action in actions:
            match action:
                case SendToDecode(link, message):
                    self.links[int(link)].to_decode.append(message)
                case MeetPeer(handle, _):
                    self.wire.append(WireWrite(handle, self.incarnation, frozenset(), is_contact=True))
                case SubmitWrite(handle, _, run):
                    page_bytes = self.make.layout.stride_bytes
                    first, last = run.dest // page_bytes, (run.dest + run.num_bytes - 1) // page_bytes
                    pages = frozenset(range(first, last + 1))
                    self.wire.append(WireWrite(handle, self.incarnation, pages, is_sent=False))
                case CancelWrites(handles):
                    cancelled = [w for w in self.own_writes() if w.handle in handles and not w.is_sent]
                    for write in cancelled:
                        self.report(write, WriteState.CANCELLED)
                case DisconnectPeer():
                    assert not self.own_writes(), "a peer is let go with writes outstanding"
                case AdmitRoom(request):
                    assert request.room not in self.admitted
                    self.admitted[request.room] = 0
                    self.requests[request.room] = action
                case ReleaseRoom(room):
                    del self.admitted[room]
                case _:
                    assert_never(action)

    def run_decode(self, actions: Sequence[DecodeAction]) -> None:
        for action in actions:
            self.seen[type(action).__name__] += 1
            match action:
                case OpenLink(_, epoch):
                    self.links[epoch] = Link(epoch, self.incarnation)
                case CloseLink():
                    pass
                case SendToPrefill(_, message):
                    self.links[max(self.links)].to_prefill.append(message)
                case PeerReady() | PeerLost():
                    pass
                case FirstTokenArrived(room):
                    assert room in self.held
                case HandoffComplete(room):
                    pages = self.held.pop(room)
                    self.assert_unreachable(pages)
                    self.private[room] = pages
                case RoomEnded(room, quarantined=True):
                    self.seen[action.code] += 1
                    assert room in self.held
                case RoomEnded(room):
                    self.give_back(room, self.held[room])
                case PagesReleased(room, pages):
                    self.give_back(room, pages)
                case _:
                    assert_never(action)

    def give_back(self, room: RoomId, pages: tuple[int, ...]) -> None:
        assert self.held.pop(room) == pages
        self.assert_unreachable(pages)
        self.free.update(pages)

    def assert_unreachable(self, pages: tuple[int, ...]) -> None:
        for write in self.wire:
            assert not write.pages & set(pages), f"{write} can still reach pages that were given back"

    def own_writes(self) -> list[WireWrite]:
        """Writes that the living prefill waits for."""
        return [w for w in self.wire if w.prefill == self.incarnation and w.landing_s is None]

    def report(self, write: WireWrite, state: WriteState) -> None:
        self.wire.remove(write)
        if state is WriteState.FAILED:
            self.wire.append(dataclasses.replace(write, landing_s=SETTLE_S))
        result = WriteResult(write.handle, state, "" if state is WriteState.DONE else "lost")
        self.run_prefill(self.prefill.on_write_result(result, self.now))

    # ---- the world ----------------------------------------------------------------------------------

    def deliver_to_prefill(self, link: Link, queue_has_room: bool = True) -> None:
        message = link.to_prefill.popleft()
        if link.prefill == self.incarnation:
            link_id = str(link.epoch).encode()
            actions = self.prefill.on_message(link_id, message, self.now, queue_has_room=queue_has_room)
            self.run_prefill(actions)

    def deliver_to_decode(self, link: Link, num_times: int = 1) -> None:
        message = link.to_decode.popleft()
        for _ in range(num_times):
            self.run_decode(self.decode.on_message(ADDRESS, message, self.now))

    def some_message_reaches_prefill(self) -> None:
        links = [link for link in self.links.values() if link.to_prefill]
        if links:
            self.deliver_to_prefill(self.rng.choice(links), queue_has_room=self.rng.random() < 0.8)

    def some_message_reaches_decode(self) -> None:
        links = [link for link in self.links.values() if link.to_decode]
        if links:
            self.deliver_to_decode(self.rng.choice(links), num_times=self.rng.choice((1, 1, 2)))

    def all_messages_arrive(self) -> None:
        for _ in range(8):
            for link in list(self.links.values()):
                while link.to_prefill:
                    self.deliver_to_prefill(link)
                while link.to_decode:
                    self.deliver_to_decode(link)

    def decode_opens_a_room(self) -> None:
        num_pages = self.rng.randint(1, 12)
        num_cached = min(num_pages, self.rng.choice((0, 0, 1, 3)))
        address = self.decode.ready_address(self.incarnation)
        if address is None or len(self.free) < num_pages:
            return
        if not self.decode.may_expose(address, num_pages - num_cached):
            return
        pages = tuple(self.rng.sample(sorted(self.free), num_pages))
        self.free.difference_update(pages[num_cached:])
        room, actions = self.decode.open_room(
            address,
            request_id="r",
            attempt=1,
            work=Work(
                prompt_ids=tuple(range(num_pages * self.make.layout.page_size)),
                choices=(0,),
                sampling=SamplingParams(),
            ),
            dest_pages=pages,
            num_cached_tokens=num_cached * self.make.layout.page_size,
            deadline_s=20.0,
            now=self.now,
        )
        self.held[room] = pages[num_cached:]
        self.run_decode(actions)

    def decode_finishes_a_request(self) -> None:
        if self.private:
            self.free.update(self.private.pop(self.rng.choice(list(self.private))))

    def decode_aborts(self) -> None:
        if self.held:
            self.run_decode(self.decode.abort(self.rng.choice(list(self.held)), self.now))

    def prefill_computes_a_chunk(self) -> None:
        if self.admitted:
            self.compute(self.rng.choice(list(self.admitted)), self.rng.randint(1, 12))

    def compute(self, room: RoomId, num_pages: int) -> None:
        total = len(self.requests[room].request.dest_pages)
        first = self.admitted[room]
        end = min(total, first + num_pages)
        self.admitted[room] = end
        self.run_prefill(self.prefill.pages_ready(room, first, range(first, end), self.now))
        if end == total:
            self.run_prefill(self.prefill.first_token(room, self.make.token, self.now))

    def prefill_gives_up_a_room(self) -> None:
        if self.admitted:
            room = self.rng.choice(list(self.admitted))
            self.run_prefill(self.prefill.fail_room(room, "transfer_failed", "out of memory"))

    def a_write_is_done(self) -> None:
        if writes := self.own_writes():
            self.report(self.rng.choice(writes), WriteState.DONE)

    def a_write_fails(self) -> None:
        if writes := self.own_writes():
            self.report(self.rng.choice(writes), WriteState.FAILED)

    def all_writes_start(self) -> None:
        for write in self.own_writes():
            write.is_sent = True

    def time_passes(self) -> None:
        self.pass_time(self.rng.choice((0.01, 0.2, 0.25)))

    def pass_time(self, awake_s: float) -> None:
        self.now += awake_s
        for write in list(self.wire):
            if write.landing_s is not None:
                write.landing_s -= awake_s
                if write.landing_s <= 0:
                    self.wire.remove(write)
        self.tick()

    def tick(self) -> None:
        self.run_decode(self.decode.tick(self.now))
        self.run_prefill(self.prefill.tick(self.now))
        assert self.decode.next_deadline() > self.now
        assert self.prefill.next_deadline() > self.now

    def decode_is_frozen(self) -> None:
        """Bytes wait in the kernel meanwhile: nothing lands, and `landing_s` stands still."""
        self.now += self.rng.choice((0.6, 3.0, 30.0))
        self.run_decode(self.decode.tick(self.now))

    def the_link_breaks(self) -> None:
        """What is under way is lost, or still arrives though its epoch is over."""
        link = self.links[max(self.links)]
        if self.rng.random() < 0.5:
            link.to_prefill.clear()
            link.to_decode.clear()
        self.run_decode(self.decode.on_link_down(ADDRESS, link.epoch, self.now))

    def prefill_dies_and_starts_again(self) -> None:
        for write in self.own_writes():
            self.wire.remove(write)
            if write.is_sent:
                self.wire.append(dataclasses.replace(write, is_dead=True))
        self.deaths.append(self.incarnation)
        self.start_prefill()

    def a_death_is_proven(self) -> None:
        if not self.deaths:
            return
        dead = self.deaths.pop()
        for write in self.wire:
            if write.prefill == dead and write.landing_s is None:
                write.landing_s = SETTLE_S
        self.run_decode(self.decode.peer_death_proven(dead, self.now))

    def weights_change_on_prefill(self) -> None:
        identity = self.make.identity(self.incarnation)
        self.run_prefill(self.prefill.set_identity(identity, "weights were updated"))

    # ---- what always holds --------------------------------------------------------------------------

    def every_page_has_one_owner(self) -> None:
        owned = [page for pages in (*self.held.values(), *self.private.values()) for page in pages]
        assert len(owned) == len(set(owned))
        assert not self.free & set(owned)
        assert len(self.free) + len(owned) == self.make.num_pages

    def books_agree(self) -> None:
        assert self.decode.num_exposed_pages(ADDRESS) == sum(len(pages) for pages in self.held.values())
        assert self.prefill.num_open_rooms == len(self.admitted)

    def recover(self) -> None:
        """Everything is well again: what is open completes, the rest drains, and nothing is left."""
        while self.deaths:
            self.a_death_is_proven()
        for _ in range(80):
            self.all_messages_arrive()
            for room in list(self.admitted):
                self.compute(room, 64)
            self.all_writes_start()
            for write in self.own_writes():
                self.report(write, WriteState.DONE)
            self.pass_time(0.25)
        assert self.decode.is_idle
        assert self.prefill.is_idle
        assert not self.held
        assert not self.wire
        (peer,) = self.decode.peers()
        assert peer.state is PeerState.READY


WEIGHTS = {
    Pair.some_message_reaches_prefill: 20,
    Pair.some_message_reaches_decode: 20,
    Pair.all_messages_arrive: 10,
    Pair.decode_opens_a_room: 20,
    Pair.decode_finishes_a_request: 10,
    Pair.prefill_computes_a_chunk: 30,
    Pair.all_writes_start: 10,
    Pair.a_write_is_done: 40,
    Pair.a_write_fails: 2,
    Pair.time_passes: 10,
    Pair.decode_aborts: 3,
    Pair.prefill_gives_up_a_room: 1,
    Pair.decode_is_frozen: 1,
    Pair.the_link_breaks: 1,
    Pair.prefill_dies_and_starts_again: 0.5,
    Pair.a_death_is_proven: 0.5,
    Pair.weights_change_on_prefill: 0.3,
}


@pytest.mark.parametrize("seed", range(12))
def test_no_reachable_page_is_given_back_and_nothing_is_left(make: Factory, seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(make, rng)
    pair.join()
    for step in range(3000):
        rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0](pair)
        pair.every_page_has_one_owner()
        pair.books_agree()
        if step % 500 == 499:
            pair.recover()
