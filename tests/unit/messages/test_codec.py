"""Every message of every boundary survives the wire; nothing else gets through."""

from __future__ import annotations

import contextlib
import math
import re
import typing
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import inspect

from pdserve.messages.codec import Codec
from pdserve.messages.node import CallReply, ClientToNode, GenerateRequest, NodeToClient, Ping
from pdserve.messages.peer import PeerToDecode, PeerToPrefill
from pdserve.messages.ranks import FromRank, ToRank
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.weights import JoinUpdateGroup
from pdserve.messages.work import Work

UNIONS = {
    "ClientToNode": ClientToNode,
    "NodeToClient": NodeToClient,
    "PeerToPrefill": PeerToPrefill,
    "PeerToDecode": PeerToDecode,
    "ToRank": ToRank,
    "FromRank": FromRank,
}
MESSAGES = [
    pytest.param(union, message, id=f"{name}-{message.__name__}")
    for name, union in UNIONS.items()
    for message in typing.get_args(union)
]
TEXTS = ("", "a", "é.b-1", "tcp://host:1", "float32")  # those that a pattern lets through are tried
# Shown and never computed with: what a model with NaN in its weights says of itself still arrives.
UNBOUNDED_FLOATS = {"TokenLogprob.logprob", "TokenLogprob.top", "TokenLogprob.named", "WeightsReply.values"}
UNBOUNDED_INTEGERS = {"SamplingParams.seed", "HandoffDone.digests", "WeightsWrittenReply.crc32"}  # of 64 bits


def instances(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    match kind:
        case inspect.IntType():
            return st.integers(kind.ge, 2**64 - 1 if (le := most(kind)) is None else le)
        case inspect.FloatType(ge=None, gt=None):
            return st.floats(allow_nan=False)
        case inspect.FloatType():
            return st.floats(kind.gt if kind.ge is None else kind.ge, kind.le, exclude_min=kind.ge is None)
        case inspect.BoolType():
            return st.booleans()
        case inspect.StrType(pattern=str() as pattern):
            least = kind.min_length or 0
            fitting = [text for text in TEXTS if len(text) >= least and re.search(pattern, text)]
            return st.sampled_from(fitting)
        case inspect.StrType():
            return st.text(max_size=4)
        case inspect.BytesType():
            least = kind.min_length or 0
            return st.binary(min_size=least, max_size=least or 8)
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


def most(kind: inspect.IntType) -> int | None:
    return kind.lt - 1 if kind.lt is not None else kind.le


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


@pytest.mark.parametrize(("union", "message"), MESSAGES)
def test_every_number_text_and_list_has_bounds(union: object, message: type[msgspec.Struct]) -> None:
    assert list(without_bounds(inspect.type_info(message), message.__name__)) == []


def without_bounds(kind: inspect.Type, field: str) -> Iterator[str]:
    """Names of fields, `Struct.field`, that may hold anything."""
    match kind:
        case inspect.IntType(ge=None) | inspect.IntType(le=None, lt=None):
            if kind.ge is None or field not in UNBOUNDED_INTEGERS:
                yield field
        case inspect.FloatType(ge=None, gt=None) | inspect.FloatType(le=None, lt=None):
            if field not in UNBOUNDED_FLOATS:
                yield field
        case inspect.StrType(max_length=None, pattern=None) | inspect.BytesType(max_length=None):
            yield field
        case inspect.UnionType():
            for part in kind.types:
                yield from without_bounds(part, field)
        case inspect.TupleType():
            for part in kind.item_types:
                yield from without_bounds(part, field)
        case inspect.VarTupleType() | inspect.ListType():
            if kind.max_length is None:
                yield field
            yield from without_bounds(kind.item_type, field)
        case inspect.DictType():
            if kind.max_length is None:
                yield field
            yield from without_bounds(kind.key_type, field)
            yield from without_bounds(kind.value_type, field)
        case inspect.StructType():
            for own in kind.fields:
                yield from without_bounds(own.type, f"{kind.cls.__name__}.{own.name}")
        case _:
            pass


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
        work=Work(prompt_ids=(1, 2), choices=(0,), sampling=SamplingParams()),
        prefill_incarnation="",
        deadline_s=1.0,
    )
)


