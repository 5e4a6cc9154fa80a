"""Prefill's side of a hand-off between replicas of several ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from pdserve.messages.peer import ContactPong, HandoffDone, PeerRefused, PeerWelcome, RoomFailed
from pdserve.runtime.timing import UNSCALED
from pdserve.transfer.actions import (
    AdmitRoom,
    CancelWrites,
    DisconnectPeer,
    MeetPeer,
    PrefillAction,
    SendToDecode,
    SubmitWrite,
)
from pdserve.transfer.backends.base import WriteResult, WriteState
from pdserve.transfer.prefill_rooms import LinkState, PrefillRooms

if TYPE_CHECKING:
    from .conftest import Factory

LINK = b"link"


class Pair:
    """A prefill replica of `source` ranks that is met by a decode replica of `dest` ranks."""

    def __init__(self, make: Factory, source: int, dest: int) -> None:
        self.make = make
        self.now = 10.0
        self.rooms = PrefillRooms(make.identity(tp_size=source), UNSCALED, settle_s=2.0)
        self.regions = tuple(make.region(f"10.0.0.2:1500{rank}") for rank in range(dest))
        hello = msgspec.structs.replace(make.hello(tp_size=dest), regions=self.regions)
        self.on(hello)
        self.meetings = [action for action in self.on(ContactPong(epoch=1)) if isinstance(action, MeetPeer)]

    def on(self, message: object) -> list[PrefillAction]:
        return self.rooms.on_message(LINK, message, self.now, queue_has_room=True)  # type: ignore[arg-type]

    def end(self, handle: int, state: WriteState = WriteState.DONE) -> list[PrefillAction]:
        return self.rooms.on_write_result(WriteResult(handle, state, "cable"), self.now)

    def connect(self) -> None:
        for meeting in self.meetings:
            self.end(meeting.handle)
        assert [peer.state for peer in self.rooms.peers()] == [LinkState.READY]


def sent(actions: list[PrefillAction]) -> list[type]:
    return [type(action.message) for action in actions if isinstance(action, SendToDecode)]


@pytest.mark.parametrize(
    ("source", "dest", "pairs"),
    [
        (1, 2, [(0, 0), (0, 1)]),
        (2, 1, [(0, 0), (1, 0)]),
        (2, 2, [(0, 0), (1, 1)]),
        (4, 2, [(0, 0), (2, 1)]),  # two KV heads: ranks 1 and 3 hold copies
        (2, 4, [(0, 0), (0, 1), (1, 2), (1, 3)]),
    ],
)
def test_every_pair_of_ranks_that_has_something_to_write_meets(
    make: Factory, source: int, dest: int, pairs: list[tuple[int, int]]
) -> None:
    pair = Pair(make, source, dest)
    assert [(meeting.rank, pair.regions.index(meeting.region)) for meeting in pair.meetings] == pairs
    *first, last = pair.meetings
    for meeting in first:
        assert pair.end(meeting.handle) == []
    assert sent(pair.end(last.handle)) == [PeerWelcome]


def test_the_pair_is_refused_when_two_ranks_cannot_meet(make: Factory) -> None:
    pair = Pair(make, 1, 2)
    first, second = pair.meetings
    actions = pair.end(first.handle, WriteState.FAILED)
    assert sent(actions) == [PeerRefused]
    assert DisconnectPeer(pair.regions[0]) not in actions  # the other contact may still write
    assert pair.end(second.handle) == [DisconnectPeer(pair.regions[0]), DisconnectPeer(pair.regions[1])]
    assert pair.rooms.peers() == []


def test_a_room_is_done_when_the_writes_of_all_ranks_are(make: Factory) -> None:
    pair = Pair(make, 2, 1)
    pair.connect()
    request = make.request(1)
    assert pair.on(request) == [AdmitRoom(request)]
    num_pages = len(request.dest_pages)
    writes = pair.rooms.pages_ready(request.room, 0, range(num_pages), pair.now)
    assert all(isinstance(write, SubmitWrite) for write in writes)
    assert sorted({write.rank for write in writes if isinstance(write, SubmitWrite)}) == [0, 1]
    total = sum(write.run.num_bytes for write in writes if isinstance(write, SubmitWrite))
    assert total == num_pages * make.layout.page_bytes
    pair.rooms.first_token(request.room, make.token, pair.now)
    *others, last = (write.handle for write in writes if isinstance(write, SubmitWrite))
    for handle in others:
        assert pair.end(handle) == []
    assert sent(pair.end(last)) == [HandoffDone]
    assert pair.rooms.is_idle


def test_a_write_that_fails_on_one_rank_fails_the_room_of_all(make: Factory) -> None:
    pair = Pair(make, 1, 2)
    pair.connect()
    request = make.request(1)
    pair.on(request)
    writes = pair.rooms.pages_ready(request.room, 0, range(len(request.dest_pages)), pair.now)
    first, *others = [write.handle for write in writes if isinstance(write, SubmitWrite)]
    actions = pair.end(first, WriteState.FAILED)
    assert RoomFailed in sent(actions)
    assert CancelWrites(tuple(others)) in actions
    for handle in others:
        assert not pair.rooms.is_idle
        pair.end(handle, WriteState.CANCELLED)
    assert pair.rooms.is_idle
