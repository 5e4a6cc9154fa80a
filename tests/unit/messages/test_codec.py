"""Every message of every boundary survives the wire; nothing else gets through."""

from __future__ import annotations

import contextlib
import math
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import inspect

from pdserve.messages.codec import Codec
from pdserve.messages.node import CallReply, ClientToNode, GenerateRequest, NodeToClient, Ping
from pdserve.messages.peer import PeerToDecode, PeerToPrefill
from pdserve.messages.sampling import SamplingParams

UNIONS = {
    "ClientToNode": ClientToNode,
    "NodeToClient": NodeToClient,
    "PeerToPrefill": PeerToPrefill,
    "PeerToDecode": PeerToDecode,
}
MESSAGES = [
    pytest.param(union, message, id=f"{name}-{message.__name__}")
    for name, union in UNIONS.items()
    for message in typing.get_args(union)
]


def instances(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    match kind:
        case inspect.IntType():
            return st.integers(0, 2**64 - 1)  # seeds use all of it
        case inspect.FloatType():
            return st.floats(allow_nan=False)
        case inspect.BoolType():
            return st.booleans()
        case inspect.StrType():
            return st.text(max_size=4)
        case inspect.BytesType():
            return st.binary(max_size=8)
        case inspect.NoneType():
            return st.none()
        case inspect.LiteralType():
            return st.sampled_from(kind.values)
        case inspect.UnionType():
            return st.one_of([instances(part) for part in kind.types])
        case inspect.VarTupleType():
            return st.lists(instances(kind.item_type), max_size=2).map(tuple)
        case inspect.TupleType():
            return st.tuples(*(instances(item) for item in kind.item_types))
        case inspect.ListType():
            return st.lists(instances(kind.item_type), max_size=2)
        case inspect.DictType():
            return st.dictionaries(instances(kind.key_type), instances(kind.value_type), max_size=2)
        case inspect.StructType():
            values = {field.name: instances(field.type) for field in kind.fields}
            return st.builds(kind.cls, **values)
    raise AssertionError(f"no strategy for {kind}: teach it to this test")


@pytest.mark.parametrize(("union", "message"), MESSAGES)
@given(data=st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_message_arrives_as_it_was_sent(
    union: object, message: type[msgspec.Struct], data: st.DataObject
) -> None:
    codec: Codec[msgspec.Struct] = Codec(union)
    sent = data.draw(instances(inspect.type_info(message)))
    received = codec.decode(codec.encode(sent))
    assert type(received) is message
    assert received == sent


@pytest.mark.parametrize(("union", "message"), MESSAGES)
def test_messages_are_frozen_and_tagged(union: object, message: type[msgspec.Struct]) -> None:
    assert message.__struct_config__.frozen
    assert message.__struct_config__.tag


def test_a_prefill_node_can_tell_routers_and_decode_nodes_apart() -> None:
    # It has one socket for both, so the unions share no tag.
    tags = [m.__struct_config__.tag for u in (ClientToNode, PeerToPrefill) for m in typing.get_args(u)]
    assert len(tags) == len(set(tags))


def test_defaults_of_sampling_cost_nothing_on_the_wire() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(SamplingParams())) == {}


def test_infinite_logprobs_survive() -> None:
    encoded = msgspec.msgpack.encode(-math.inf)
    assert msgspec.msgpack.decode(encoded, type=float) == -math.inf


GENERATE = msgspec.to_builtins(
    GenerateRequest(
        request_id="r",
        attempt=1,
        prompt_ids=(1, 2),
        output_ids=(),
        choices=(0,),
        sampling=SamplingParams(),
        prefill_incarnation="",
        deadline_s=1.0,
    )
)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"type": "no_such", "call_id": 1}, "Invalid value 'no_such' - at `$.type`"),
        ({"call_id": 1}, "missing required field `type`"),
        ({"type": "ping"}, "missing required field `call_id`"),
        ({"type": "ping", "call_id": "1"}, "Expected `int`, got `str` - at `$.call_id`"),
        ({**GENERATE, "prompt_ids": [1, "2"]}, "at `$.prompt_ids[1]`"),
        ({**GENERATE, "sampling": {"top_p": "all"}}, "at `$.sampling.top_p`"),
        ({**GENERATE, "deadline_s": None}, "at `$.deadline_s`"),
        ([1, 2], "Expected `object`, got `array`"),
        (None, "Expected `object`, got `None`"),
    ],
)
def test_what_is_no_message_of_the_receiver_is_refused_with_its_path(body: object, says: str) -> None:
    codec: Codec[Any] = Codec(ClientToNode)
    with pytest.raises(msgspec.ValidationError) as caught:
        codec.decode(msgspec.msgpack.encode(body))
    assert says in str(caught.value)


def test_a_message_of_another_receiver_is_refused() -> None:
    codec: Codec[Any] = Codec(ClientToNode)
    with pytest.raises(msgspec.ValidationError, match="'reply'"):
        codec.decode(codec.encode(CallReply(call_id=1, success=True)))


def test_fields_of_a_newer_sender_are_passed_over() -> None:
    codec: Codec[Any] = Codec(ClientToNode)
    assert codec.decode(msgspec.msgpack.encode({"type": "ping", "call_id": 3, "new": [1]})) == Ping(call_id=3)


PING = msgspec.msgpack.encode(Ping(call_id=1))
NOT_MESSAGES = {
    "empty": b"",
    "cut": PING[:-1],
    "trailing": PING + b"\x00",
    "text": b"GET / HTTP/1.1\r\n",
    "invalid-utf8": b"\x83\xa4type\xa5abort\xa7call_id\x01\xaarequest_id\xa2\xff\xfe",
    "nested-too-deep": b"\x83\xa4type\xa4ping\xa7call_id\x01\xa1x" + b"\x91" * 100_000 + b"\x01",
    "length-of-4-GiB": b"\x83\xa4type\xa4ping\xa7call_id\x01\xa1x\xdd\xff\xff\xff\xff",
}


@pytest.mark.parametrize("data", NOT_MESSAGES.values(), ids=NOT_MESSAGES.keys())
def test_bytes_that_are_no_message_raise_one_kind_of_error(data: bytes) -> None:
    codec: Codec[Any] = Codec(ClientToNode)
    with pytest.raises(msgspec.DecodeError):
        codec.decode(data)


@given(data=st.binary(max_size=64))
@settings(max_examples=300, deadline=None)
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    codec: Codec[Any] = Codec(ClientToNode)
    with contextlib.suppress(msgspec.DecodeError):
        codec.decode(data)
