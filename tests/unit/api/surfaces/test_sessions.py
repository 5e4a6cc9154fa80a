from __future__ import annotations

from typing import Any

import pytest

from pdserve.api.generation import ChoiceDelta
from pdserve.tests.unit.api.conftest import Api, chunks


async def opened(api: Api, **fields: object) -> str:
    status, session_id = await api.post("/open_session", fields)
    assert status == 200
    assert isinstance(session_id, str), "a JSON string, as SGLang's clients read it"
    return session_id


async def turn(api: Api, session_id: str, name: str, *ids: int, stream: bool = False, **params: Any) -> Any:  # noqa: ANN401
    body = {
        "input_ids": list(ids),
        "rid": name,
        "session_params": {"id": session_id, **params},
        "sampling_params": {"max_new_tokens": 2},
        "stream": stream,
    }
    if stream:
        return chunks(await api.stream("/generate", body))[-1]
    status, answer = await api.post("/generate", body)
    assert status == 200, answer
    return answer


@pytest.mark.parametrize("stream", [False, True])
async def test_a_turn_appends_to_the_one_it_names(api: Api, stream: bool) -> None:
    session_id = await opened(api)
    first = await turn(api, session_id, "a", 5, 6, stream=stream)
    await turn(api, session_id, "b", 7, rid="a", stream=stream)
    specs = api.generator.specs
    assert specs[0].work.prompt_ids == (5, 6)
    assert specs[1].work.prompt_ids == (5, 6, *first["output_ids"], 7)
    assert {spec.session.session_id for spec in specs if spec.session is not None} == {session_id}
    assert first["meta_info"]["id"] == "a"


async def test_incremental_streams_are_turns_too(api: Api) -> None:
    session_id = await opened(api)
    body = {
        "input_ids": [5],
        "rid": "a",
        "session_params": {"id": session_id},
        "stream": True,
        "incremental_streaming_output": True,
    }
    await api.stream("/generate", body)
    await turn(api, session_id, "b", 7, rid="a", offset=3)
    assert api.generator.specs[1].work.prompt_ids == (5, *api.generator.token_ids[:2], 7)


async def test_what_the_client_saw_is_what_the_next_turn_continues(api: Api) -> None:
    """A stop string ends the answer before the tokens that had come."""
    ids = api.generator.token_ids
    api.generator.script = lambda spec: [ChoiceDelta(0, ids, (), "length")]
    session_id = await opened(api)
    params = {"id": session_id}
    body = {"text": "The", "rid": "a", "session_params": params, "sampling_params": {"stop": "brown"}}
    seen = (await api.post("/generate", body))[1]["output_ids"]
    assert len(seen) < len(ids)
    await turn(api, session_id, "b", 7, rid="a")
    first, second = api.generator.specs
    assert second.work.prompt_ids == (*first.work.prompt_ids, *seen, 7)


async def test_an_aborted_turn_has_not_happened(api: Api) -> None:
    session_id = await opened(api)
    api.generator.script = lambda spec: [ChoiceDelta(0, (9,)), ChoiceDelta(0, (), (), "abort")]
    await turn(api, session_id, "a", 5)
    status, answer = await api.post(
        "/generate", {"input_ids": [6], "session_params": {"id": session_id, "rid": "a"}}
    )
    assert (status, answer["error"]["param"]) == (400, "session_params.rid")


async def test_a_batch_branches(api: Api) -> None:
    session_id = await opened(api)
    first = await turn(api, session_id, "a", 5)
    params = [{"id": session_id, "rid": "a"}, {"id": session_id, "rid": "a", "offset": 1}]
    body = {"input_ids": [[6], [7]], "rid": ["b", "c"], "session_params": params}
    assert (await api.post("/generate", body))[0] == 200
    assert [spec.work.prompt_ids for spec in api.generator.specs[1:]] == [
        (5, *first["output_ids"], 6),
        (5, 7),
    ]


async def test_opening_and_closing(api: Api) -> None:
    assert await opened(api, capacity_of_str_len=1000, session_id="mine", timeout=5.0) == "mine"
    status, answer = await api.post("/open_session", {"session_id": "mine"})
    assert (status, answer["error"]["code"]) == (400, "session_exists")
    assert await api.post("/close_session", {"session_id": "mine"}) == (
        200,
        {"success": True, "message": "closed"},
    )
    assert (await api.post("/close_session", {"session_id": "mine"}))[0] == 400
    assert (await opened(api, capacity_of_str_len=0)).endswith("@127.0.0.1:8200")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/open_session", {"session_id": "a b"}, "session_id"),
        ("/open_session", {"capacity_of_str_len": -1}, "capacity_of_str_len"),
        ("/open_session", {"timeout": 0}, "timeout"),
        ("/open_session", {"streaming": True}, "streaming"),
        ("/close_session", {}, "session_id"),
        ("/generate", {"input_ids": [5], "session_params": {"rid": "a"}}, "id"),
        ("/generate", {"input_ids": [5], "session_params": {"id": "none"}}, "session_params.id"),
        ("/generate", {"input_ids": [[5]], "session_params": []}, "session_params"),
    ],
    ids=str,
)
async def test_bad_input_is_named(api: Api, path: str, body: dict[str, Any], param: str) -> None:
    status, answer = await api.post(path, body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert api.generator.specs == []


async def test_a_turn_has_one_output_and_fits_the_context(api: Api) -> None:
    session_id = await opened(api)
    body: dict[str, Any] = {"input_ids": [5], "session_params": {"id": session_id}}
    status, answer = await api.post("/generate", {**body, "sampling_params": {"n": 2}})
    assert (status, answer["error"]["param"]) == (400, "n")
    await turn(api, session_id, "a", *[5] * 40)
    long = {"id": session_id, "rid": "a"}
    status, answer = await api.post("/generate", {"input_ids": [5] * 230, "session_params": long})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
