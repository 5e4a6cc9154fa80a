from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from pdserve.messages.peer import (
    PROTOCOL_VERSION,
    AbortRoom,
    ContactPing,
    ContactPong,
    Drained,
    FirstToken,
    HandoffDone,
    PeerPing,
    PeerPong,
    PeerRefused,
    PeerWelcome,
    PrefillRequest,
    RoomBusy,
    RoomFailed,
    RoomId,
)
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.timeline import Span
from pdserve.messages.work import Work
from pdserve.runtime.timing import UNSCALED
from pdserve.transfer.actions import (
    AdmitRoom,
    CancelWrites,
    DisconnectPeer,
    MeetPeer,
    PrefillAction,
    ReleaseRoom,
    SendToDecode,
    SubmitWrite,
)
from pdserve.transfer.backends.base import WriteResult, WriteState
from pdserve.transfer.compatibility import refusal
from pdserve.transfer.copy_plan import Run
from pdserve.transfer.prefill_rooms import LinkState, PrefillRooms

if TYPE_CHECKING:
    from .conftest import Factory

LINK, LINK2 = b"link-1", b"link-2"


class Node:
    """A prefill node under a clock that the test holds."""

    def __init__(self, make: Factory) -> None:
        self.make = make
        self.rooms = PrefillRooms(make.identity(), UNSCALED, settle_s=2.0, unix_minus_monotonic_s=1000.0)
        self.now = 10.0

    def on(self, message: object, link: bytes = LINK, *, queue_has_room: bool = True) -> list[PrefillAction]:
        return self.rooms.on_message(link, message, self.now, queue_has_room=queue_has_room)  # type: ignore[arg-type]

    def connect(self, link: bytes = LINK, epoch: int = 1, incarnation: str = "D1") -> None:
        self.on(self.make.hello(epoch, incarnation), link)
        (meet,) = self.on(ContactPong(epoch=epoch), link)
        assert isinstance(meet, MeetPeer)
        (welcome,) = self.end(meet.handle)
        assert isinstance(welcome, SendToDecode)
        assert isinstance(welcome.message, PeerWelcome)

    def open(self, counter: int = 1, **changes: object) -> RoomId:
        request = self.make.request(counter, **changes)  # type: ignore[arg-type]
        assert self.on(request) == [AdmitRoom(request)]
        return request.room

    def submit(self, room: RoomId, first: int, pages: Sequence[int]) -> list[int]:
        actions = self.rooms.pages_ready(room, first, pages, self.now)
        assert all(isinstance(action, SubmitWrite) for action in actions)
        return [action.handle for action in actions if isinstance(action, SubmitWrite)]

    def first_token(self, room: RoomId) -> list[PrefillAction]:
        return self.rooms.first_token(room, self.make.token, self.now)

    def end(self, handle: int, state: WriteState = WriteState.DONE) -> list[PrefillAction]:
        reason = "" if state is WriteState.DONE else "cable"
        return self.rooms.on_write_result(WriteResult(handle, state, reason), self.now)


@pytest.fixture
def node(make: Factory) -> Node:
    node = Node(make)
    node.connect()
    return node


def sent(message: object, link: bytes = LINK) -> SendToDecode:
    return SendToDecode(link, message)  # type: ignore[arg-type]


# ---- the handshake ----------------------------------------------------------------------------------


def test_a_peer_is_met_only_after_it_proved_to_be_alive(make: Factory) -> None:
    node = Node(make)
    assert node.on(make.hello()) == [sent(ContactPing(epoch=1))]
    node.now = 12.0
    assert node.on(ContactPong(epoch=1)) == [MeetPeer(1, make.region())]
    node.now = 12.5
    welcome = PeerWelcome(epoch=1, identity=make.identity(), contact_s=0.5, settle_s=2.0)
    assert node.end(1) == [sent(welcome)]
    (peer,) = node.rooms.peers()
    assert (peer.incarnation, peer.state) == ("D1", LinkState.READY)


def test_a_failed_contact_refuses_the_pair(make: Factory) -> None:
    node = Node(make)
    node.on(make.hello())
    node.on(ContactPong(epoch=1))
    refused = PeerRefused(epoch=1, reason="the first contact failed: cable")
    assert node.end(1, WriteState.FAILED) == [sent(refused), DisconnectPeer(make.region())]
    assert node.rooms.peers() == []


