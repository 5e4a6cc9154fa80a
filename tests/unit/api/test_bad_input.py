from __future__ import annotations

import pytest

from pdserve.api.generation import ModelCard
from pdserve.api.validation import Limits
from pdserve.tests.bad_input_cases import BadInput, bad_input_cases
from pdserve.tests.unit.api.conftest import Api

NUM_TOKENS = 404  # of the tests' tokenizer
CASES = bad_input_cases(max_model_len=256, vocab_size=NUM_TOKENS, max_body_bytes=20_000)


def test_the_cases_are_made_for_this_server(card: ModelCard, limits: Limits) -> None:
    assert (card.max_model_len, card.vocab_size, limits.max_body_bytes) == (256, NUM_TOKENS, 20_000)
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_bad_input_is_answered_clearly(api: Api, case: BadInput) -> None:
    if case.code == "request_not_found":
        api.admin.states.clear()
    headers = {"content-type": "application/json", "x-request-id": "mine"}
    async with api.http.request(case.method, api.url + case.path, data=case.body, headers=headers) as answer:
        status, body = answer.status, await answer.json()
        assert answer.headers["x-request-id"] == "mine"
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (status, error["param"], error["code"]) == (case.status, case.param, case.code), error
    assert error["message"]
    assert api.generator.generations == []
