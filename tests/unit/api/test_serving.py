"""What holds on every generating endpoint: failures, clients that leave, ids, keys, draining, metrics."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import gzip
import json
import re
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pdserve.api.generation import ChoiceDelta, GenerateSpec, WeightSpan
from pdserve.runtime.errors import RequestError
from pdserve.runtime.process import NO_KEYS, AccessKeys
from pdserve.tests.deadline import DEADLINE_S
from pdserve.tests.unit.api.conftest import Api, chunks, eventually
from pdserve.tests.unit.api.fakes import Step, one_by_one

BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "The"}),
    ("/v1/completions", {"prompt": ["The", "fox"]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "The"}]}),
    ("/generate", {"text": "The"}),
]
ENDPOINTS = pytest.mark.parametrize(("path", "body"), BODIES, ids=["text", "batch", "chat", "native"])
STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@ENDPOINTS
@STREAMED
async def test_refusals_keep_their_status(api: Api, path: str, body: dict[str, Any], stream: bool) -> None:
    api.generator.refusal = RequestError(
        "the queue is full", status=429, code="queue_full", error_type="rate_limit_error", retry_after_s=2.5
    )
    async with api.http.post(api.url + path, json={**body, "stream": stream}) as answer:
        assert answer.status == 429
        assert answer.headers["retry-after"] == "3"
        assert answer.headers["content-type"] == "application/json"
        assert (await answer.json())["error"]["code"] == "queue_full"


@ENDPOINTS
async def test_failing_before_the_first_token_keeps_its_status(
    api: Api, path: str, body: dict[str, Any]
) -> None:
    api.generator.script = lambda spec: [RequestError("no pair", status=503)]
    async with api.http.post(api.url + path, json={**body, "stream": True}) as answer:
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) >= 1


@ENDPOINTS
async def test_failing_in_mid_stream_is_an_error_event_and_an_aborted_connection(
    api: Api, path: str, body: dict[str, Any]
) -> None:
    api.generator.script = lambda spec: [
        *one_by_one(api.generator.token_ids, spec)[:2],
        RequestError("the last attempt failed", status=503, code="attempts_exhausted"),
    ]
    received = bytearray()

    async def receive_all(answer: aiohttp.ClientResponse) -> None:
        async for part in answer.content.iter_any():
            received.extend(part)

    async with api.http.post(api.url + path, json={**body, "stream": True}) as answer:
        assert answer.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await receive_all(answer)
    events = received.decode().split("\n\n")
    error = json.loads(events[-2].removeprefix("data: "))["error"]
    assert (error["message"], error["code"]) == ("the last attempt failed", "attempts_exhausted")
    assert b"[DONE]" not in received


@ENDPOINTS
async def test_failing_when_not_streamed_is_a_status(api: Api, path: str, body: dict[str, Any]) -> None:
    api.generator.script = lambda spec: [
        *one_by_one(api.generator.token_ids, spec)[:2],
        RequestError("too late", status=504),
    ]
    status, answer = await api.post(path, body)
    assert (status, answer["error"]["message"]) == (504, "too late")


@ENDPOINTS
@STREAMED
async def test_a_client_that_leaves_cancels_its_generations(
    api: Api, path: str, body: dict[str, Any], stream: bool
) -> None:
    def first_token_then_nothing(spec: GenerateSpec) -> list[Step]:
        return [*one_by_one(api.generator.token_ids, spec)[:1], asyncio.Event()]

    api.generator.script = first_token_then_nothing
    request = asyncio.create_task(api.http.post(api.url + path, json={**body, "stream": stream}))
    await eventually(lambda: bool(api.generator.generations))
    if stream:
        answer = await request
        await answer.content.readany()
        assert len(api.in_flight) == 1
        answer.close()
    else:
        await asyncio.sleep(0.02)
        request.cancel()
    await eventually(lambda: len(api.in_flight) == 0)
    assert all(generation.is_cancelled for generation in api.generator.generations)


async def test_a_client_that_leaves_while_it_sends_is_no_bug(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", int(api.url.rpartition(":")[2]))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    await api.get("/health")  # what was sent first has been read
    writer.close()
    await writer.wait_closed()
    await api.get("/health")
    await asyncio.sleep(0.02)
    assert caplog.messages == []


@ENDPOINTS
async def test_bugs_are_answered_with_a_500(api: Api, path: str, body: dict[str, Any]) -> None:
    def broken(spec: GenerateSpec) -> list[Step]:
        raise ZeroDivisionError

    api.generator.script = broken
    async with api.http.post(api.url + path, json=body, headers={"X-Request-ID": "mine"}) as answer:
        assert (answer.status, answer.headers["x-request-id"]) == (500, "mine")
        assert (await answer.json())["error"]["code"] == "internal_error"


# ---- ids --------------------------------------------------------------------------------------------


async def test_the_header_names_the_request(api: Api) -> None:
    async with api.http.post(
        f"{api.url}/v1/completions", json={"prompt": "The"}, headers={"X-Request-ID": "trace-1"}
    ) as answer:
        assert answer.headers["x-request-id"] == "trace-1"
        assert (await answer.json())["id"] == "cmpl-trace-1"
    assert api.generator.specs[0].request_id == "cmpl-trace-1"


async def test_unsafe_header_ids_are_replaced(api: Api) -> None:
    async with api.http.get(f"{api.url}/health", headers={"X-Request-ID": "é" * 300}) as answer:
        assert len(answer.headers["x-request-id"]) == 32


async def in_flight(
    api: Api, body: dict[str, Any], **headers: str
) -> tuple[asyncio.Event, asyncio.Task[Any]]:
    """A request that waits for the event."""
    goes_on = asyncio.Event()
    known = len(api.generator.generations)
    api.generator.script = lambda spec: [goes_on, *one_by_one(api.generator.token_ids, spec)]
    task = asyncio.create_task(api.post("/v1/completions", body, **headers))
    await eventually(lambda: len(api.generator.generations) > known)
    api.generator.script = None
    return goes_on, task


async def test_the_same_rid_twice_at_once_is_refused(api: Api) -> None:
    goes_on, first = await in_flight(api, {"prompt": "The", "rid": "mine"})
    for path, body in BODIES:
        status, answer = await api.post(path, {**body, "rid": "mine"})
        assert (status, answer["error"]["code"]) == (409, "duplicate_request_id")
    goes_on.set()
    assert (await first)[0] == 200
    assert (await api.post("/generate", {"text": "The", "rid": "mine"}))[0] == 200


async def test_the_same_header_twice_at_once_is_made_unique(api: Api) -> None:
    goes_on, first = await in_flight(api, {"prompt": "The"}, **{"X-Request-ID": "trace"})
    status, second = await api.post("/v1/completions", {"prompt": "The"}, **{"X-Request-ID": "trace"})
    goes_on.set()
    assert status == 200
    assert second["id"].startswith("cmpl-trace-")
    assert (await first)[1]["id"] == "cmpl-trace"


async def test_requests_are_found_and_aborted_by_rid(api: Api) -> None:
    goes_on, first = await in_flight(api, {"prompt": "The", "rid": "mine"})
    api.admin.states["cmpl-mine"] = {"state": "decoding", "age_s": 0.5, "waits_for": "a step"}
    for name in ("mine", "cmpl-mine"):
        _, state = await api.get(f"/requests/{name}")
        timeline = state.pop("timeline")
        assert state == {"id": "cmpl-mine", "state": "decoding", "age_s": 0.5, "waits_for": "a step"}
        assert [span["name"] for span in timeline["spans"][-3:]] == ["receive", "tokenize", "prepare"]
    assert (await api.post("/abort_request", {"rid": "mine"}))[0] == 200
    assert api.admin.calls == [("abort", "cmpl-mine", False)]
    goes_on.set()
    await first


async def test_the_trace_that_a_client_names_goes_with_the_timeline(api: Api) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    for path, body in BODIES:
        await api.post(path, body, traceparent=parent, tracestate="vendor=1")
    assert len(api.exported) == len(BODIES) + 1, "one of them is a batch of two"
    for timeline in api.exported:
        assert (timeline.traceparent, timeline.tracestate) == (parent, "vendor=1")


async def test_a_prompt_of_a_batch_has_its_own_timeline(api: Api) -> None:
    await api.post("/v1/completions", {"prompt": ["The"] * 5})
    for timeline in api.exported:
        assert [span.name for span in timeline.spans].count("prepare") == 1


async def test_a_timeline_is_kept_after_the_end_of_its_request(api: Api) -> None:
    await api.post("/v1/completions", {"prompt": "The", "rid": "mine"})
    await api.stream("/generate", {"text": "The", "stream": True, "rid": "other"})
    for name in ("mine", "cmpl-mine", "other"):
        status, answer = await api.get(f"/requests/{name}")
        assert (status, answer["state"]) == (200, "ended")
        assert answer["timeline"]["spans"][-1]["name"] == "stream_out"
    assert [timeline.request_id for timeline in api.exported] == ["cmpl-mine", "other"]
    text = api.admin.metrics()
    assert 'pd_request_stage_seconds_count{model_name="org/tiny",role="router",stage="tokenize"} 2.0' in text
    assert 'pd_request_unaccounted_seconds_count{model_name="org/tiny",role="router"} 2.0' in text


# ---- the door ---------------------------------------------------------------------------------------


async def test_draining_refuses_new_requests_and_ends_old_ones(api: Api) -> None:
    goes_on, first = await in_flight(api, {"prompt": "The"})
    assert (await api.get("/ready"))[0] == 200
    api.in_flight.drain()
    status, answer = await api.get("/ready")
    assert (status, answer["error"]["message"]) == (503, "draining")
    assert (await api.get("/health"))[0] == 200
    for path, body in BODIES:
        async with api.http.post(api.url + path, json=body) as refused:
            assert refused.status == 503
            assert "retry-after" in refused.headers
    assert not await api.in_flight.wait_empty(0.01)
    goes_on.set()
    assert (await first)[0] == 200
    assert await api.in_flight.wait_empty(5.0)


@ENDPOINTS
@STREAMED
async def test_what_a_drain_does_not_wait_for_is_told_so(
    api: Api, path: str, body: dict[str, Any], stream: bool
) -> None:
    never = asyncio.Event()
    api.generator.script = lambda spec: [*one_by_one(api.generator.token_ids, spec)[:1], never]
    received = bytearray()

    async def ask() -> int:
        async with api.http.post(api.url + path, json={**body, "stream": stream}) as answer:
            with contextlib.suppress(aiohttp.ClientPayloadError):
                async for part in answer.content.iter_any():
                    received.extend(part)
            return answer.status

    asking = asyncio.create_task(ask())
    await eventually(lambda: bool(received) if stream else bool(api.generator.generations))
    api.in_flight.cut_off()
    assert await asking == (200 if stream else 503)
    told = received.decode().split("\n\n")[-2].removeprefix("data: ") if stream else received.decode()
    assert json.loads(told)["error"]["code"] == "draining"
    assert b"[DONE]" not in received
    assert all(generation.is_cancelled for generation in api.generator.generations)
    assert await api.in_flight.wait_empty(DEADLINE_S)


@pytest.mark.parametrize("keys", [AccessKeys(("k1", "k2"))])
async def test_api_keys(api: Api) -> None:
    for path in ("/health", "/ready", "/live", "/metrics", "/version", "/openapi.json"):
        async with api.http.get(api.url + path) as answer:
            assert answer.status == 200, path
    for path in ("/v1/models", "/workers", "/server_info", "/health_generate"):
        status, refusal = await api.get(path)
        assert (status, refusal["error"]["code"]) == (401, "invalid_api_key"), path
    body = {"prompt": "The"}
    for header in ("", "Bearer", "Bearer wrong", "Basic k1", "Bearer k1x"):
        assert (await api.post("/v1/completions", body, authorization=header))[0] == 401
    for header in ("Bearer k1", "bearer k2"):
        assert (await api.post("/v1/completions", body, authorization=header))[0] == 200


@pytest.mark.parametrize("root_path", ["", "/llm"])
@pytest.mark.parametrize("keys", [AccessKeys(("k1",))])
async def test_the_docs_page_needs_no_other_host_and_no_key(api: Api, root_path: str) -> None:
    async with api.http.get(api.url + "/docs") as answer:
        page = await answer.text()
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sources
    for source in sources:
        assert source.startswith(f"{root_path}/docs/files/")
        for prefix in {"", root_path}:  # a proxy may take the root path off, or leave it
            async with api.http.get(api.url + prefix + source.removeprefix(root_path)) as answer:
                assert answer.status == 200


@pytest.mark.parametrize("root_path", ["/llm"])
@pytest.mark.parametrize("keys", [AccessKeys(("k1",), "root")])
@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_keys_are_asked_for_under_a_root_path_too(api: Api, prefix: str) -> None:
    status, _ = await api.post(f"{prefix}/v1/completions", {"prompt": "The"}, authorization="Bearer k1")
    assert status == 200
    status, _ = await api.post(f"{prefix}/v1/completions", {"prompt": "The"})
    assert status == 401
    status, refusal = await api.post(f"{prefix}/flush_cache", {}, authorization="Bearer k1")
    assert (status, refusal["error"]["code"]) == (401, "invalid_admin_api_key")


@pytest.mark.parametrize("keys", [AccessKeys(("k1",))])
@pytest.mark.parametrize("allowed_origins", [("https://app.example",)])
async def test_web_pages_of_an_allowed_origin_may_ask(api: Api) -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for origin, allowed in (("https://app.example", "https://app.example"), ("https://b.example", None)):
        async with api.http.options(
            api.url + "/v1/completions", headers={"origin": origin, **asks}
        ) as preflight:
            assert preflight.headers.get("access-control-allow-origin") == allowed
            assert preflight.status == (200 if allowed else 400)
        async with api.http.post(
            api.url + "/v1/completions", json={"prompt": "The"}, headers={"origin": origin}
        ) as refused:
            assert refused.status == 401
            assert refused.headers.get("access-control-allow-origin") == allowed


async def test_without_allowed_origins_no_web_page_may_ask(api: Api) -> None:
    async with api.http.get(api.url + "/health", headers={"origin": "https://app.example"}) as answer:
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate", "/v1/embeddings"])
@pytest.mark.parametrize("keys", [AccessKeys(("k1", "k2"))])
async def test_overload_is_answered_before_the_body_is_looked_at(api: Api, path: str) -> None:
    api.generator.overload = RequestError("later", status=429, code="queue_wait", retry_after_s=6.2)
    async with api.http.post(
        api.url + path, data="no JSON", headers={"authorization": "Bearer k2"}
    ) as answer:
        assert (answer.status, answer.headers["retry-after"]) == (429, "7")
    assert api.generator.clients == ["k2"]


ADMIN_PATHS = ("/flush_cache", "/abort_request", "/assert_peer_death", "/update_weights_from_disk")


async def codes_of(api: Api, paths: tuple[str, ...], **headers: str) -> set[str]:
    answers = [(await api.post(path, {}, **headers))[1] for path in paths]
    return {answer.get("error", {}).get("code", "served") for answer in answers}


@pytest.mark.parametrize("keys", [AccessKeys(("k1",), "root"), AccessKeys((), "root")])
@pytest.mark.parametrize("is_loopback", [True, False])
async def test_the_admin_key_opens_everything_and_no_other_opens_admin_routes(
    api: Api, keys: AccessKeys
) -> None:
    for header in ("", "Bearer k1", "Bearer roo", "Basic root"):
        assert await codes_of(api, ADMIN_PATHS, authorization=header) == {"invalid_admin_api_key"}
    assert "invalid_admin_api_key" not in await codes_of(api, ADMIN_PATHS, authorization="Bearer root")
    assert api.admin.calls == [("flush", 0.0)], "the others want a body"
    is_open = not keys.api
    for header, expected in (("", is_open), ("Bearer k1", True), ("Bearer root", True)):
        status, _ = await api.post("/v1/completions", {"prompt": "The"}, authorization=header)
        assert (status == 200) == expected


@pytest.mark.parametrize("keys", [AccessKeys(("k1",)), NO_KEYS])
@pytest.mark.parametrize("is_loopback", [False])
async def test_admin_routes_are_closed_to_others_without_an_admin_key(api: Api) -> None:
    assert await codes_of(api, ADMIN_PATHS, authorization="Bearer k1") == {"admin_api_key_not_set"}
    assert api.admin.calls == []
    assert (await api.post("/v1/completions", {"prompt": "The"}, authorization="Bearer k1"))[0] == 200


async def test_an_empty_bearer_is_fine_without_keys(api: Api) -> None:
    assert (await api.post("/v1/completions", {"prompt": "The"}, authorization="Bearer "))[0] == 200


# ---- metrics ----------------------------------------------------------------------------------------


def sample(page: str, name: str) -> float:
    return sum(
        entry.value
        for family in text_string_to_metric_families(page)
        for entry in family.samples
        if entry.name == name
    )


async def test_counters_equal_what_clients_received(api: Api) -> None:
    usages = [
        (await api.post("/v1/completions", {"prompt": ["The", "fox"], "n": 2}))[1]["usage"],
        (await api.post("/v1/completions", {"prompt": "The", "stop": "brown"}))[1]["usage"],
        (
            await api.post(
                "/v1/completions", {"prompt": "The quick", "max_tokens": 0, "echo": True, "logprobs": 1}
            )
        )[1]["usage"],
        (await api.post("/generate", {"text": "The"}))[1]["meta_info"],
    ]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for path, body in BODIES[:3]:
        usages.append(chunks(await api.stream(path, {**body, **options}))[-1]["usage"])
    page = await (await api.http.get(f"{api.url}/metrics")).text()
    assert sample(page, "pd_prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in usages)
    assert sample(page, "pd_generation_tokens_total") == sum(usage["completion_tokens"] for usage in usages)
    assert sample(page, "pd_request_success_total") == 4 + 1 + 1 + 1 + 1 + 2 + 1
    assert sample(page, "pd_e2e_request_latency_seconds_count") == len(usages)
    assert sample(page, "pd_time_to_first_token_seconds_count") == 3
    # Streams alone have gaps: one per token but the first of each choice.
    assert sample(page, "pd_inter_token_latency_seconds_count") == 4 * 3
    assert 'role="router"' in page


async def test_every_answer_is_counted_by_route_and_status(api: Api) -> None:
    await api.post("/v1/completions", {"prompt": "The"})
    await api.post("/v1/completions", {"prompt": 7})
    await api.get("/v1/models/nothing")
    await api.get("/made/up")
    api.generator.script = lambda spec: [RequestError("later", status=429)]
    await api.post("/v1/completions", {"prompt": "The"})
    page = await (await api.http.get(f"{api.url}/metrics")).text()
    counted = {
        (entry.labels["endpoint"], entry.labels["status_code"]): entry.value
        for family in text_string_to_metric_families(page)
        for entry in family.samples
        if entry.name == "pd_http_responses_total"
    }
    assert counted == {
        ("/v1/completions", "200"): 1,
        ("/v1/completions", "400"): 1,
        ("/v1/completions", "429"): 1,
        ("/v1/models/{model_id:path}", "404"): 1,
        ("unknown", "404"): 1,
    }


async def test_lengths_and_time_per_output_token(api: Api) -> None:
    await api.stream("/v1/completions", {"prompt": ["The", "fox"], "n": 2, "stream": True})
    page = await (await api.http.get(f"{api.url}/metrics")).text()
    assert sample(page, "pd_request_generation_tokens_count") == 4
    assert sample(page, "pd_request_generation_tokens_sum") == sample(page, "pd_generation_tokens_total")
    assert sample(page, "pd_request_prompt_tokens_count") == 2
    assert sample(page, "pd_request_prompt_tokens_sum") == sample(page, "pd_prompt_tokens_total")
    assert sample(page, "pd_request_time_per_output_token_seconds_count") == 4


async def test_failed_requests_count_what_was_delivered(api: Api) -> None:
    api.generator.script = lambda spec: [
        *one_by_one(api.generator.token_ids, spec)[:2],
        RequestError("gone", status=503),
    ]
    with pytest.raises(aiohttp.ClientPayloadError):
        await api.stream("/v1/completions", {"prompt": "The", "stream": True})
    page = await (await api.http.get(f"{api.url}/metrics")).text()
    assert sample(page, "pd_generation_tokens_total") == 2
    assert sample(page, "pd_request_success_total") == 0


async def test_a_chunk_of_k_tokens_gives_k_gaps(api: Api) -> None:
    ids = api.generator.token_ids
    api.generator.script = lambda spec: [ChoiceDelta(0, ids[:1]), ChoiceDelta(0, ids[1:], (), "length")]
    await api.stream("/v1/completions", {"prompt": "The", "stream": True})
    page = await (await api.http.get(f"{api.url}/metrics")).text()
    assert sample(page, "pd_inter_token_latency_seconds_count") == len(ids) - 1
    assert sample(page, "pd_time_to_first_token_seconds_count") == 1


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "The"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "The"}]}),
    ],
)
async def test_an_answer_says_which_weights_made_which_tokens(
    api: Api, path: str, asked: dict[str, Any]
) -> None:
    body = {**asked, "n": 2, "max_tokens": 3}
    api.generator.weight_spans = {0: [WeightSpan("7", 0), WeightSpan("8", 2)], 1: [WeightSpan("7", 0)]}
    told = [{"weight_version": "7", "start": 0}, {"weight_version": "8", "start": 2}]
    _, answer = await api.post(path, body)
    first, second = answer["choices"]
    assert first["weight_versions"] == told
    assert "weight_versions" not in second, "they did not change"
    choices = [
        c for chunk in chunks(await api.stream(path, {**body, "stream": True})) for c in chunk["choices"]
    ]
    of_first = [c for c in choices if c["index"] == 0]
    assert [c.get("weight_versions") for c in of_first] == [None] * (len(of_first) - 1) + [told]
    assert all("weight_versions" not in c for c in choices if c["index"] == 1)


async def test_the_list_of_models_may_end_in_a_slash(api: Api) -> None:
    assert await api.get("/v1/models/") == await api.get("/v1/models")
    assert (await api.get("/v1/models/org/tiny"))[1]["id"] == "org/tiny"


async def test_a_byte_order_mark_is_ignored_and_a_compressed_body_refused(api: Api) -> None:
    body = json.dumps({"prompt": "The"}).encode()
    url = f"{api.url}/v1/completions"
    async with api.http.post(url, data=codecs.BOM_UTF8 + body) as answer:
        assert answer.status == 200
    async with api.http.post(url, data=body, headers={"Content-Encoding": "identity"}) as answer:
        assert answer.status == 200
    packed = gzip.compress(body)
    async with api.http.post(url, data=packed, headers={"Content-Encoding": "gzip"}) as answer:
        assert answer.status == 415
        assert (await answer.json())["error"]["code"] == "unsupported_content_encoding"
