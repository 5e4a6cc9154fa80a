from __future__ import annotations

import random
from typing import Any

import pytest

from pdserve.api.generation import ChoiceDelta, GenerateSpec
from pdserve.api.text.tokenization import Tokenizer
from pdserve.messages.sampling import SamplingParams
from pdserve.runtime.errors import RequestError, UnexpectedError
from pdserve.tests.unit.api.conftest import Api, chunks
from pdserve.tests.unit.api.fakes import one_by_one

PATH = "/v1/completions"
OUTPUT = " quick brown fox jumps"


async def test_an_answer(api: Api) -> None:
    status, answer = await api.post(PATH, {"model": "org/tiny", "prompt": "The", "max_tokens": 3})
    assert status == 200
    assert answer["id"].startswith("cmpl-")
    assert answer["created"] > 1_700_000_000
    assert (answer["object"], answer["model"], answer["weight_version"]) == (
        "text_completion",
        "org/tiny",
        "7",
    )
    assert answer["system_fingerprint"].startswith("pdserve-")
    assert answer["choices"] == [
        {
            "index": 0,
            "text": " quick brown fox",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 3,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_a_stream_ends_with_its_last_text(api: Api) -> None:
    parts = chunks(await api.stream(PATH, {"prompt": "The", "stream": True}))
    choices = [part["choices"][0] for part in parts]
    assert [choice["text"] for choice in choices] == [" quick", " brown", " fox", " jumps"]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "length"]
    assert "usage" not in parts[-1]
    assert parts[-1]["weight_version"] == "7"
    assert len({part["id"] for part in parts}) == 1


async def test_usage_in_a_stream_only_when_asked(api: Api) -> None:
    body = {"prompt": "The", "stream": True, "stream_options": {"include_usage": True}}
    parts = chunks(await api.stream(PATH, body))
    assert [len(part["choices"]) for part in parts] == [1, 1, 1, 1, 0]
    assert ["usage" in part for part in parts] == [False] * 4 + [True]
    assert parts[-1]["usage"]["completion_tokens"] == 4
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    parts = chunks(await api.stream(PATH, body))
    assert [part["usage"]["completion_tokens"] for part in parts] == [1, 2, 3, 4, 4]


async def test_nulls_mean_defaults(api: Api) -> None:
    fields = ("max_tokens", "temperature", "seed", "logprobs", "stop", "n", "echo", "suffix", "user")
    unknown = ("logit_bias", "stream_options", "best_of", "tools", "response_format")
    body = {"model": "org/tiny", "prompt": "The", **dict.fromkeys(fields + unknown)}
    assert (await api.post(PATH, body))[0] == 200
    sampling = api.generator.specs[0].work.sampling
    assert sampling == SamplingParams(temperature=0.6, top_p=0.9, seed=sampling.seed, max_tokens=16)


@pytest.mark.parametrize("seed", [7])
async def test_seeds_of_requests_that_bring_none_follow_from_the_servers(api: Api) -> None:
    """By the order in which they come; one that brings its own takes none."""
    for path, body in (
        (PATH, {"model": "org/tiny", "prompt": "The"}),
        (PATH, {"model": "org/tiny", "prompt": "The", "seed": 3}),
        ("/generate", {"text": "The"}),
    ):
        assert (await api.post(path, body))[0] == 200
    drawn = random.Random(7)
    wanted = [drawn.getrandbits(64), 3, drawn.getrandbits(64)]
    assert [spec.work.sampling.seed for spec in api.generator.specs] == wanted


async def test_harmless_fields_are_ignored(api: Api) -> None:
    body = {
        "prompt": "The",
        "user": "u",
        "metadata": {"a": 1},
        "store": True,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "best_of": 1,
        "include_reasoning": True,
        "reasoning_effort": "low",
        "verbosity": "low",
        "truncate_prompt_tokens": -1,
        "documents": [],
        "bad_words": [],
        "return_tokens_as_token_ids": False,
        "bootstrap_room": 2**62,
        "bootstrap_port": None,
    }
    assert (await api.post(PATH, body))[0] == 200


async def test_sampling_reaches_the_generator(api: Api) -> None:
    body = {
        "prompt": [5, 6],
        "max_tokens": 9,
        "temperature": 1e-7,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.1,
        "seed": -1,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.5,
        "logit_bias": {"7": -100},
        "stop_token_ids": [9, 9],
        "min_tokens": 2,
        "ignore_eos": True,
        "logprobs": 3,
        "n": 2,
        "priority": 4,
    }
    assert (await api.post(PATH, body))[0] == 200
    spec = api.generator.specs[0]
    assert (spec.work.prompt_ids, spec.work.choices, spec.stream, spec.priority) == ((5, 6), (0, 1), False, 4)
    assert spec.work.sampling == SamplingParams(
        temperature=0.0,
        top_p=0.5,
        top_k=0,
        min_p=0.1,
        seed=2**64 - 1,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logit_bias={7: -100.0},
        stop_token_ids=(9,),
        ignore_eos=True,
        min_tokens=2,
        max_tokens=9,
        num_logprobs=3,
    )


async def test_the_default_length_fits_the_context(api: Api) -> None:
    await api.post(PATH, {"prompt": [5] * 250})
    assert api.generator.specs[0].work.sampling.max_tokens == 6


@pytest.mark.parametrize("prompt", [["The quick", "brown"], [[5, 6], [7]]], ids=["texts", "token ids"])
@pytest.mark.parametrize("stream", [False, True])
async def test_batches(api: Api, prompt: list[Any], stream: bool) -> None:
    body = {"prompt": prompt, "n": 2, "max_tokens": 2, "stream": stream}
    if stream:
        texts = dict.fromkeys(range(4), "")
        for part in chunks(await api.stream(PATH, body)):
            texts[part["choices"][0]["index"]] += part["choices"][0]["text"]
        assert texts == dict.fromkeys(range(4), " quick brown")
        return
    _, answer = await api.post(PATH, body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 8
    ids = [spec.request_id for spec in api.generator.specs]
    assert ids == [f"{answer['id']}-0", f"{answer['id']}-1"]


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_cut_text_ids_and_usage_alike(api: Api, stream: bool) -> None:
    body = {
        "prompt": "The",
        "stop": ["own f"],
        "logprobs": 1,
        "return_token_ids": True,
        "stream": stream,
        "stream_options": {"include_usage": True} if stream else None,
    }
    if stream:
        parts = chunks(await api.stream(PATH, body))
        choices = [part["choices"][0] for part in parts[:-1]]
        usage = parts[-1]["usage"]
    else:
        _, answer = await api.post(PATH, body)
        choices, usage = answer["choices"], answer["usage"]
    assert "".join(choice["text"] for choice in choices) == " quick br"
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "own f")
    ids = [token_id for choice in choices for token_id in choice["token_ids"]]
    assert ids == list(api.generator.token_ids[:3])
    assert [name for choice in choices for name in choice["logprobs"]["tokens"]] == [
        " quick",
        " brown",
        " fox",
    ]
    assert usage["completion_tokens"] == 3
    assert api.generator.specs[0].stream  # tokens one by one, so that the stop is found at once
    assert api.generator.generations[0].stopped == [0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_top", [0, 1])
async def test_logprobs_of_named_tokens(api: Api, num_top: int, stream: bool) -> None:
    body = {
        "prompt": [11, 12],
        "max_tokens": 2,
        "logprobs": num_top,
        "logprob_token_ids": [7, 3],
        "return_tokens_as_token_ids": True,
        "stream": stream,
    }
    if stream:
        choices = [part["choices"][0] for part in chunks(await api.stream(PATH, body))]
    else:
        choices = (await api.post(PATH, body))[1]["choices"]
    told = [position for choice in choices for position in choice["logprobs"]["top_logprobs"]]
    expected: list[dict[str, float]] = []
    for token_id in api.generator.token_ids[:2]:
        likeliest = {f"token_id:{token_id + 1}": -0.5} if num_top else {}
        expected.append({**likeliest, f"token_id:{token_id}": -1.0, "token_id:7": -7.0, "token_id:3": -3.0})
    assert [list(position.items()) for position in told] == [list(each.items()) for each in expected]


async def test_named_tokens_are_of_the_output_and_of_an_echo_alike(api: Api) -> None:
    body = {
        "prompt": [11, 12],
        "max_tokens": 1,
        "echo": True,
        "logprobs": 0,
        "logprob_token_ids": [5],
        "return_tokens_as_token_ids": True,
    }
    told = (await api.post(PATH, body))[1]["choices"][0]["logprobs"]["top_logprobs"]
    own = f"token_id:{api.generator.token_ids[0]}"
    assert told == [None, {"token_id:12": -1.0, "token_id:5": -5.0}, {own: -1.0, "token_id:5": -5.0}]


async def test_stop_tokens(api: Api, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(OUTPUT, add_special_tokens=False)

    def ends_with(token_id: int) -> None:
        api.generator.script = lambda spec: one_by_one(
            [*ids, token_id], spec, finish="stop", matched=token_id
        )

    ends_with(2)  # EOS
    _, answer = await api.post(PATH, {"prompt": "The", "skip_special_tokens": False})
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (OUTPUT, "stop", None)
    assert answer["usage"]["completion_tokens"] == len(ids) + 1
    ends_with(7)
    _, answer = await api.post(PATH, {"prompt": "The", "stop_token_ids": [7]})
    assert (answer["choices"][0]["text"], answer["choices"][0]["stop_reason"]) == (OUTPUT, 7)


@pytest.mark.parametrize("skip", [True, False])
async def test_streamed_text_is_the_unstreamed_text(api: Api, tokenizer: Tokenizer, skip: bool) -> None:
    ids = [*tokenizer.encode("naïve 🙂 café 你", add_special_tokens=False), 1, 70, 200, 70, 226]
    api.generator.script = lambda spec: one_by_one(ids, spec)
    body = {"prompt": "The", "skip_special_tokens": skip, "return_token_ids": True}
    _, answer = await api.post(PATH, body)
    streamed = chunks(await api.stream(PATH, {**body, "stream": True}))
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert answer["choices"][0]["text"] == whole
    assert "".join(part["choices"][0]["text"] for part in streamed) == whole
    assert len(streamed) == len(ids)


async def test_what_lm_eval_asks(api: Api) -> None:
    prompts = [[10, 11, 12], [13, 14]]
    body = {
        "model": "org/tiny",
        "prompt": prompts,
        "max_tokens": 1,
        "temperature": 0,
        "echo": True,
        "logprobs": 1,
        "seed": 1234,
    }
    _, answer = await api.post(PATH, body)
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        logprobs = choice["logprobs"]
        lengths = {name: len(logprobs[name]) for name in logprobs}
        assert set(lengths.values()) == {len(prompt) + 1}
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        for token, logprob, top in list(
            zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        )[1:]:
            assert top[token] == logprob
            assert len(top) == 2  # the best, and the chosen one beside it
        assert logprobs["text_offset"][0] == 0
        assert choice["text"][logprobs["text_offset"][-1] :] == " quick"


@pytest.mark.parametrize("stream", [False, True])
async def test_max_tokens_0_scores_the_prompt(api: Api, stream: bool) -> None:
    body = {"prompt": "The quick", "max_tokens": 0, "echo": True, "logprobs": 0, "stream": stream}
    if stream:
        (answer,) = chunks(await api.stream(PATH, body))
    else:
        _, answer = await api.post(PATH, body)
        assert answer["usage"]["completion_tokens"] == 0
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("The quick", "length")
    assert choice["logprobs"]["tokens"] == ["The", " quick"]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0]
    assert choice["logprobs"]["top_logprobs"] == [None, {" quick": -1.0}]
    assert api.generator.specs[0].work.sampling.max_tokens == 1


async def test_a_mere_echo_needs_no_node(api: Api) -> None:
    api.generator.refusal = RequestError("none", status=503)
    _, answer = await api.post(PATH, {"prompt": ["The", "quick"], "max_tokens": 0, "echo": True})
    assert [choice["text"] for choice in answer["choices"]] == ["The", "quick"]


async def test_echo_comes_once_a_choice(api: Api) -> None:
    body = {"prompt": "The", "echo": True, "n": 2, "stream": True, "logprobs": 0}
    texts = {0: "", 1: ""}
    tokens: dict[int, list[str]] = {0: [], 1: []}
    for part in chunks(await api.stream(PATH, body)):
        choice = part["choices"][0]
        texts[choice["index"]] += choice["text"]
        tokens[choice["index"]] += choice["logprobs"]["tokens"]
    assert texts == dict.fromkeys((0, 1), "The" + OUTPUT)
    assert tokens[0] == tokens[1] == ["The", " quick", " brown", " fox", " jumps"]


@pytest.mark.parametrize("stream", [False, True])
async def test_vllm_extras(api: Api, stream: bool) -> None:
    body = {"prompt": [10, 11], "prompt_logprobs": 1, "return_token_ids": True, "stream": stream}
    if stream:
        first, *others = chunks(await api.stream(PATH, body))
        assert all("prompt_token_ids" not in part["choices"][0] for part in others)
        choice = first["choices"][0]
    else:
        choice = (await api.post(PATH, body))[1]["choices"][0]
    assert choice["prompt_token_ids"] == [10, 11]
    assert choice["prompt_logprobs"][0] is None
    ranked = choice["prompt_logprobs"][1]
    assert {token_id: entry["rank"] for token_id, entry in ranked.items()} == {"12": 1, "11": None}
    assert set(ranked["11"]) == {"logprob", "rank", "decoded_token"}


@pytest.mark.parametrize("stream", [False, True])
async def test_timeline(api: Api, stream: bool) -> None:
    body = {"prompt": "The", "timeline": True, "stream": stream}
    if stream:
        answer = chunks(await api.stream(PATH, body))[-1]
        assert (answer["choices"], "usage" in answer) == ([], False)
    else:
        _, answer = await api.post(PATH, body)
    timeline = answer["timeline"]
    assert timeline["spans"][:3] == [
        {"name": "queue", "start_s": 0.0, "duration_s": 1.5},
        {"name": "prefill_chunk", "start_s": 1.5, "duration_s": 0.25, "num_tokens": 3},
        {"name": "handoff", "start_s": 1.75, "duration_s": 0.5, "num_bytes": 4096, "overlaps": True},
    ]
    own = ["receive", "tokenize", "prepare", "deliver", "detokenize", "stream_out"]
    assert [span["name"] for span in timeline["spans"][3:]] == own
    # The fake's spans lie long ago, so what they would name of this request is told to be missing.
    assert 0 < timeline["unaccounted_s"] < timeline["ttft_s"]


async def test_a_batch_tells_which_prompt_a_span_is_of(api: Api) -> None:
    _, answer = await api.post(PATH, {"prompt": ["The", "fox"], "timeline": True})
    spans = answer["timeline"]["spans"]
    assert {span["prompt"] for span in spans if span["name"] == "deliver"} == {0, 1}
    assert "ttft_s" not in answer["timeline"], "each prompt has its own"


async def test_a_token_whose_text_must_wait_is_given_at_once(api: Api, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂a🙂", add_special_tokens=False)
    api.generator.script = lambda spec: one_by_one(ids, spec)
    body = {"prompt": "The", "stream": True, "return_token_ids": True, "logprobs": 0}
    choices = [part["choices"][0] for part in chunks(await api.stream(PATH, body))]
    assert [choice["text"] for choice in choices] == ["", "", "", "🙂", "a", "", "", "", "🙂"]
    assert [choice["token_ids"] for choice in choices] == [[token_id] for token_id in ids]
    assert choices[0]["logprobs"]["tokens"] == ["bytes:\\xf0"]


async def test_deltas_of_several_tokens(api: Api) -> None:
    def script(spec: GenerateSpec) -> list[ChoiceDelta]:
        ids = api.generator.token_ids
        return [ChoiceDelta(0, ids[:3]), ChoiceDelta(0, ids[3:], (), "length")]

    api.generator.script = script
    parts = chunks(await api.stream(PATH, {"prompt": "The", "stream": True}))
    assert [part["choices"][0]["text"] for part in parts] == [" quick brown fox", " jumps"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_where_cached_tokens_were(api: Api, path: str) -> None:
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "The"}
    kept = "messages" if "chat" in path else "prompt"
    body = {kept: prompt[kept], "max_tokens": 2, "return_cached_tokens_details": True}
    details = {"device": 2, "host": 0, "storage": 0, "storage_backend": None}
    assert (await api.post(path, body))[1]["sglext"] == {"cached_tokens_details": details}
    *parts, last = chunks(await api.stream(path, {**body, "stream": True}))
    assert last["sglext"] == {"cached_tokens_details": details}
    assert last["choices"] == []
    assert not any("sglext" in part for part in parts)
    del body["return_cached_tokens_details"]
    assert "sglext" not in (await api.post(path, body))[1]


async def test_f13_offsets_count_echoed_special_tokens(api: Api) -> None:
    prompt = "<|im_start|>The fox"
    body = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 4}
    _, answer = await api.post(PATH, body)
    choice = answer["choices"][0]
    offsets = choice["logprobs"]["text_offset"]
    names = choice["logprobs"]["tokens"]
    assert names[0] == "<|im_start|>"
    assert all(choice["text"][offset:].startswith(name) for offset, name in zip(offsets, names, strict=True))


async def test_a_prompt_of_the_whole_context_is_scored_and_no_token_longer(api: Api) -> None:
    body: dict[str, Any] = {"prompt": [5] * 256, "max_tokens": 0, "echo": True, "logprobs": 0}
    status, answer = await api.post(PATH, body)
    assert status == 200
    assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == 256
    status, answer = await api.post(PATH, {**body, "prompt": [5] * 257})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


class PanicException(BaseException):
    """As PyO3 makes it: no Exception."""


class PanickingBackend:
    def encode(self, *_: object, **__: object) -> None:
        raise PanicException("index out of bounds")

    encode_batch_fast = decode = decode_batch = encode


async def test_a_panic_of_the_tokenizer_ends_one_request(
    api: Api, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "_backend", PanickingBackend())
        for text in ("a", "a" * 3000):  # the second is encoded in a thread
            with pytest.raises(UnexpectedError, match="panicked: index out of bounds"):
                await tokenizer.encode_async(text)
        for num_ids in (1, 20_000):
            with pytest.raises(UnexpectedError, match="panicked"):
                await tokenizer.decode_async([1] * num_ids)
        patch.setattr(tokenizer, "max_text_bytes", lambda _: 1000)
        asked = {"prompt": "a", "max_tokens": 1}
        status, body = await api.post("/v1/completions", asked, connection="close")
    assert (status, body["error"]["code"]) == (500, "internal_error")
    assert (await api.post("/v1/completions", {"prompt": "a", "max_tokens": 1}))[0] == 200
