"""Control messages in whatever order, valid and odd: once they stop, whoever may work together does."""

from __future__ import annotations

import random

import msgspec

from pdserve.messages.node import AssertPeerDeath, FlushCache, NodeEntry, Ping, Roster
from pdserve.messages.operation import ContinueGeneration, PauseGeneration
from pdserve.messages.peer import AbortRoom, ContactPong, PeerHello, PeerPing, RoomId
from pdserve.messages.weights import (
    MEMORY_TAGS,
    CommitWeights,
    DiscardWeights,
    FromDisk,
    FromServed,
    KeepWeights,
    PrepareWeights,
    ReleaseMemory,
    ResumeMemory,
)
from pdserve.runtime.pause_gate import PauseMode
from pdserve.transfer.decode_rooms import PeerState

from .cluster import ADDRESS, Pair, prompt_of

NUM_SEEDS = 10
PROMPT = prompt_of(9)
WAITS_S = 4.0  # longer than any deadline and lease of the storm
REST_S = 15.0  # the longest silence, and the longest time between two attempts at a handshake
ROUTERS = ("router", "router-2")
MODES: tuple[PauseMode, ...] = ("abort", "retract", "in_place")


class Storm:
    """One seed's messages to both nodes of a pair, of which some go to both, as a router sends them."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(f"storm/{seed}")
        self.pair = Pair(max_waiting=4)
        self.num_calls = 0

    def entry(self) -> NodeEntry:
        """Who a router may take the prefill node for, or another node."""
        entry = self.pair.prefill.status.entry
        address = self.draw.choice((ADDRESS, ADDRESS, ADDRESS, "tcp://nobody:1", "tcp://prefill:2"))
        incarnation = self.draw.choice((entry.incarnation, "prefill-1", "prefill-0", "decode-1"))
        update_id = self.draw.choice((entry.update_id, "", f"update-{self.draw.randrange(3)}"))
        role = self.draw.choice(("prefill", "prefill", "prefill", "decode"))
        return msgspec.structs.replace(
            entry, zmq_address=address, incarnation=incarnation, update_id=update_id, role=role
        )

    def message(self) -> msgspec.Struct:
        draw = self.draw
        self.num_calls += 1
        call_id = self.num_calls
        update_id = f"update-{draw.randrange(3)}"
        tags = tuple(draw.sample(MEMORY_TAGS, draw.randint(0, 3)))
        match draw.randrange(13):
            case 0 | 1:
                nodes = tuple(self.entry() for _ in range(draw.choice((0, 1, 1, 2, 4))))
                return Roster(router_id=draw.choice(ROUTERS), nodes=nodes)
            case 2:
                return PauseGeneration(call_id=call_id, mode=draw.choice(MODES))
            case 3 | 4:
                return ContinueGeneration(call_id=call_id)
            case 5:
                return ReleaseMemory(call_id=call_id, tags=tags, timeout_s=draw.choice((0.0, 0.3, 3.0)))
            case 6 | 7:
                return ResumeMemory(call_id=call_id, tags=tags, if_released=draw.random() < 0.7)
            case 8:
                source = (
                    FromServed()
                    if draw.random() < 0.3
                    else FromDisk(model_path=draw.choice(("weights-1", "weights-2", "wrong")))
                )
                return PrepareWeights(
                    call_id=call_id,
                    update_id=update_id,
                    source=source,
                    weight_version=draw.choice(("default", "v2")),
                    lease_s=draw.choice((0.0, 1.0, 3.0)),
                )
            case 9:
                return CommitWeights(call_id=call_id, update_id=update_id)
            case 10:
                return DiscardWeights(call_id=call_id, update_id=update_id)
            case 11:
                return KeepWeights(update_id=update_id, lease_s=draw.choice((0.0, 1.0)))
            case _:
                incarnation = draw.choice(("prefill-1", "prefill-1~1", "decode-1"))
                return draw.choice(
                    (
                        AssertPeerDeath(call_id=call_id, incarnation=incarnation),
                        FlushCache(call_id=call_id, timeout_s=draw.choice((0.0, 1.0))),
                        Ping(call_id=call_id),
                    )
                )

    def impostor(self) -> tuple[bytes, msgspec.Struct]:
        """Who speaks in the decode node's name, with whatever numbers, on a connection of its own."""
        draw = self.draw
        identity = self.pair.decode.identity
        epoch, counter = draw.choice((0, 3, 99, 2**63 - 1)), draw.choice((0, 1, 99, 2**63 - 1))
        hello = PeerHello(epoch=epoch, identity=identity, regions=self.pair.decode.regions, num_pages=32)
        said: msgspec.Struct = draw.choice(
            (
                hello,
                hello,
                AbortRoom(room=RoomId(identity.incarnation, counter), epoch=epoch),
                PeerPing(epoch=epoch, seq=1),
                ContactPong(epoch=epoch),
            )
        )
        return draw.choice((b"odd-1", b"odd-2")), said

    def blow(self) -> None:
        draw, pair = self.draw, self.pair
        pair.prefill.server.deaf |= {b"odd-1", b"odd-2"}
        for number in range(draw.randint(5, 60)):
            if draw.random() < 0.2:
                pair.generate(
                    f"early-{number}", prompt_of(draw.randint(1, 20)), deadline_s=draw.choice((1.0, 3.0))
                )
            message = self.message()
            for node in draw.choice(((pair.prefill,), (pair.decode,), (pair.prefill, pair.decode))):
                node.server.deliver(b"router", message)
            if draw.random() < 0.15:
                pair.prefill.server.deliver(*self.impostor())
            match draw.randrange(5):
                case 0:
                    pair.step()
                case 1:
                    self.work()
                case 2:
                    self.pass_time(draw.choice((0.1, 0.5, 3.0)))
                case 3 if draw.random() < 0.3:
                    pair.network.cut()
                case _:
                    pass

    def work(self) -> None:
        self.pair.prefill.engine.finish()
        self.pair.decode.engine.finish()
        self.pair.backend.finish(self.draw.choice((None, 1)))
        self.pair.step()

    def pass_time(self, seconds: float) -> None:
        until = self.pair.now + seconds
        while self.pair.now < until:
            self.pair.now += 0.2
            for _ in range(3):
                self.work()

    def end(self) -> None:
        """An operator sets everything right by the same messages; routers name the node that is there."""
        pair = self.pair
        entry = pair.prefill.status.entry
        self.pass_time(WAITS_S)
        for node in (pair.prefill, pair.decode):
            node.server.deliver(b"router", ContinueGeneration(call_id=1))
        self.pass_time(WAITS_S)
        for node in (pair.prefill, pair.decode):
            node.server.deliver(b"router", ResumeMemory(call_id=1, tags=MEMORY_TAGS, if_released=True))
        for router in ROUTERS:
            pair.decode.server.deliver(b"router", Roster(router_id=router, nodes=(entry,)))
        self.pass_time(1.0)
        for node in (pair.prefill, pair.decode):
            prepare = PrepareWeights(
                call_id=1, update_id="last", source=FromDisk(model_path="weights-9"), weight_version="v9"
            )
            node.server.deliver(b"router", prepare)
        self.pass_time(1.0)
        for node in (pair.prefill, pair.decode):
            node.server.deliver(b"router", CommitWeights(call_id=2, update_id="last"))
        self.pass_time(REST_S)


def test_after_a_storm_the_pair_serves() -> None:
    for seed in range(NUM_SEEDS):
        storm = Storm(seed)
        storm.blow()
        storm.end()
        pair = storm.pair
        (peer,) = pair.decode.rooms.peers()
        assert (peer.address, peer.state) == (ADDRESS, PeerState.READY), f"seed {seed}: {peer.reason}"
        assert pair.decode.rooms.is_idle, f"seed {seed}: pages stay in quarantine"
        pair.generate("last", PROMPT, prefill=pair.prefill.status.entry.incarnation)
        storm.pass_time(WAITS_S)
        assert pair.stream("last").reasons == {0: "length"}, f"seed {seed}: {pair.stream('last')}"
        pair.prefill.check()
        pair.decode.check()
