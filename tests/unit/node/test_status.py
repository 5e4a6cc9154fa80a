"""NodeStatus: what a node says of itself, before and after other weights."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from pdserve.messages.codec import Codec
from pdserve.messages.kv_layout import KVLayout
from pdserve.messages.node import ModelInfo, NodeEntry, NodeLoad, NodeToClient, RankInfo
from pdserve.node.status import NodeStatus
from pdserve.runtime.command_line import node_config

LAYOUT = KVLayout(num_kv_heads=2, num_layers=2, page_size=16, head_dim=8, dtype="float32")
ENTRY = NodeEntry(
    url="http://127.0.0.1:8200",
    role="decode",
    incarnation="d1",
    zmq_address="tcp://127.0.0.1:5",
    model_name="tiny",
    model_fingerprint="old digest",
    weight_version="w1",
)
MODEL = ModelInfo(
    model_name="tiny",
    model_path="/models/tiny",
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    vocab_size=9,
    max_model_len=64,
    eos_token_ids=(0,),
    dtype="float32",
    weight_version="w1",
    model_fingerprint="old digest",
)
RANKS = (
    RankInfo(rank=0, pid=10, session="10.0.0.2:15000"),
    RankInfo(rank=1, pid=11, session="10.0.0.2:15001"),
)
SECRET = "secret-token"


@pytest.fixture
def status() -> NodeStatus:
    config = node_config(
        "decode",
        {"api_key": [SECRET], "cluster_secret": SECRET, "router": ["http://r:1"], "model": "/models/tiny"},
    )
    return NodeStatus(ENTRY, MODEL, config, LAYOUT, "tcp", RANKS)


def test_server_info_has_every_flag_but_the_secrets(status: NodeStatus) -> None:
    info = status.server_info(7, NodeLoad(num_running_reqs=3))
    assert (info.call_id, info.entry, info.model, info.load.num_running_reqs) == (7, ENTRY, MODEL, 3)
    assert (info.kv_layout, info.transport, info.ranks) == (LAYOUT, "tcp", RANKS)
    assert info.config["router"] == ["http://r:1"]
    names = {field.name for field in dataclasses.fields(node_config("decode", {}))}
    assert set(info.config) == names - {"api_key", "admin_api_key", "cluster_secret", "cluster_secret_file"}
    assert SECRET.encode() not in msgspec.json.encode(info)


def test_what_is_said_survives_the_wire(status: NodeStatus) -> None:
    codec: Codec[NodeToClient] = Codec(NodeToClient)
    info = status.server_info(7, NodeLoad())
    assert codec.decode(codec.encode(info)) == info


def test_a_pong_tells_the_pairs(status: NodeStatus) -> None:
    refused = {"http://p2:1": "page size 8, not 16"}
    pong = status.pong(4, NodeLoad(), ready_peers=["p1"], refused_peers=refused, is_draining=True)
    assert (pong.call_id, pong.entry, pong.ready_peers, pong.draining) == (4, ENTRY, ("p1",), True)
    refused.clear()
    assert pong.refused_peers == {"http://p2:1": "page size 8, not 16"}


def test_new_weights_are_told_everywhere_and_nothing_else_changes(status: NodeStatus) -> None:
    status.renew("/models/next", "new digest", "w2")
    assert status.weight_version == "w2"
    info = status.server_info(1, NodeLoad())
    assert info.entry == msgspec.structs.replace(ENTRY, model_fingerprint="new digest", weight_version="w2")
    assert info.model == msgspec.structs.replace(
        MODEL, model_path="/models/next", model_fingerprint="new digest", weight_version="w2"
    )
    pong = status.pong(1, NodeLoad(), ready_peers=(), refused_peers={}, is_draining=False)
    assert pong.entry == info.entry
