from __future__ import annotations

from array import array
from typing import Any, Literal

import pytest

from pdserve.api.generation import ChoiceDelta, GenerateSpec
from pdserve.api.text.growing import is_due
from pdserve.tests.unit.api.conftest import Api, chunks
from pdserve.tests.unit.api.fakes import one_by_one

PATH = "/generate"
OUTPUT = " quick brown fox jumps"


async def test_an_answer(api: Api) -> None:
    status, answer = await api.post(
        PATH, {"text": "The", "sampling_params": {"max_new_tokens": 3}, "rid": "r1"}
    )
    assert status == 200
    latency = answer["meta_info"].pop("e2e_latency")
    assert latency > 0
    assert answer == {
        "text": " quick brown fox",
        "output_ids": list(api.generator.token_ids[:3]),
        "meta_info": {
            "id": "r1",
            "finish_reason": {"type": "length", "length": 3},
            "prompt_tokens": 1,
            "completion_tokens": 3,
            "cached_tokens": 2,
            "cached_tokens_details": {"device": 2, "host": 0, "storage": 0, "storage_backend": None},
            "weight_version": "7",
        },
    }
    assert api.generator.specs[0].request_id == "r1"
    assert api.generator.specs[0].work.sampling.temperature == 0.6


async def test_put_and_the_default_length(api: Api) -> None:
    async with api.http.put(api.url + PATH, json={"input_ids": [5, 6]}) as answer:
        assert answer.status == 200
    assert api.generator.specs[0].work.sampling.max_tokens == 128
    assert api.generator.specs[0].work.prompt_ids == (5, 6)


async def test_fields_of_other_versions_are_ignored(api: Api) -> None:
    body = {
        "text": "The",
        "lora_path": "",
        "return_routed_experts": False,
        "logprob_start_len": -1,
        "image_data": None,
        "a_field_of_tomorrow": 1,
        "bootstrap_room": 5,
        "sampling_params": {"stream_interval": 4, "regex": None, "spaces_between_special_tokens": True},
    }
    assert (await api.post(PATH, body))[0] == 200


@pytest.mark.parametrize("incremental", [False, True])
async def test_streams_are_cumulative_unless_wanted_otherwise(api: Api, incremental: bool) -> None:
    body = {
        "text": "The",
        "stream": True,
        "return_logprob": True,
        "logprob_start_len": 0,
        "incremental_streaming_output": incremental,
    }
    parts = chunks(await api.stream(PATH, body))
    pieces = [" quick", " brown", " fox", " jumps"]
    sums = ["".join(pieces[: end + 1]) for end in range(4)]
    assert [part["text"] for part in parts] == (pieces if incremental else sums)
    assert [len(part["output_ids"]) for part in parts] == ([1] * 4 if incremental else [1, 2, 3, 4])
    infos = [part["meta_info"] for part in parts]
    assert [info["completion_tokens"] for info in infos] == [1, 2, 3, 4]
    assert [len(info["output_token_logprobs"]) for info in infos] == [
        len(part["output_ids"]) for part in parts
    ]
    assert [len(info["input_token_logprobs"]) for info in infos] == ([1, 0, 0, 0] if incremental else [1] * 4)
    assert [info["finish_reason"] for info in infos[:-1]] == [None] * 3
    assert "index" not in parts[0]


async def test_logprobs(api: Api) -> None:
    body = {
        "input_ids": [10, 11, 12],
        "sampling_params": {"max_new_tokens": 2},
        "return_logprob": True,
        "logprob_start_len": 1,
        "top_logprobs_num": 2,
        "return_text_in_logprobs": True,
    }
    info = (await api.post(PATH, body))[1]["meta_info"]
    first, second = api.generator.token_ids[:2]
    assert info["output_token_logprobs"] == [[-1.0, first, " quick"], [-1.0, second, " brown"]]
    assert [entry[1] for entry in info["input_token_logprobs"]] == [11, 12]
    assert [len(top) for top in info["output_top_logprobs"]] == [2, 2]
    assert [len(top) for top in info["input_top_logprobs"]] == [2, 2]
    sampling = api.generator.specs[0].work.sampling
    assert (sampling.num_logprobs, sampling.num_prompt_logprobs, sampling.prompt_logprobs_start) == (2, 2, 1)


