"""Fields of other servers: what would change the answer is refused, everything else is ignored."""

from __future__ import annotations

import logging

import pytest

from pdserve.api.http.bodies import BodyLimits, parse_request
from pdserve.api.http.fields import (
    EMBEDDING_RULES,
    GENERATING_RULES,
    OPENAI_RULES,
    FieldRules,
    chosen_salt,
    tell_ignored,
)
from pdserve.api.surfaces.openai_types import CompletionRequest
from pdserve.runtime.errors import RequestError
from pdserve.tests.unit.api.conftest import Api

COMPLETIONS = "/v1/completions"
RULES = {"native": GENERATING_RULES, "openai": OPENAI_RULES, "embeddings": EMBEDDING_RULES}


def test_an_unknown_field_is_ignored_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    tell_ignored.cache_clear()
    with caplog.at_level(logging.INFO, logger="pdserve.api.http.fields"):
        for _ in range(3):
            body = parse_request(
                {"prompt": "def", "temprature": 0}, CompletionRequest, OPENAI_RULES, strict=False
            )
    assert body.prompt == "def"
    assert [record.getMessage() for record in caplog.records] == [
        "the unknown field 'temprature' is ignored; --strict-fields refuses such requests"
    ]


@pytest.mark.parametrize("rules", [OPENAI_RULES, FieldRules()])
def test_an_unknown_field_may_be_refused(rules: FieldRules) -> None:
    is_strict = rules is OPENAI_RULES  # control routes always are
    with pytest.raises(RequestError) as refusal:
        parse_request({"prompt": "def", "temprature": 0}, CompletionRequest, rules, strict=is_strict)
    assert (refusal.value.status, refusal.value.param) == (400, "temprature")
    assert refusal.value.code == "unsupported_parameter"


@pytest.mark.parametrize(
    ("surface", "name"), [(surface, name) for surface, rules in RULES.items() for name in rules.unsupported]
)
def test_a_field_that_would_change_the_answer_is_refused_unless_it_asks_for_nothing(
    surface: str, name: str
) -> None:
    rules = RULES[surface]
    if name in CompletionRequest.__struct_fields__:
        pytest.skip("the completions' own")
    with pytest.raises(RequestError) as refusal:
        parse_request({"prompt": "def", name: {"some": "thing"}}, CompletionRequest, rules, strict=False)
    assert (refusal.value.status, refusal.value.param) == (400, name)
    assert rules.unsupported[name].reason in refusal.value.message
    for inert in (None, *rules.unsupported[name].inert):
        parse_request({"prompt": "def", name: inert}, CompletionRequest, rules, strict=True)


def test_nothing_is_both_harmless_and_unsupported() -> None:
    for rules in RULES.values():
        assert not rules.harmless & rules.unsupported.keys()


@pytest.mark.parametrize("path", ["/generate", COMPLETIONS, "/tokenize"])
async def test_a_server_ignores_unknown_fields(api: Api, path: str) -> None:
    body = {"text" if path == "/generate" else "prompt": "def", "invented": {"deep": [1]}}
    assert (await api.post(path, body))[0] == 200


@pytest.mark.parametrize("limits", [BodyLimits(strict_fields=True)])
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": "def", "invented": 1}, "invented"),
        ("/tokenize", {"prompt": "def", "invented": 1}, "invented"),
        ("/detokenize", {"tokens": [5], "invented": 1}, "invented"),
        ("/generate", {"text": "def", "invented": 1}, "invented"),
        ("/generate", {"text": "def", "sampling_params": {"top_z": 1}}, "top_z"),
    ],
)
async def test_a_strict_server_refuses_them(api: Api, path: str, body: dict[str, object], param: str) -> None:
    status, answer = await api.post(path, body)
    assert (status, answer["error"]["param"]) == (400, param)


# ---- cache_salt -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "The", "cache_salt": "mine"}),
        (COMPLETIONS, {"prompt": ["The", "fox"], "extra_key": "mine"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "cache_salt": "mine"}),
        ("/generate", {"text": "The", "extra_key": "mine"}),
        ("/generate", {"text": ["The", "fox"], "extra_key": ["mine", "mine"]}),
        ("/generate", {"text": "The", "cache_salt": "mine"}),
    ],
)
async def test_a_salt_goes_with_the_request(api: Api, path: str, body: dict[str, object]) -> None:
    assert (await api.post(path, body))[0] == 200
    assert {spec.work.cache_salt for spec in api.generator.specs} == {"mine"}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"cache_salt": ""}, "cache_salt"),
        (COMPLETIONS, {"cache_salt": "x" * 1025}, "cache_salt"),
        (COMPLETIONS, {"cache_salt": 5}, "cache_salt"),
        (COMPLETIONS, {"cache_salt": "a", "extra_key": "b"}, "extra_key"),
        ("/generate", {"extra_key": ["a", "b"]}, "extra_key"),
        ("/generate", {"extra_key": ["a"], "cache_salt": "a"}, "extra_key"),
        ("/generate", {"extra_key": ""}, "extra_key"),
        ("/v1/embeddings", {"cache_salt": ""}, "cache_salt"),
    ],
)
async def test_a_salt_that_separates_nothing_is_refused(
    api: Api, path: str, fields: dict[str, object], param: str
) -> None:
    good = {COMPLETIONS: "prompt", "/generate": "text", "/v1/embeddings": "input"}
    status, answer = await api.post(path, {good[path]: "The", **fields})
    assert (status, answer["error"]["param"]) == (400, param), answer


def test_the_salt_of_a_request() -> None:
    assert [chosen_salt(None, None), chosen_salt("a", None), chosen_salt(None, "b")] == ["", "a", "b"]
