from __future__ import annotations

from pathlib import Path

from pdserve.api.generation import ModelCard
from pdserve.api.http.bodies import BodyLimits
from pdserve.tests.bad_input_cases import BadInput, bad_input_cases, markdown_table
from pdserve.tests.unit.api.conftest import Api

DOCS = Path(__file__).parents[3] / "docs" / "http_api.md"


async def problem_with(api: Api, case: BadInput) -> str:
    headers = {"content-type": "application/json", "x-request-id": "mine"}
    async with api.http.request(case.method, api.url + case.path, data=case.body, headers=headers) as answer:
        status, body = answer.status, await answer.json()
        request_id = answer.headers["x-request-id"]
    error = body.get("error", {})
    if set(body) != {"error"} or set(error) != {"message", "type", "param", "code"} or not error["message"]:
        return f"{case.name}: the body is {body}"
    if (status, error["param"], error["code"]) != (case.status, case.param, case.code):
        return f"{case.name}: {status} {error}"
    return "" if request_id == "mine" else f"{case.name}: request id {request_id}"


async def test_bad_input_is_answered_clearly(api: Api, card: ModelCard, limits: BodyLimits) -> None:
    cases = bad_input_cases(
        max_model_len=card.max_model_len,
        vocab_size=card.vocab_size,
        max_body_bytes=limits.max_bytes,
    )
    assert len({case.name for case in cases}) == len(cases)
    problems = [await problem_with(api, case) for case in cases]
    assert [problem for problem in problems if problem] == []
    assert api.generator.generations == []


def test_the_docs_hold_the_table() -> None:
    assert markdown_table() in DOCS.read_text(encoding="utf-8")
