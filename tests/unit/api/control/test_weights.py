"""The routes about weights on a router."""

from __future__ import annotations

import base64
import pickle
from typing import Any

import pytest
from safetensors.torch import load, save
from torch import ones, zeros

from pdserve.api.control.tensor_bodies import in_parts
from pdserve.api.generation import AdminReply
from pdserve.messages.weights import (
    FromGpuMemory,
    FromGroup,
    FromSharedMemory,
    GroupBackend,
    TensorSpec,
    UpdateGroupSpec,
    WeightChecksReply,
    WeightsReply,
)
from pdserve.tests.unit.api.conftest import Api

BACKENDS: tuple[GroupBackend, ...] = ("gloo", "nccl")
TENSOR_ROUTE = "/update_weights_from_tensor"


async def post_bytes(api: Api, body: bytes, query: str = "", **headers: str) -> tuple[int, Any]:
    async with api.http.post(f"{api.url}{TENSOR_ROUTE}{query}", data=body, headers=headers) as answer:
        return answer.status, await answer.json()


async def test_tensors_are_passed_on_as_they_are(api: Api) -> None:
    body = save({"t": zeros(100_000)})
    assert await post_bytes(api, body, "?weight_version=8") == (200, {"success": True, "message": "done"})
    assert await post_bytes(api, body, "?abort_all_requests=true") == (
        200,
        {"success": True, "message": "done"},
    )
    api.admin.reply = AdminReply(False, "t is no tensor of this model")
    assert (await post_bytes(api, body))[0] == 400
    assert api.admin.calls == [
        ("update", body, "8", "wait"),
        ("update", body, None, "abort"),
        ("update", body, None, "wait"),
    ]


@pytest.mark.parametrize("body", [pickle.dumps([("t", [1.0])]), b"", b"\x02", bytes(8) + b"{}"])
async def test_what_is_no_safetensors_file_is_refused_with_our_format(api: Api, body: bytes) -> None:
    status, answer = await post_bytes(api, body)
    assert (status, answer["error"]["code"]) == (400, "not_safetensors")
    assert "safetensors.torch.save" in answer["error"]["message"]
    assert api.admin.calls == []


async def test_a_payload_of_sglang_is_refused_with_our_format(api: Api) -> None:
    payload = base64.b64encode(pickle.dumps({})).decode()
    status, answer = await api.post(
        TENSOR_ROUTE, {"serialized_named_tensors": [payload], "flush_cache": True}
    )
    assert (status, answer["error"]["code"]) == (400, "not_safetensors")
    assert "Pickled tensors are not read" in answer["error"]["message"]
    assert "safetensors.torch.save" in answer["error"]["message"]
    assert "--allow-pickled-tensors" in answer["error"]["message"]


@pytest.mark.parametrize("allow_pickled_tensors", [True])
async def test_a_payload_of_sglang_is_read_where_it_is_allowed(api: Api) -> None:
    tensors = {"t": zeros(3), "u": ones(2, 2)}
    entry = base64.b64encode(pickle.dumps(list(tensors.items()))).decode()
    body = {"serialized_named_tensors": [entry, entry], "flush_cache": True, "weight_version": "8"}
    assert await api.post(TENSOR_ROUTE, body) == (200, {"success": True, "message": "done"})
    ((_, file, weight_version, mode),) = api.admin.calls
    assert (weight_version, mode) == ("8", "wait")
    read = load(file)
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    assert (await post_bytes(api, save(tensors)))[0] == 200, "the file as before"