async def test_logprobs_of_named_tokens(api: Api) -> None:
    body = {
        "input_ids": [[10, 11], [12, 13]],
        "sampling_params": {"max_new_tokens": 2},
        "return_logprob": True,
        "logprob_start_len": 0,
        "token_ids_logprob": [[7, 5], [3]],
    }
    first, second = (answer["meta_info"] for answer in (await api.post(PATH, body))[1])
    named = [[-7.0, 7, None], [-5.0, 5, None]]
    assert first["output_token_ids_logprobs"] == [named, named]
    assert first["input_token_ids_logprobs"] == [None, named]
    assert second["output_token_ids_logprobs"] == [[[-3.0, 3, None]]] * 2
    body |= {"token_ids_logprob": [9], "logprob_start_len": -1}
    for answer in (await api.post(PATH, body))[1]:
        info = answer["meta_info"]
        assert info["output_token_ids_logprobs"] == [[[-9.0, 9, None]]] * 2
        assert info["input_token_ids_logprobs"] == []


@pytest.mark.parametrize("ids", [[[1], [2], [3]], [[1], 2]], ids=str)
async def test_named_tokens_are_one_list_or_one_for_each_prompt(api: Api, ids: list[Any]) -> None:
    body = {"input_ids": [[10], [11]], "return_logprob": True, "token_ids_logprob": ids}
    status, answer = await api.post(PATH, body)
    assert (status, answer["error"]["param"]) == (400, "token_ids_logprob")


async def test_sampling_is_taken_under_the_names_of_this_endpoint_alone(api: Api) -> None:
    """What the others call otherwise is unknown here, as it is to SGLang."""
    sampling = {"max_new_tokens": 2, "min_tokens": 1, "logprob_token_ids": "none", "min_new_tokens": 2}
    assert (await api.post(PATH, {"input_ids": [10], "sampling_params": sampling}))[0] == 200
    params = api.generator.specs[0].work.sampling
    assert (params.min_tokens, params.logprob_token_ids) == (2, ())
    sampling["min_new_tokens"] = 3
    _, answer = await api.post(PATH, {"input_ids": [10], "sampling_params": sampling})
    assert answer["error"]["message"].startswith("`min_new_tokens` must be between 0 and the 2 tokens")


async def test_logprobs_of_the_output_alone(api: Api) -> None:
    info = (await api.post(PATH, {"text": "The", "return_logprob": True}))[1]["meta_info"]
    assert info["input_token_logprobs"] == []
    assert len(info["output_token_logprobs"]) == 4
    assert info["output_token_logprobs"][0][2] is None
    assert api.generator.specs[0].work.sampling.num_prompt_logprobs is None


