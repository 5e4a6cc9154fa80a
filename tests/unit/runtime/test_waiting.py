"""The Waiter wakes on whatever is readable."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from pdserve.runtime.waiting import Waiter
from pdserve.tests.deadline import DEADLINE_S


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


@pytest.fixture
def sockets() -> Iterator[tuple[zmq.Socket[Any], zmq.Socket[Any]]]:
    with zmq.Context() as context, context.socket(zmq.PAIR) as ours, context.socket(zmq.PAIR) as theirs:
        ours.bind("inproc://waiter")
        theirs.connect("inproc://waiter")
        yield ours, theirs


def wakes_at_once(waiter: Waiter) -> bool:
    """Whether `wait` without end returns. In a thread of its own, so that a failure does not hang."""
    thread = threading.Thread(target=waiter.wait, args=(DEADLINE_S * 2,), daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    return not thread.is_alive()


def test_a_readable_descriptor_wakes(pipe: tuple[int, int]) -> None:
    waiter = Waiter()
    waiter.add(pipe[0])
    os.write(pipe[1], b"x")
    assert wakes_at_once(waiter)
    assert wakes_at_once(waiter), "what was not read wakes again"


def test_a_message_wakes(sockets: tuple[zmq.Socket[Any], zmq.Socket[Any]], pipe: tuple[int, int]) -> None:
    ours, theirs = sockets
    waiter = Waiter()
    waiter.add(pipe[0])
    waiter.add(ours)
    theirs.send(b"x")
    assert wakes_at_once(waiter)


def test_nothing_to_read_returns_at_the_timeout(pipe: tuple[int, int]) -> None:
    waiter = Waiter()
    waiter.add(pipe[0])
    waiter.wait(0.001)
    waiter.wait(-1.0)  # a deadline that has passed, not "for ever"


def test_what_was_removed_does_not_wake(pipe: tuple[int, int]) -> None:
    polled: list[int] = []
    waiter = Waiter()
    waiter.add(pipe[0])
    os.write(pipe[1], b"x")
    waiter.remove(pipe[0])
    waiter._poller.poll = polled.append  # type: ignore[method-assign, assignment]
    waiter.wait(0.0004)
    assert polled == [1], "rounded up: a wait that is nearly over does not spin"
    assert not waiter._poller.sockets


def test_a_signal_handler_ends_the_wait_by_an_eventfd() -> None:
    """What the node's loop relies on: zmq's poll goes on after a signal, but its handler runs first."""
    signalled = os.eventfd(0, os.EFD_NONBLOCK)
    waiter = Waiter()
    waiter.add(signalled)
    kept = signal.signal(signal.SIGALRM, lambda *_: os.eventfd_write(signalled, 1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        started = time.monotonic()
        waiter.wait(DEADLINE_S)
        assert time.monotonic() - started < DEADLINE_S / 2
        os.eventfd_read(signalled)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(signalled)
            pytest.fail("it was read before")
    finally:
        signal.signal(signal.SIGALRM, kept)
        os.close(signalled)
