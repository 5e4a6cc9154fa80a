"""One node reads another's weights: over real sockets, with the parts that serve them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
import torch
import zmq
from safetensors.torch import load_file

from pdserve.components import peer_weights
from pdserve.components.peer_weights import pull_weights
from pdserve.components.weight_images import IDLE_S, WeightImage, WeightImages
from pdserve.messages.channel import MalformedMessage, ServerChannel
from pdserve.messages.node import CallReply, ClientToNode
from pdserve.messages.weights import STAGE_PART_BYTES, FromPeer, OpenWeights, ReadWeights
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
                        server.send(link, images.open(message))
                    case ReadWeights():
                        server.send(link, images.read(message))
                    case _:
                        raise AssertionError(message)
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
    images = WeightImages(lambda: WeightImage(given))
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
    images = WeightImages(lambda: WeightImage(tensors(), "u", "print"))
    with peer(images) as source:
        wanted = msgspec.structs.replace(source, **{"update_id": "u", "fingerprint": "print", **changes})
        if is_refused:
            with pytest.raises(StartupError, match="serves other weights by now"):
                pull_weights(wanted, lambda: PLENTY)
        else:
            pull_weights(wanted, lambda: PLENTY).close()


def test_the_weights_are_those_of_the_moment_that_the_pull_began() -> None:
    served = {"t": torch.zeros(4)}
    images = WeightImages(lambda: WeightImage(dict(served)))
    opened = images.open(OpenWeights(call_id=1))
    served["t"] = torch.ones(4)  # an update replaces tensors, and writes into none
    read = images.read(ReadWeights(call_id=2, image=opened.image, offset=0, num_bytes=1000))
    assert read.data[-16:] == bytes(16)
    assert len(read.data) == opened.num_bytes


@pytest.mark.parametrize("offset", [0, 1, 7, 50, 90])
def test_any_range_can_be_read(offset: int) -> None:
    image = WeightImage({"a": torch.arange(3.0), "b": torch.arange(5, dtype=torch.int64)})
    whole = image.read(0, image.num_bytes)
    assert len(whole) == image.num_bytes
    assert image.read(offset, 30) == whole[offset : offset + 30]
    assert image.read(image.num_bytes - 3, 30) == whole[-3:]


def test_an_image_that_nobody_reads_is_let_go_of() -> None:
    images = WeightImages(lambda: WeightImage({"a": torch.arange(9.0)}))
    one, two = (images.open(OpenWeights(call_id=call_id)).image for call_id in (1, 2))
    images.poll(100.0)
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
    images = WeightImages(lambda: WeightImage({"a": torch.arange(9.0)}))
    image = images.open(OpenWeights(call_id=1)).image
    reply = images.read(ReadWeights(call_id=2, image=image, offset=offset, num_bytes=num_bytes))
    assert (reply.success, reply.message) == (False, "no such bytes")


def test_a_peer_that_says_no_is_quoted() -> None:
    def released() -> WeightImage:
        raise StartupError("the memory of the weights is released: resume it first")

    with peer(WeightImages(released)) as source, pytest.raises(StartupError, match="memory of the weights"):
        pull_weights(source, lambda: PLENTY)


def test_what_does_not_fit_is_not_pulled() -> None:
    images = WeightImages(lambda: WeightImage(tensors()))
    with peer(images) as source, pytest.raises(StartupError, match="1 MiB left for an update of 3 MiB"):
        pull_weights(source, lambda: 1 << 20)


@pytest.mark.parametrize("serves", [0, 1, 2])
def test_a_peer_that_falls_silent_is_given_up(serves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_weights, "_SILENCE_S", 0.2)
    images = WeightImages(lambda: WeightImage(tensors()))
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
