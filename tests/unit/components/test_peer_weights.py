"""One node reads another's weights: over real sockets, with the parts that serve them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest
import torch
import zmq
from safetensors.torch import load_file

from pdserve.components import peer_weights
from pdserve.components.peer_weights import pull_weights
from pdserve.components.weight_images import IDLE_S, WeightImage, WeightImages
from pdserve.engine.engine_thread import JobResult
from pdserve.messages.channel import MalformedMessage, ServerChannel
from pdserve.messages.node import CallReply, ClientToNode
from pdserve.messages.weights import (
    STAGE_PART_BYTES,
    FromPeer,
    OpenWeights,
    ReadWeights,
    WeightImageReply,
)
from pdserve.runtime.errors import StartupError

PLENTY = 1 << 40


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


class Jobs:
    """Done when they are looked for."""

    def __init__(self) -> None:
        self.waiting: list[tuple[str, Callable[[], WeightImage]]] = []
        self.num_done = 0

    def submit(self, name: str, run: Callable[[], WeightImage]) -> None:
        self.waiting.append((name, run))

    def poll(self) -> list[JobResult]:
        jobs, self.waiting = self.waiting, []
        self.num_done += len(jobs)
        return [self._do(name, run) for name, run in jobs]

    def _do(self, name: str, run: Callable[[], WeightImage]) -> JobResult:
        try:
            return JobResult(name, run(), None, 0.0, 1.0)
        except StartupError as error:
            return JobResult(name, None, error, 0.0, 1.0)


def images_of(given: dict[str, torch.Tensor]) -> WeightImages:
    return WeightImages(lambda: lambda: WeightImage(given, "u1"), lambda: "u1", Jobs())


def opened(images: WeightImages, call_id: int = 1) -> WeightImageReply:
    assert images.open(b"puller", OpenWeights(call_id=call_id)) is None
    ((link, reply),) = images.poll(0.0)
    assert (link, reply.call_id) == (b"puller", call_id)
    return reply


@contextmanager
def peer(images: WeightImages, *, serves: int = 1 << 30) -> Iterator[FromPeer]:
    """A scheduler that answers `serves` messages, and then no more."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    server: ServerChannel[ClientToNode] = ServerChannel(context, "127.0.0.1", 0, ClientToNode)
    stop = threading.Event()

    def loop() -> None:
        left = serves
        while not stop.is_set():
            server.socket.poll(10)
            for link, message in server.receive():
                assert not isinstance(message, MalformedMessage)
                left -= 1
                if left < 0:
                    continue
                match message:
                    case OpenWeights():
                        if (opened := images.open(link, message)) is not None:
                            server.send(link, opened)
                    case ReadWeights():
                        server.send(link, images.read(message))
                    case _:
                        raise AssertionError(message)
            for link, reply in images.poll(0.0):
                server.send(link, reply)
        server.close()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield FromPeer(zmq_address=f"tcp://127.0.0.1:{server.port}")
    finally:
        stop.set()
        thread.join()
        context.term()


def test_every_bit_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors()
    images = images_of(given)
    assert WeightImage(given).num_bytes > STAGE_PART_BYTES
    with peer(images) as source:
        file = pull_weights(source, lambda: PLENTY)
        again = pull_weights(source, lambda: PLENTY)
    for pulled in (file, again):
        read = load_file(pulled.path)
        assert read.keys() == given.keys()
        for name, tensor in given.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor), name
        pulled.close()
    images.poll(0.0)
    assert images.deadline is None, "who has read to the end holds nothing"


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [({}, False), ({"update_id": "v"}, True), ({"fingerprint": "other"}, True)],
)
def test_other_weights_than_those_that_are_wanted_are_refused(
    changes: dict[str, str], *, is_refused: bool
) -> None:
    images = WeightImages(lambda: lambda: WeightImage(tensors(), "u", "print"), lambda: "u", Jobs())
    with peer(images) as source:
        wanted = msgspec.structs.replace(source, **{"update_id": "u", "fingerprint": "print", **changes})
        if is_refused:
            with pytest.raises(StartupError, match="serves other weights by now"):
                pull_weights(wanted, lambda: PLENTY)
        else:
            pull_weights(wanted, lambda: PLENTY).close()


