"""What guarding a zmq link costs: CURVE against one in the clear, both ends in this process, over loopback.

A step is one message of a decode node to a router, with one token of each row of its batch. The two kinds of
link take turns, after one turn that is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import zmq

from ..messages.channel import ClientChannel, ServerChannel
from ..messages.link_guard import LinkKeys
from ..messages.node import CallReply, ClientToNode, NodeToClient, Ping, TokenOutput, TokenOutputs
from ..runtime.cluster_secret import new_secret
from ..runtime.errors import StartupError

_IN_FLIGHT = 16  # steps: a router that is busy reads several at once
_SILENCE_MS = 10_000


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one turn, in seconds."""

    step_cpu: float  # of both ends and of zmq's own threads, for a step
    round_trip: float  # median


class Link:
    """A node's socket and a router's connection to it."""

    def __init__(self, keys: LinkKeys | None) -> None:
        """Raises StartupError when the two ends do not meet."""
        with ExitStack() as undo:
            contexts: list[zmq.Context[zmq.Socket[bytes]]] = [zmq.Context(), zmq.Context()]
            for context in contexts:
                undo.callback(context.destroy, linger=0)
            self._node: ServerChannel[ClientToNode] = ServerChannel(
                contexts[0], "127.0.0.1", 0, ClientToNode, keys=keys
            )
            undo.callback(self._node.close)
            address = f"tcp://127.0.0.1:{self._node.port}"
            self._router: ClientChannel[NodeToClient] = ClientChannel(
                contexts[1], address, NodeToClient, keys=keys
            )
            undo.callback(self._router.close)
            self._name = b""  # of the router, to the node
            self.round_trip()
            self._undo = undo.pop_all()

    def round_trip(self) -> None:
        self._router.send(Ping(call_id=1))
        _await(self._node.socket)
        ((self._name, _),) = self._node.receive()
        self._node.send(self._name, CallReply(call_id=1, success=True))
        self._receive(1)

    def steps(self, step: TokenOutputs, count: int) -> None:
        """Sends it so many times and receives them all."""
        for start in range(0, count, _IN_FLIGHT):
            sent = min(_IN_FLIGHT, count - start)
            for _ in range(sent):
                self._node.send(self._name, step)
            self._receive(sent)

    def _receive(self, count: int) -> None:
        while count > 0:
            _await(self._router.socket)
            count -= sum(1 for _ in self._router.receive())

    def close(self) -> None:
        self._undo.close()


def _await(socket: zmq.Socket[bytes]) -> None:
    if not socket.poll(_SILENCE_MS):
        raise StartupError("the two ends of a link do not hear each other")


def step_of(num_rows: int) -> TokenOutputs:
    """A token of each row."""
    return TokenOutputs(
        outputs=tuple(
            TokenOutput(
                request_id=f"cmpl-{row:032x}", attempt=1, choice=0, position=1000, token_ids=(30_000 + row,)
            )
            for row in range(num_rows)
        )
    )


def measure(link: Link, num_rows: int, num_steps: int, num_round_trips: int) -> Cost:
    step = step_of(num_rows)
    started = time.process_time()
    link.steps(step, num_steps)
    step_cpu = (time.process_time() - started) / num_steps
    return Cost(step_cpu, statistics.median(_timed(link.round_trip) for _ in range(num_round_trips)))


def _timed(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def compare(
    num_rows: int, repeats: int, num_steps: int, num_round_trips: int
) -> tuple[Sequence[Cost], Sequence[Cost]]:
    """Of a link in the clear and of a guarded one, as many as `repeats`."""
    links = (Link(None), Link(LinkKeys.of(new_secret())))
    try:
        turns = [
            tuple(measure(link, num_rows, num_steps, num_round_trips) for link in links)
            for _ in range(repeats + 1)
        ]
    finally:
        for link in links:
            link.close()
    return tuple(clear for clear, _ in turns[1:]), tuple(guarded for _, guarded in turns[1:])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64], metavar="N", help="of a batch")
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="turns of each kind")
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="of a turn")
    parser.add_argument("--round-trips", type=int, default=500, metavar="N", help="of a turn")


def main(options: argparse.Namespace) -> int:
    """Prints a Markdown table: medians of the turns, in microseconds, and of the ratios of pairs."""
    if min(*options.rows, options.repeats, options.steps, options.round_trips) < 1:
        raise StartupError("--rows, --repeats, --steps and --round-trips must be 1 or more")
    print("| rows | step, clear | step, CURVE | ratio | a token more | round trip, clear | CURVE | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for num_rows in options.rows:
        clear, guarded = compare(num_rows, options.repeats, options.steps, options.round_trips)
        step = [1e6 * statistics.median(cost.step_cpu for cost in costs) for costs in (clear, guarded)]
        trip = [1e6 * statistics.median(cost.round_trip for cost in costs) for costs in (clear, guarded)]
        pairs = list(zip(clear, guarded, strict=True))
        step_ratio = statistics.median(b.step_cpu / a.step_cpu for a, b in pairs)
        trip_ratio = statistics.median(b.round_trip / a.round_trip for a, b in pairs)
        print(
            f"| {num_rows} | {step[0]:.1f} | {step[1]:.1f} | {step_ratio:.2f} "
            f"| {(step[1] - step[0]) / num_rows:.2f} | {trip[0]:.0f} | {trip[1]:.0f} | {trip_ratio:.2f} |"
        )
    return 0
