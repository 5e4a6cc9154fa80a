from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from pdserve.api.surfaces.chat_messages import normalized_messages
from pdserve.api.text.chat_template import ChatTemplate
from pdserve.api.text.tokenization import Tokenizer
from pdserve.runtime.errors import RequestError
from pdserve.tests.unit.api.conftest import Api, chunks
from pdserve.tests.unit.api.fakes import one_by_one

PATH = "/v1/chat/completions"
HI: list[Any] = [{"role": "user", "content": "The fox"}]
OUTPUT = " quick brown fox jumps"


@pytest_asyncio.fixture
async def client(api: Api) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="x", max_retries=0) as client:
        yield client


def prompt_text(api: Api, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(api.generator.specs[-1].work.prompt_ids, skip_special_tokens=False)


async def test_an_answer(api: Api, tokenizer: Tokenizer) -> None:
    status, answer = await api.post(PATH, {"model": "org/tiny", "messages": HI})
    assert status == 200
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["weight_version"] == "7"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": OUTPUT, "refusal": None}
    assert choice["finish_reason"] == "length"
    prompt = prompt_text(api, tokenizer)
    assert prompt == "<|im_start|>user\nThe fox<|im_end|>\n<|im_start|>assistant\n"
    num_prompt = len(api.generator.specs[0].work.prompt_ids)
    assert answer["usage"]["prompt_tokens"] == num_prompt
    assert api.generator.specs[0].work.sampling.max_tokens == 256 - num_prompt  # the rest of the context


async def test_f4_a_default_length_may_shrink_to_what_nodes_have_room_for(api: Api) -> None:
    for path, prompt, name in (
        (PATH, {"messages": HI}, "max_completion_tokens"),
        (PATH, {"messages": HI}, "max_tokens"),
        ("/v1/completions", {"prompt": "The fox"}, "max_tokens"),
    ):
        assert (await api.post(path, prompt))[0] == 200
        assert (await api.post(path, {**prompt, name: 200}))[0] == 200
        default, asked = api.generator.specs[-2:]
        assert default.has_default_length
        assert not asked.has_default_length, "asked for: the nodes answer that"
    assert (await api.post("/generate", {"text": "The fox"}))[0] == 200
    assert api.generator.specs[-1].has_default_length
    assert (await api.post("/generate", {"text": "The fox", "sampling_params": {"max_new_tokens": 3}}))[
        0
    ] == 200
    assert not api.generator.specs[-1].has_default_length


async def test_the_openai_client_streams(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="org/tiny", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    parts = [part async for part in stream]
    deltas = [part.choices[0].delta for part in parts[:-1]]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert all(delta.role is None for delta in deltas[1:])
    assert "".join(delta.content or "" for delta in deltas) == OUTPUT
    reasons = [part.choices[0].finish_reason for part in parts[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert parts[-1].choices == []
    assert parts[-1].usage is not None
    assert parts[-1].usage.completion_tokens == 4


async def test_the_openai_client_reads_logprobs_and_choices(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="org/tiny", messages=HI, n=2, logprobs=True, top_logprobs=2, max_completion_tokens=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == [" quick", " brown"]
    assert logprobs.content[0].bytes == list(b" quick")
    assert [top.logprob for top in logprobs.content[0].top_logprobs] == [-0.5, -1.0]


async def test_the_openai_client_sees_errors(api: Api, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        await client.chat.completions.create(model="no/such", messages=HI)
    assert (not_found.value.code, not_found.value.param) == ("model_not_found", "model")
    api.generator.script = lambda spec: [
        *one_by_one(api.generator.token_ids, spec)[:2],
        RequestError("no pair is left", status=503, code="no_pair"),
    ]
    stream = await client.chat.completions.create(model="org/tiny", messages=HI, stream=True)
    received: list[str] = []

    async def receive_all() -> None:
        async for part in stream:
            received.append(part.choices[0].delta.content or "")

    with pytest.raises(openai.APIError, match="no pair is left"):
        await receive_all()
    assert "".join(received) == " quick brown"


async def test_m_the_openai_client_lists_models_and_uses_any_name(client: openai.AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == ["org/tiny", "tiny", "tiny-lora"]
    assert (await client.models.retrieve("org/tiny")).id == "org/tiny"
    assert (await client.models.retrieve("tiny")).id == "tiny"
    answer = await client.chat.completions.create(model="tiny-lora", messages=HI)
    assert answer.model == "org/tiny", "answers show the first"


async def test_logprobs_may_name_tokens_by_their_ids(api: Api) -> None:
    body = {"messages": HI, "logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True}
    _, answer = await api.post(PATH, body)
    first = answer["choices"][0]["logprobs"]["content"][0]
    token_id = api.generator.token_ids[0]
    assert (first["token"], bytes(first["bytes"])) == (f"token_id:{token_id}", b" quick")
    assert [top["token"] for top in first["top_logprobs"]] == [f"token_id:{token_id + 1}", first["token"]]
    body = {"prompt": [7], "logprobs": 1, "echo": True, "return_tokens_as_token_ids": True}
    _, answer = await api.post("/v1/completions", body)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"][:2] == ["token_id:7", f"token_id:{token_id}"]
    assert logprobs["top_logprobs"][1] == {f"token_id:{token_id + 1}": -0.5, f"token_id:{token_id}": -1.0}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_top", [None, 1])
async def test_logprobs_of_named_tokens(api: Api, num_top: int | None, stream: bool) -> None:
    body = {
        "messages": HI,
        "max_tokens": 2,
        "logprobs": True,
        "top_logprobs": num_top,
        "logprob_token_ids": [7, 3],
        "return_tokens_as_token_ids": True,
        "stream": stream,
    }
    if stream:
        choices = [part["choices"][0] for part in chunks(await api.stream(PATH, body))]
    else:
        choices = (await api.post(PATH, body))[1]["choices"]
    told = [row for choice in choices if choice["logprobs"] for row in choice["logprobs"]["content"]]
    assert [row["token"] for row in told] == [f"token_id:{each}" for each in api.generator.token_ids[:2]]
    for row, token_id in zip(told, api.generator.token_ids, strict=False):
        likeliest = [(f"token_id:{token_id + 1}", -0.5)] if num_top else []
        others = [(other["token"], other["logprob"]) for other in row["top_logprobs"]]
        assert others == [*likeliest, ("token_id:7", -7.0), ("token_id:3", -3.0)]


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream(api: Api, n: int) -> None:
    body = {"messages": HI, "stream": True, "n": n, "return_token_ids": True, "prompt_logprobs": 0}
    parts = chunks(await api.stream(PATH, body))
    assert all(part["object"] == "chat.completion.chunk" for part in parts)
    roles = [part for part in parts if "role" in part["choices"][0]["delta"]]
    assert len(roles) == n
    assert parts[0]["prompt_token_ids"] == list(api.generator.specs[0].work.prompt_ids)
    assert parts[0]["prompt_logprobs"][0] is None
    for number in range(n):
        choices = [part["choices"][0] for part in parts if part["choices"][0]["index"] == number]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == OUTPUT
        assert choices[-1]["finish_reason"] == "length"
        ids = [token_id for choice in choices for token_id in choice.get("token_ids", [])]
        assert ids == list(api.generator.token_ids)


async def test_text_parts_are_lines(api: Api, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await api.post(PATH, {"messages": [{"role": "user", "content": parts}]})
    assert "<|im_start|>user\none\ntwo<|im_end|>" in prompt_text(api, tokenizer)


async def test_the_final_message_is_continued(api: Api, tokenizer: Tokenizer) -> None:
    messages = [*HI, {"role": "assistant", "content": "It jumps"}]
    status, _ = await api.post(PATH, {"messages": messages, "continue_final_message": True})
    assert status == 200
    assert prompt_text(api, tokenizer).endswith("<|im_start|>assistant\nIt jumps")


async def test_a_stop_string(api: Api) -> None:
    _, answer = await api.post(PATH, {"messages": HI, "stop": "brown", "include_stop_str_in_output": True})
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == (" quick brown", "brown")


async def test_what_langchain_and_benchmarks_send(api: Api) -> None:
    body = {
        "model": "org/tiny",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "The"}]}],
        "max_completion_tokens": 3,
        "stream": False,
        "temperature": None,
        "frequency_penalty": 0,
        "ignore_eos": True,
        "n": 1,
        "no_stop_trim": False,
        "separate_reasoning": True,
        "return_hidden_states": False,
    }
    status, answer = await api.post(PATH, body)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 3)


async def test_f7_empty_tool_calls_and_an_assistant_without_content(api: Api) -> None:
    said: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [], "audio": None}
    messages = normalized_messages([*HI, {**said, "refusal": None}])
    assert messages == [*HI, {"role": "assistant", "content": ""}]
    assert normalized_messages([{"role": "assistant"}]) == [{"role": "assistant", "content": ""}]
    status, answer = await api.post(PATH, {"messages": [{"role": "user", "content": None}]})
    assert (status, answer["error"]["param"]) == (400, "messages[0].content")


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def test_tools_and_a_history_of_calls_reach_the_template() -> None:
    template = ChatTemplate(
        "{{ tools | tojson }}{% for m in messages %}{% for c in m.tool_calls %}"
        "{{ c.function.arguments.x }}{% endfor %}{{ m.role }}:{{ m.content }};{% endfor %}",
        {},
    )
    history: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "7"},
    ]
    text = template.render(normalized_messages(history), tools=TOOLS)
    assert text == json.dumps(TOOLS) + "1assistant:;tool:7;"


@pytest.mark.parametrize(
    ("calls", "param"),
    [
        ("f", "tool_calls"),
        ([{}], "tool_calls[0].function"),
        ([{"function": {"name": "f", "arguments": "{"}}], "tool_calls[0].function.arguments"),
        ([{"function": {"name": "f", "arguments": "[1]"}}], "tool_calls[0].function.arguments"),
    ],
)
def test_bad_calls_in_a_history_are_named(calls: object, param: str) -> None:
    with pytest.raises(RequestError) as refused:
        normalized_messages([{"role": "assistant", "tool_calls": calls}])
    assert refused.value.param == f"messages[0].{param}"


async def test_tools_are_shown_where_no_call_is_asked_for(api: Api) -> None:
    body = {"messages": HI, "tools": TOOLS, "tool_choice": "none"}
    assert (await api.post(PATH, body))[0] == 200
    for choice, param in (
        ("auto", "tools"),
        ("required", "tool_choice"),
        ({"type": "function"}, "tool_choice"),
    ):
        status, answer = await api.post(PATH, {**body, "tool_choice": choice})
        assert (status, answer["error"]["param"]) == (400, param)
