from __future__ import annotations

import base64
from array import array
from typing import Any

import pytest

from pdserve.api.generation import ChoiceDelta, GenerateSpec
from pdserve.tests.unit.api.conftest import Api

MODEL = "org/tiny"


@pytest.fixture
def states(api: Api) -> Api:
    """The last state of a prompt is (3 × its first id, 4 × its first id)."""

    def script(spec: GenerateSpec) -> list[ChoiceDelta]:
        state = array("f", [3.0 * spec.work.prompt_ids[0], 4.0 * spec.work.prompt_ids[0]]).tobytes()
        return [ChoiceDelta(0, (7,), (), "length", hidden_states=(state,))]

    api.generator.script = script
    return api


async def test_a_vector_of_length_one(states: Api) -> None:
    status, answer = await states.post("/v1/embeddings", {"input": [5, 6], "model": MODEL})
    assert status == 200
    (data,) = answer.pop("data")
    assert answer == {
        "object": "list",
        "model": MODEL,
        "usage": {"prompt_tokens": 2, "total_tokens": 2},
    }
    assert data["embedding"] == pytest.approx([0.6, 0.8])
    assert (data["object"], data["index"]) == ("embedding", 0)
    (spec,) = states.generator.specs
    assert spec.work.prompt_ids == (5, 6)
    assert (spec.work.sampling.hidden_states, spec.work.sampling.max_tokens) == ("sampled", 1)


async def test_a_batch_in_base64(states: Api) -> None:
    body = {"input": ["The", "quick"], "encoding_format": "base64"}
    data = (await states.post("/v1/embeddings", body))[1]["data"]
    assert [one["index"] for one in data] == [0, 1]
    vectors = [array("f", base64.b64decode(one["embedding"])).tolist() for one in data]
    assert vectors == [pytest.approx([0.6, 0.8])] * 2
    assert len({spec.request_id for spec in states.generator.specs}) == 2


@pytest.mark.parametrize(
    ("body", "is_batch"),
    [
        ({"text": "The"}, False),
        ({"input_ids": [5, 6]}, False),
        ({"text": ["The"]}, True),
        ({"input_ids": [[5], [6, 7]]}, True),
    ],
    ids=str,
)
async def test_encode_has_sglangs_shape(states: Api, body: dict[str, Any], is_batch: bool) -> None:
    status, answer = await states.post("/encode", {**body, "rid": "r1"})
    assert status == 200
    assert isinstance(answer, list) == is_batch
    first = answer[0] if is_batch else answer
    assert first["embedding"] == pytest.approx([0.6, 0.8])
    assert first["meta_info"]["prompt_tokens"] == len(states.generator.specs[0].work.prompt_ids)
    assert first["meta_info"]["cached_tokens_details"]["device"] == 2
    assert first["meta_info"]["id"] == states.generator.specs[0].request_id


async def test_an_abort_is_an_error(api: Api) -> None:
    api.generator.script = lambda spec: [ChoiceDelta(0, (), (), "abort")]
    status, answer = await api.post("/v1/embeddings", {"input": "The"})
    assert (status, answer["error"]["code"]) == (500, "aborted")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ["The", 5]}, "input"),
        ("/v1/embeddings", {"input": "The", "dimensions": 8}, "dimensions"),
        ("/encode", {}, "text"),
        ("/encode", {"text": "a", "input_ids": [5]}, "text"),
        ("/encode", {"input_ids": [10**9]}, "input_ids"),
    ],
    ids=str,
)
async def test_bad_input_is_named(api: Api, path: str, body: dict[str, Any], param: str) -> None:
    status, answer = await api.post(path, body)
    assert status == 400
    assert answer["error"]["param"] == param
    assert api.generator.specs == []
