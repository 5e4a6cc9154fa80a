from __future__ import annotations

from pdserve.tests.unit.api.conftest import Api


async def test_answers(api: Api) -> None:
    status, answer = await api.post(
        "/v1/completions", {"model": "org/tiny", "prompt": "The", "max_tokens": 3}
    )
    print(answer)
    assert status == 200


async def test_stream(api: Api) -> None:
    print(await api.stream("/v1/completions", {"prompt": "The", "stream": True}))