@pytest.mark.parametrize("allow_pickled_tensors", [True])
@pytest.mark.parametrize(
    ("serialized", "word"),
    [
        ([], "one pickle"),
        (["a", "b"], "one pickle"),
        (["?"], "base64"),
        ([base64.b64encode(pickle.dumps(print)).decode()], "builtins.print"),
        ([base64.b64encode(pickle.dumps({"t": 1})).decode()], "safetensors.torch.save"),
    ],
)
async def test_another_pickle_is_refused_by_name(api: Api, serialized: list[str], word: str) -> None:
    status, answer = await api.post(TENSOR_ROUTE, {"serialized_named_tensors": serialized})
    assert (status, answer["error"]["param"]) == (400, "serialized_named_tensors")
    assert word in answer["error"]["message"]
    assert api.admin.calls == []


async def test_a_flag_that_is_none_is_refused(api: Api) -> None:
    assert (await post_bytes(api, save({"t": zeros(1)}), "?force=perhaps"))[0] == 400


async def test_in_parts_keeps_every_byte() -> None:
    async def pieces() -> Any:  # noqa: ANN401
        for size in (0, 1, 5, 2, 0, 9):
            yield bytes(range(size))

    parts = [part async for part in in_parts(pieces(), 4)]
    assert [len(part) for part in parts] == [4, 4, 4, 4, 1]
    assert b"".join(parts) == b"".join([piece async for piece in pieces()])


DISTRIBUTED: dict[str, Any] = {
    "names": ["a", "b"],
    "dtypes": ["torch.float32", "bfloat16"],
    "shapes": [[2, 3], []],
    "group_name": "g",
}


async def test_a_distributed_update(api: Api) -> None:
    route = "/update_weights_from_distributed"
    body = {**DISTRIBUTED, "flush_cache": True, "weight_version": "8", "timeout": 5}
    assert await api.post(route, body) == (200, {"success": True, "message": "done"})
    assert (await api.post(route, {**DISTRIBUTED, "load_format": "flattened_bucket", "mode": "keep"}))[
        0
    ] == 200
    tensors = (TensorSpec("a", "float32", (2, 3)), TensorSpec("b", "bfloat16", ()))
    first = FromGroup(group_name="g", tensors=tensors, is_one_bucket=False, timeout_s=5.0)
    second = FromGroup(group_name="g", tensors=tensors, is_one_bucket=True, timeout_s=300.0)
    assert api.admin.calls == [("update", first, "8", "wait"), ("update", second, None, "retract")]


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"names": ["a"]}, "names"),
        ({"names": ["a", "a"]}, "twice"),
        ({"dtypes": ["float32", "quaternion"]}, "quaternion"),
        ({"shapes": [[2, -3], []]}, "`shapes[0][1]`"),
        ({"shapes": [[2, 2**70], []]}, "`shapes[0][1]`"),
        ({"timeout": 0}, "timeout"),
        ({"mode": "in_place"}, "other weights computed"),
        ({"load_format": "pickle"}, "load_format"),
    ],
)
async def test_a_wrong_distributed_update_is_refused(api: Api, wrong: dict[str, Any], word: str) -> None:
    status, answer = await api.post("/update_weights_from_distributed", {**DISTRIBUTED, **wrong})
    assert (status, word in answer["error"]["message"]) == (400, True), answer
    assert api.admin.calls == []


async def test_an_update_from_shared_memory(api: Api) -> None:
    route = "/update_weights_from_ipc"
    assert (await api.post(route, {"name": "step-7", "weight_version": "7"}))[0] == 200
    for wrong in ({"name": "../etc/passwd"}, {"name": ".."}, {"name": ""}, {}):
        assert (await api.post(route, wrong))[0] == 400, wrong
    status, answer = await api.post(route, {"zmq_handles": {}})
    assert (status, "/dev/shm" in answer["error"]["message"]) == (400, True)
    assert api.admin.calls == [("update ipc", FromSharedMemory(name="step-7"), "7", "wait")]


