"""What the outbox does with slots, pullers and an engine that does not always answer."""

from __future__ import annotations

import os
import select
import zlib
from collections.abc import Iterable

import pytest
import torch

from pdserve.messages.memory_region import MemoryRegion
from pdserve.messages.node import CallReply
from pdserve.messages.weights import (
    WRITE_PART_BYTES,
    MeetInbox,
    OfferInbox,
    TransferKind,
    WeightsWrittenReply,
    WriteWeights,
)
from pdserve.runtime.timing import UNSCALED
from pdserve.transfer.backends.base import WriteResult, WriteState
from pdserve.transfer.copy_plan import Run
from pdserve.weights.images import WeightImage
from pdserve.weights.outbox import (
    NUM_SLOTS,
    SLOTS_PER_PULLER,
    OutboxPart,
    OutboxWriter,
    Reply,
    WeightOutbox,
)

KIND = TransferKind("mooncake", "rdma")
IMAGE = WeightImage({"t": torch.arange(10 * WRITE_PART_BYTES // 4, dtype=torch.int32)})


def region(name: str) -> MemoryRegion:
    return MemoryRegion(session=name, address=0, num_bytes=1 << 30, scratch_address=1 << 29)


class FakeBackend:
    """Its writes end when the test says so. What a write carries is copied when it is submitted."""

    name = "mooncake"
    transport = "rdma"
    settle_s = 2.0
    num_outstanding = 0

    def __init__(self) -> None:
        self.memory = memoryview(b"")
        self.contacts: dict[int, str] = {}  # by handle: the session
        self.writes: dict[int, tuple[str, int, bytes]] = {}  # session, dest, what it carries
        self.slots: dict[int, int] = {}  # by handle
        self.left: list[str] = []
        self.results: list[WriteResult] = []
        self.stuck = 0.0

    def allocate(self, num_bytes: int) -> memoryview:
        self.memory = memoryview(bytearray(num_bytes))
        return self.memory

    def register(self) -> MemoryRegion:
        return region("own")

    def release(self) -> None:
        raise AssertionError("nobody releases an outbox")

    def first_contact(self, handle: int, region: MemoryRegion) -> None:
        self.contacts[handle] = region.session

    def submit(self, handle: int, region: MemoryRegion, run: Run) -> None:
        assert run.source not in self.slots.values(), "a slot is under a write"
        self.slots[handle] = run.source
        data = bytes(self.memory[run.source : run.source + run.num_bytes])
        self.writes[handle] = (region.session, run.dest, data)

    def cancel(self, handles: Iterable[int]) -> None:
        raise AssertionError(handles)

    def disconnect(self, region: MemoryRegion) -> None:
        assert all(session != region.session for session, _, _ in self.writes.values())
        self.left.append(region.session)

    def poll(self) -> list[WriteResult]:
        results, self.results = self.results, []
        return results

    def fileno(self) -> int:
        return -1

    def stuck_s(self, now: float) -> float:
        return self.stuck

    def close(self) -> None:
        self.memory.release()

    def end(self, handle: int, state: WriteState = WriteState.DONE, reason: str = "") -> None:
        self.contacts.pop(handle, None)
        self.writes.pop(handle, None)
        self.slots.pop(handle, None)
        self.results.append(WriteResult(handle, state, reason))


class Desk:
    """The writer, and a clock."""

    def __init__(self) -> None:
        self.backend = FakeBackend()
        self.writer = OutboxWriter(KIND, lambda: self.backend, UNSCALED)
        self.now = 0.0

    def offer(self, kind: TransferKind = KIND) -> str:
        """Why not."""
        ((_, reply),) = self.writer.handle(b"link", OfferInbox(call_id=1, kind=kind), self.now)
        assert isinstance(reply, CallReply)
        assert reply.success == (not reply.message)
        return reply.message

    def meet(self, name: str) -> None:
        assert self.writer.handle(name.encode(), MeetInbox(call_id=2, region=region(name)), self.now) == []
        (handle,) = self.backend.contacts
        self.backend.end(handle)
        assert self.writer.poll(self.now) == [(name.encode(), CallReply(call_id=2, success=True))]

    def ask(self, name: str, *parts: int) -> list[tuple[bytes, Reply]]:
        replies: list[tuple[bytes, Reply]] = []
        for part in parts:
            offset = part * WRITE_PART_BYTES
            message = WriteWeights(
                call_id=part,
                image=1,
                offset=offset,
                num_bytes=WRITE_PART_BYTES,
                region=region(name),
                dest=offset,
            )
            replies += self.writer.handle(name.encode(), OutboxPart(message, IMAGE), self.now)
        self.start()
        return replies

    def start(self) -> None:
        while self.writer.start_next(self.now):
            pass

    @property
    def on_the_wire(self) -> list[tuple[str, int]]:
        return [(session, dest // WRITE_PART_BYTES) for session, dest, _ in self.backend.writes.values()]

    def end(self, state: WriteState = WriteState.DONE, reason: str = "") -> list[tuple[bytes, Reply]]:
        """The oldest write."""
        self.backend.end(next(iter(self.backend.writes)), state, reason)
        replies = self.writer.poll(self.now)
        self.start()
        return replies


@pytest.fixture
def desk() -> Desk:
    desk = Desk()
    assert desk.offer() == ""
    desk.meet("a")
    return desk


def test_a_puller_has_its_slots_and_the_next_part_waits(desk: Desk) -> None:
    desk.ask("a", 0, 1, 2, 3)
    assert desk.on_the_wire == [("a", 0), ("a", 1)]
    assert len(desk.on_the_wire) == SLOTS_PER_PULLER
    (carried,) = (data for _, dest, data in desk.backend.writes.values() if dest == WRITE_PART_BYTES)
    assert carried == IMAGE.read(WRITE_PART_BYTES, WRITE_PART_BYTES)
    first = IMAGE.read(0, WRITE_PART_BYTES)
    reply = WeightsWrittenReply(call_id=0, success=True, num_bytes=len(first), crc32=zlib.crc32(first))
    assert desk.end() == [(b"a", reply)]
    assert desk.on_the_wire == [("a", 1), ("a", 2)]


def test_the_last_part_is_as_long_as_the_image(desk: Desk) -> None:
    desk.ask("a", 10)
    ((_, reply),) = desk.end()
    assert isinstance(reply, WeightsWrittenReply)
    assert 0 < reply.num_bytes == IMAGE.num_bytes - 10 * WRITE_PART_BYTES


def test_pullers_take_turns(desk: Desk) -> None:
    desk.meet("b")
    desk.ask("a", 0, 1, 2)
    desk.ask("b", 0, 1, 2)
    assert sorted(desk.on_the_wire) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    desk.end()
    desk.end()
    assert sorted(desk.on_the_wire) == [("a", 2), ("b", 0), ("b", 1)]


def test_a_failed_write_is_told_and_its_slot_used_again(desk: Desk) -> None:
    desk.ask("a", 0, 1, 2)
    failed = WeightsWrittenReply(call_id=0, success=False, message="out of reach")
    assert desk.end(WriteState.FAILED, "out of reach") == [(b"a", failed)]
    assert len(desk.on_the_wire) == SLOTS_PER_PULLER


def test_a_part_that_cannot_be_copied_is_refused_alone(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy_into(image: WeightImage, rows: object, offset: int) -> int:
        raise ValueError("no such bytes")

    with monkeypatch.context() as patch:
        patch.setattr(WeightImage, "copy_into", copy_into)
        assert desk.ask("a", *range(NUM_SLOTS + 1)) == []
    replies = desk.writer.poll(desk.now)
    assert len(replies) == NUM_SLOTS + 1, "slots are given back"
    assert all(isinstance(reply, WeightsWrittenReply) and not reply.success for _, reply in replies)
    desk.ask("a", 0)
    assert desk.on_the_wire == [("a", 0)]


def test_a_question_that_raises_is_answered_and_the_thread_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def first_contact(backend: FakeBackend, handle: int, region: MemoryRegion) -> None:
        raise OverflowError("int too big to convert")

    monkeypatch.setattr(FakeBackend, "first_contact", first_contact)
    monkeypatch.setattr(FakeBackend, "fileno", lambda _: os.eventfd(0))
    outbox = WeightOutbox(KIND, FakeBackend, UNSCALED)
    replies: list[CallReply] = []
    asked: list[OfferInbox | MeetInbox] = [
        OfferInbox(call_id=0, kind=KIND),
        MeetInbox(call_id=1, region=region("a")),
        OfferInbox(call_id=2, kind=KIND),
    ]
    for call_id, message in enumerate(asked):
        outbox.ask(b"link", message)
        while len(replies) <= call_id:
            assert select.select([outbox], [], [], 30)[0]
            replies += [reply for _, reply in outbox.poll() if isinstance(reply, CallReply)]
    assert [reply.success for reply in replies] == [True, False, True]
    assert "OverflowError" in replies[1].message
    outbox.close()


def test_an_inbox_that_was_not_met_is_not_written(desk: Desk) -> None:
    ((_, reply),) = desk.ask("b", 0)
    assert reply == WeightsWrittenReply(call_id=0, success=False, message="this inbox was not met")
    desk.writer.handle(b"b", MeetInbox(call_id=2, region=region("b")), desk.now)
    (handle,) = desk.backend.contacts
    desk.backend.end(handle, WriteState.FAILED, "nobody there")
    refused = CallReply(call_id=2, success=False, message="nobody there")
    assert desk.writer.poll(desk.now) == [(b"b", refused)]
    assert len(desk.ask("b", 0)) == 1
    assert desk.on_the_wire == []


def test_frozen_pullers_hold_up_nobody_until_all_slots_are_theirs(desk: Desk) -> None:
    num_frozen = NUM_SLOTS // SLOTS_PER_PULLER - 1
    for number in range(num_frozen):
        desk.meet(f"frozen {number}")
        desk.ask(f"frozen {number}", 0, 1, 2)
    desk.now += UNSCALED.weight_write_stall_s + 1
    assert desk.offer() == ""
    desk.ask("a", 0, 1)
    assert ("a", 0) in desk.on_the_wire, "these slots are the others'"
    desk.now += UNSCALED.weight_write_stall_s + 1
    assert desk.offer() == f"{NUM_SLOTS} writes of weights wait for nodes that take nothing"
    while desk.on_the_wire:
        desk.end()
    assert desk.offer() == ""


def test_an_engine_that_hangs_or_is_of_another_kind_is_not_offered(desk: Desk) -> None:
    desk.backend.stuck = 2.0
    assert desk.offer() == "its transfer engine hangs in a call"
    desk.backend.stuck = 0.0
    tcp = TransferKind("mooncake", "tcp")
    assert desk.offer(tcp) == "it moves weights over mooncake/rdma, not over mooncake/tcp"


def test_a_frozen_puller_does_not_hold_on_to_weights(desk: Desk) -> None:
    """Those that serve may be replaced meanwhile, and want their memory back."""
    desk.ask("a", 0, 1, 2, 3)
    desk.now += UNSCALED.weight_puller_idle_s + 1
    refused = [(link, reply.success) for link, reply in desk.writer.poll(desk.now)]
    assert refused == [(b"a", False)] * 2
    desk.end()
    assert desk.on_the_wire == [("a", 1)]
    assert desk.backend.left == []
    desk.end()
    assert desk.backend.left == ["a"]


def test_no_memory_is_a_no(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(backend: FakeBackend, num_bytes: int) -> memoryview:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(FakeBackend, "allocate", allocate)
    desk = Desk()
    assert desk.offer() == "no memory for weights can be registered: Cannot allocate memory"
    monkeypatch.undo()
    assert desk.offer() == ""


def test_who_asks_for_nothing_is_let_go_of(desk: Desk) -> None:
    desk.ask("a", 0)
    desk.now += UNSCALED.weight_puller_idle_s + 1
    assert desk.writer.poll(desk.now) == []
    assert desk.backend.left == [], "a write to it is outstanding"
    desk.end()
    assert desk.backend.left == ["a"]
    assert not desk.writer.has_pullers
    assert len(desk.ask("a", 0)) == 1, "it has to be met again"
    desk.meet("a")
    assert desk.ask("a", 0) == []
    assert desk.on_the_wire == [("a", 0)]
