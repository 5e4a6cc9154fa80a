"""`is_idle` of both schedulers covers every place where work can be.

Every container that a scheduler and its parts hold is found by looking into them. A new queue fails a test
here until it is named below; named as one of work, until it is seen filled and is covered.

One kind of work mostly comes with another, which hides a term of `is_idle` that is missing. So each term has
a test in which it alone says that the node is not idle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from pdserve.messages.node import AbortRequests, CallReply, ClientToNode, FlushCache, ResendFrom
from pdserve.transfer.decode_rooms import RoomState

from .cluster import ROUTER, DecodeNode, Pair, PrefillNode, prompt_of

FOLDERS = ("components", "decode", "node", "prefill", "runtime", "transfer")
PARTS = tuple(f"pdserve.{folder}." for folder in FOLDERS)

# Filled: somebody waits for it, so the node is not idle.
WORK = {
    "prefill": {
        "jobs._jobs",
        "jobs._forwards",
        "rooms._rooms",
        "rooms._room_of_write",
        "allocator._private",
    },
    "decode": {
        "waiting._requests",
        "handoffs._handoffs",
        "handoffs._rooms_of",
        "running._prefilling",
        "running._decoding",
        "running._forward",
        "rooms._rooms",
        "streamer._attempts",
        "allocator._exposed",
        "allocator._private",
    },
}
# Of these only some items are work, and only those are counted.
IS_WORK: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "prefill": {},
    "decode": {
        "rooms._rooms": lambda room: room.state is RoomState.OPEN,  # the others are in quarantine
        "streamer._attempts": lambda attempt: not attempt.is_closed,  # those may be asked for again
    },
}
# Filled and emptied within a turn.
PASSING = {
    "prefill": set[str](),
    "decode": {"outputs._gone_clients", "handoffs._complete", "streamer._dirty", "timeline._relayed"},
}
# May be filled while a node is idle.
STANDING = {
    "free._by_length": "free pages",
    "free._length_at": "free pages",
    "free._start_before": "free pages",
    "allocator._quarantined": "pages that a peer may still write: no work",
    "allocator._readers": "shared pages, those of the cache too",
    "cache._candidates": "what is cached",
    "cache._in_tree": "what is cached",
    "cache._roots": "what is cached",
    "pins._pins": "pages of sessions between turns",
    "streamer._closed": "outputs that may be asked for again",
    "images._held": "weights that others read",
    "images._making": "weights that others read",
    "groups._groups": "groups with trainers",
    "weights._jobs": "weights that load beside the forwards",
    "profile.waiting": "the profiler starts or stops",
    "faults._throttles": "what the log was told of",
    "loop_times._kinds": "measured",
    "operations._processes": "who this node is",
    "settings._settings": "how it is set",
    "status._config": "how it is set",
    "last_chunk._forward_s": "measured",
    "peer_clocks._clocks": "measured",
    "peer_clocks._pinged": "measured",
    "rosters._rosters": "who peers are",
    "rooms._peers": "who peers are",
    "rooms._decodes": "who peers are",
    "rooms._links": "who peers are",
    "rooms._meetings": "peers that are met before anything is written to them",
}


def found(role: str, node: PrefillNode | DecodeNode) -> dict[str, int]:
    """Part and attribute -> number of items, of each container that the loop and its parts hold."""
    sizes: dict[str, int] = {}
    parts: deque[tuple[str, object]] = deque([("loop", node.loop)])
    known = {id(node.loop)}
    while parts:
        owner, part = parts.popleft()
        names = {*getattr(part, "__dict__", {})}
        names.update(slot for kind in type(part).__mro__ for slot in getattr(kind, "__slots__", ()))
        for name in sorted(names):
            value = getattr(part, name, None)
            if id(value) in known:
                continue
            if isinstance(value, dict | list | set | deque):
                items = value.values() if isinstance(value, dict) else value
                container = f"{owner}.{name}"
                assert container not in sizes, "two parts of one name"
                sizes[container] = sum(map(IS_WORK[role].get(container, lambda _: True), items))
            elif type(value).__module__.startswith(PARTS):
                known.add(id(value))
                parts.append((name.lstrip("_"), value))
    return sizes


class WatchedPair(Pair):
    """Looks at both nodes after each of their turns."""

    def __init__(self, settings: Mapping[str, object]) -> None:
        self.seen: dict[str, set[str]] = {"prefill": set(), "decode": set()}
        super().__init__(**settings)

    def step(self) -> None:
        super().step()
        for role, node in (("prefill", self.prefill), ("decode", self.decode)):
            sizes = found(role, node)
            filled = {path for path in WORK[role] if sizes[path]}
            self.seen[role] |= filled
            assert not (filled and node.scheduler.is_idle), f"{role} is idle with {filled}"
            assert not any(sizes[path] for path in PASSING[role]), f"{role}: {sizes}"


def hand_offs(pair: Pair) -> None:
    for number in range(4):
        pair.start(
            f"r{number}", prompt_of(12 + 5 * number, seed=number), choices=tuple(range(1 + number % 2))
        )
    pair.cancel("r2")


def verified(pair: Pair) -> None:
    pair.decode.digests.is_held = True
    pair.start("a", prompt_of(20))
    pair.run()
    assert not pair.decode.scheduler.is_idle
    pair.decode.digests.is_held = False


def cancelled_in_a_forward(pair: Pair) -> None:
    """The only request, on prefill and then on decode: its forward goes on without it."""
    nodes: tuple[PrefillNode | DecodeNode, ...] = (pair.prefill, pair.decode)
    for number, node in enumerate(nodes):
        pair.start(f"r{number}", prompt_of(20, seed=number))
        pair.settle()
        while not node.engine.queued:
            pair.prefill.engine.finish()
            pair.write()
        pair.cancel(f"r{number}")
        pair.settle()
        pair.run()


def lost(pair: Pair) -> None:
    pair.start("a", prompt_of(20))
    pair.network.cut()


WORKLOADS: tuple[tuple[Callable[[Pair], None], Mapping[str, object]], ...] = (
    (hand_offs, {}),
    (hand_offs, {"decode_pages": 16, "prefill_pages": 16, "conservativeness": 0.1}),
    (hand_offs, {"local_prefill_threshold": 64}),
    (verified, {"verify_pages": "all"}),
    (cancelled_in_a_forward, {}),
    (lost, {}),
)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_every_container_is_known(role: str) -> None:
    pair = Pair()
    node = pair.prefill if role == "prefill" else pair.decode
    standing = STANDING.keys() | ({"allocator._exposed"} if role == "prefill" else set())
    named = WORK[role] | PASSING[role] | standing
    sizes = found(role, node)
    assert sizes.keys() - named == set(), "is it work? Then `is_idle` has to cover it"
    assert (WORK[role] | PASSING[role]) - sizes.keys() == set(), "gone"
    assert not standing & (WORK[role] | PASSING[role])


def test_a_node_with_work_anywhere_is_not_idle() -> None:
    seen: dict[str, set[str]] = {"prefill": set(), "decode": set()}
    for begin, settings in WORKLOADS:
        pair = WatchedPair(settings)
        begin(pair)
        pair.run()
        pair.advance(60.0)
        pair.run()
        assert pair.prefill.scheduler.is_idle, begin
        assert pair.decode.scheduler.is_idle, begin
        seen = {role: seen[role] | paths for role, paths in pair.seen.items()}
    assert seen == WORK, "what was never filled shows nothing"


# ---- each term alone --------------------------------------------------------------------------------


def test_a_forward_whose_room_is_over_keeps_prefill_busy() -> None:
    pair = Pair()
    pair.start("a", prompt_of(20))
    pair.cancel("a")
    assert pair.prefill.engine.queued
    assert pair.prefill.rooms.is_idle
    assert not pair.prefill.scheduler.is_idle
    pair.finish()


def test_a_write_whose_job_is_over_keeps_prefill_busy() -> None:
    pair = Pair()
    pair.backend.has_started = True  # a cancel comes too late for it
    pair.start("a", prompt_of(8))
    pair.compute(pair.prefill)
    pair.cancel("a")
    assert pair.backend.num_outstanding
    assert not pair.prefill.jobs
    assert not pair.prefill.scheduler.is_idle
    pair.finish()


def test_a_forward_whose_request_is_over_keeps_decode_busy() -> None:
    pair = Pair()
    pair.start("a", prompt_of(8))
    pair.compute(pair.prefill)
    pair.write()
    pair.cancel("a")
    assert not pair.decode.requests
    assert pair.decode.streamer.is_idle
    assert not pair.decode.scheduler.is_idle
    pair.finish()


def test_a_request_whose_client_was_told_its_end_keeps_decode_busy() -> None:
    """As long as the process lives it holds pages, and a peer may write them."""
    pair = Pair()
    pair.start("a", prompt_of(20))
    pair.decode.scheduler.fail_open_requests()
    assert not pair.decode.running.has_forward
    assert pair.decode.streamer.is_idle
    assert not pair.decode.scheduler.is_idle


def flush_after(pair: Pair, message: ClientToNode) -> str:
    """The answer to a flush that comes in the same turn as the message, before any output is sent."""
    pair.decode.server.deliver(ROUTER, message)
    pair.to_decode(FlushCache(call_id=1), b"admin")
    reply = pair.last_reply(pair.decode, b"admin")
    assert isinstance(reply, CallReply)
    return reply.message


def test_an_end_that_was_not_sent_keeps_decode_busy() -> None:
    pair = Pair()
    pair.generate("a", prompt_of(20))
    answer = flush_after(pair, AbortRequests(call_id=2, all_requests=True))
    assert answer == "The node is not idle, and no timeout was given."
    assert pair.stream("a").reasons == {0: "abort"}
    pair.finish()


def test_an_output_that_is_asked_for_again_keeps_decode_busy() -> None:
    pair = Pair()
    pair.start("a", prompt_of(20))
    pair.run()
    assert pair.decode.scheduler.is_idle, "to have it on record is no work"
    answer = flush_after(pair, ResendFrom(request_id="a", attempt=1, choice=0, position=0))
    assert answer == "The node is not idle, and no timeout was given."
    pair.finish()
