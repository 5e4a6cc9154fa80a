"""Whole messages, in order, whoever is slow."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import pytest

from pdserve.messages.malformed import MalformedMessage
from pdserve.messages.pipe import Pipe
from pdserve.messages.ranks import DropShard, FromRank, RankDone, RunForward, ToRank


@pytest.fixture
def ends() -> Iterator[tuple[Pipe[FromRank], Pipe[ToRank]]]:
    ours, theirs = socket.socketpair()
    rank0: Pipe[FromRank] = Pipe(ours, FromRank, "rank 0")
    worker: Pipe[ToRank] = Pipe(theirs, ToRank, "worker")
    yield rank0, worker
    rank0.close()
    worker.close()


def receive(pipe: Pipe[ToRank] | Pipe[FromRank], count: int) -> list[ToRank | FromRank | MalformedMessage]:
    messages: list[ToRank | FromRank | MalformedMessage] = []
    while len(messages) < count and not pipe.closed:
        assert select.select([pipe.fileno()], [], [], 30)[0]
        messages += pipe.receive()
    return messages


def test_messages_longer_than_the_kernel_holds_arrive_whole_and_in_order(
    ends: tuple[Pipe[FromRank], Pipe[ToRank]],
) -> None:
    rank0, worker = ends
    sent = [RunForward(batch=bytes([number]) * (number * 700_000)) for number in range(5)]
    for message in sent:
        rank0.send(message)  # returns at once: nobody has read yet
    rank0.send(DropShard())
    assert receive(worker, 6) == [*sent, DropShard()]
    worker.send(RankDone(call_id=3, error="no"))
    assert receive(rank0, 1) == [RankDone(call_id=3, error="no")]


def test_an_end_that_closes_is_seen_behind_its_last_message(
    ends: tuple[Pipe[FromRank], Pipe[ToRank]],
) -> None:
    rank0, worker = ends
    worker.send(RankDone(call_id=1))
    worker.close()
    assert receive(rank0, 2) == [RankDone(call_id=1)]
    assert rank0.closed
    rank0.send(DropShard())  # to nobody
    assert rank0.receive() == []


def test_a_message_out_of_bounds_is_malformed_and_the_next_one_arrives(
    ends: tuple[Pipe[FromRank], Pipe[ToRank]],
) -> None:
    """As the text of an error may be, that somebody else has made long."""
    rank0, worker = ends
    worker.send(RankDone(call_id=3, error="x" * ((1 << 20) + 1)))
    worker.send(RankDone(call_id=4))
    first, second = receive(rank0, 2)
    assert isinstance(first, MalformedMessage)
    assert first.head.call_id == 3
    assert second == RankDone(call_id=4)