async def test_an_update_from_memory_of_a_gpu(api: Api) -> None:
    route, handle = "/update_weights_from_ipc", bytes(range(64))
    gpu: dict[str, Any] = {"device_uuid": "GPU-1", "handle": base64.b64encode(handle).decode(), "offset": 8}
    body = {"gpu": gpu, "names": ["a"], "dtypes": ["torch.float32"], "shapes": [[2, 3]]}
    assert (await api.post(route, {**body, "mode": "retract"}))[0] == 200
    tensors = (TensorSpec("a", "float32", (2, 3)),)
    source = FromGpuMemory(device_uuid="GPU-1", handle=handle, offset=8, tensors=tensors)
    assert api.admin.calls == [("update ipc", source, None, "retract")]
    wrongs: list[dict[str, object]] = [
        {"name": "step-7"},  # which of the two?
        {"names": []},
        {"gpu": {**gpu, "handle": gpu["handle"][:8]}},
        {"gpu": {**gpu, "handle": "no base64"}},
        {"gpu": {**gpu, "offset": -1}},
    ]
    for wrong in wrongs:
        assert (await api.post(route, {**body, **wrong}))[0] == 400, wrong


async def test_update_groups(api: Api) -> None:
    body = {
        "master_address": "trainer",
        "master_port": 5,
        "rank_offset": 1,
        "world_size": 3,
        "group_name": "g",
    }
    assert await api.post("/init_weights_update_group", body) == (
        200,
        {"success": True, "message": "done", "ranks": {"http://d": 1}},
    )
    for wrong in ({"backend": "mpi"}, {"rank_offset": 0}, {"rank_offset": 3}, {"master_port": 0}):
        assert (await api.post("/init_weights_update_group", {**body, **wrong}))[0] == 400, wrong
    assert (await api.post("/destroy_weights_update_group", {"group_name": "g"}))[0] == 200
    assert (await api.post("/init_weights_update_group", {**body, "backend": "nccl"}))[0] == 200
    gloo, nccl = (
        UpdateGroupSpec(
            name="g",
            backend=backend,
            master_address="trainer",
            master_port=5,
            world_size=3,
            timeout_s=120.0,
        )
        for backend in BACKENDS
    )
    assert api.admin.calls == [("init group", gloo, 1), ("destroy group", "g"), ("init group", nccl, 1)]


async def test_memory_occupation(api: Api) -> None:
    assert (await api.post("/release_memory_occupation", {}))[0] == 200
    assert (await api.post("/resume_memory_occupation", {"tags": ["weights"]}))[0] == 200
    assert (await api.post("/release_memory_occupation", {"tags": ["cuda_graph", "graphs"]}))[0] == 200
    assert (await api.post("/release_memory_occupation", {"tags": ["vision"]}))[0] == 400
    api.admin.reply = AdminReply(False, "not released: weights")
    assert await api.post("/resume_memory_occupation", {"tags": ["weights"]}) == (
        400,
        {"success": False, "message": "not released: weights"},
    )
    every, one = ("weights", "kv_cache", "graphs"), ("weights",)
    assert api.admin.calls == [("release", every), ("resume", one), ("release", ("graphs",)), ("resume", one)]


async def test_vllms_names_of_a_release_and_a_resume(api: Api) -> None:
    assert (await api.post("/sleep?level=1", {}))[0] == 200
    assert (await api.post("/sleep?level=3", {}))[0] == 400
    assert await api.get("/is_sleeping") == (200, {"is_sleeping": False})
    api.admin.released = frozenset({"weights"})
    assert await api.get("/is_sleeping") == (200, {"is_sleeping": True})
    assert (await api.post("/wake_up?tags=kv_cache&tags=weights", {}))[0] == 200
    assert (await api.post("/wake_up?tags=dreams", {}))[0] == 400
    assert (await api.post("/wake_up", {}))[0] == 200
    every = ("weights", "kv_cache", "graphs")
    assert api.admin.calls == [("release", every), ("resume", every[:2]), ("resume", every)]


