"""Runs a role's loop in its process until it is told to end, or a rank or a thread of it is lost."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from typing import Any, TypeVar

import msgspec

from ..components.request_receiver import RequestReceiver
from ..messages.channel import ServerChannel
from ..messages.timeline import SpanClock
from ..ranks.group import LostRankError, RankGroup
from ..runtime.process import end_now
from ..weights.loaded import LoadedModel
from .control import NodeControl
from .loop import Report, Role, RoleLoop
from .loop_times import TURN
from .start import Node

_log = logging.getLogger(__name__)

_LONGEST_SLEEP_S = 0.5  # a front that has ended is noticed this late at worst

M = TypeVar("M", bound=msgspec.Struct)


def run(
    node: Node,
    role: Role[M],
    report: Report,
    server: ServerChannel[Any],  # of CommonCall | M
    control: NodeControl[LoadedModel],
    clock: SpanClock,
) -> int:
    """The loop, until SIGTERM or SIGINT; then what runs may end, and what is left fails retriably.

    A second signal ends it at once. Returns the process's exit code.
    """
    loop: RoleLoop[M, LoadedModel] = RoleLoop(
        role,
        report,
        receiver=RequestReceiver(server),
        send=server.send,
        engine=node.engine,
        side_jobs=node.jobs,
        control=control,
        swap=node.served.swap,
        status=node.status,
        metrics=node.metrics,
        loop_times=node.loop_times,
        unix_now=clock.unix_now,
        timing=node.config.timing,
    )
    threading.excepthook = _end_process
    num_signals = 0
    signalled = os.eventfd(0, os.EFD_NONBLOCK)
    node.waiter.add(signalled)

    def on_signal(number: int, frame: object) -> None:
        nonlocal num_signals
        del number, frame
        num_signals += 1
        os.eventfd_write(signalled, 1)  # ends the loop's sleep

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    drain_until = math.inf
    while True:
        now = time.monotonic()
        with node.loop_times.measured(TURN):
            if node.ranks is None:
                loop.step(now)
            else:
                _step_with_ranks(node, node.ranks, loop, now)
        if num_signals and not role.is_draining:
            role.is_draining = True
            drain_until = now + node.config.timing.drain_s
        if num_signals > 1 or now > drain_until or (role.is_draining and role.is_idle):
            role.fail_open_requests()
            break
        if not role.is_draining:  # a front that got the same signal may end before what runs here has
            node.front.keep_alive(now)
        node.waiter.wait(min(_LONGEST_SLEEP_S, max(0.0, loop.next_deadline() - now)))
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(signalled)
    node.close()
    return 0


def _step_with_ranks(node: Node, ranks: RankGroup, loop: RoleLoop[M, LoadedModel], now: float) -> None:
    """A step of the loop; when a rank is lost, it ends this process, and with it the replica, loudly."""
    try:
        ranks.poll(now, node.engine.progress)
        loop.step(now)
    except Exception as error:
        cause = ranks.cause(error)
        ranks.kill()
        _log.critical("%s; the node ends", cause, exc_info=not isinstance(cause, LostRankError))
        # The engine's thread may wait in a collective for a rank that will never answer.
        end_now(1)


def _end_process(failure: threading.ExceptHookArgs) -> None:
    """A helper thread died of a bug: what it held would stay pending for ever, so everything ends, loudly."""
    name = failure.thread.name if failure.thread else "?"
    _log.critical(
        "thread %s failed",
        name,
        exc_info=(failure.exc_type, failure.exc_value or failure.exc_type(), failure.exc_traceback),
    )
    logging.shutdown()
    os._exit(1)