def test_a_contact_that_hung_is_not_made_again_soon(make: Factory) -> None:
    """While it hangs, nothing is submitted to anybody: decode's retries must not take all of the time."""
    node = Node(make)
    node.on(make.hello())
    node.on(ContactPong(epoch=1))
    node.now += 60.0
    node.end(1, WriteState.FAILED)
    node.now += 2.0
    reason = "the first contact failed after long; the next one is made in 238 s"
    assert node.on(make.hello(epoch=2)) == [sent(PeerRefused(epoch=2, reason=reason))]
    assert node.on(make.hello(1, "D2"), LINK2) == [sent(ContactPing(epoch=1), LINK2)], "others are met"
    node.now += 238.0
    assert node.on(make.hello(epoch=3)) == [sent(ContactPing(epoch=3))]


def test_a_peer_is_met_again_after_some_minutes_however_long_its_contact_hung(make: Factory) -> None:
    """As it seems to after a night in which this host slept."""
    node = Node(make)
    node.on(make.hello())
    node.on(ContactPong(epoch=1))
    node.now += 8 * 3600.0
    node.end(1, WriteState.FAILED)
    node.now += UNSCALED.max_contact_pause_s - 1.0
    reason = "the first contact failed after long; the next one is made in 1 s"
    assert node.on(make.hello(epoch=2)) == [sent(PeerRefused(epoch=2, reason=reason))]
    node.now += 1.0
    assert node.on(make.hello(epoch=3)) == [sent(ContactPing(epoch=3))]


def test_hellos_and_pongs_that_come_twice_or_late_do_nothing(make: Factory) -> None:
    node = Node(make)
    assert node.on(ContactPong(epoch=1)) == []
    node.on(make.hello(epoch=2))
    assert node.on(make.hello(epoch=2)) == []
    assert node.on(make.hello(epoch=1), LINK2) == []
    assert node.on(ContactPong(epoch=1)) == []
    assert len(node.on(ContactPong(epoch=2))) == 1
    assert node.on(ContactPong(epoch=2)) == []


def test_a_contact_that_outlives_its_link_ends_quietly(make: Factory) -> None:
    node = Node(make)
    node.on(make.hello())
    (meet,) = node.on(ContactPong(epoch=1))
    assert isinstance(meet, MeetPeer)
    assert node.on(make.hello(epoch=2), LINK2) == [sent(ContactPing(epoch=2), LINK2)]
    assert node.end(meet.handle) == []
    assert [peer.state for peer in node.rooms.peers()] == [LinkState.PINGED]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"protocol_version": 0},
            f"protocol version differs: prefill has {PROTOCOL_VERSION}, decode has 0; install",
        ),
        ({"model_fingerprint": "m2"}, "model differs: prefill has 'model', decode has 'm2'; load"),
        ({"weight_version": "w2"}, "weight version differs: prefill has 'w1', decode has 'w2'; update"),
        (
            {"arithmetic": "ab12"},
            "deterministic mode's arithmetic differs: prefill has 'none', decode has 'ab12'; give "
            "--deterministic to both or to neither",
        ),
        ({"tp_size": 3}, "decode splits 2 KV heads over 3 ranks: they do not divide"),
        ({"tp_size": 2}, "decode has 2 ranks and announces the memory of 1"),
        (
            {"tp_size": 2, "verifies_pages": True},
            "--verify-pages compares whole pages, and ranks hold parts; leave it out on decode",
        ),
        ({"backend": "shm"}, "transfer backend differs: prefill has 'mooncake', decode has 'shm'; start"),
        ({"transport": "rdma"}, "transport differs: prefill has 'tcp', decode has 'rdma'; start"),
    ],
)
def test_a_mismatch_is_refused_in_words(make: Factory, changes: dict[str, Any], expected: str) -> None:
    node = Node(make)
    (action,) = node.on(make.hello(**changes))
    assert isinstance(action, SendToDecode)
    assert isinstance(action.message, PeerRefused)
    assert action.message.reason.startswith(expected)
    assert node.on(ContactPong(epoch=1)) == []


