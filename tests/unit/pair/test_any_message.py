"""Messages at the edges of their values and beyond raise in no handler, and leave what must hold as it is."""

from __future__ import annotations

import random
import typing

import msgspec
import pytest
from msgspec import inspect

from pdserve.messages.node import ClientToNode
from pdserve.messages.peer import PeerToPrefill
from pdserve.messages.weights import (
    CommitWeights,
    MeetInbox,
    OfferInbox,
    OpenWeights,
    ReadWeights,
    WriteWeights,
)
from pdserve.scripts.tools.fuzz import Values

from .cluster import ADDRESS, Pair, prompt_of

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
