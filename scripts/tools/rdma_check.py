"""Hands rooms over from prefill nodes to decode nodes over this machine's RDMA device, without an engine.

    scripts/dev rdma_check                          # on a machine with an RDMA device
    scripts/dev softroce scripts/dev rdma_check     # on one without: inside a small virtual machine
    scripts/dev rdma_check --transport tcp          # the same over TCP, on any machine

Prefill nodes in one process, decode nodes in another, TP 1 and 2 on each side, every pair of them. Both room
machines, their messages over zmq, the page allocator and Mooncake are those of a cluster. In place of the
engine there are bytes that follow from a page's tokens: no model is loaded and torch is not imported, so the
check is as fast under emulation as the wire is.

On every pair: rooms that complete, two at once, one of which has its first page already, beside one that is
aborted between its chunks; one that is aborted while its writes are on their way; and one whose writes are
reported as failed and land later. Passes when every page of a completed room holds what it must, every page
that was given back had received by then whatever was still on its way, and no other byte of decode's memory
was ever touched. Over RDMA the device itself must have counted the packets that this needs.
"""

from __future__ import annotations

import argparse
import json
import random
import select
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, assert_never

import zmq

from pdserve.components.page_allocator import PageAllocator
from pdserve.decode.peer_links import LinkDown, PeerLinks
from pdserve.messages.channel import ServerChannel
from pdserve.messages.kv_layout import KVLayout, kv_heads_of_rank
from pdserve.messages.malformed import MalformedMessage
from pdserve.messages.node import FailureCode
from pdserve.messages.peer import (
    PROTOCOL_VERSION,
    PeerIdentity,
    PeerToPrefill,
    PrefillRequest,
    RoomId,
)
from pdserve.messages.report import SampledToken
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.work import Work
from pdserve.runtime.errors import StartupError
from pdserve.runtime.process import end_now
from pdserve.runtime.timing import UNSCALED
from pdserve.runtime.waiting import Waiter
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
from pdserve.transfer.backends import create_backend
from pdserve.transfer.backends.devices import INFINIBAND, rdma_devices
from pdserve.transfer.decode_rooms import DecodeRooms
from pdserve.transfer.prefill_rooms import PrefillRooms

HOST = "127.0.0.1"
NO_KEYS = None  # the links between the two processes do not leave this host
LAYOUT = KVLayout(num_kv_heads=4, num_layers=2, page_size=16, head_dim=32, dtype="float32")
TP_SIZES = (1, 2)
NUM_PAGES = 56  # of each pool
HELD_PAGE_EVERY = 4  # of decode's pages somebody else has every fourth: rooms are cut into several runs
ROOM_PAGES = 6
CHUNK_PAGES = 3  # the first chunk of a room; the rest is the second
SOURCE_FILL, DEST_FILL = 0xDB, 0x5A  # of prefill's and of decode's pages that hold nobody's KV
HELD = "held"  # how the ids of requests begin whose second chunk is never computed
LARGEST_MTU = 4096  # bytes of payload in one packet of RDMA
STEP_S = 0.02


@dataclass(frozen=True, slots=True)
class Kind:
    """What is done with a room, and what shows that it was."""

    name: str
    faults: str = ""  # of the prefill node's backend, as `FaultPlan.parse` takes them
    num_cached_pages: int = 0  # that decode holds already
    is_held: bool = False  # prefill never computes the second chunk
    aborts_at_once: bool = False  # otherwise a held room is aborted when its first chunk is in place


WHOLE = Kind("whole")
DELTA = Kind("delta", num_cached_pages=1)
ABORTED = Kind("aborted", is_held=True)
OVERTAKEN = Kind("overtaken", faults="delay=1,delay_s=1", is_held=True, aborts_at_once=True)
LATE = Kind("late", faults="late=1")
# Those that may leave something on its way come first: what it could do, it can do to the rooms behind.
ROUNDS = ((LATE,), (OVERTAKEN,), (WHOLE, DELTA, ABORTED))
FAULTS = tuple(dict.fromkeys(kind.faults for kinds in ROUNDS for kind in kinds))


