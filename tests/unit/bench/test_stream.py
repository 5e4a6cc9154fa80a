"""The stream contract, event by event. Faults over HTTP are in test_client.py."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pdserve.bench.records import CountSource, Outcome, SpanTime, TokenChunk
from pdserve.bench.stream import Answer, Expectation, StreamReader, error_message


def read(events: list[dict[str, Any] | str], expected: Expectation) -> Answer:
    """Event number i arrives at i seconds."""
    reader = StreamReader()
    for number, event in enumerate(events):
        data = event if isinstance(event, str) else json.dumps(event)
        reader.feed(f"data: {data}\n\n".encode(), float(number))
    return reader.judge(expected)


def chunk(text: str, *, usage: int | None = None, **choice: Any) -> dict[str, Any]:  # noqa: ANN401
    event: dict[str, Any] = {"choices": [{"index": 0, "text": text, **choice}]}
    return event if usage is None else event | {"usage": {"prompt_tokens": 3, "completion_tokens": usage}}


def usage(num_completion: int, num_prompt: int = 3) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": num_prompt, "completion_tokens": num_completion}}


EXPECTED = Expectation(num_prompt_tokens=3, num_output_tokens=4, ignore_eos=True)


def test_token_ids_give_the_tokens_of_each_chunk() -> None:
    answer = read(
        [
            chunk("", token_ids=[1]),
            chunk("é", token_ids=[2, 3]),
            chunk("", token_ids=[]),
            chunk("x", token_ids=[4], finish_reason="length"),
            usage(4),
            "[DONE]",
        ],
        EXPECTED,
    )
    assert answer.outcome is Outcome.OK
    assert answer.count_source is CountSource.TOKEN_IDS
    assert answer.chunks == (TokenChunk(0.0, 1), TokenChunk(1.0, 2), TokenChunk(3.0, 1))
    assert (answer.text, answer.finish_reason) == ("éx", "length")
    assert (answer.num_prompt_tokens, answer.num_output_tokens) == (3, 4)


def test_token_ids_alone_can_count_an_answer_without_usage() -> None:
    answer = read([chunk("abcd", token_ids=[1, 2, 3, 4], finish_reason="length"), "[DONE]"], EXPECTED)
    assert (answer.outcome, answer.num_output_tokens) == (Outcome.OK, 4)


def test_continuous_usage_gives_the_tokens_of_each_chunk() -> None:
    answer = read(
        [
            chunk("", usage=0),
            chunk("a", usage=1),
            chunk("", usage=2),
            chunk("bc", usage=4, finish_reason="length"),
            usage(4),
            "[DONE]",
        ],
        EXPECTED,
    )
    assert answer.outcome is Outcome.OK
    assert answer.count_source is CountSource.CONTINUOUS_USAGE
    assert answer.chunks == (TokenChunk(1.0, 1), TokenChunk(2.0, 1), TokenChunk(3.0, 2))


def test_usage_on_the_last_chunk_only_is_not_taken_for_continuous() -> None:
    answer = read(
        [chunk("a"), chunk("b"), chunk(""), chunk("c", usage=4, finish_reason="length"), "[DONE]"], EXPECTED
    )
    assert answer.outcome is Outcome.OK
    assert answer.count_source is CountSource.CHUNKS
    assert [arrival.at_s for arrival in answer.chunks] == [0.0, 1.0, 3.0]


def test_chat_chunks_count_reasoning_and_tool_calls_but_not_the_role() -> None:
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {"reasoning": "mm"},
        {"content": "yes"},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
    ]
    events: list[dict[str, Any] | str] = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    answer = read([*events, usage(4), "[DONE]"], EXPECTED)
    assert answer.outcome is Outcome.OK
    assert [arrival.at_s for arrival in answer.chunks] == [1.0, 2.0, 3.0, 4.0]
    assert answer.text == "hmmmyes"


def four(**last: Any) -> list[dict[str, Any] | str]:  # noqa: ANN401
    return [chunk("a"), chunk("b"), chunk("c"), chunk("d", **last)]


@pytest.mark.parametrize(
    ("events", "outcome", "message"),
    [
        ([], Outcome.TRUNCATED, "without [DONE]"),
        ([*four(finish_reason="length"), usage(4)], Outcome.TRUNCATED, "without [DONE]"),
        ([*four(), usage(4), "[DONE]"], Outcome.TRUNCATED, "without a finish_reason"),
        ([*four(finish_reason="length"), "[DONE]"], Outcome.COUNT_MISMATCH, "no usage"),
        (
            [*four(finish_reason="length"), usage(3), "[DONE]"],
            Outcome.COUNT_MISMATCH,
            "4 output tokens asked, 3",
        ),
        (
            [*four(finish_reason="length"), usage(5), "[DONE]"],
            Outcome.COUNT_MISMATCH,
            "4 output tokens asked, 5",
        ),
        (
            [*four(finish_reason="length"), usage(4, 5), "[DONE]"],
            Outcome.COUNT_MISMATCH,
            "3 prompt tokens sent",
        ),
        ([chunk("", finish_reason="stop"), usage(0), "[DONE]"], Outcome.COUNT_MISMATCH, "no chunk carried"),
        (
            [chunk("ab", token_ids=[1, 2], finish_reason="length"), usage(4), "[DONE]"],
            Outcome.COUNT_MISMATCH,
            "2 token ids came",
        ),
        ([chunk("a"), {"error": {"message": "boom"}}, "[DONE]"], Outcome.IN_STREAM_ERROR, "boom"),
        ([{"object": "error", "message": "old style"}], Outcome.IN_STREAM_ERROR, "old style"),
        ([chunk("a"), "{'error': 1}"], Outcome.MALFORMED, "{'error': 1}"),
        ([{"choices": [{"text": 7}]}], Outcome.MALFORMED, "choices"),
    ],
)
def test_broken_answers(events: list[dict[str, Any] | str], outcome: Outcome, message: str) -> None:
    answer = read(events, EXPECTED)
    assert answer.outcome is outcome
    assert message in answer.error


@pytest.mark.parametrize(
    ("finish_reason", "outcome"), [("stop", Outcome.OK), ("length", Outcome.COUNT_MISMATCH)]
)
def test_without_ignore_eos_only_a_stop_may_be_short(finish_reason: str, outcome: Outcome) -> None:
    expected = Expectation(num_prompt_tokens=None, num_output_tokens=4, ignore_eos=False)
    events: list[dict[str, Any] | str] = [chunk("a", finish_reason=finish_reason), usage(1), "[DONE]"]
    assert read(events, expected).outcome is outcome


def test_what_comes_after_done_is_ignored_and_the_first_failure_is_kept() -> None:
    answer = read([*four(finish_reason="length"), usage(4), "[DONE]", {"error": "late"}], EXPECTED)
    assert answer.outcome is Outcome.OK
    reader = StreamReader()
    reader.fail(Outcome.TIMEOUT, "first")
    reader.fail(Outcome.CONNECT, "second")
    assert reader.judge(EXPECTED).outcome is Outcome.TIMEOUT


def test_spans_of_the_timeline() -> None:
    timeline = {"timeline": {"spans": [{"name": "wire", "start_s": 1.0, "duration_s": 0.5}], "other": 1}}
    answer = read([*four(finish_reason="length"), usage(4) | timeline, "[DONE]"], EXPECTED)
    assert answer.spans == (SpanTime("wire", 0.5),)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "m", "code": 4}}', "m"),
        (b'{"error": "plain"}', "plain"),
        (b'{"message": "top"}', "top"),
        (b'{"detail": "fastapi"}', '{"detail": "fastapi"}'),
        (b"<html>" + b"x" * 500, "<html>" + "x" * 194),
    ],
)
def test_error_message(body: bytes, message: str) -> None:
    assert error_message(body) == message
