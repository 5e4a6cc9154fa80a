from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pdserve.api.generation import AdminReply
from pdserve.api.text.tokenization import Tokenizer
from pdserve.runtime.errors import RequestError
from pdserve.tests.unit.api.conftest import Api
from pdserve.tests.unit.api.fakes import ENTRY


@pytest.mark.parametrize("path", ["/health", "/ping", "/live", "/liveness", "/ready", "/readiness"])
async def test_probes(api: Api, path: str) -> None:
    assert (await api.get(path))[0] == 200
    async with api.http.head(api.url + path) as answer:
        assert answer.status == 200


async def test_not_ready_says_why(api: Api) -> None:
    api.admin.ready = (False, "no decode node has registered")
    for path in ("/ready", "/readiness"):
        status, answer = await api.get(path)
        assert (status, answer["error"]["code"]) == (503, "not_ready")
        assert answer["error"]["message"] == "no decode node has registered"
    assert (await api.get("/health"))[0] == 200


async def test_health_generate_makes_one_token(api: Api) -> None:
    assert (await api.get("/health_generate"))[0] == 200
    sampling = api.generator.specs[0].work.sampling
    assert (sampling.max_tokens, sampling.ignore_eos) == (1, True)
    api.generator.refusal = RequestError("the queue is full", status=429, code="queue_full")
    status, answer = await api.get("/health_generate")
    assert (status, answer["error"]["code"]) == (503, "queue_full")


async def test_models(api: Api) -> None:
    _, models = await api.get("/v1/models")
    assert models["object"] == "list"
    assert models["data"] == [
        {
            "id": name,
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "pdserve",
            "root": "/models/tiny",
            "parent": None,
            "max_model_len": 256,
        }
        for name in ("org/tiny", "tiny", "tiny-lora")
    ]
    assert (await api.get("/v1/models/org/tiny"))[1] == models["data"][0]
    assert (await api.get("/v1/models/org%2Ftiny"))[1] == models["data"][0]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/server_info", {"role": "router"}),
        ("/get_server_info", {"internal_states": [{}]}),
        ("/model_info", {"model_path": "/models/tiny", "is_generation": True, "weight_version": "7"}),
        ("/get_model_info", {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}),
        ("/get_weight_version", {"weight_version": "7"}),
    ],
)
async def test_facts(api: Api, path: str, expected: dict[str, Any]) -> None:
    status, answer = await api.get(path)
    assert status == 200
    assert expected.items() <= answer.items()


async def test_loads(api: Api) -> None:
    _, loads = await api.get("/get_load")
    assert loads[0]["num_reqs"] == 4
    assert loads[0]["num_waiting_reqs"] == 1
    assert loads[0]["num_tokens"] == 64
    assert (await api.get("/v1/loads"))[1]["loads"] == loads


async def test_workers_come_and_go(api: Api) -> None:
    _, answer = await api.get("/workers")
    (worker,) = answer["workers"]
    assert (worker["id"], worker["url"], worker["worker_type"]) == ("p-1", ENTRY.url, "prefill")
    assert worker["is_ready"]
    assert worker["lease_s"] == 4.5
    body = {"url": f"{ENTRY.url}/", "entry": msgspec.structs.asdict(ENTRY)}
    assert (await api.post("/workers", body))[0] == 200
    by_hand = {"url": "http://h:1", "worker_type": "decode", "bootstrap_port": None}
    assert (await api.post("/workers", by_hand))[0] == 200
    for name in ("p-1", ENTRY.url, "http%3A%2F%2F127.0.0.1%3A8100"):
        async with api.http.delete(f"{api.url}/workers/{name}") as deleted:
            assert deleted.status == 200
    assert api.admin.calls == [
        ("register", ENTRY.url, ENTRY),
        ("register", "http://h:1", None),
        *[("remove", ENTRY.url)] * 3,
    ]
    api.admin.reply = AdminReply(False, "no such node")
    async with api.http.delete(f"{api.url}/workers/x") as deleted:
        assert deleted.status == 404


async def test_a_bad_registration_is_refused_by_field(api: Api) -> None:
    status, answer = await api.post("/workers", {"url": "http://h:1", "entry": {"url": "http://h:1"}})
    assert (status, answer["error"]["param"]) == (400, "role")


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_flush_cache(api: Api, method: str) -> None:
    async with api.http.request(method, f"{api.url}/flush_cache?timeout=2.5") as answer:
        assert (answer.status, await answer.json()) == (200, {"success": True, "message": "done"})
    assert api.admin.calls == [("flush", 2.5)]
    api.admin.reply = AdminReply(False, "busy")
    async with api.http.request(method, f"{api.url}/flush_cache") as answer:
        assert (answer.status, await answer.json()) == (400, {"success": False, "message": "busy"})