def test_nodes_that_compute_other_bits_are_told_so(make: Factory) -> None:
    ours, theirs = (make.identity(arithmetic=arithmetic) for arithmetic in ("ab12", "cd34"))
    reason = refusal(ours, msgspec.structs.replace(make.hello(), identity=theirs))
    assert reason is not None
    assert "prefill has 'ab12', decode has 'cd34'; use equal processors, and start both" in reason
    assert refusal(ours, msgspec.structs.replace(make.hello(), identity=ours)) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dtype": "float16"}, "KV dtype differs: prefill has 'float32', decode has 'float16'"),
        ({"page_size": 32}, "page size differs: prefill has 16, decode has 32"),
        ({"num_kv_heads": 1}, "number of KV heads differs"),
        ({"num_layers": 3}, "number of layers differs"),
        ({"head_dim": 16}, "head dimension differs"),
        ({"page_stride_bytes": 1 << 14}, "page stride in bytes differs: prefill has 4096, decode has 16384"),
    ],
)
def test_every_part_of_the_layout_is_compared(make: Factory, change: dict[str, int], expected: str) -> None:
    layout = msgspec.structs.replace(make.layout, **change)
    (action,) = Node(make).on(make.hello(layout=layout))
    assert isinstance(action, SendToDecode)
    assert isinstance(action.message, PeerRefused)
    assert action.message.reason.startswith(expected)


def test_a_stride_that_says_dense_in_other_words_is_the_same(make: Factory) -> None:
    layout = msgspec.structs.replace(make.layout, page_stride_bytes=make.layout.page_bytes)
    assert Node(make).on(make.hello(layout=layout)) == [sent(ContactPing(epoch=1))]


def test_more_pages_than_memory_is_refused(make: Factory) -> None:
    hello = msgspec.structs.replace(make.hello(), num_pages=make.num_pages + 1)
    (action,) = Node(make).on(hello)
    assert isinstance(action, SendToDecode)
    assert isinstance(action.message, PeerRefused)
    assert "decode announces 65 pages" in action.message.reason


# ---- a room that goes well --------------------------------------------------------------------------


def test_pages_travel_as_they_are_ready_and_the_last_byte_ends_the_room(node: Node) -> None:
    page = node.make.layout.page_bytes
    room = node.open(num_tokens=40)
    first = node.rooms.pages_ready(room, 0, [5, 6], node.now)
    assert first == [SubmitWrite(2, node.make.region(), Run(5 * page, 10 * page, 2 * page))]
    node.now = 11.0
    (second,) = node.submit(room, 2, [9])
    assert node.end(2) == []
    token = FirstToken(room=room, epoch=1, weight_version="w1", tokens=node.make.token)
    assert node.first_token(room) == [sent(token)]
    node.now = 11.5
    spans = (
        Span("handoff", 1010.0, 1.5, 3 * page),
        Span("wire", 1010.0, 1.0, 2 * page),
        Span("wire", 1011.0, 0.5, page),
    )
    done = HandoffDone(room=room, epoch=1, num_bytes=3 * page, spans=spans)
    assert node.end(second) == [sent(done), ReleaseRoom(room, completed=True)]
    assert node.rooms.is_idle


def test_the_first_token_may_be_last(node: Node) -> None:
    room = node.open()
    (handle,) = node.submit(room, 0, [1, 2, 3])
    assert node.end(handle) == []
    kinds = [type(action.message) for action in node.first_token(room) if isinstance(action, SendToDecode)]
    assert kinds == [FirstToken, HandoffDone]
    assert node.first_token(room) == []


def test_the_first_token_is_sent_once(node: Node) -> None:
    room = node.open()
    assert len(node.first_token(room)) == 1
    assert node.first_token(room) == []


def test_pages_that_decode_holds_are_not_written(node: Node) -> None:
    page = node.make.layout.page_bytes
    room = node.open(num_tokens=64, num_cached_tokens=32)
    assert node.submit(room, 0, [1, 2]) == []
    (write,) = node.rooms.pages_ready(room, 0, [1, 2, 3, 4], node.now)
    assert isinstance(write, SubmitWrite)
    assert write.run == Run(3 * page, 12 * page, 2 * page)


