"""What people use: the `openai` package, and what packages around it send."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import Completion

from pdserve.bench.local_cluster import LocalCluster
from pdserve.tests.cluster.helpers import request

MODEL = "tiny-python"
PROMPT = "def add(a, b):"
MESSAGES: list[Any] = [{"role": "user", "content": "Add two numbers."}]


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def parts_of(answer: Completion | openai.Stream[Completion]) -> list[Completion]:
    return list(answer) if isinstance(answer, openai.Stream) else [answer]


# ---- models -----------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [(model.id, model.object) for model in models] == [(MODEL, "model")]
    assert client.models.retrieve(MODEL) == models[0]
    assert models[0].created > 1_700_000_000
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("some/other-model")


# ---- streams ----------------------------------------------------------------------------------------


def test_chat_streams_what_it_answers_whole(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "max_tokens": 24,
        "seed": 7,
        "temperature": 0.8,
    }
    whole = client.chat.completions.create(**fields)
    pieces, roles, reasons = [], [], []
    for chunk in client.chat.completions.create(**fields, stream=True):
        assert chunk.object == "chat.completion.chunk"
        assert chunk.usage is None
        (choice,) = chunk.choices
        roles += [choice.delta.role] if choice.delta.role else []
        pieces += [choice.delta.content] if choice.delta.content else []
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 1
    assert (roles, reasons) == (["assistant"], [whole.choices[0].finish_reason])
    assert whole.usage is not None
    assert 0 < whole.usage.completion_tokens <= 24


def test_completion_streams_what_it_answers_whole(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_usage_comes_last_when_asked_for(client: openai.OpenAI, kind: str) -> None:
    fields: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
        "extra_body": {"ignore_eos": True},
    }
    chunks = list(
        client.chat.completions.create(messages=MESSAGES, **fields)
        if kind == "chat"
        else client.completions.create(prompt=PROMPT, **fields)
    )
    assert all(chunk.choices for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 9
    assert usage.total_tokens == usage.prompt_tokens + 9


@pytest.mark.parametrize("stream", [False, True])
def test_two_choices_differ_and_repeat_under_the_same_seed(client: openai.OpenAI, stream: bool) -> None:
    fields: dict[str, Any] = {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": 20,
        "n": 2,
        "seed": 3,
        "temperature": 1.0,
    }

    def ask() -> dict[int, str]:
        texts: dict[int, str] = defaultdict(str)
        for part in parts_of(client.completions.create(**fields, stream=stream)):
            for choice in part.choices:
                texts[choice.index] += choice.text
        return dict(texts)

    first = ask()
    assert first.keys() == {0, 1}
    assert first[0] != first[1]
    assert ask() == first


# ---- contents ---------------------------------------------------------------------------------------


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert answer.usage is not None
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3
        # Greedy: the chosen token is the most likely one.
        assert (token.top_logprobs[0].token, token.top_logprobs[0].logprob) == (token.token, token.logprob)
        assert [t.logprob for t in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )
    all_bytes = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
    assert all_bytes.decode(errors="replace").startswith(choice.message.content or "")


def test_completion_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert answer.usage is not None
    num_tokens = answer.usage.completion_tokens
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    for column in (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset):
        assert len(column) == num_tokens
    assert logprobs.text_offset[0] == 0
    for logprob, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert max(top.values()) == logprob


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_text_before_it(client: openai.OpenAI, stream: bool) -> None:
    fields: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 60, "temperature": 0}
    full = client.completions.create(**fields).choices[0].text
    stop = full[10:14]
    assert len(stop) == 4, f"the model says too little for this test: {full!r}"
    chunks = parts_of(client.completions.create(**fields, stop=[stop, "never said"], stream=stream))
    assert "".join(chunk.choices[0].text for chunk in chunks) == full[: full.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_token_ids_and_batches(client: openai.OpenAI, cluster: LocalCluster) -> None:
    texts = [PROMPT, "class A:", "import os"]
    ids = [cluster.post("/tokenize", {"prompt": text})["tokens"] for text in texts]
    fields: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 0}
    alone = [client.completions.create(prompt=text, **fields).choices[0].text for text in texts]
    assert client.completions.create(prompt=ids[0], **fields).choices[0].text == alone[0]
    for batch in (texts, ids):
        answer = client.completions.create(prompt=batch, **fields)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert [choice.text for choice in answer.choices] == alone
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    pairs = client.completions.create(prompt=texts, n=2, **fields)
    assert [choice.index for choice in pairs.choices] == list(range(6))
    assert [choice.text for choice in pairs.choices] == [text for text in alone for _ in range(2)]


# ---- around it --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
        ({"temperature": -0.1}, openai.BadRequestError, "temperature"),
        ({"prompt": ""}, openai.BadRequestError, "prompt"),
        ({"stream": True, "prompt": [5] * 3000}, openai.BadRequestError, "prompt"),
        (
            {"extra_body": {"response_format": {"type": "json_object"}}},
            openai.BadRequestError,
            "response_format",
        ),
    ],
    ids=["model", "negative", "huge", "temperature", "empty", "too-long", "unsupported"],
)
def test_errors(
    client: openai.OpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": MODEL, "prompt": PROMPT, **fields})
    assert caught.value.param == param
    assert caught.value.code
    assert caught.value.type
    assert caught.value.request_id


def test_request_id_is_echoed(client: openai.OpenAI, cluster: LocalCluster) -> None:
    headers = {"X-Request-ID": "trace-42"}
    for stream in (False, True):
        raw = client.completions.with_raw_response.create(
            model=MODEL, prompt=PROMPT, max_tokens=2, stream=stream, extra_headers=headers
        )
        assert raw.headers["x-request-id"] == "trace-42"
        raw.http_response.read()
    assert client.models.list()._request_id  # one is made up for a client that sends none
    reply = request(cluster.url, "/v1/completions", {"prompt": ""}, headers=headers)
    assert (reply.status, reply.headers["x-request-id"]) == (400, "trace-42")


def test_a_request_id_may_be_used_again_at_once(cluster: LocalCluster) -> None:
    """Nodes keep what has ended on record for a while; a new request of the same id is another one."""
    prompts = [[7, 8, 9], [7, 8, 9], [10] * 40]
    for number in range(3):
        body = {"prompt": prompts[number], "max_tokens": 3, "request_id": "mine", "ignore_eos": True}
        reply = request(cluster.url, "/v1/completions", body, timeout_s=30)
        assert (reply.status, reply.json["id"]) == (200, "cmpl-mine")
        assert reply.json["usage"]["completion_tokens"] == 3


def test_explicit_nulls_mean_the_default(cluster: LocalCluster) -> None:
    """As langchain sends them."""
    nulls: tuple[str, ...] = (
        "logprobs",
        "seed",
        "stop",
        "logit_bias",
        "top_p",
        "temperature",
        "stream_options",
        "user",
    )
    body = {"model": MODEL, "prompt": [PROMPT], "max_tokens": 4, "n": 1, "best_of": 1, "frequency_penalty": 0}
    answer = cluster.post("/v1/completions", body | dict.fromkeys(nulls))
    assert answer["choices"][0]["logprobs"] is None
    nulls = ("max_tokens", "logprobs", "top_logprobs", "tools", "tool_choice", "response_format", *nulls[1:])
    body = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 4, "stream": False}
    answer = cluster.post("/v1/chat/completions", body | dict.fromkeys(nulls))
    assert answer["usage"]["completion_tokens"] <= 4
    assert answer["choices"][0]["logprobs"] is None


def test_content_parts_are_joined(client: openai.OpenAI) -> None:
    """As vLLM's and guidellm's benchmarks send them."""
    parts: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "Add two numbers."}]}]
    fields: dict[str, Any] = {"model": MODEL, "max_completion_tokens": 12, "temperature": 0}
    texts = [
        client.chat.completions.create(messages=messages, **fields).choices[0].message.content
        for messages in (MESSAGES, parts)
    ]
    assert texts[0] == texts[1]
