"""One node reads another's weights: over real sockets and engines, with the parts that serve them."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq
from safetensors.torch import load_file

from pdserve.messages.channel import ServerChannel
from pdserve.messages.memory_region import MemoryRegion
from pdserve.messages.node import CallReply, ClientToNode
from pdserve.messages.weights import (
    STAGE_PART_BYTES,
    WRITE_PART_BYTES,
    FromPeer,
    OpenWeights,
    ReadWeights,
    TransferKind,
    WeightImageReply,
    WeightsWrittenReply,
    WriteWeights,
)
from pdserve.runtime.errors import StartupError
from pdserve.runtime.timing import UNSCALED, Timing
from pdserve.tests.deadline import DEADLINE_S
from pdserve.tests.unit.weights.weights_peer import ImageJobs, WeightsServer, images_of, weights
from pdserve.transfer.backends import create_backend, devices
from pdserve.transfer.backends.base import TransferBackend
from pdserve.transfer.backends.faulty import FaultPlan, FaultyBackend
from pdserve.transfer.backends.shm import ShmBackend
from pdserve.weights import inbox as weight_inbox
from pdserve.weights import outbox
from pdserve.weights.images import WeightImage, WeightImages
from pdserve.weights.inbox import MAX_SET_ASIDE, Inbox, Inboxes
from pdserve.weights.outbox import WeightOutbox
from pdserve.weights.peer import OVER_LINK, WeightPuller
from pdserve.weights.staged import StagedFile

PLENTY = 1 << 40
SLOT_BYTES = 1 << 20
SHM = TransferKind("shm", "shm")
TCP = TransferKind("mooncake", "tcp")
KINDS = [
    SHM,
    TCP,
    TransferKind("mooncake", "rdma"),
    TransferKind("nixl", "tcp"),
]


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> TransferKind:
    kind: TransferKind = request.param
    if kind.transport == "rdma" and not devices.rdma_devices():
        pytest.skip("no RDMA device here: scripts/dev softroce has one")
    if kind.backend == "nixl" and not any(map(find_spec, ("nixl_cu12", "nixl_cu13"))):
        pytest.skip("nixl is not installed: pip install 'pdserve[nixl]'")
    return kind


def engine(kind: TransferKind) -> Callable[[], TransferBackend]:
    return lambda: create_backend(kind.backend, kind.transport, "127.0.0.1")


def faulty(plan: str) -> Callable[[], TransferBackend]:
    return lambda: FaultyBackend(ShmBackend(), FaultPlan.parse(plan))


def no_engine() -> TransferBackend:
    raise StartupError("no engine starts here")


def tensors() -> dict[str, torch.Tensor]:
    """More than one part long; one of them is rows of a larger tensor, one is empty, one is bfloat16."""
    generator = torch.Generator().manual_seed(5)
    fused = torch.randn(300, 2000, generator=generator)
    return {
        "rows": fused[100:200],
        "more rows": fused[200:],
        "half": torch.randn(1_000_003, generator=generator).bfloat16(),
        "none": torch.empty(0, 4),
        "norm": torch.randn(7, generator=generator),
    }


@contextmanager
def peer(
    images: WeightImages,
    *,
    serves: int = 1 << 30,
    kind: TransferKind = SHM,
    make_backend: Callable[[], TransferBackend] | None = None,
) -> Iterator[FromPeer]:
    """A scheduler that answers `serves` messages, and then no more."""
    server = WeightsServer(images, WeightOutbox(kind, make_backend or engine(kind), UNSCALED), serves=serves)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server.address
    finally:
        server.stop()
        thread.join()


@dataclass
class Node:
    """One that pulls. Keeps what was counted."""

    kind: TransferKind = SHM
    make_backend: Callable[[], TransferBackend] | None = None
    available_bytes: int = PLENTY
    counted: list[tuple[str, int]] = field(default_factory=list)
    timing: Timing = UNSCALED

    def __post_init__(self) -> None:
        self.puller = WeightPuller(
            self.kind,
            Inboxes(self.make_backend or engine(self.kind), slot_bytes=SLOT_BYTES),
            lambda: self.available_bytes,
            lambda over, num_bytes, duration_s: self.counted.append((over, num_bytes)),
            link_keys=None,
            timing=self.timing,
        )

    def pull(self, source: FromPeer) -> StagedFile:
        return self.puller.pull(source)


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.puller.close()


def check(file: StagedFile, given: Mapping[str, torch.Tensor]) -> None:
    """And close it."""
    read = load_file(file.path)
    assert read.keys() == given.keys()
    for name, tensor in given.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    file.close()


def test_every_bit_arrives(kind: TransferKind) -> None:
    """Over the engines; the outbox and the inbox of one process too, as when a node pulls from itself."""
    given = tensors()
    images = images_of(given)
    num_bytes = WeightImage(given).num_bytes
    assert num_bytes > 2 * SLOT_BYTES
    node = Node(kind)
    with peer(images, kind=kind) as source:
        file = node.pull(source)
        again = node.pull(source)
    check(file, given)
    check(again, given)
    assert node.counted == [(str(kind), num_bytes)] * 2
    images.poll(0.0)
    assert images.deadline == math.inf, "who has read to the end holds nothing"
    node.puller.close()


def test_two_pull_at_once(node: Node) -> None:
    given = tensors()
    other = Node()
    with peer(images_of(given)) as source:
        files: list[StagedFile] = []
        thread = threading.Thread(target=lambda: files.append(other.pull(source)))
        thread.start()
        check(node.pull(source), given)
        thread.join()
    check(files[0], given)
    assert node.counted == other.counted
    other.puller.close()


@pytest.mark.parametrize(
    ("kind", "its_backend", "our_backend", "reason"),
    [
        (TCP, None, None, "it moves weights over mooncake/tcp, not over shm/shm"),
        (SHM, no_engine, None, "it says: no engine starts here"),
        (SHM, None, no_engine, "no engine starts here"),
    ],
)
def test_without_engines_that_fit_the_link_carries_them(
    kind: TransferKind,
    its_backend: Callable[[], TransferBackend] | None,
    our_backend: Callable[[], TransferBackend] | None,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = tensors()
    images = images_of(given)
    assert WeightImage(given).num_bytes > STAGE_PART_BYTES
    node = Node(make_backend=our_backend)
    with peer(images, kind=kind, make_backend=its_backend) as source, caplog.at_level(logging.WARNING):
        check(node.pull(source), given)
    assert [over for over, _ in node.counted] == [OVER_LINK]
    assert reason in caplog.text
    images.poll(0.0)
    assert images.deadline == math.inf
    node.puller.close()


def test_engines_that_do_not_reach_one_another(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As over shm on two hosts: the peer cannot find the inbox."""

    def not_found(backend: ShmBackend, region: MemoryRegion) -> None:
        raise FileNotFoundError(region.session)

    given = tensors()
    with peer(images_of(given)) as source, monkeypatch.context() as patch:
        patch.setattr(ShmBackend, "_map", not_found)
        check(node.pull(source), given)
    assert [over for over, _ in node.counted] == [OVER_LINK]
    assert "its transfer engine did not reach this node's: cannot map" in caplog.text