def test_a_room_without_a_page_to_write_ends_with_its_first_token(node: Node) -> None:
    room = node.open(num_tokens=32, num_cached_tokens=32)
    assert node.submit(room, 0, [1, 2]) == []
    assert node.first_token(room)[-1] == ReleaseRoom(room, completed=True)


def test_pages_told_twice_are_sent_once(node: Node) -> None:
    room = node.open()
    assert len(node.submit(room, 0, [1, 2])) == 1
    assert node.submit(room, 0, [1, 2]) == []
    assert node.submit(room, 1, [2]) == []
    assert len(node.submit(room, 1, [2, 3])) == 1


def test_a_page_left_out_or_too_many_is_a_bug_of_ours(node: Node) -> None:
    room = node.open()
    with pytest.raises(ValueError, match="page 0 was left out"):
        node.submit(room, 1, [5])
    with pytest.raises(ValueError, match="page 3 of 3"):
        node.submit(room, 0, [1, 2, 3, 4])


# ---- rooms that are not opened ----------------------------------------------------------------------


def test_a_full_queue_is_busy_and_opens_nothing(node: Node) -> None:
    request = node.make.request()
    busy = [sent(RoomBusy(room=request.room, epoch=1))]
    assert node.on(request, queue_has_room=False) == busy
    assert node.rooms.is_idle
    assert node.on(request) == []  # the mark was raised: decode asks again under another counter


def test_requests_at_or_below_the_mark_are_ignored(node: Node) -> None:
    node.open(5)
    assert node.on(node.make.request(5)) == []
    assert node.on(node.make.request(4)) == []
    node.open(6)


@pytest.mark.parametrize("epoch", [5, 2**63 - 1])
def test_who_spoke_in_a_decode_nodes_name_keeps_it_out_no_longer_than_it_speaks(
    node: Node, epoch: int
) -> None:
    """It named the highest epoch and the highest counter there can be."""
    node.on(node.make.hello(epoch=epoch), LINK2)
    node.on(AbortRoom(room=node.make.request(2**63 - 1).room, epoch=epoch), LINK2)
    assert node.on(node.make.hello(epoch=2), LINK) == []
    node.now += UNSCALED.decode_silence_s
    node.rooms.tick(node.now)
    node.connect(LINK, epoch=3)
    request = node.make.request(1, epoch=3)
    assert node.on(request) == [AdmitRoom(request)]


def test_pings_do_not_keep_a_link_whose_contact_ping_was_not_answered(make: Factory) -> None:
    node = Node(make)
    node.on(make.hello())
    for _ in range(2 * int(UNSCALED.decode_silence_s)):
        node.now += 0.5
        node.on(PeerPing(epoch=1, seq=1))
        node.rooms.tick(node.now)
    assert node.rooms.peers() == []


def test_marks_of_decode_incarnations_are_apart(node: Node) -> None:
    node.open(5)
    node.connect(LINK2, incarnation="D2")
    request = node.make.request(1, incarnation="D2")
    assert node.on(request, LINK2) == [AdmitRoom(request)]
    assert node.on(node.make.request(9, incarnation="D1"), LINK2) == []  # D2 cannot speak for D1


def work(prompt_ids: tuple[int, ...] = tuple(range(40)), choices: tuple[int, ...] = (0,)) -> Work:
    return Work(prompt_ids=prompt_ids, choices=choices, sampling=SamplingParams())


@pytest.mark.parametrize(
    ("changes", "code", "retriable"),
    [
        ({"weight_version": "w2"}, "version_skew", True),
        ({"dest_pages": (1, 2)}, "invalid", False),
        ({"dest_pages": (1, 2, 2)}, "invalid", False),
        ({"dest_pages": (1, 2, 64)}, "invalid", False),
        ({"dest_pages": (1, 2, -1)}, "invalid", False),
        ({"num_cached_tokens": 8}, "invalid", False),
        ({"num_cached_tokens": 48}, "invalid", False),
        ({"num_cached_tokens": -16}, "invalid", False),
        ({"work": work(prompt_ids=()), "dest_pages": ()}, "invalid", False),
        ({"work": work(choices=())}, "invalid", False),
    ],
)
def test_what_cannot_be_done_fails_clean(
    node: Node, changes: dict[str, object], code: str, retriable: bool
) -> None:
    request = node.make.request(**changes)  # type: ignore[arg-type]
    failed, drained = node.on(request)
    assert isinstance(failed, SendToDecode)
    assert isinstance(failed.message, RoomFailed)
    assert (failed.message.code, failed.message.retriable) == (code, retriable)
    assert drained == sent(Drained(room=request.room, epoch=1, clean=True))
    assert node.rooms.is_idle


