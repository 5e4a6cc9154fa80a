from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import pytest

from pdserve.messages.peer import (
    AbortRoom,
    ContactPing,
    ContactPong,
    Drained,
    FirstToken,
    HandoffDone,
    PeerHello,
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
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.work import Work
from pdserve.runtime.timing import UNSCALED
from pdserve.transfer.actions import (
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
from pdserve.transfer.decode_rooms import (
    DecodeRooms,
    PeerState,
    RoomState,
)

if TYPE_CHECKING:
    from .conftest import Factory

P = "tcp://10.0.0.1:9000"
PAGES = (10, 11, 12)


class Node:
    """A decode node under a clock that the test holds. It ticks whenever a tick is due."""

    def __init__(self, make: Factory) -> None:
        self.make = make
        self.rooms = DecodeRooms(make.identity("D1"), (make.region(),), make.num_pages, UNSCALED)
        self.now = 10.0

    @property
    def epoch(self) -> int:
        return self.rooms._peers[P].epoch

    def on(self, message: PeerToDecode, address: str = P) -> list[DecodeAction]:
        return self.rooms.on_message(address, message, self.now)

    def welcome(self, incarnation: str = "P1", settle_s: float = 2.0) -> list[DecodeAction]:
        identity = self.make.identity(incarnation)
        return self.on(PeerWelcome(epoch=self.epoch, identity=identity, contact_s=0.01, settle_s=settle_s))

    def connect(self, incarnation: str = "P1", settle_s: float = 2.0) -> None:
        self.rooms.add_peer(P, self.now)
        self.on(ContactPing(epoch=self.epoch))
        assert PeerReady(P, incarnation) in self.welcome(incarnation, settle_s)

    def open(self, pages: tuple[int, ...] = PAGES, num_cached: int = 0, deadline_s: float = 100.0) -> RoomId:
        page_size = self.make.layout.page_size
        room, actions = self.rooms.open_room(
            P,
            request_id="r",
            attempt=1,
            work=Work(
                prompt_ids=tuple(range(len(pages) * page_size)), choices=(0,), sampling=SamplingParams()
            ),
            dest_pages=pages,
            num_cached_tokens=num_cached * page_size,
            deadline_s=deadline_s,
            now=self.now,
        )
        (action,) = actions
        assert isinstance(action, SendToPrefill)
        assert isinstance(action.message, PrefillRequest)
        return room

    def pong(self) -> None:
        self.on(PeerPong(epoch=self.epoch, seq=0))

    def run(self, seconds: float, *, peer_answers: bool = True, step_s: float = 0.1) -> list[DecodeAction]:
        """Time goes by in a loop that is awake."""
        actions: list[DecodeAction] = []
        for _ in range(round(seconds / step_s)):
            self.now = round(self.now + step_s, 6)
            if peer_answers:
                self.pong()
            actions += self.rooms.tick(self.now)
        return actions

    def freeze(self, seconds: float) -> list[DecodeAction]:
        self.now += seconds
        self.pong()
        return self.rooms.tick(self.now)


@pytest.fixture
def node(make: Factory) -> Node:
    node = Node(make)
    node.connect()
    return node


def aborts(actions: Sequence[DecodeAction]) -> list[RoomId]:
    return [
        action.message.room
        for action in actions
        if isinstance(action, SendToPrefill) and isinstance(action.message, AbortRoom)
    ]


def of(kind: type, actions: list[DecodeAction]) -> list[DecodeAction]:
    return [action for action in actions if isinstance(action, kind)]


# ---- peers ------------------------------------------------------------------------------------------


def test_a_peer_is_ready_after_hello_contact_and_welcome(make: Factory) -> None:
    node = Node(make)
    hello = PeerHello(
        epoch=1, identity=make.identity("D1"), regions=(make.region(),), num_pages=make.num_pages
    )
    assert node.rooms.add_peer(P, node.now) == [OpenLink(P, 1), SendToPrefill(P, hello)]
    assert node.rooms.add_peer(P, node.now) == []
    assert node.rooms.ready_peers() == {}
    assert node.on(ContactPing(epoch=1)) == [SendToPrefill(P, ContactPong(epoch=1))]
    assert node.welcome() == [PeerReady(P, "P1")]
    assert node.welcome() == []
    assert node.rooms.ready_peers() == {"P1": P}
    assert node.rooms.ready_address("P1") == P
    assert node.rooms.ready_address("P2") is None


def test_a_refusal_is_shown_and_tried_again_ever_less_often(make: Factory) -> None:
    node = Node(make)
    node.rooms.add_peer(P, node.now)
    waits = []
    for _ in range(6):
        assert node.on(PeerRefused(epoch=node.epoch, reason="TP size differs")) == [CloseLink(P, node.epoch)]
        (view,) = node.rooms.peers()
        assert (view.state, view.is_refused, view.reason) == (PeerState.WAITING, True, "TP size differs")
        refused_at = node.now
        actions: list[DecodeAction] = []
        while not actions:
            node.now = node.rooms.next_deadline()
            actions = node.rooms.tick(node.now)
        waits.append(round(node.now - refused_at, 3))
        assert actions[0] == OpenLink(P, node.epoch)
    assert waits == [0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    node.welcome()
    (view,) = node.rooms.peers()
    assert (view.state, view.is_refused, view.reason) == (PeerState.READY, False, "")


def test_a_peer_is_pinged_each_second_and_lost_after_two_of_silence(node: Node) -> None:
    actions = node.run(5.0)
    messages = [action.message for action in actions if isinstance(action, SendToPrefill)]
    pings = [message.seq for message in messages if isinstance(message, PeerPing)]
    assert pings == [1, 2, 3, 4, 5]
    epoch = node.epoch
    assert of(PeerLost, node.run(1.8, peer_answers=False)) == []
    actions = node.run(0.3, peer_answers=False)
    assert of(PeerLost, actions) == [PeerLost(P, "P1", "no answer for 2.0 s")]
    assert of(CloseLink, actions) == [CloseLink(P, epoch)]
    assert node.rooms.ready_peers() == {}


def test_an_announced_pause_is_no_silence(node: Node) -> None:
    node.on(PeerPong(epoch=node.epoch, seq=0, busy_until_s=5.0))
    assert of(PeerLost, node.run(6.5, peer_answers=False)) == []
    assert len(of(PeerLost, node.run(1.0, peer_answers=False))) == 1


def test_an_announced_pause_is_believed_for_a_while_only(node: Node) -> None:
    """The connection may be gone, and the word that the pause is over with it."""
    node.on(PeerPong(epoch=node.epoch, seq=0, busy_until_s=120.0))
    assert of(PeerLost, node.run(UNSCALED.busy_peer_silence_s - 0.5, peer_answers=False)) == []
    assert len(of(PeerLost, node.run(1.0, peer_answers=False))) == 1


def test_a_busy_peer_that_answers_is_not_lost(node: Node) -> None:
    for _ in range(3):
        node.on(PeerPong(epoch=node.epoch, seq=0, busy_until_s=120.0))
        assert of(PeerLost, node.run(UNSCALED.busy_peer_silence_s - 0.5, peer_answers=False)) == []


def test_every_state_of_a_peer_ends_by_itself(node: Node) -> None:
    """Whatever was announced: a handshake whose refusal is lost is made again."""
    node.on(PeerRefused(epoch=node.epoch, reason="other weights"))
    assert node.rooms.moves_on_at()[P] - node.now <= UNSCALED.max_peer_retry_s
    epoch = node.epoch
    node.run(UNSCALED.max_peer_retry_s, peer_answers=False)
    assert node.epoch == epoch + 1
    node.on(ContactPing(epoch=node.epoch))
    node.on(PeerPong(epoch=node.epoch, seq=0, busy_until_s=120.0))
    assert node.rooms.moves_on_at()[P] - node.now <= UNSCALED.busy_peer_silence_s
    opened = of(
        OpenLink, node.run(UNSCALED.busy_peer_silence_s + UNSCALED.max_peer_retry_s, peer_answers=False)
    )
    assert opened == [OpenLink(P, epoch + 2)]


def test_a_peer_that_answers_pings_and_never_welcomes_is_left(make: Factory) -> None:
    node = Node(make)
    node.rooms.add_peer(P, node.now)
    node.run(UNSCALED.welcome_timeout_s - 1.0)
    (peer,) = node.rooms.peers()
    assert peer.state is PeerState.CONNECTING
    node.run(1.0)
    (peer,) = node.rooms.peers()
    assert (peer.state, peer.reason) == (PeerState.WAITING, "no welcome within 300 s")


def test_a_held_loop_does_not_take_its_own_pause_for_silence(node: Node) -> None:
    node.now += 30.0
    assert of(PeerLost, node.rooms.tick(node.now)) == []
    assert len(of(PeerLost, node.run(2.5, peer_answers=False))) == 1


def test_a_peer_heard_after_a_pause_gets_no_credit_for_it(node: Node) -> None:
    """Its pong was read first; hung now, it must not be trusted for as long as the pause was."""
    assert of(PeerLost, node.freeze(60.0)) == []
    assert len(of(PeerLost, node.run(2.5, peer_answers=False))) == 1


def test_a_closed_socket_is_seen_at_once_and_only_for_its_epoch(node: Node) -> None:
    room = node.open()
    epoch = node.epoch
    assert node.rooms.on_link_down(P, epoch - 1, node.now) == []
    assert node.rooms.on_link_down("tcp://elsewhere", epoch, node.now) == []
    ended, lost, closed = node.rooms.on_link_down(P, epoch, node.now)
    reason = f"prefill {P}: the connection was closed"
    assert ended == RoomEnded(room, "peer_lost", reason, retriable=True, quarantined=True)
    assert lost == PeerLost(P, "P1", "the connection was closed")
    assert closed == CloseLink(P, epoch)
    assert node.rooms.on_link_down(P, epoch, node.now) == []


def test_messages_of_another_epoch_or_of_strangers_are_dropped(node: Node) -> None:
    room = node.open()
    assert (
        node.on(FirstToken(room=room, epoch=node.epoch - 1, weight_version="w1", tokens=node.make.token))
        == []
    )
    assert node.on(Drained(room=room, epoch=node.epoch + 1, clean=True)) == []
    assert node.on(Drained(room=room, epoch=node.epoch, clean=True), "tcp://elsewhere") == []
    assert node.rooms.state_of(room) is RoomState.OPEN


def test_a_removed_peer_keeps_its_quarantine(node: Node) -> None:
    room = node.open()
    ended, *_ = node.rooms.remove_peer(P, node.now)
    assert isinstance(ended, RoomEnded)
    assert node.rooms.remove_peer(P, node.now) == []
    (view,) = node.rooms.peers()
    assert (view.reason, view.num_quarantined_pages) == ("removed from the cluster", 3)
    assert node.run(60.0, peer_answers=False) == []
    assert node.rooms.state_of(room) is RoomState.DRAINING


def test_other_weights_shake_hands_again(node: Node) -> None:
    room = node.open()
    identity = node.make.identity("D1", weight_version="w2")
    actions = node.rooms.set_identity(identity, "weights are w2 now", node.now)
    assert [type(action) for action in actions] == [RoomEnded, PeerLost, CloseLink, OpenLink, SendToPrefill]
    (hello,) = [action.message for action in actions if isinstance(action, SendToPrefill)]
    assert isinstance(hello, PeerHello)
    assert hello.identity == identity
    assert aborts(node.welcome()) == [room]


# ---- a room that goes well --------------------------------------------------------------------------


def test_the_request_says_everything(node: Node) -> None:
    page_size = node.make.layout.page_size
    work = Work(prompt_ids=(1, 2), output_ids=(3,), choices=(1,), sampling=SamplingParams(seed=5))
    room, (action,) = node.rooms.open_room(
        P,
        request_id="r",
        attempt=3,
        work=work,
        dest_pages=PAGES,
        num_cached_tokens=page_size,
        deadline_s=7.0,
        now=node.now,
    )
    assert action == SendToPrefill(
        P,
        PrefillRequest(
            room=room,
            epoch=node.epoch,
            request_id="r",
            attempt=3,
            work=work,
            dest_pages=PAGES,
            num_cached_tokens=page_size,
            weight_version="w1",
            deadline_s=7.0,
        ),
    )
    assert node.rooms.num_exposed_pages(P) == 2  # the page that decode holds is not exposed


def test_a_room_that_new_weights_overtake_ends_for_its_version(node: Node) -> None:
    room = node.open()
    ended, *_ = node.on(PeerRefused(epoch=node.epoch, reason="weights are w2 now", code="version_skew"))
    assert isinstance(ended, RoomEnded)
    assert (ended.room, ended.code, ended.retriable, ended.quarantined) == (room, "version_skew", True, True)


def test_a_first_token_of_other_weights_ends_the_room(node: Node) -> None:
    room = node.open()
    token = FirstToken(room=room, epoch=node.epoch, weight_version="w2", tokens=node.make.token)
    ended, *asked = node.on(token)
    assert isinstance(ended, RoomEnded)
    assert (ended.code, ended.quarantined) == ("version_skew", True)
    assert len(aborts(asked)) == 1
    assert node.rooms.num_crossed == 1


def test_counters_only_grow(node: Node) -> None:
    counters = [node.open((page,)).counter for page in range(5)]
    assert counters == [1, 2, 3, 4, 5]


def test_first_token_then_done(node: Node) -> None:
    room = node.open()
    token = FirstToken(room=room, epoch=node.epoch, weight_version="w1", tokens=node.make.token)
    assert node.on(token) == [FirstTokenArrived(room, token)]
    assert node.on(token) == []
    done = HandoffDone(room=room, epoch=node.epoch, num_bytes=1)
    assert node.on(done) == [HandoffComplete(room, done)]
    assert node.on(done) == []
    assert node.rooms.is_idle
    assert node.rooms.abort(room, node.now) == []
    assert node.on(Drained(room=room, epoch=node.epoch, clean=False)) == []


def test_done_without_a_first_token_is_a_failure(node: Node) -> None:
    room = node.open()
    (ended,) = node.on(HandoffDone(room=room, epoch=node.epoch, num_bytes=1))
    assert isinstance(ended, RoomEnded)
    assert (ended.code, ended.quarantined) == ("transfer_failed", False)


def test_busy_gives_the_pages_back_at_once(node: Node) -> None:
    room = node.open()
    busy = RoomBusy(room=room, epoch=node.epoch)
    assert node.on(busy) == [RoomEnded(room, "busy", "prefill's queue is full", True, quarantined=False)]
    assert node.on(busy) == []
    assert node.rooms.is_idle


# ---- quarantine -------------------------------------------------------------------------------------


def failed(room: RoomId, epoch: int) -> RoomFailed:
    return RoomFailed(room=room, epoch=epoch, reason="cable", code="transfer_failed", retriable=True)


def test_a_failed_room_is_released_by_a_clean_drain(node: Node) -> None:
    room = node.open(num_cached=1)
    assert node.on(failed(room, node.epoch)) == [
        RoomEnded(room, "transfer_failed", "cable", retriable=True, quarantined=True)
    ]
    assert node.on(failed(room, node.epoch)) == []
    assert node.rooms.num_quarantined_pages == 2
    drained = Drained(room=room, epoch=node.epoch, clean=True)
    assert node.on(drained) == [PagesReleased(room, (11, 12))]
    assert node.on(drained) == []


def test_an_unclean_drain_settles_first(node: Node) -> None:
    room = node.open()
    node.on(failed(room, node.epoch))
    drained = Drained(room=room, epoch=node.epoch, clean=False)
    assert node.on(drained) == []
    assert node.rooms.state_of(room) is RoomState.SETTLING
    assert of(PagesReleased, node.run(1.0)) == []
    assert node.on(drained) == []  # said again: the count goes on
    assert of(PagesReleased, node.run(1.3)) == []
    assert of(PagesReleased, node.run(1.0)) == [PagesReleased(room, PAGES)]


def test_a_late_tick_restarts_the_count(node: Node) -> None:
    """While this process is frozen the bytes wait with it, so that time does not count."""
    room = node.open()
    node.rooms.abort(room, node.now)
    node.on(Drained(room=room, epoch=node.epoch, clean=False))
    for _ in range(5):
        assert of(PagesReleased, node.run(1.6)) == []
        assert of(PagesReleased, node.freeze(60.0)) == []
    assert of(PagesReleased, node.run(2.1)) == []
    assert of(PagesReleased, node.run(1.0)) == [PagesReleased(room, PAGES)]


@pytest.mark.parametrize("freeze_s", [0.1, 0.2, 0.35, 0.45])
def test_a_freeze_too_short_to_be_noticed_does_not_release_what_waited_for_it(
    node: Node, freeze_s: float
) -> None:
    """Bytes that were due in the last moment of the count land when this process goes on, not before."""
    room = node.open()
    node.rooms.abort(room, node.now)
    node.on(Drained(room=room, epoch=node.epoch, clean=False))
    assert of(PagesReleased, node.run(1.9)) == []  # of the 2 s that bytes may take
    assert of(PagesReleased, node.freeze(freeze_s)) == []
    assert of(PagesReleased, node.run(0.05, step_s=0.01)) == []
    assert of(PagesReleased, node.run(3.0)) == [PagesReleased(room, PAGES)]


def test_a_freeze_right_after_the_drain_does_not_count(node: Node) -> None:
    room = node.open()
    node.rooms.abort(room, node.now)
    node.on(Drained(room=room, epoch=node.epoch, clean=False))
    assert of(PagesReleased, node.freeze(3600.0)) == []
    assert of(PagesReleased, node.run(2.3)) == []
    assert of(PagesReleased, node.run(1.0)) == [PagesReleased(room, PAGES)]


def test_while_pages_settle_the_loop_is_asked_to_tick_often(node: Node) -> None:
    room = node.open()
    node.rooms.abort(room, node.now)
    node.on(Drained(room=room, epoch=node.epoch, clean=False))
    for _ in range(5):
        assert node.rooms.next_deadline() - node.now <= 0.25
        node.now = node.rooms.next_deadline()
        node.pong()
        node.rooms.tick(node.now)


def test_a_backend_that_does_not_settle_releases_at_once(make: Factory) -> None:
    node = Node(make)
    node.connect(settle_s=0.0)
    room = node.open()
    node.rooms.abort(room, node.now)
    drained = Drained(room=room, epoch=node.epoch, clean=False)
    assert node.on(drained) == [PagesReleased(room, PAGES)]


def test_an_abort_is_repeated_ever_less_often_until_it_is_answered(node: Node) -> None:
    room = node.open()
    assert aborts(node.rooms.abort(room, node.now)) == [room]
    assert node.rooms.abort(room, node.now) == []
    times = []
    for _ in range(160):
        if aborts(node.run(0.1)):
            times.append(round(node.now - 10.0, 1))
    assert times == [0.5, 1.5, 3.5, 7.5, 11.5, 15.5]
    assert node.on(Drained(room=room, epoch=node.epoch, clean=True)) == [PagesReleased(room, PAGES)]
    assert aborts(node.run(10.0)) == []


def test_no_time_ends_the_quarantine_of_a_room_that_is_not_drained(node: Node) -> None:
    room = node.open()
    node.rooms.abort(room, node.now)
    assert of(PagesReleased, node.run(600.0)) == []
    assert node.rooms.num_quarantined_pages == 3


@pytest.mark.parametrize("clean_end", ["done", "busy"])
def test_an_abort_that_crosses_the_end_is_clean(node: Node, clean_end: str) -> None:
    room = node.open()
    node.rooms.abort(room, node.now)
    assert node.on(FirstToken(room=room, epoch=node.epoch, weight_version="w1", tokens=node.make.token)) == []
    assert node.on(failed(room, node.epoch)) == []
    end: PeerToDecode = (
        HandoffDone(room=room, epoch=node.epoch, num_bytes=1)
        if clean_end == "done"
        else RoomBusy(room=room, epoch=node.epoch)
    )
    assert node.on(end) == [PagesReleased(room, PAGES)]


def test_what_comes_while_pages_settle_changes_nothing(node: Node) -> None:
    room = node.open()
    node.rooms.abort(room, node.now)
    node.on(Drained(room=room, epoch=node.epoch, clean=False))
    for message in (
        HandoffDone(room=room, epoch=node.epoch, num_bytes=1),
        RoomBusy(room=room, epoch=node.epoch),
        failed(room, node.epoch),
        Drained(room=room, epoch=node.epoch, clean=True),
        FirstToken(room=room, epoch=node.epoch, weight_version="w1", tokens=node.make.token),
    ):
        assert node.on(message) == []
    assert node.rooms.state_of(room) is RoomState.SETTLING


def test_a_drain_out_of_the_blue_ends_the_room(node: Node) -> None:
    room = node.open()
    ended, released = node.on(Drained(room=room, epoch=node.epoch, clean=True))
    assert isinstance(ended, RoomEnded)
    assert (ended.code, ended.quarantined) == ("transfer_failed", True)
    assert released == PagesReleased(room, PAGES)


def test_a_room_over_its_deadline_is_aborted(node: Node) -> None:
    room = node.open(deadline_s=3.0)
    assert of(RoomEnded, node.run(2.8)) == []
    actions = node.run(0.3)
    (ended,) = of(RoomEnded, actions)
    assert isinstance(ended, RoomEnded)
    assert (ended.code, ended.retriable, ended.quarantined) == ("deadline", True, True)
    assert aborts(actions) == [room]


# ---- lost peers -------------------------------------------------------------------------------------


def lose(node: Node) -> None:
    node.rooms.on_link_down(P, node.epoch, node.now)
    actions = node.run(0.3, peer_answers=False)
    assert len(of(OpenLink, actions)) == 1


def test_rooms_of_a_lost_epoch_are_asked_for_in_the_next(node: Node) -> None:
    room, done = node.open(), node.open((20,))
    old_epoch = node.epoch
    node.on(FirstToken(room=done, epoch=old_epoch, weight_version="w1", tokens=node.make.token))
    node.on(HandoffDone(room=done, epoch=old_epoch, num_bytes=1))
    lose(node)
    assert node.on(Drained(room=room, epoch=old_epoch, clean=True)) == []
    assert aborts(node.welcome("P1")) == [room]
    assert node.on(Drained(room=room, epoch=node.epoch, clean=True)) == [PagesReleased(room, PAGES)]


def test_nobody_speaks_for_a_room_before_the_welcome_says_who_it_is(node: Node) -> None:
    room = node.open()
    lose(node)
    assert node.on(Drained(room=room, epoch=node.epoch, clean=True)) == []
    assert node.rooms.state_of(room) is RoomState.DRAINING


def test_a_peer_that_was_ready_is_soon_tried_again(node: Node) -> None:
    for _ in range(3):
        lose(node)
        node.welcome()


def test_a_new_incarnation_frees_nothing_and_cannot_speak_for_the_old_one(node: Node) -> None:
    room = node.open()
    lose(node)
    assert aborts(node.welcome("P2")) == []
    assert node.on(Drained(room=room, epoch=node.epoch, clean=True)) == []
    assert aborts(node.run(30.0)) == []
    (view,) = node.rooms.peers()
    assert (view.incarnation, view.num_quarantined_pages) == ("P2", 3)


def test_a_process_whose_memory_came_back_is_asked_what_it_wrote_before(node: Node) -> None:
    """It has another incarnation, and no room any more: it says so, and the pages settle."""
    room = node.open()
    lose(node)
    assert aborts(node.welcome("P1~1")) == [room]
    node.on(Drained(room=room, epoch=node.epoch, clean=False))
    assert node.rooms.state_of(room) is RoomState.SETTLING


def test_the_death_of_a_process_is_that_of_all_its_incarnations(node: Node) -> None:
    room = node.open()
    lose(node)
    node.rooms.peer_death_proven("P1~2", node.now)
    assert node.rooms.state_of(room) is RoomState.SETTLING


def test_a_proven_death_still_settles(node: Node) -> None:
    room = node.open()
    lose(node)
    node.welcome("P2")
    other = node.open((30,))
    assert node.rooms.peer_death_proven("P1", node.now) == []
    assert node.rooms.state_of(other) is RoomState.OPEN
    assert of(PagesReleased, node.run(2.3)) == []
    assert of(PagesReleased, node.run(1.0)) == [PagesReleased(room, PAGES)]


def test_a_death_may_be_proven_before_it_is_felt(node: Node) -> None:
    room = node.open()
    ended, lost, closed = node.rooms.peer_death_proven("P1", node.now)
    assert isinstance(ended, RoomEnded)
    assert lost == PeerLost(P, "P1", "its death is proven")
    assert isinstance(closed, CloseLink)
    assert node.rooms.state_of(room) is RoomState.SETTLING


# ---- exposure ---------------------------------------------------------------------------------------


def test_one_peer_is_exposed_to_half_of_the_pool(node: Node) -> None:
    assert node.rooms.may_expose(P, 64)  # one request may take it all
    node.open(tuple(range(30)))
    assert node.rooms.may_expose(P, 2)
    assert not node.rooms.may_expose(P, 3)
    assert node.rooms.may_expose("tcp://another", 32)


def test_quarantine_counts_as_exposed(node: Node) -> None:
    room = node.open(tuple(range(30)))
    node.rooms.abort(room, node.now)
    assert node.rooms.num_quarantined_pages == 30
    assert not node.rooms.may_expose(P, 3)
    node.on(Drained(room=room, epoch=node.epoch, clean=True))
    assert node.rooms.may_expose(P, 64)


def test_an_unready_peer_gets_no_room(node: Node) -> None:
    lose(node)
    with pytest.raises(AssertionError):
        node.open()


def test_every_message_survives_the_wire(node: Node) -> None:
    room = node.open()
    message = failed(room, node.epoch)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=PeerToDecode) == message
