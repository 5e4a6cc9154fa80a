"""Every fault of the field's fault table, over real sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pdserve.bench.client import BodyOptions, Client, Endpoint, prepare
from pdserve.bench.datasets import Sample
from pdserve.bench.load import Release
from pdserve.bench.records import CountSource, MeasuredRequest, Outcome
from pdserve.runtime.errors import StartupError

if TYPE_CHECKING:
    from .conftest import FakeServer

SAMPLE = Sample([5, 6, 7], 6)


def body_options(**changes: object) -> BodyOptions:
    fields: dict[str, object] = {
        "model": "m",
        "endpoint": Endpoint.COMPLETIONS,
        "temperature": 0.0,
        "ignore_eos": True,
        "continuous_usage": True,
        "token_ids": False,
        "timeline": False,
        "extra_body": {},
    }
    return BodyOptions(**fields | changes)  # type: ignore[arg-type]


async def send(
    url: str, sample: Sample = SAMPLE, timeout_s: float = 5.0, **changes: object
) -> MeasuredRequest:
    options = body_options(**changes)
    with Client(url, options.endpoint, timeout_s, "secret") as client:
        return await client.send(prepare(sample, options), Release(3, 1.0, 2.0))


@pytest.mark.parametrize(
    ("fault", "outcome", "message"),
    [
        ("none", Outcome.OK, ""),
        ("pings", Outcome.OK, ""),
        ("unrequested_usage", Outcome.OK, ""),
        ("early_end", Outcome.TRUNCATED, "[DONE]"),
        ("no_finish_reason", Outcome.TRUNCATED, "finish_reason"),
        ("abort", Outcome.TRUNCATED, "Error"),
        ("abort_after_done", Outcome.TRUNCATED, "Error"),
        ("error_then_abort", Outcome.IN_STREAM_ERROR, "decode died"),
        ("error_then_done", Outcome.IN_STREAM_ERROR, "decode died"),
        ("bad_json", Outcome.MALFORMED, "{'error': 1}"),
        ("no_usage", Outcome.COUNT_MISMATCH, "no usage"),
        ("one_token_short", Outcome.COUNT_MISMATCH, "6 output tokens asked, 5 came"),
        ("wrong_usage", Outcome.COUNT_MISMATCH, "6 output tokens asked, 7 came"),
        ("wrong_prompt_count", Outcome.COUNT_MISMATCH, "3 prompt tokens sent, usage says 4"),
        ("no_tokens", Outcome.COUNT_MISMATCH, "no chunk carried a token"),
        ("status_503", Outcome.HTTP_5XX, "HTTP 503: no decode node"),
        ("status_400", Outcome.HTTP_4XX, "HTTP 400: bad prompt"),
        ("status_204", Outcome.HTTP_OTHER, "HTTP 204"),
        ("drop_before_status", Outcome.CONNECT, "ended before the answer"),
    ],
)
async def test_outcome_of_each_fault(
    fake_server: FakeServer, fault: str, outcome: Outcome, message: str
) -> None:
    fake_server.inject(fault)
    fake_server.continuous_usage = fault != "no_usage"
    record = await send(fake_server.url)
    assert record.outcome is outcome
    assert message in record.error
    assert (record.error == "") == record.ok


async def test_a_good_record(fake_server: FakeServer) -> None:
    fake_server.tokens_per_chunk = 4
    record = await send(fake_server.url)
    assert (record.index, record.due_s, record.released_s) == (3, 1.0, 2.0)
    assert (record.status, record.finish_reason, record.text) == (200, "length", "t0 t1 t2 t3 t4 t5 ")
    assert (record.num_prompt_tokens, record.num_output_tokens) == (3, 6)
    assert [chunk.num_tokens for chunk in record.chunks] == [4, 2]
    assert record.count_source is CountSource.CONTINUOUS_USAGE
    assert record.sent_s < record.chunks[0].at_s <= record.chunks[1].at_s <= record.ended_s


async def test_timeout(fake_server: FakeServer) -> None:
    fake_server.inject("silence")
    record = await send(fake_server.url, timeout_s=0.5)
    assert (record.outcome, record.status) == (Outcome.TIMEOUT, 200)


async def test_refused_connection(unused_tcp_port: int) -> None:
    record = await send(f"http://127.0.0.1:{unused_tcp_port}")
    assert (record.outcome, record.status, record.chunks) == (Outcome.CONNECT, None, ())


async def test_completions_body(fake_server: FakeServer) -> None:
    record = await send(fake_server.url, token_ids=True, extra_body={"top_k": 1})
    assert record.count_source is CountSource.TOKEN_IDS
    assert fake_server.bodies == [
        {
            "model": "m",
            "prompt": [5, 6, 7],
            "max_tokens": 6,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
            "top_k": 1,
        }
    ]
    assert fake_server.headers[0]["Authorization"] == "Bearer secret"


async def test_chat_body_without_extensions(fake_server: FakeServer) -> None:
    record = await send(
        fake_server.url,
        Sample("three words here", 5),
        endpoint=Endpoint.CHAT,
        temperature=None,
        ignore_eos=False,
        continuous_usage=False,
    )
    assert record.ok
    assert (record.count_source, len(record.chunks), record.num_prompt_tokens) == (CountSource.CHUNKS, 5, 3)
    assert fake_server.bodies == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "three words here"}],
            "max_completion_tokens": 5,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_chat_takes_no_token_ids() -> None:
    with pytest.raises(StartupError, match="--tokenizer"):
        prepare(SAMPLE, body_options(endpoint=Endpoint.CHAT))


async def test_server_information(fake_server: FakeServer) -> None:
    with Client(fake_server.url, Endpoint.COMPLETIONS, 5.0) as client:
        assert await client.first_model() == "fake/model"
        assert await client.vocab_size() == 1000
        fake_server.vocab_size = None
        assert await client.vocab_size() is None


async def test_server_information_of_no_server(unused_tcp_port: int) -> None:
    with Client(f"http://127.0.0.1:{unused_tcp_port}", Endpoint.COMPLETIONS, 5.0) as client:
        with pytest.raises(StartupError, match="/model_info: cannot connect"):
            await client.vocab_size()
        with pytest.raises(StartupError, match="/v1/models: cannot connect"):
            await client.first_model()


async def test_a_server_without_model_information(fake_server: FakeServer) -> None:
    with Client(fake_server.url + "/elsewhere", Endpoint.COMPLETIONS, 5.0) as client:
        assert await client.vocab_size() is None
        with pytest.raises(StartupError, match="/v1/models: HTTP 404"):
            await client.first_model()