def test_a_request_before_the_welcome_is_told_so(make: Factory) -> None:
    node = Node(make)
    node.on(make.hello())
    failed, _ = node.on(make.request())
    assert isinstance(failed, SendToDecode)
    assert isinstance(failed.message, RoomFailed)
    assert failed.message.code == "not_ready"


# ---- rooms that fail --------------------------------------------------------------------------------


def test_an_abort_before_anything_was_sent_is_clean(node: Node) -> None:
    room = node.open()
    assert node.on(AbortRoom(room=room, epoch=1)) == [
        ReleaseRoom(room, completed=False, reason="aborted by decode", is_aborted=True),
        sent(Drained(room=room, epoch=1, clean=True)),
    ]
    assert node.submit(room, 0, [1, 2, 3]) == []
    assert node.first_token(room) == []


def test_an_abort_waits_for_the_writes_under_way(node: Node) -> None:
    room = node.open()
    (first,) = node.submit(room, 0, [1])
    (second,) = node.submit(room, 1, [7])
    assert node.on(AbortRoom(room=room, epoch=1)) == [
        ReleaseRoom(room, completed=False, reason="aborted by decode", is_aborted=True),
        CancelWrites((first, second)),
    ]
    assert node.rooms.num_draining_rooms == 1
    assert node.on(AbortRoom(room=room, epoch=1)) == []  # said again: the answer comes when it is true
    assert node.end(second, WriteState.CANCELLED) == []
    assert node.end(first) == [sent(Drained(room=room, epoch=1, clean=True))]
    assert node.rooms.is_idle


def test_a_failed_write_fails_the_room_and_drains_unclean(node: Node) -> None:
    room = node.open()
    (first,) = node.submit(room, 0, [1])
    (second,) = node.submit(room, 1, [7])
    failed = RoomFailed(room=room, epoch=1, reason="cable", code="transfer_failed", retriable=True)
    assert node.end(first, WriteState.FAILED) == [
        sent(failed),
        ReleaseRoom(room, completed=False, reason="cable"),
        CancelWrites((second,)),
    ]
    assert node.end(second) == [sent(Drained(room=room, epoch=1, clean=False))]


def test_an_abort_of_an_unknown_room_raises_the_mark_first(node: Node) -> None:
    request = node.make.request(7)
    drained = sent(Drained(room=request.room, epoch=1, clean=False))
    assert node.on(AbortRoom(room=request.room, epoch=1)) == [drained]
    assert node.on(request) == []  # overtaken by its abort
    assert node.on(AbortRoom(room=request.room, epoch=1)) == [drained]


def test_an_abort_after_the_end_is_answered_without_a_promise(node: Node) -> None:
    room = node.open()
    (handle,) = node.submit(room, 0, [1, 2, 3])
    node.first_token(room)
    node.end(handle)
    assert node.on(AbortRoom(room=room, epoch=1)) == [sent(Drained(room=room, epoch=1, clean=False))]


def test_a_room_over_its_deadline_fails(node: Node) -> None:
    room, later = node.open(deadline_s=3.0), node.open(2, deadline_s=5.0)
    assert node.rooms.next_deadline() == 13.0
    assert node.rooms.tick(12.9) == []
    failed, release, drained = node.rooms.tick(13.0)
    assert isinstance(failed, SendToDecode)
    assert isinstance(failed.message, RoomFailed)
    assert failed.message.code == "deadline"
    assert isinstance(release, ReleaseRoom)
    assert drained == sent(Drained(room=room, epoch=1, clean=True))
    assert node.rooms.tick(13.0) == []
    assert node.rooms.next_deadline() == 15.0
    assert node.rooms.is_open(later)