def generate(**changes: object) -> dict[str, Any]:
    return {**GENERATE, "work": {**GENERATE["work"], **changes}}


def group(**changes: object) -> dict[str, Any]:
    joining = JoinUpdateGroup(
        call_id=1,
        group_name="g",
        backend="gloo",
        master_address="h",
        master_port=1,
        rank=1,
        world_size=2,
        timeout_s=1.0,
    )
    return {**msgspec.to_builtins(joining), **changes}


def prepare(source: dict[str, Any]) -> dict[str, Any]:
    head = {"type": "prepare_weights", "call_id": 1, "update_id": "u", "weight_version": "v"}
    return {**head, "source": source}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (generate(choices=[2**63]), "`$.work.choices[...]`"),
        ({**GENERATE, "attempt": 2**63}, "`$.attempt`"),
        (generate(prompt_ids=[-1]), "`$.work.prompt_ids[...]`"),
        ({**GENERATE, "deadline_s": math.inf}, "`$.deadline_s`"),
        ({**GENERATE, "deadline_s": math.nan}, "`$.deadline_s`"),
        (generate(sampling={"top_k": 2**64 - 1}), "`$.work.sampling.top_k`"),
        (generate(sampling={"logit_bias": {-5000: 1.0}}), "`key` in `$.work.sampling.logit_bias`"),
        (generate(sampling={"logit_bias": {5: math.nan}}), "`$.work.sampling.logit_bias[...]`"),
        (generate(sampling={"stop_token_ids": [-5000]}), "`$.work.sampling.stop_token_ids[...]`"),
        (generate(sampling={"temperature": math.nan}), "`$.work.sampling.temperature`"),
        (group(world_size=2**40), "`$.world_size`"),
        (group(rank=2**40), "`$.rank`"),
        (group(timeout_s=1e12), "`$.timeout_s`"),
        (prepare({"type": "shared_memory", "name": "x" * 5000}), "`$.source.name`"),
        (prepare({"type": "shared_memory", "name": "../x"}), "`$.source.name`"),
        (prepare({"type": "disk", "model_path": "/tmp/\0"}), "`$.source.model_path`"),
        ({"type": "start_profile", "profile_id": "p", "output_dir": "/tmp/\0"}, "`$.output_dir`"),
        ({"type": "start_profile", "profile_id": "../p", "output_dir": "/tmp"}, "`$.profile_id`"),
        ({"type": "slow_down", "forward_sleep_s": math.inf}, "`$.forward_sleep_s`"),
        ({"type": "set_internal_state", "settings": {"a": 2**64 - 1}}, "`$.settings[...]`"),
    ],
)
def test_a_value_beyond_its_bounds_is_refused_with_its_path(body: object, says: str) -> None:
    codec: Codec[Any] = Codec(ClientToNode)
    with pytest.raises(msgspec.ValidationError) as caught:
        codec.decode(msgspec.msgpack.encode(body))
    assert says.replace("[...]", "") in str(caught.value).replace("[...]", "").replace("[0]", "")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"type": "no_such", "call_id": 1}, "Invalid value 'no_such' - at `$.type`"),
        ({"call_id": 1}, "missing required field `type`"),
        ({"type": "ping"}, "missing required field `call_id`"),
        ({"type": "ping", "call_id": "1"}, "Expected `int`, got `str` - at `$.call_id`"),
        (generate(prompt_ids=[1, "2"]), "at `$.work.prompt_ids[1]`"),
        (generate(sampling={"top_p": "all"}), "at `$.work.sampling.top_p`"),
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