class CheckError(Exception):
    """Something that must hold does not."""


class NodeName(NamedTuple):
    """A prefill node of the check."""

    tp_size: int
    faults: str

    def __str__(self) -> str:
        return f"prefill TP {self.tp_size} {self.faults}".rstrip()


def identity(incarnation: str, tp_size: int, transport: str) -> PeerIdentity:
    return PeerIdentity(
        incarnation=incarnation,
        protocol_version=PROTOCOL_VERSION,
        model_fingerprint="none",
        weight_version="none",
        layout=LAYOUT,
        tp_size=tp_size,
        backend="mooncake",
        transport=transport,
    )


def kv_of(first_token: int) -> bytes:
    """What all heads of a page hold, in their order, that begins with this token."""
    return random.Random(first_token).randbytes(LAYOUT.page_bytes)


class Ranks:
    """The ranks of one node: each has a backend, and a pool that holds its heads of every page."""

    def __init__(self, tp_size: int, transport: str, waiter: Waiter, faults: str, fill: int) -> None:
        self._fill = bytes([fill]) * LAYOUT.head_bytes
        self._heads = [kv_heads_of_rank(LAYOUT.num_kv_heads, tp_size, rank) for rank in range(tp_size)]
        self.backends = [create_backend("mooncake", transport, HOST, faults=faults) for _ in range(tp_size)]
        self._pools = [
            backend.allocate(NUM_PAGES * LAYOUT.of_rank(tp_size).stride_bytes) for backend in self.backends
        ]
        self.regions = tuple(backend.register() for backend in self.backends)
        for backend in self.backends:
            waiter.add(backend.fileno())
        for page in range(NUM_PAGES):
            self.empty(page)

    def head(self, page: int, head: int) -> memoryview:
        """The memory of one head of a page."""
        (rank,) = (rank for rank, heads in enumerate(self._heads) if head in heads)
        heads = self._heads[rank]
        start = (page * len(heads) + head - heads.start) * LAYOUT.head_bytes
        return self._pools[rank][start : start + LAYOUT.head_bytes]

    def store(self, page: int, kv: bytes) -> None:
        for head in range(LAYOUT.num_kv_heads):
            self.head(page, head)[:] = kv[head * LAYOUT.head_bytes : (head + 1) * LAYOUT.head_bytes]

    def load(self, page: int) -> bytes:
        return b"".join(self.head(page, head) for head in range(LAYOUT.num_kv_heads))

    def empty(self, page: int) -> None:
        self.store(page, self._fill * LAYOUT.num_kv_heads)

    def is_empty(self, page: int) -> bool:
        return self.load(page) == self._fill * LAYOUT.num_kv_heads


# ---- prefill ----------------------------------------------------------------------------------------


