"""RequestReceiver: typed messages in order, a bound per step, malformed frames dropped and counted."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from pdserve.components.request_receiver import RequestReceiver
from pdserve.messages.channel import ServerChannel
from pdserve.messages.node import CallReply, ClientToNode, Ping
from pdserve.tests.deadline import DEADLINE_S


class Bench:
    """A receiver and one client, over a real socket."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], max_per_step: int) -> None:
        self.server: ServerChannel[ClientToNode] = ServerChannel(
            context, "127.0.0.1", 0, ClientToNode, keys=None
        )
        self.receiver: RequestReceiver[ClientToNode] = RequestReceiver(self.server, max_per_step)
        self.client = context.socket(zmq.DEALER)
        self.client.connect(f"tcp://127.0.0.1:{self.server.port}")

    def send(self, *call_ids: int) -> None:
        for call_id in call_ids:
            self.client.send(msgspec.msgpack.encode(Ping(call_id=call_id)))

    def step(self) -> list[int]:
        """The calls that one turn of the loop gets; waits until there is something to read."""
        assert self.server.socket.poll(int(DEADLINE_S * 1000))
        return [message.call_id for _, message in self.receiver.receive() if isinstance(message, Ping)]

    def steps_until(self, call_id: int) -> list[list[int]]:
        """Every turn until the one that got `call_id`."""
        deadline = time.monotonic() + DEADLINE_S
        steps: list[list[int]] = []
        while not steps or call_id not in steps[-1]:
            assert time.monotonic() < deadline
            steps.append(self.step())
        return steps


@pytest.fixture
def bench() -> Iterator[Bench]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield Bench(context, max_per_step=4)
    context.destroy(linger=0)


def test_nothing_has_arrived(bench: Bench) -> None:
    assert list(bench.receiver.receive()) == []


def test_no_step_gets_more_than_its_bound_and_nothing_is_lost(bench: Bench) -> None:
    bench.send(*range(50))
    steps = bench.steps_until(49)
    assert all(len(step) <= 4 for step in steps)
    assert list(itertools.chain(*steps)) == list(range(50))


def test_a_step_that_is_left_half_way_loses_nothing(bench: Bench) -> None:
    bench.send(*range(6))
    received: list[int] = []
    while len(received) < 6:
        assert bench.server.socket.poll(int(DEADLINE_S * 1000))
        for _, message in bench.receiver.receive():
            assert isinstance(message, Ping)
            received.append(message.call_id)
            break
    assert received == list(range(6))


def test_malformed_frames_are_dropped_counted_and_logged(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pdserve"):
        bench.send(1)
        bench.client.send(b"\xc1")
        bench.client.send(msgspec.msgpack.encode({"type": "ping", "call_id": "x"}))
        bench.send(2)
        assert list(itertools.chain(*bench.steps_until(2))) == [1, 2]
    assert bench.receiver.num_malformed == 2
    # A flood of them is no flood of lines: the second is told a few seconds later, if more come.
    (line,) = caplog.messages
    assert line.startswith("dropped 1 malformed messages, the last from ")


def test_a_caller_whose_message_is_unknown_is_refused_by_its_name(bench: Bench) -> None:
    bench.client.send(msgspec.msgpack.encode({"type": "make_coffee", "call_id": 7}))
    bench.send(8)
    assert list(itertools.chain(*bench.steps_until(8))) == [8]
    assert bench.client.poll(int(DEADLINE_S * 1000))
    reply = msgspec.msgpack.decode(bench.client.recv(), type=CallReply)
    assert (reply.call_id, reply.success) == (7, False)
    assert "'make_coffee'" in reply.message


def test_a_caller_is_refused_whatever_its_request_id_holds(bench: Bench) -> None:
    bench.client.send(msgspec.msgpack.encode({"type": "get_request_state", "call_id": 7, "request_id": "\0"}))
    bench.send(8)
    assert list(itertools.chain(*bench.steps_until(8))) == [8]
    assert bench.client.poll(int(DEADLINE_S * 1000))
    assert msgspec.msgpack.decode(bench.client.recv(), type=CallReply).call_id == 7


def test_malformed_frames_count_toward_the_bound(bench: Bench) -> None:
    # Otherwise a sender of rubbish could keep the loop in one step.
    for _ in range(50):
        bench.client.send(b"\xc1")
    bench.send(1)
    steps = bench.steps_until(1)
    assert len(steps) >= 51 / 4
    assert bench.receiver.num_malformed == 50