def test_the_scheduler_may_fail_a_room_or_all(node: Node) -> None:
    first, second, third = node.open(1), node.open(2), node.open(3)
    failed, *_ = node.rooms.fail_room(first, "invalid", "too long", retriable=False)
    assert failed == sent(RoomFailed(room=first, epoch=1, reason="too long", code="invalid", retriable=False))
    assert node.rooms.fail_room(first, "invalid", "too long") == []
    actions = node.rooms.fail_all("shutting_down", "stopping")
    released = [action.room for action in actions if isinstance(action, ReleaseRoom)]
    assert released == [second, third]
    assert node.rooms.is_idle


# ---- epochs -----------------------------------------------------------------------------------------


def test_a_new_epoch_ends_the_rooms_of_the_old_one(node: Node) -> None:
    room = node.open()
    (handle,) = node.submit(room, 0, [1])
    actions = node.on(node.make.hello(epoch=2), LINK2)
    assert actions == [
        ReleaseRoom(room, completed=False, reason="epoch 2 began"),
        CancelWrites((handle,)),
        sent(ContactPing(epoch=2), LINK2),
    ]
    assert node.on(AbortRoom(room=room, epoch=1)) == []  # of the old epoch: dropped
    assert node.on(AbortRoom(room=room, epoch=2), LINK2) == []  # draining
    assert node.end(handle) == [sent(Drained(room=room, epoch=2, clean=True), LINK2)]


def test_messages_of_an_ended_epoch_are_dropped_and_its_ping_is_told(node: Node) -> None:
    node.on(node.make.hello(epoch=2), LINK2)
    assert node.on(node.make.request(8)) == []
    (told,) = node.on(PeerPing(epoch=1, seq=4))
    assert told == sent(PeerRefused(epoch=1, reason="epoch 1 is over here; connect again"))


def test_a_silent_peer_is_forgotten_when_its_last_write_has_ended(node: Node) -> None:
    room = node.open(deadline_s=60.0)
    (handle,) = node.submit(room, 0, [1])
    node.now = 10.0 + UNSCALED.decode_silence_s
    release, cancel = node.rooms.tick(node.now)
    assert isinstance(release, ReleaseRoom)
    assert cancel == CancelWrites((handle,))
    assert node.rooms.peers() == []
    assert node.end(handle, WriteState.FAILED) == [DisconnectPeer(node.make.region())]
    assert node.rooms.next_deadline() == float("inf")


def test_pings_keep_a_peer(node: Node) -> None:
    for _ in range(30):
        node.now += 1.0
        assert node.on(PeerPing(epoch=1, seq=1)) == [sent(PeerPong(epoch=1, seq=1))]
        assert node.rooms.tick(node.now) == []
    assert len(node.rooms.peers()) == 1


def test_a_held_loop_does_not_take_its_own_pause_for_silence(node: Node) -> None:
    node.now += 60.0
    assert node.rooms.tick(node.now) == []
    assert len(node.rooms.peers()) == 1
    node.now += UNSCALED.decode_silence_s
    node.rooms.tick(node.now)
    assert node.rooms.peers() == []


@pytest.mark.parametrize("state", list(LinkState))
def test_a_link_in_whatever_state_ends_by_itself(state: LinkState, make: Factory) -> None:
    node = Node(make)
    node.on(make.hello())
    if state is not LinkState.PINGED:
        (meet,) = node.on(ContactPong(epoch=1))
        assert isinstance(meet, MeetPeer)
        if state is LinkState.READY:
            node.end(meet.handle)
    assert [peer.state for peer in node.rooms.peers()] == [state]
    assert node.rooms.moves_on_at() == {"D1": node.now + UNSCALED.decode_silence_s}
    node.now = node.rooms.next_deadline()
    node.rooms.tick(node.now)
    assert node.rooms.peers() == []


def test_a_pause_is_announced(node: Node) -> None:
    assert node.rooms.announce_busy(40.0, node.now) == [sent(PeerPong(epoch=1, seq=0, busy_until_s=30.0))]
    node.now = 15.0
    assert node.on(PeerPing(epoch=1, seq=1)) == [sent(PeerPong(epoch=1, seq=1, busy_until_s=25.0))]