async def test_weights_by_name_is_what_all_nodes_agree_on(api: Api) -> None:
    reply = WeightsReply(call_id=1, success=True, dtype="float32", values=[[0.5, 1.0]])
    api.admin.named_weights = {"http://p": reply, "http://d": reply}
    assert await api.post("/get_weights_by_name", {"name": "t", "truncate_size": 1}) == (200, [[0.5, 1.0]])
    assert await api.get("/get_weights_by_name?name=t&truncate_size=7") == (200, [[0.5, 1.0]])
    assert api.admin.calls == [("get weights", "t", 1), ("get weights", "t", 7)]

    other = WeightsReply(call_id=1, success=True, dtype="float32", values=[[0.5, 2.0]])
    api.admin.named_weights["http://d"] = other
    status, answer = await api.post("/get_weights_by_name", {"name": "t"})
    assert (status, answer["success"]) == (400, False)
    assert "http://p, http://d hold other values of t" in answer["message"]
    api.admin.named_weights["http://d"] = WeightsReply(call_id=1, success=False, message="no tensor 't'")
    status, answer = await api.post("/get_weights_by_name", {"name": "t"})
    assert (status, answer["message"]) == (400, "http://d: no tensor 't'")


@pytest.mark.parametrize("body", [{}, {"name": 5}, {"name": "t", "truncate_size": 0}, {"name": "t", "x": 1}])
async def test_bad_questions_are_refused(api: Api, body: dict[str, object]) -> None:
    assert (await api.post("/get_weights_by_name", body))[0] == 400
    assert api.admin.calls == []


async def test_a_check_compares_all_nodes(api: Api) -> None:
    same = WeightChecksReply(call_id=1, success=True, tensors={"a": "1", "b": "2"}, whole="w")
    api.admin.weight_checks = {"http://p": same, "http://d": same}
    status, answer = await api.post("/check_weights", {})
    assert (status, answer["success"]) == (200, True)
    assert answer["message"] == "2 tensors are the same on 2 nodes: w"
    assert answer["nodes"]["http://d"]["tensors"] == {"a": "1", "b": "2"}

    api.admin.weight_checks["http://d"] = WeightChecksReply(
        call_id=1, success=True, tensors={"a": "1", "b": "3"}
    )
    status, answer = await api.post("/weights_checker", {"action": "checksum"})
    assert (status, answer["success"]) == (400, False)
    assert answer["message"] == "these tensors differ between nodes: b"
    api.admin.weight_checks["http://d"] = WeightChecksReply(call_id=1, success=False, message="lost")
    assert (await api.post("/check_weights", {}))[1]["message"] == "http://d: lost"
    assert (await api.post("/check_weights", {"action": "reset_tensors"}))[0] == 400


async def test_a_check_tells_what_has_changed_since_a_snapshot(api: Api) -> None:
    route = "/weights_checker"
    assert (await api.post(route, {"action": "compare"}))[
        0
    ] == 400  # nothing happened: "no node is connected"
    before = WeightChecksReply(call_id=1, success=True, tensors={"a": "1", "b": "2"}, whole="w")
    api.admin.weight_checks = {"http://p": before, "http://d": before}
    status, refusal = await api.post(route, {"action": "compare"})
    assert (status, refusal["error"]["code"]) == (400, "no_snapshot")
    assert (await api.post(route, {"action": "snapshot"}))[0] == 200
    status, answer = await api.post(route, {"action": "compare"})
    assert (status, answer["message"]) == (200, "2 tensors are as they were at the snapshot: w")
    after = WeightChecksReply(call_id=1, success=True, tensors={"a": "1", "b": "3"}, whole="v")
    api.admin.weight_checks = {"http://p": after, "http://d": after}
    status, answer = await api.post(route, {"action": "compare"})
    assert (status, answer["success"]) == (400, False)
    assert answer["message"] == "these tensors have changed since the snapshot: b"


