"""Messages at the edges of their values and beyond raise in no handler, and afterwards both nodes serve."""

from __future__ import annotations

import random
import typing

import msgspec
import pytest
from msgspec import inspect

from pdserve.messages.node import ClientToNode, Roster
from pdserve.messages.operation import ContinueGeneration, SetInternalState, SettingValue
from pdserve.messages.peer import PeerToPrefill
from pdserve.messages.weights import (
    MEMORY_TAGS,
    CommitWeights,
    FromDisk,
    MeetInbox,
    OfferInbox,
    OpenWeights,
    PrepareWeights,
    ReadWeights,
    ResumeMemory,
    WriteWeights,
)
from pdserve.scripts.tools.fuzz import Values

from .cluster import ADDRESS, DecodeNode, Pair, PrefillNode, prompt_of

# Their parts are fakes here, and what is committed would be other weights on one node alone.
NOT_HERE = {CommitWeights, MeetInbox, OfferInbox, OpenWeights, ReadWeights, WriteWeights}
KNOWN = ["prefill-1", "decode-1", "live", ADDRESS, "router"]
NUM_MESSAGES = 600


def structs(union: object) -> list[inspect.StructType]:
    kinds = [inspect.type_info(message) for message in typing.get_args(union)]
    return [kind for kind in kinds if isinstance(kind, inspect.StructType)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_any_message_to_a_node(role: str, seed: int) -> None:
    pair, values = Pair(), Values(random.Random(seed), KNOWN)
    node = pair.prefill if role == "prefill" else pair.decode
    node.server.deaf.add(b"odd")
    kinds = [kind for kind in structs(ClientToNode) if kind.cls not in NOT_HERE]
    kinds += structs(PeerToPrefill) if role == "prefill" else []
    for number in range(NUM_MESSAGES):
        if number % 20 == 0:
            pair.generate("live", prompt_of(10), attempt=number)
        kind = values.rng.choice(kinds)
        body = values.of(kind)
        if number % 2 and len(body) > 1:
            values.spoil(body)
        payload = msgspec.msgpack.encode(body)
        node.server.deliver_raw(b"odd", payload)
        pair.step()
        if number % 7 == 0:
            pair.prefill.engine.finish()
            pair.decode.engine.finish()
            pair.backend.finish()
    assert not any(each.num_faults for each in node.containments), "a handler has raised"
    node.check()
    set_right(pair)
    assert pair.decode.rooms.ready_peers() == {pair.prefill.status.entry.incarnation: ADDRESS}
    pair.generate("last", prompt_of(10), prefill=pair.prefill.status.entry.incarnation)
    pass_time(pair, 5.0)
    pair.check_answer("last", prompt_of(10), 4)


def set_right(pair: Pair) -> None:
    """What was changed on purpose is changed back, by the messages that did it."""
    pass_time(pair, 1.0)
    update = PrepareWeights(
        call_id=0, update_id="last", source=FromDisk(model_path="weights-9"), weight_version="v9"
    )
    settings: dict[PrefillNode | DecodeNode, dict[str, SettingValue]] = {
        pair.prefill: {"chunked_prefill_size": 8, "max_queued_prefills": 8},
        pair.decode: {"schedule_conservativeness": 1.0},
    }
    for node, values in settings.items():
        node.server.deliver(b"odd", ContinueGeneration(call_id=0))
        node.server.deliver(b"odd", SetInternalState(settings=values))
        pass_time(pair, 5.0)
        node.server.deliver(b"odd", ResumeMemory(call_id=0, tags=MEMORY_TAGS, if_released=True))
        pass_time(pair, 1.0)
        node.server.deliver(b"odd", update)  # a roster may have committed one that was prepared
        pass_time(pair, 1.0)
        node.server.deliver(b"odd", CommitWeights(call_id=0, update_id=update.update_id))
    pair.decode.server.deliver(b"odd", Roster(router_id="router", nodes=(pair.prefill.status.entry,)))
    pass_time(pair, 20.0)


def pass_time(pair: Pair, seconds: float) -> None:
    for _ in range(round(5 * seconds)):
        pair.now += 0.2
        for _ in range(3):
            pair.prefill.engine.finish()
            pair.decode.engine.finish()
            pair.backend.finish()
            pair.step()