def test_other_weights_need_another_handshake(node: Node) -> None:
    room = node.open()
    identity = node.make.identity(weight_version="w2")
    assert node.rooms.set_identity(identity, "weights are w2 now") == [
        sent(
            RoomFailed(room=room, epoch=1, reason="weights are w2 now", code="version_skew", retriable=True)
        ),
        ReleaseRoom(room, completed=False, reason="weights are w2 now"),
        sent(Drained(room=room, epoch=1, clean=True)),
        sent(PeerRefused(epoch=1, reason="weights are w2 now", code="version_skew")),
        DisconnectPeer(node.make.region()),
    ]
    (refused,) = node.on(node.make.hello(epoch=2), LINK2)
    assert isinstance(refused, SendToDecode)
    assert isinstance(refused.message, PeerRefused)
    assert node.on(node.make.hello(epoch=3, weight_version="w2"), LINK2) == [
        sent(ContactPing(epoch=3), LINK2)
    ]


def test_a_request_that_crosses_new_weights_is_refused_for_its_version(node: Node) -> None:
    node.rooms.set_identity(node.make.identity(weight_version="w2", update_id="u2"), "weights are w2 now")
    (told,) = node.on(node.make.request(8))
    assert isinstance(told, SendToDecode)
    reason = "prefill serves weights 'w2', the request wants 'w1'"
    assert told.message == RoomFailed(
        room=RoomId("D1", 8), epoch=1, reason=reason, code="version_skew", retriable=True
    )
    assert node.rooms.is_idle
    (told,) = node.on(PeerPing(epoch=1, seq=9))
    assert isinstance(told, SendToDecode)
    assert isinstance(told.message, PeerRefused)
    assert told.message.update_id == "u2", "a refusal says what prefill serves"


def test_memory_that_comes_or_goes_is_no_change_of_weights(node: Node) -> None:
    room = node.open()
    failed, *_ = node.rooms.set_identity(node.make.identity("P1~1"), "memory is released or resumed")
    assert isinstance(failed, SendToDecode)
    assert isinstance(failed.message, RoomFailed)
    assert (failed.message.room, failed.message.code) == (room, "not_ready")


def test_a_decode_node_under_a_new_name_may_ask_for_its_old_rooms(node: Node) -> None:
    room = node.open()
    node.connect(LINK2, incarnation="D2")
    assert node.on(AbortRoom(room=room, epoch=1), LINK2) == []  # D1 is alive: not D2's to abort
    node.now += UNSCALED.decode_silence_s
    node.on(PeerPing(epoch=1, seq=1), LINK2)
    node.rooms.tick(node.now)
    drained = Drained(room=room, epoch=1, clean=False)
    assert node.on(AbortRoom(room=room, epoch=1), LINK2) == [sent(drained, LINK2)]


def test_every_admitted_room_is_released_once(node: Node) -> None:
    released = []
    for counter in range(1, 6):
        room = node.open(counter)
        handles = node.submit(room, 0, [1])
        actions = (
            node.on(AbortRoom(room=room, epoch=1)) if counter % 2 else node.end(handles[0], WriteState.FAILED)
        )
        actions += node.on(AbortRoom(room=room, epoch=1))
        released += [action.room for action in actions if isinstance(action, ReleaseRoom)]
    assert released == [RoomId("D1", counter) for counter in range(1, 6)]


def test_requests_are_decoded_from_the_wire_as_they_were(make: Factory) -> None:
    request = make.request()
    data = msgspec.msgpack.encode(request)
    assert msgspec.msgpack.decode(data, type=PrefillRequest) == request


# ---- what people look at ----------------------------------------------------------------------------


def test_the_rate_to_a_peer_is_that_of_writes_in_place(node: Node) -> None:
    room = node.open()
    node.now = 20.0
    handles = node.submit(room, 0, [3, 9, 5])
    node.now = 22.0
    for handle in handles[:-1]:
        node.end(handle)
    node.end(handles[-1], WriteState.FAILED)
    node.now = 30.0
    traffic = node.rooms.traffic(node.now)["D1"]
    page_bytes = node.make.layout.stride_bytes
    assert (traffic.num_bytes, traffic.busy_s) == (2 * page_bytes, 2.0)
    assert traffic.bytes_per_s == pytest.approx(page_bytes)