async def test_saving(api: Api) -> None:
    assert (await api.post("/save_sharded_model", {"path": "/new", "max_size": 9, "pattern": None}))[0] == 200
    assert (await api.post("/save_sharded_model", {"path": "/new"}))[0] == 200
    assert (await api.post("/save_remote_model", {"url": "s3://b/m"}))[0] == 200
    for wrong in ({"path": "new"}, {"path": "/new", "max_size": 0}, {"path": "/new", "pattern": "x"}, {}):
        assert (await api.post("/save_sharded_model", wrong))[0] == 400, wrong
    for url in ("/new", ""):
        status, answer = await api.post("/save_remote_model", {"url": url})
        assert (status, answer["error"]["param"]) == (400, "url")
    assert api.admin.calls == [
        ("save", "/new", False, 9),
        ("save", "/new", False, 5 << 30),
        ("save", "s3://b/m", True, 5 << 30),
    ]
    api.admin.reply = AdminReply(False, "the disk is full")
    assert await api.post("/save_remote_model", {"url": "s3://b/m"}) == (
        400,
        {"success": False, "message": "the disk is full"},
    )


async def test_the_version_alone(api: Api) -> None:
    """SGLang's route, whose default ends running requests."""
    path = "/update_weight_version"
    assert await api.post(path, {"new_version": "step-8"}) == (
        200,
        {"success": True, "message": "done", "new_version": "step-8"},
    )
    for fields in ({"abort_all_requests": False}, {"mode": "retract"}):
        assert (await api.post(path, {"new_version": "9", **fields}))[0] == 200
    assert api.admin.calls == [
        ("update version", "step-8", "abort"),
        ("update version", "9", "wait"),
        ("update version", "9", "retract"),
    ]
    for wrong, param in (
        ({}, "new_version"),
        ({"new_version": ""}, "new_version"),
        ({"mode": "in_place", "new_version": "9"}, "mode"),
    ):
        status, answer = await api.post(path, wrong)
        assert (status, answer["error"]["param"]) == (400, param)
    api.admin.reply = AdminReply(False, "no node is registered")
    status, answer = await api.post(path, {"new_version": "9"})
    assert (status, answer["success"], answer["message"]) == (400, False, "no node is registered")


async def test_an_update_from_a_peer(api: Api) -> None:
    body = {"peer": "http://p:8100/", "mode": "keep"}
    assert (await api.post("/update_weights_from_peer", body))[0] == 200
    for wrong in ({"peer": "tcp://p:1"}, {}, {**body, "mode": "in_place"}):
        assert (await api.post("/update_weights_from_peer", wrong))[0] == 400, wrong
    assert api.admin.calls == [("update peer", "http://p:8100", None, "retract")]


GROUP: dict[str, Any] = {"master_address": "h", "master_port": 5, "rank_offset": 1, "world_size": 3}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/save_sharded_model", {"path": "/m", "max_size": 2**70}, "max_size"),
        ("/save_sharded_model", {"path": "/m\0", "max_size": 1}, "path"),
        ("/update_weights_from_disk", {"model_path": "/m\0"}, "model_path"),
        ("/update_weights_from_ipc", {"name": "x" * 5000}, "name"),
        ("/init_weights_update_group", {**GROUP, "world_size": 2**40}, "world_size"),
        ("/init_weights_update_group", {**GROUP, "rank_offset": 2**40}, "rank_offset"),
        ("/get_weights_by_name", {"name": "w", "truncate_size": 2**70}, "truncate_size"),
    ],
)
async def test_a_value_that_no_message_carries_is_refused_by_name(
    api: Api, path: str, body: dict[str, Any], field: str
) -> None:
    status, answer = await api.post(path, body)
    assert (status, answer["error"]["param"]) == (400, field), answer


async def test_a_truncate_size_in_other_digits_is_no_number(api: Api) -> None:
    async with api.http.get(f"{api.url}/get_weights_by_name?name=w&truncate_size=%C2%B2") as answer:
        assert answer.status == 400