async def test_vllms_names_of_a_flush_and_of_the_load(api: Api) -> None:
    assert (await api.post("/reset_prefix_cache", {}))[0] == 200
    assert api.admin.calls == [("flush", 0.0)]
    end = api.in_flight.begin("a", ["cmpl-a"])
    assert await api.get("/load") == (200, {"server_load": 1})
    end()


async def test_tokenizer_info_is_what_lm_eval_reads(api: Api) -> None:
    status, info = await api.get("/tokenizer_info")
    assert (status, info["eos_token"]) == (200, "<|im_end|>")
    assert "<|im_start|>" in info["chat_template"]


async def test_abort_request(api: Api) -> None:
    assert (await api.post("/abort_request", {"rid": "elsewhere"}))[0] == 200
    assert (await api.post("/abort_request", {"rid": "", "abort_all": True}))[0] == 200
    assert api.admin.calls == [("abort", "elsewhere", False), ("abort", "", True)]


async def test_assert_peer_death(api: Api) -> None:
    assert (await api.post("/assert_peer_death", {"incarnation": "P1"}))[0] == 200
    api.admin.reply = AdminReply(False, "P1 is alive")
    assert (await api.post("/assert_peer_death", {"incarnation": "P1"}))[0] == 400
    assert (await api.post("/assert_peer_death", {}))[0] == 400
    assert api.admin.calls == [("dead", "P1"), ("dead", "P1")]


async def test_update_weights(api: Api) -> None:
    body = {"model_path": "/new", "load_format": "auto", "flush_cache": True, "abort_all_requests": True}
    assert await api.post("/update_weights_from_disk", body) == (200, {"success": True, "message": "done"})
    api.admin.reply = AdminReply(False, "another model")
    body = {"model_path": "/new", "weight_version": "8"}
    assert (await api.post("/update_weights_from_disk", body))[0] == 400
    assert api.admin.calls == [("update", "/new", None, "abort"), ("update", "/new", "8", "wait")]


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_tokenize_and_back(api: Api, tokenizer: Tokenizer, prefix: str) -> None:
    _, answer = await api.post(f"{prefix}/tokenize", {"prompt": "The quick", "return_token_strs": True})
    assert answer == {
        "count": 2,
        "max_model_len": 256,
        "tokens": tokenizer.encode("The quick"),
        "token_strs": ["The", "Ġquick"],
    }
    _, back = await api.post(f"{prefix}/detokenize", {"tokens": answer["tokens"]})
    assert back == {"prompt": "The quick"}


async def test_tokenize_a_chat(api: Api, tokenizer: Tokenizer) -> None:
    body = {"model": "org/tiny", "messages": [{"role": "user", "content": "The"}]}
    _, answer = await api.post("/tokenize", body)
    text = tokenizer.decode(answer["tokens"], skip_special_tokens=False)
    assert text == "<|im_start|>user\nThe<|im_end|>\n<|im_start|>assistant\n"


async def test_the_openapi_page_is_honest(api: Api) -> None:
    _, page = await api.get("/openapi.json")
    schemas = page["components"]["schemas"]

    def refs(node: object) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
            return own.union(*(refs(value) for value in node.values()))
        return set().union(*(refs(value) for value in node)) if isinstance(node, list) else set()

    assert {ref.removeprefix("#/components/schemas/") for ref in refs(page)} <= set(schemas)
    for path in ("/v1/completions", "/v1/chat/completions", "/generate", "/tokenize", "/workers"):
        operation = page["paths"][path]["post"]
        assert "requestBody" in operation
        error = operation["responses"]["4XX"]["content"]["application/json"]["schema"]
        forms = {form["$ref"].rpartition("/")[2] for form in error.get("anyOf", [error])}
        assert forms == ({"ErrorBody", "Outcome"} if path == "/workers" else {"ErrorBody"})
    assert schemas["CompletionRequest"]["required"] == ["prompt"]
    assert set(schemas["ErrorInfo"]["properties"]) == {"message", "type", "param", "code"}
    identifiers = [
        operation["operationId"] for methods in page["paths"].values() for operation in methods.values()
    ]
    assert len(set(identifiers)) == len(identifiers)