class PrefillNode:
    """Every prompt is computed at once: its first chunk as it is admitted, the second a turn later."""

    def __init__(self, name: NodeName, transport: str, waiter: Waiter) -> None:
        self.name = name
        self._ranks = Ranks(name.tp_size, transport, waiter, name.faults, SOURCE_FILL)
        settle_s = self._ranks.backends[0].settle_s
        self._rooms = PrefillRooms(identity(str(name), name.tp_size, transport), UNSCALED, settle_s=settle_s)
        self._allocator = PageAllocator(NUM_PAGES)
        self._half_done: list[RoomId] = []
        self._channel: ServerChannel[PeerToPrefill] = ServerChannel(
            zmq.Context(), HOST, 0, PeerToPrefill, keys=NO_KEYS
        )
        waiter.add(self._channel.socket)
        self.address = f"tcp://{HOST}:{self._channel.port}"

    @property
    def is_idle(self) -> bool:
        return self._rooms.is_idle and self._allocator.num_free == NUM_PAGES

    def step(self) -> None:
        now = time.monotonic()
        half_done, self._half_done = self._half_done, []
        for room in half_done:
            self._act(self._compute_rest(room, now))
        for link, message in self._channel.receive():
            assert not isinstance(message, MalformedMessage), message
            self._act(self._rooms.on_message(link, message, now, queue_has_room=True))
        for backend in self._ranks.backends:
            for result in backend.poll():
                self._act(self._rooms.on_write_result(result, now))
        self._act(self._rooms.tick(now))

    def _act(self, actions: list[PrefillAction]) -> None:
        backends = self._ranks.backends
        for action in actions:
            match action:
                case SendToDecode(link, message):
                    self._channel.send(link, message)
                case MeetPeer(handle, region, rank):
                    backends[rank].first_contact(handle, region)
                case SubmitWrite(handle, region, run, rank):
                    backends[rank].submit(handle, region, run)
                case CancelWrites(handles):
                    for backend in backends:
                        backend.cancel(handles)
                case DisconnectPeer(region, rank):
                    backends[rank].disconnect(region)
                case AdmitRoom(request):
                    self._act(self._compute_first_chunk(request, time.monotonic()))
                case ReleaseRoom(room):
                    for page in self._allocator.free_private(room):
                        self._ranks.empty(page)
                case _:
                    assert_never(action)

    def _compute_first_chunk(self, request: PrefillRequest, now: float) -> list[PrefillAction]:
        pages = self._allocator.allocate_private(request.room, len(request.dest_pages))
        assert pages is not None, "the pool holds every room that decode can open"
        first_tokens = request.work.prompt_ids[:: LAYOUT.page_size]
        for page, token in zip(pages, first_tokens, strict=True):
            self._ranks.store(page, kv_of(token))
        if not request.request_id.startswith(HELD):
            self._half_done.append(request.room)
        return self._rooms.pages_ready(request.room, 0, pages[:CHUNK_PAGES], now)

    def _compute_rest(self, room: RoomId, now: float) -> list[PrefillAction]:
        rest = self._allocator.private_pages(room)[CHUNK_PAGES:]
        actions = self._rooms.pages_ready(room, CHUNK_PAGES, rest, now)
        return actions + self._rooms.first_token(room, (SampledToken(0, 7),), now)