def test_the_weights_are_those_of_the_moment_that_the_pull_began() -> None:
    served = {"t": torch.zeros(4)}

    def make() -> Callable[[], WeightImage]:
        given = dict(served)
        return lambda: WeightImage(given)

    images = WeightImages(make, lambda: "u1", Jobs())
    images.open(b"puller", OpenWeights(call_id=1))
    served["t"] = torch.ones(4)  # an update replaces tensors, and writes into none
    ((_, image),) = images.poll(0.0)
    read = images.read(ReadWeights(call_id=2, image=image.image, offset=0, num_bytes=1000))
    assert read.data[-16:] == bytes(16)
    assert len(read.data) == image.num_bytes


def test_who_reads_the_same_weights_shares_what_was_made_of_them() -> None:
    served, jobs = ["u1"], Jobs()

    def make() -> Callable[[], WeightImage]:
        update_id = served[0]
        return lambda: WeightImage({"a": torch.arange(9.0)}, update_id)

    images = WeightImages(make, lambda: served[0], jobs)
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


def test_an_image_that_nobody_reads_is_let_go_of() -> None:
    images = images_of({"a": torch.arange(9.0)})
    for call_id in (1, 2):
        images.open(b"puller", OpenWeights(call_id=call_id))
    one, two = (reply.image for _, reply in images.poll(100.0))
    assert images.deadline == 100.0 + IDLE_S
    images.poll(130.0)
    read = ReadWeights(call_id=3, image=two, offset=0, num_bytes=4)
    assert images.read(read).success
    images.poll(131.0)
    images.poll(100.0 + IDLE_S)
    assert not images.read(ReadWeights(call_id=4, image=one, offset=0, num_bytes=4)).success
    assert images.read(read).success
    images.drop()
    assert images.read(read).message == "these weights are let go of"
    assert images.deadline is None


@pytest.mark.parametrize(("offset", "num_bytes"), [(-1, 4), (0, 0), (0, STAGE_PART_BYTES + 1)])
def test_reads_that_make_no_sense_are_refused(offset: int, num_bytes: int) -> None:
    images = images_of({"a": torch.arange(9.0)})
    image = opened(images).image
    reply = images.read(ReadWeights(call_id=2, image=image, offset=offset, num_bytes=num_bytes))
    assert (reply.success, reply.message) == (False, "no such bytes")


def test_a_peer_that_says_no_is_quoted() -> None:
    def released() -> WeightImage:
        raise StartupError("the memory of the weights is released: resume it first")

    images = WeightImages(lambda: released, lambda: "u1", Jobs())
    with peer(images) as source, pytest.raises(StartupError, match="memory of the weights"):
        pull_weights(source, lambda: PLENTY)


def test_what_does_not_fit_is_not_pulled() -> None:
    images = images_of(tensors())
    with peer(images) as source, pytest.raises(StartupError, match="1 MiB left for an update of 3 MiB"):
        pull_weights(source, lambda: 1 << 20)


@pytest.mark.parametrize("serves", [0, 1, 2])
def test_a_peer_that_falls_silent_is_given_up(serves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("_OPEN_S", "_SILENCE_S"):
        monkeypatch.setattr(peer_weights, limit, 0.2)
    images = images_of(tensors())
    with peer(images, serves=serves) as source, pytest.raises(StartupError, match="was silent"):
        pull_weights(source, lambda: PLENTY)


def test_nobody_there_and_no_address() -> None:
    with pytest.raises(StartupError, match=r"is lost|was silent"):
        pull_weights(FromPeer(zmq_address="tcp://127.0.0.1:1"), lambda: PLENTY)
    with pytest.raises(StartupError, match="no address of a node"):
        pull_weights(FromPeer(zmq_address="nonsense"), lambda: PLENTY)


def test_another_kind_of_answer_is_no_weights() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    server: ServerChannel[ClientToNode] = ServerChannel(context, "127.0.0.1", 0, ClientToNode)

    def answer() -> None:
        server.socket.poll()
        for link, _ in server.receive():
            server.send(link, CallReply(call_id=0, success=False, message="unknown message"))

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(StartupError, match="unknown message"):
        pull_weights(FromPeer(zmq_address=f"tcp://127.0.0.1:{server.port}"), lambda: PLENTY)
    thread.join()
    server.close()
    context.term()