@pytest.mark.parametrize("body", [{"text": ["The", "quick"]}, {"input_ids": [[5], [6, 7]]}], ids=str)
async def test_batches(api: Api, body: dict[str, Any]) -> None:
    samplings = [{"max_new_tokens": 1}, {"max_new_tokens": 2, "stop": "brown"}]
    batch = {**body, "sampling_params": samplings, "rid": ["a", "b"]}
    status, answer = await api.post(PATH, batch)
    assert status == 200
    assert [output["text"] for output in answer] == [" quick", " quick "]
    assert [output["meta_info"]["id"] for output in answer] == ["a", "b"]
    assert answer[1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": "brown"}
    parts = chunks(await api.stream(PATH, {**batch, "stream": True}))
    last = {part["index"]: part["text"] for part in parts}
    assert last == {0: " quick", 1: " quick "}


async def test_several_choices_are_a_list(api: Api) -> None:
    _, answer = await api.post(PATH, {"text": "The", "sampling_params": {"n": 2, "max_new_tokens": 1}})
    assert [output["text"] for output in answer] == [" quick", " quick"]


async def test_how_choices_end(api: Api) -> None:
    ids = api.generator.token_ids
    api.generator.script = lambda spec: one_by_one([*ids, 2], spec, finish="stop", matched=2)
    _, answer = await api.post(PATH, {"text": "The", "sampling_params": {"skip_special_tokens": False}})
    assert (answer["text"], answer["meta_info"]["finish_reason"]) == (OUTPUT, {"type": "stop", "matched": 2})
    api.generator.script = lambda spec: one_by_one(ids[:2], spec, finish="abort")
    status, answer = await api.post(PATH, {"text": "The"})
    assert (status, answer["meta_info"]["finish_reason"]["type"]) == (200, "abort")
    assert answer["text"] == " quick brown"


def floats(*values: float) -> bytes:
    return array("f", values).tobytes()


def with_hidden_states(api: Api, *parts: tuple[int, ...]) -> None:
    """The answer's tokens come in these deltas; a token's state is its position, and half of it."""

    def script(spec: GenerateSpec) -> list[ChoiceDelta]:
        deltas = []
        at = 0
        for part in parts:
            states = tuple(floats(position, position / 2) for position in range(at, at + len(part)))
            at += len(part)
            reason: Literal["length"] | None = "length" if at == sum(map(len, parts)) else None
            deltas.append(ChoiceDelta(0, part, (), reason, hidden_states=states))
        return deltas

    api.generator.script = script
    api.generator.prompt_hidden_states = floats(-2, -1, 0, 0)


async def test_hidden_states_have_sglangs_shape(api: Api) -> None:
    ids = api.generator.token_ids
    with_hidden_states(api, ids[:1], ids[1:3])
    body = {"input_ids": [10, 11], "return_hidden_states": True}
    info = (await api.post(PATH, body))[1]["meta_info"]
    assert info["hidden_states"] == [[[-2.0, -1.0], [0.0, 0.0]], [1.0, 0.5], [2.0, 1.0]]
    assert api.generator.specs[0].work.sampling.hidden_states == "all"
    assert "hidden_states" not in (await api.post(PATH, {"input_ids": [10, 11]}))[1]["meta_info"]


@pytest.mark.parametrize("incremental", [False, True])
async def test_streamed_hidden_states(api: Api, incremental: bool) -> None:
    ids = api.generator.token_ids
    with_hidden_states(api, ids[:1], ids[1:3])
    body = {
        "input_ids": [10, 11],
        "return_hidden_states": True,
        "stream": True,
        "incremental_streaming_output": incremental,
    }
    first, second = [part["meta_info"]["hidden_states"] for part in chunks(await api.stream(PATH, body))]
    prompt = [[-2.0, -1.0], [0.0, 0.0]]
    assert first == [prompt]
    assert second == ([] if incremental else [prompt]) + [[1.0, 0.5], [2.0, 1.0]]


async def test_a_stop_string_cuts_hidden_states_with_the_tokens(api: Api) -> None:
    with_hidden_states(api, api.generator.token_ids)
    body = {"input_ids": [10, 11], "return_hidden_states": True, "sampling_params": {"stop": "brown"}}
    answer = (await api.post(PATH, body))[1]
    assert len(answer["meta_info"]["hidden_states"]) == len(answer["output_ids"]) == 2


async def test_f12_the_default_length_is_what_has_room(api: Api) -> None:
    status, _ = await api.post(PATH, {"input_ids": [5] * 200})
    assert status == 200
    assert api.generator.specs[0].work.sampling.max_tokens == 56


@pytest.mark.parametrize("stream", [False, True])
async def test_f12_max_new_tokens_0_scores_the_prompt(api: Api, stream: bool) -> None:
    body = {
        "input_ids": [5] * 256,
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "stream": stream,
    }
    if stream:
        [answer] = chunks(await api.stream(PATH, body))
    else:
        _, answer = await api.post(PATH, body)
    meta = answer["meta_info"]
    assert (answer["text"], answer["output_ids"], meta["completion_tokens"]) == ("", [], 0)
    assert meta["finish_reason"] == {"type": "length", "length": 0}
    assert len(meta["input_token_logprobs"]) == 256
    status, answer = await api.post(PATH, {**body, "sampling_params": {"max_new_tokens": 0, "n": 2}})
    assert (status, answer["error"]["param"]) == (400, "n")


def test_a_long_answer_is_shown_whole_ever_more_rarely() -> None:
    shown = 0
    num_events = num_sent = 0
    for num_tokens in range(1, 20_001):
        if is_due(num_tokens, shown):
            shown = num_tokens
            num_events += 1
            num_sent += num_tokens
    assert num_events < 1_500
    assert num_sent < 130 * 20_000 + 512**2
    assert all(is_due(num_tokens, num_tokens - 1) for num_tokens in range(1, 256))


async def test_the_model_is_ignored(api: Api) -> None:
    assert (await api.post(PATH, {"text": "The", "model": "unknown"}))[0] == 200