def serve_prefill(transport: str) -> int:
    """Says the addresses of its nodes as a line of JSON. Ends with stdin; 1: a node still holds something."""
    waiter = Waiter()
    waiter.add(sys.stdin.fileno())
    nodes = [
        PrefillNode(NodeName(tp_size, faults), transport, waiter) for tp_size in TP_SIZES for faults in FAULTS
    ]
    print(json.dumps([[*node.name, node.address] for node in nodes]), flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        waiter.wait(STEP_S)
        for node in nodes:
            node.step()
    busy = [str(node.name) for node in nodes if not node.is_idle]
    if busy:
        print(f"nodes still hold a room or a page: {', '.join(busy)}", file=sys.stderr)
    return bool(busy)


# ---- decode -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Room:
    """One hand-off, as decode sees it."""

    kind: Kind
    name: NodeName  # of the prefill node
    kv: tuple[bytes, ...]  # that belongs into each page
    pages: tuple[int, ...]  # of which decode holds the first `kind.num_cached_pages` already
    failure: FailureCode | None = None
    num_landed: int = 0  # heads of its pages that had been written when it was over

    @property
    def num_cached(self) -> int:
        return self.kind.num_cached_pages

    @property
    def has_shown_its_kind(self) -> bool:
        """Otherwise it is tried again: on a machine so slow that a node seemed to be lost, or that the faulty
        backend was woken too late to send what it had held back."""
        if self.failure == "peer_lost":
            return False
        return self.kind is not LATE or self.num_landed > 0


class DecodeNode:
    """Opens rooms on every prefill node, and looks at all of its memory whenever one is over."""

    def __init__(self, tp_size: int, transport: str, waiter: Waiter) -> None:
        self.tp_size = tp_size
        self._ranks = Ranks(tp_size, transport, waiter, "", DEST_FILL)
        node = identity(f"decode TP {tp_size}", tp_size, transport)
        self._rooms = DecodeRooms(node, self._ranks.regions, NUM_PAGES, UNSCALED)
        self._links = PeerLinks(zmq.Context(), waiter, NO_KEYS)
        self._allocator = PageAllocator(NUM_PAGES)
        pages = self._allocator.allocate_private("others", NUM_PAGES)
        assert pages is not None
        self._allocator.free_private("others", [page for page in pages if page % HELD_PAGE_EVERY])
        self._open: dict[RoomId, Room] = {}
        self._next_token = 0

    @property
    def is_idle(self) -> bool:
        return self._rooms.is_idle

    def is_ready_with(self, addresses: Collection[str]) -> bool:
        return {*addresses} <= {*self._rooms.ready_peers().values()}

    def describe(self) -> str:
        """What it waits for."""
        peers = [
            f"{peer.address} is {peer.state.value} {peer.reason}".rstrip() for peer in self._rooms.peers()
        ]
        rooms = [f"{room.kind.name} from {room.name}" for room in self._open.values()]
        return f"decode TP {self.tp_size} has rooms {rooms}; {'; '.join(peers)}"

    def join(self, address: str) -> None:
        self._act(self._rooms.add_peer(address, time.monotonic()))

    def open(self, kind: Kind, name: NodeName, address: str) -> Room:
        room_id = self._rooms.next_room_id
        cached = self._allocator.allocate_private(room_id, kind.num_cached_pages)
        exposed = self._allocator.reserve_exposed(room_id, ROOM_PAGES - kind.num_cached_pages)
        assert cached is not None, "the pool holds all rooms of a round"
        assert exposed is not None, "the pool holds all rooms of a round"
        tokens = range(self._next_token, self._next_token + ROOM_PAGES * LAYOUT.page_size)
        self._next_token = tokens.stop
        pages = (*cached, *exposed)
        _, actions = self._rooms.open_room(
            address,
            request_id=f"{HELD if kind.is_held else kind.name}-{room_id.counter}",
            attempt=1,
            work=Work(prompt_ids=tuple(tokens), choices=(0,), sampling=SamplingParams()),
            dest_pages=pages,
            num_cached_tokens=kind.num_cached_pages * LAYOUT.page_size,
            deadline_s=3600.0,
            now=time.monotonic(),
        )
        kv = tuple(kv_of(token) for token in tokens[:: LAYOUT.page_size])
        room = self._open[room_id] = Room(kind, name, kv, pages)
        self._act(actions)
        if kind.aborts_at_once:
            self._act(self._rooms.abort(room_id, time.monotonic()))
        return room

    def step(self) -> None:
        for address, message in self._links.receive():
            now = time.monotonic()
            if isinstance(message, LinkDown):
                self._act(self._rooms.on_link_down(address, message.epoch, now))
            else:
                self._act(self._rooms.on_message(address, message, now))
        for room_id, room in list(self._open.items()):
            if room.kind.is_held and self._holds_first_chunk(room):
                self._act(self._rooms.abort(room_id, time.monotonic()))
        self._act(self._rooms.tick(time.monotonic()))

    def check_untouched(self) -> None:
        """Every page holds what it held before, but for those that a room exposes."""
        exposed = {page for room in self._open.values() for page in room.pages[room.num_cached :]}
        for page in range(NUM_PAGES):
            if page not in exposed and not self._ranks.is_empty(page):
                state = self._allocator.describe(page)
                raise CheckError(f"decode TP {self.tp_size}: page {page} was written, and is {state}")

    def _act(self, actions: Sequence[DecodeAction]) -> None:
        for action in actions:
            match action:
                case OpenLink(address, epoch):
                    self._links.open(address, epoch)
                case CloseLink(address):
                    self._links.close(address)
                case SendToPrefill(address, message):
                    self._links.send(address, message)
                case PeerReady() | PeerLost() | FirstTokenArrived():
                    pass
                case HandoffComplete(room_id):
                    self._complete(room_id)
                case RoomEnded(room_id, code, reason):
                    room = self._open[room_id]
                    if code != "peer_lost" and room.kind is not LATE:
                        raise CheckError(f"{self._name(room)}: {code}: {reason}")
                    room.failure = code
                    self._allocator.quarantine(room_id)
                case PagesReleased(room_id):
                    self._release(room_id)
                case _:
                    assert_never(action)

    def _complete(self, room_id: RoomId) -> None:
        room = self._open[room_id]
        self._allocator.exposed_to_private(room_id, room_id)
        for page, kv in list(zip(room.pages, room.kv, strict=True))[room.num_cached :]:
            if self._ranks.load(page) != kv:
                raise CheckError(f"{self._name(room)}: page {page} is in place and holds other bytes")
        room.num_landed = (len(room.pages) - room.num_cached) * LAYOUT.num_kv_heads
        self._end(room_id)
        self._allocator.free_private(room_id)

    def _release(self, room_id: RoomId) -> None:
        """Nothing may reach its pages any more: what was on its way is there, and nothing of what was not."""
        room = self._open[room_id]
        landed = [self._num_heads_landed(room, index) for index in range(len(room.pages))]
        room.num_landed = sum(landed)
        if room.failure is None:  # an abort
            all_heads = LAYOUT.num_kv_heads
            if landed != [all_heads] * CHUNK_PAGES + [0] * (ROOM_PAGES - CHUNK_PAGES):
                raise CheckError(
                    f"{self._name(room)}: {landed} of {all_heads} heads of its pages were written when they "
                    f"came back, and {CHUNK_PAGES} whole pages had been sent"
                )
        self._end(room_id)
        self._allocator.release_room(room_id)

    def _end(self, room_id: RoomId) -> None:
        room = self._open.pop(room_id)
        for page in room.pages[room.num_cached :]:
            self._ranks.empty(page)
        self.check_untouched()

    def _num_heads_landed(self, room: Room, index: int) -> int:
        """Of one page. A late write may find prefill's own pages emptied, and then brings that."""
        num_landed, size = 0, LAYOUT.head_bytes
        for head in range(LAYOUT.num_kv_heads):
            found = bytes(self._ranks.head(room.pages[index], head))
            if found in (room.kv[index][head * size : (head + 1) * size], bytes([SOURCE_FILL]) * size):
                num_landed += 1
            elif found != bytes([DEST_FILL]) * size:
                page = room.pages[index]
                raise CheckError(f"{self._name(room)}: head {head} of page {page} is written in part")
        return num_landed

    def _holds_first_chunk(self, room: Room) -> bool:
        chunk = list(zip(room.pages, room.kv, strict=True))[:CHUNK_PAGES]
        return all(self._ranks.load(page) == kv for page, kv in chunk)

    def _name(self, room: Room) -> str:
        return f"{room.kind.name} room, {room.name} -> decode TP {self.tp_size}"


# ---- the check --------------------------------------------------------------------------------------


class Check:
    """The prefill nodes' process, and the decode nodes in this one."""

    def __init__(self, transport: str, timeout_s: float) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._prefill = subprocess.Popen(
            [sys.executable, "-P", __file__, "--transport", transport, "--serve-prefill"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._waiter = Waiter()
        self._decodes = [DecodeNode(tp_size, transport, self._waiter) for tp_size in TP_SIZES]
        self._addresses: dict[NodeName, str] = {}

    def meet(self) -> None:
        """Every decode node shakes hands with every prefill node."""
        said = self._prefill.stdout
        assert said is not None
        self._until(lambda: bool(select.select([said], [], [], 0)[0]), "the prefill nodes have started")
        line = said.readline()
        if not line:
            raise CheckError("the prefill nodes did not start; their error is above")
        self._addresses = {NodeName(*name): address for *name, address in json.loads(line)}
        for decode in self._decodes:
            for address in self._addresses.values():
                decode.join(address)
        self._until(self._is_ready, "all pairs are ready")

    def carry_out(self, kinds: Collection[Kind]) -> list[Room]:
        """A room of each kind on every pair at once, again where one did not show what it is there for."""
        waiting = [
            (decode, kind, name)
            for decode in self._decodes
            for name in self._addresses
            for kind in kinds
            if kind.faults == name.faults
        ]
        tried: list[Room] = []
        while waiting:
            self._until(self._is_ready, "all pairs are ready")
            rooms = [decode.open(kind, name, self._addresses[name]) for decode, kind, name in waiting]
            self._until(lambda: all(decode.is_idle for decode in self._decodes), "all rooms are over")
            tried += rooms
            waiting = [
                wanted for wanted, room in zip(waiting, rooms, strict=True) if not room.has_shown_its_kind
            ]
        return tried

    def end(self) -> None:
        """Both sides are idle, and decode's memory is as it was at first."""
        self._until(self._is_ready, "all pairs are ready")
        for decode in self._decodes:
            decode.check_untouched()
        self._prefill.communicate()
        if self._prefill.returncode != 0:
            raise CheckError("the prefill nodes did not end well; their error is above")

    def _is_ready(self) -> bool:
        return all(decode.is_ready_with(self._addresses.values()) for decode in self._decodes)

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        while not condition():
            if time.monotonic() > self._deadline:
                waiting = "; ".join(decode.describe() for decode in self._decodes)
                raise CheckError(f"the time is up and it is not so that {what}: {waiting}")
            self._waiter.wait(STEP_S)
            for decode in self._decodes:
                decode.step()


def received_packets() -> int:
    """Of every RDMA device here, as the driver counts them: rxe's own name, then a network card's."""
    counters = (
        *INFINIBAND.glob("*/ports/*/hw_counters/rcvd_pkts"),
        *INFINIBAND.glob("*/ports/*/counters/port_rcv_packets"),
    )
    return sum(int(path.read_text()) for path in counters)


def run(transport: str, timeout_s: float) -> str:
    """What was shown. Raises CheckError for what does not hold."""
    began = time.monotonic()
    check = Check(transport, timeout_s)
    check.meet()
    say(f"all pairs are ready over {transport}", began)
    packets_before = received_packets()
    rooms: list[Room] = []
    for kinds in ROUNDS:
        tried = check.carry_out(kinds)
        say(f"{len(tried)} rooms: {', '.join(kind.name for kind in kinds)}", began)
        rooms += tried
    num_packets = received_packets() - packets_before
    check.end()
    num_bytes = sum(room.num_landed for room in rooms) * LAYOUT.head_bytes
    if transport == "rdma":
        say(f"rdma: {num_bytes:,} bytes in {num_packets:,} packets of the device", began)
        if num_packets < num_bytes // LARGEST_MTU:
            raise CheckError(f"the device received {num_packets} packets for {num_bytes} bytes")
    return summary(transport, rooms)


def summary(transport: str, rooms: Collection[Room]) -> str:
    def pages(some: Collection[Room]) -> int:
        return sum(room.num_landed for room in some) // LAYOUT.num_kv_heads

    shown = [room for room in rooms if room.has_shown_its_kind]
    whole = [room for room in shown if room.kind in (WHOLE, DELTA)]
    aborted = [room for room in shown if room.kind in (ABORTED, OVERTAKEN)]
    late = [room for room in shown if room.kind is LATE]
    return (
        f"OK over {transport}, prefill TP 1 and 2 to decode TP 1 and 2: "
        f"{len(whole)} rooms handed over, {pages(whole)} pages, each byte in its place; "
        f"{len(aborted)} aborted and {len(late)} whose writes landed after they had failed, "
        f"{pages(aborted + late)} pages, all in place before they were given back; no other byte was touched"
    )


def say(what: str, began: float) -> None:
    print(f"{time.monotonic() - began:6.1f} s  {what}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transport", choices=("rdma", "tcp"), default="rdma", help="[rdma]")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds until it gives up [300]")
    parser.add_argument("--serve-prefill", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.transport == "rdma" and not rdma_devices():
        print("no RDMA device here: scripts/dev softroce scripts/dev rdma_check", file=sys.stderr)
        return 1
    try:
        if options.serve_prefill:
            return serve_prefill(options.transport)
        print(run(options.transport, options.timeout))
    except (CheckError, StartupError) as error:
        print(f"FAILED: {error}")
        return 1
    return 0


if __name__ == "__main__":
    end_now(main())