# ---- writes that go wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ("fail=1", "made this write fail"),
        ("late=1", "made this write fail"),
        ("half=1", "made this write fail"),
        ("corrupt=1", "arrived other than it was sent"),
    ],
)
def test_a_write_that_fails_fails_the_pull_and_not_the_next_one(node: Node, plan: str, reason: str) -> None:
    given = tensors()
    with (
        peer(images_of(given), make_backend=faulty(plan)) as source,
        pytest.raises(StartupError, match=reason),
    ):
        node.pull(source)
    assert node.counted == []
    with peer(images_of(given)) as source:
        check(node.pull(source), given)
    assert [over for over, _ in node.counted] == [str(SHM)]


@pytest.mark.parametrize(
    "plan", ["duplicate=1", "delay=1,delay_s=0.02", "duplicate=0.4,delay=0.4,delay_s=0.1"]
)
def test_writes_that_come_twice_or_late_are_waited_for(node: Node, plan: str) -> None:
    given = tensors()
    with peer(images_of(given), make_backend=faulty(plan)) as source:
        check(node.pull(source), given)
        check(node.pull(source), given)
    assert [over for over, _ in node.counted] == [str(SHM)] * 2


@pytest.mark.parametrize("wrong", [{"num_bytes": 17}, {"crc32": 17}])
def test_a_part_of_another_length_or_sum_is_refused(
    node: Node, wrong: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(**given: Any) -> WeightsWrittenReply:  # noqa: ANN401  a message's fields
        return WeightsWrittenReply(**{**given, **wrong})

    monkeypatch.setattr(outbox, "WeightsWrittenReply", changed)
    with (
        peer(images_of(tensors())) as source,
        pytest.raises(StartupError, match="arrived other than it was sent"),
    ):
        node.pull(source)


def test_what_lands_late_lands_where_nobody_reads(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    inboxes: list[Inbox] = []

    class Recorded(Inbox):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)  # type: ignore[arg-type]
            inboxes.append(self)

    monkeypatch.setattr(weight_inbox, "Inbox", Recorded)
    old = {"t": torch.full((SLOT_BYTES,), 7, dtype=torch.uint8)}
    given = {"t": torch.full((4 * SLOT_BYTES,), 9, dtype=torch.uint8)}
    with peer(images_of(old), make_backend=faulty("late=1")) as source:
        with pytest.raises(StartupError, match="made this write fail"):
            node.pull(source)
        with peer(images_of(given)) as healthy:
            check(node.pull(healthy), given)
            deadline = time.monotonic() + DEADLINE_S
            while inboxes[0].slot(0)[-1] != 7:
                assert time.monotonic() < deadline, "the late write did not land where it was sent"
                time.sleep(0.01)
            check(node.pull(healthy), given)
    assert len(inboxes) == 2
    assert inboxes[0].region.session != inboxes[1].region.session
    assert 7 not in bytes(inboxes[1].slot(1)), "the inbox in use has the healthy peer's bytes alone"


def test_so_many_inboxes_are_set_aside_and_no_more(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    given = tensors()
    images = images_of(given)
    with peer(images, make_backend=faulty("fail=1")) as source:
        for _ in range(MAX_SET_ASIDE):
            with pytest.raises(StartupError, match="made this write fail"):
                node.pull(source)
        check(node.pull(source), given)
    assert [over for over, _ in node.counted] == [OVER_LINK]
    assert f"{MAX_SET_ASIDE} inboxes are set aside" in caplog.text


# ---- a peer that is killed or frozen in mid-pull, in a process of its own ---------------------------


@dataclass(frozen=True)
class PeerProcess:
    """It serves `weights_peer.weights()`."""

    process: subprocess.Popen[str]
    source: FromPeer

    def signal_at_part(self, number: signal.Signals, part: int, patch: pytest.MonkeyPatch) -> None:
        """When so many parts of a pull were written, with the next ones asked for."""
        slot, taken = Inbox.slot, iter(range(1000))

        def signalled(inbox: Inbox, index: int) -> memoryview:
            if next(taken) == part:
                os.kill(self.process.pid, number)
            return slot(inbox, index)

        patch.setattr(Inbox, "slot", signalled)


@contextmanager
def weights_process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    script = Path(__file__).with_name("weights_peer.py")
    command = [sys.executable, "-P", str(script), *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def peer_process(kind: TransferKind) -> Iterator[PeerProcess]:
    with weights_process("serve", kind.backend, kind.transport) as process:
        yield PeerProcess(process, FromPeer(zmq_address=line_of(process)))


@pytest.mark.process
def test_a_peer_killed_in_mid_pull(
    kind: TransferKind, peer_process: PeerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(kind)
    with monkeypatch.context() as patch:
        peer_process.signal_at_part(signal.SIGKILL, 2, patch)
        with pytest.raises(StartupError, match="is lost"):
            node.pull(peer_process.source)
    given = tensors()
    with peer(images_of(given), kind=kind) as source:
        check(node.pull(source), given)
    assert [over for over, _ in node.counted] == [str(kind)]
    node.puller.close()


@pytest.mark.process
def test_a_peer_frozen_in_mid_pull(
    kind: TransferKind, peer_process: PeerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another serves meanwhile; and when it is back, it is pulled from again."""
    node = Node(kind, timing=replace(UNSCALED, weight_peer_silence_s=2.0))
    with monkeypatch.context() as patch:
        peer_process.signal_at_part(signal.SIGSTOP, 2, patch)
        with pytest.raises(StartupError, match="was silent"):
            node.pull(peer_process.source)
    given = tensors()
    with peer(images_of(given), kind=kind) as source:
        check(node.pull(source), given)
        peer_process.process.send_signal(signal.SIGCONT)
        check(node.pull(source), given)
    check(node.pull(peer_process.source), weights())
    assert [over for over, _ in node.counted] == [str(kind)] * 3
    node.puller.close()


@pytest.mark.process
def test_a_puller_frozen_in_mid_pull(kind: TransferKind) -> None:
    """The peer goes on with others, whatever became of the writes to that one."""
    given = tensors()
    node = Node(kind)
    served = {"t": torch.zeros(16 << 20, dtype=torch.uint8), **given}
    with (
        peer(images_of(served), kind=kind) as source,
        weights_process("pull", kind.backend, kind.transport, source.zmq_address) as process,
    ):
        assert line_of(process) == "frozen"
        check(node.pull(source), served)
        process.send_signal(signal.SIGCONT)
        assert line_of(process) == "pulled", "nothing is lost where the peer lives"
    assert [over for over, _ in node.counted] == [str(kind)]
    node.puller.close()


# ---- images, and peers that say no ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [({}, False), ({"update_id": "v"}, True), ({"fingerprint": "other"}, True)],
)
def test_other_weights_than_those_that_are_wanted_are_refused(
    node: Node, changes: dict[str, str], *, is_refused: bool
) -> None:
    images = images_of(tensors(), "print")
    with peer(images) as source:
        wanted = msgspec.structs.replace(source, **{"update_id": "u", "fingerprint": "print", **changes})
        if is_refused:
            with pytest.raises(StartupError, match="serves other weights by now"):
                node.pull(wanted)
        else:
            node.pull(wanted).close()


def opened(images: WeightImages, call_id: int = 1) -> WeightImageReply:
    assert images.open(b"puller", OpenWeights(call_id=call_id)) is None
    ((link, reply),) = images.poll(0.0)
    assert (link, reply.call_id) == (b"puller", call_id)
    return reply


def test_the_weights_are_those_of_the_moment_that_the_pull_began() -> None:
    served = {"t": torch.zeros(4)}

    def make() -> Callable[[], WeightImage]:
        given = dict(served)
        return lambda: WeightImage(given)

    images = WeightImages(make, lambda: "u1", ImageJobs(), idle_s=60.0)
    images.open(b"puller", OpenWeights(call_id=1))
    served["t"] = torch.ones(4)  # an update replaces tensors, and writes into none
    ((_, image),) = images.poll(0.0)
    read = images.read(ReadWeights(call_id=2, image=image.image, offset=0, num_bytes=1000))
    assert read.data[-16:] == bytes(16)
    assert len(read.data) == image.num_bytes


def test_who_reads_the_same_weights_shares_what_was_made_of_them() -> None:
    served, jobs = ["u1"], ImageJobs()

    def make() -> Callable[[], WeightImage]:
        update_id = served[0]
        return lambda: WeightImage({"a": torch.arange(9.0)}, update_id)

    images = WeightImages(make, lambda: served[0], jobs, idle_s=60.0)
    for call_id in (1, 2):
        assert images.open(b"one", OpenWeights(call_id=call_id)) is None
    first, second = (reply for _, reply in images.poll(0.0))
    assert first.image != second.image
    third = images.open(b"two", OpenWeights(call_id=3))
    assert third is not None
    assert jobs.num_done == 1
    served[0] = "u2"
    opened(images, 4)
    assert jobs.num_done == 2
    for reply in (first, second, third):
        whole = ReadWeights(call_id=9, image=reply.image, offset=0, num_bytes=1000)
        assert images.read(whole).success
        assert not images.read(whole).success, "each reads to its own end"


def test_an_image_that_is_made_while_the_memory_is_wanted_back_is_no_image() -> None:
    images = images_of({"a": torch.arange(9.0)})
    images.open(b"one", OpenWeights(call_id=1))
    images.drop()
    images.open(b"two", OpenWeights(call_id=2))
    dropped, made = (reply for _, reply in images.poll(0.0))
    assert (dropped.success, dropped.message) == (False, "these weights are let go of")
    assert made.success


@pytest.mark.parametrize("offset", [0, 1, 7, 50, 90])
def test_any_range_can_be_read(offset: int) -> None:
    image = WeightImage({"a": torch.arange(3.0), "b": torch.arange(5, dtype=torch.int64)})
    whole = image.read(0, image.num_bytes)
    assert len(whole) == image.num_bytes
    assert image.read(offset, 30) == whole[offset : offset + 30]
    assert image.read(image.num_bytes - 3, 30) == whole[-3:]


def test_who_asks_after_an_image_that_could_not_be_begun_gets_one() -> None:
    begins: list[Callable[[], WeightImage] | Exception] = [
        RuntimeError("no rank answers"),
        lambda: WeightImage({"a": torch.arange(9.0)}, "u"),
    ]

    def begin() -> Callable[[], WeightImage]:
        begun = begins.pop(0)
        if isinstance(begun, Exception):
            raise begun
        return begun

    images = WeightImages(begin, lambda: "u", ImageJobs(), idle_s=60.0)
    with pytest.raises(RuntimeError):
        images.open(b"first", OpenWeights(call_id=1))
    assert images.open(b"second", OpenWeights(call_id=2)) is None
    assert [(link, reply.success) for link, reply in images.poll(100.0)] == [(b"second", True)]


def test_an_image_that_nobody_reads_is_let_go_of() -> None:
    images = images_of({"a": torch.arange(9.0)})
    for call_id in (1, 2):
        images.open(b"puller", OpenWeights(call_id=call_id))
    one, two = (reply.image for _, reply in images.poll(100.0))
    assert images.deadline == 160.0
    images.poll(130.0)
    read = ReadWeights(call_id=3, image=two, offset=0, num_bytes=4)
    assert images.read(read).success
    images.poll(131.0)
    images.poll(160.0)
    assert not images.read(ReadWeights(call_id=4, image=one, offset=0, num_bytes=4)).success
    assert images.read(read).success
    images.drop()
    assert images.read(read).message == "these weights are let go of"
    assert images.deadline == math.inf


@pytest.mark.parametrize(("offset", "num_bytes"), [(-1, 4), (0, 0), (0, STAGE_PART_BYTES + 1)])
def test_reads_that_make_no_sense_are_refused(offset: int, num_bytes: int) -> None:
    images = images_of({"a": torch.arange(9.0)})
    image = opened(images).image
    reply = images.read(ReadWeights(call_id=2, image=image, offset=offset, num_bytes=num_bytes))
    assert (reply.success, reply.message) == (False, "no such bytes")


@pytest.mark.parametrize(("offset", "num_bytes"), [(-1, 4), (0, 0), (0, WRITE_PART_BYTES + 1)])
def test_so_are_writes(offset: int, num_bytes: int) -> None:
    images = images_of({"a": torch.arange(9.0)})
    region = MemoryRegion(session="s", address=0, num_bytes=4096, scratch_address=2048)

    def lend(image: int, offset: int, num_bytes: int) -> WeightImage | WeightsWrittenReply:
        message = WriteWeights(
            call_id=2, image=image, offset=offset, num_bytes=num_bytes, region=region, dest=0
        )
        return images.lend(message)

    image = opened(images).image
    reply = lend(image, offset, num_bytes)
    assert reply == WeightsWrittenReply(call_id=2, success=False, message="no such bytes")
    reply = lend(image + 1, 0, 4)
    assert reply == WeightsWrittenReply(call_id=2, success=False, message="these weights are let go of")
    assert isinstance(lend(image, 0, 4), WeightImage)
    assert isinstance(lend(image, 4, WRITE_PART_BYTES), WeightImage)
    reply = lend(image, 0, 4)
    assert isinstance(reply, WeightsWrittenReply), "its end lets go of it"


def test_a_peer_that_says_no_is_quoted(node: Node) -> None:
    def released() -> WeightImage:
        raise StartupError("the memory of the weights is released: resume it first")

    images = WeightImages(lambda: released, lambda: "u1", ImageJobs(), idle_s=60.0)
    with peer(images) as source, pytest.raises(StartupError, match="memory of the weights"):
        node.pull(source)


def test_what_does_not_fit_is_not_pulled(node: Node) -> None:
    images = images_of(tensors())
    node.available_bytes = 1 << 20
    with peer(images) as source, pytest.raises(StartupError, match="1 MiB left for an update of 3 MiB"):
        node.pull(source)


@pytest.mark.parametrize("kind", [SHM, TCP], ids=["over shm", "over the link"])
@pytest.mark.parametrize("serves", [0, 1, 2, 3, 4])
def test_a_peer_that_falls_silent_is_given_up(serves: int, kind: TransferKind) -> None:
    """Whichever message it answers last: of the engines' meeting, or of the weights."""
    node = Node(timing=replace(UNSCALED, weight_image_s=0.2, weight_peer_silence_s=0.2))
    images = images_of({"t": torch.zeros(10 * STAGE_PART_BYTES, dtype=torch.uint8)})
    with peer(images, kind=kind, serves=serves) as source, pytest.raises(StartupError, match="was silent"):
        node.pull(source)
    node.puller.close()


def test_nobody_there_and_no_address(node: Node) -> None:
    with pytest.raises(StartupError, match=r"is lost|was silent"):
        node.pull(FromPeer(zmq_address="tcp://127.0.0.1:1"))
    with pytest.raises(StartupError, match="no address of a node"):
        node.pull(FromPeer(zmq_address="nonsense"))


def test_another_kind_of_answer_is_no_weights(node: Node) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    server: ServerChannel[ClientToNode] = ServerChannel(context, "127.0.0.1", 0, ClientToNode, keys=None)

    def answer() -> None:
        server.socket.poll()
        for link, _ in server.receive():
            server.send(link, CallReply(call_id=0, success=False, message="unknown message"))

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(StartupError, match="unknown message"):
        node.pull(FromPeer(zmq_address=f"tcp://127.0.0.1:{server.port}"))
    thread.join()
    server.close()
    context.term()
