from __future__ import annotations

import asyncio
import json
import random
import re
import threading
from collections.abc import Generator
from typing import Any

import msgspec
import pytest

from pdserve.api.generation import GenerateSpec
from pdserve.api.http import json_slices
from pdserve.api.http.json_slices import JsonBounds, JsonTooLargeError, decode_slices
from pdserve.api.slices import SLICE_BYTES, at_once, in_slices, in_thread, rows, sliced, spaced
from pdserve.api.text.tokenization import Tokenizer
from pdserve.tests.unit.api.conftest import Api
from pdserve.tests.unit.api.fakes import FakeGeneration


class Turns:
    """Counts how often something else had its turn while work was under way."""

    def __init__(self) -> None:
        self.num = 0

    async def __aenter__(self) -> Turns:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.num += 1


async def test_others_have_their_turn_between_slices() -> None:
    def steps() -> Generator[None, None, str]:
        for _ in range(50):
            yield
        return "done"

    async with Turns() as turns:
        assert await in_slices(steps()) == "done"
        assert turns.num >= 49
    async with Turns() as turns:
        assert [list(run) async for run in sliced(range(10), 3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
        assert turns.num >= 2
    async with Turns() as turns:
        assert [item async for item in spaced(range(50))] == list(range(50))
        assert turns.num >= 48
    async with Turns() as turns:  # what is small costs no turn
        assert [list(run) async for run in sliced(range(3), 3)] == [[0, 1, 2]]
        assert turns.num == 0
    assert await in_thread(lambda: "there") == "there"


# ---- JSON -------------------------------------------------------------------------------------------


def random_value(draw: random.Random, depth: int = 0) -> Any:  # noqa: ANN401 (any JSON)
    match draw.randrange(9 if depth < 4 else 5):
        case 0:
            return draw.choice([None, True, False, 0, -1, 1.5, 10**12])
        case 1:
            return "".join(draw.choice('ab"\\,[]{}é😀\n:') for _ in range(draw.randrange(30)))
        case 2:
            return draw.randrange(10**6)
        case 3 | 4:
            return draw.choice(["", [], {}, "x"])
        case 5 | 6:
            return [random_value(draw, depth + 1) for _ in range(draw.randrange(8))]
        case _:
            names = ("".join(draw.choice('ab"\\,[') for _ in range(draw.randrange(6))) for _ in range(6))
            return {name: random_value(draw, depth + 1) for name in names}


def broken(draw: random.Random, document: bytes) -> bytes:
    """With a byte gone, changed or put in."""
    at = draw.randrange(len(document) + 1)
    byte = draw.choice([b"", *(bytes([each]) for each in b',[]{}":\\ 1x')])
    return document[:at] + byte + document[at + draw.randrange(2) :]


def outcome(document: bytes, *, is_sliced: bool) -> object:
    try:
        value = at_once(decode_slices(document)) if is_sliced else msgspec.json.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return type(error)
    return json.dumps(value)


@pytest.mark.parametrize("size", [20, 24, 33, 64])  # a number or a name must fit in
def test_what_slices_make_is_what_msgspec_makes(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(json_slices, "SLICE_BYTES", size)
    draw = random.Random(size)
    for _ in range(500):
        monkeypatch.setattr(json_slices, "_SLICE_MARKS", draw.choice([1, 2, 5, 4000]))
        value = random_value(draw)
        document = json.dumps(value, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.5).encode()
        for attempt in (document, broken(draw, document), broken(draw, broken(draw, document))):
            if attempt:
                assert outcome(attempt, is_sliced=True) == outcome(attempt, is_sliced=False), attempt


NUMBERS = b"[%b]" % b",".join(b"%d" % number for number in range(1000, 9000))
DOCUMENTS = {
    "ids": b'{"prompt":%b}' % (b"[" + b",".join([NUMBERS] * 20) + b"]"),
    "one list of ids": b'{"prompt":[%b]}' % b",".join([NUMBERS[1:-1]] * 20),
    "parts": b'{"messages":[{"role":"user","content":[%b]}]}' % b",".join([b'{"text":"[a,b]"}'] * 40_000),
    "names": b'{"logit_bias":{%b}}' % b",".join(b'"%d":1' % number for number in range(90_000)),
    "texts": b"[%b]" % b",".join([b'"\\"[{,%b"' % (b"x" * 70)] * 10_000),
    "a text": b'{"prompt":"%b"}' % ("é\\n" * 250_000).encode(),
    "blanks": b'{"prompt":%b1}' % (b" \n" * 400_000),
    "lists": b"[%b]" % b",".join([b"[]"] * 150_000),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_no_slice_holds_more_than_its_share(kind: str) -> None:
    """A slice is 64 KiB, or fewer bytes where they are many texts and brackets."""
    document = DOCUMENTS[kind]
    num_steps = len(list(decode_slices(document)))
    num_texts_and_brackets = len(re.findall(rb'"|\[\]', document))
    assert num_steps >= len(document) // SLICE_BYTES
    assert num_steps >= num_texts_and_brackets // 10_000
    assert at_once(decode_slices(document)) == msgspec.json.decode(document)


@pytest.mark.parametrize(
    ("document", "what"),
    [
        (b"[1,2,3,4]", "more than 2 values"),
        (b'[["a",2],[]]', "more than 3 texts, lists and objects"),
        (b'"%b"' % (b"x" * 200_000), "a text of more than 100000 bytes"),
    ],
)
def test_a_document_has_bounds(document: bytes, what: str) -> None:
    bounds = JsonBounds(max_values=2, max_parts=3, max_text_bytes=100_000)
    with pytest.raises(JsonTooLargeError, match=what):
        at_once(decode_slices(document, bounds))
    at_once(decode_slices(b'"[,[,[,[,{"', bounds))  # in a text they are none


def test_a_malformed_document_says_where() -> None:
    document = b"[%b,x]" % b",".join([b"1000"] * 30_000)
    with pytest.raises(msgspec.DecodeError, match=rf"\(byte {len(document) - 2}\)"):
        at_once(decode_slices(document))


# ---- requests ---------------------------------------------------------------------------------------


async def test_a_request_has_a_bound_of_outputs(api: Api) -> None:
    status, answer = await api.post("/v1/completions", {"prompt": ["a"] * 200, "n": 128, "max_tokens": 1})
    assert (status, answer["error"]["param"]) == (400, "n")
    assert "at most 16384" in answer["error"]["message"]
    sampling = {"n": 128, "max_new_tokens": 1}
    status, answer = await api.post("/generate", {"text": ["a"] * 200, "sampling_params": sampling})
    assert (status, answer["error"]["param"]) == (400, "n")
    assert api.generator.generations == []


async def test_others_have_their_turn_between_the_prompts_of_a_batch(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, turns_at = api.generator.generate, []
    async with Turns() as turns:

        async def noting(spec: GenerateSpec, client: str = "") -> FakeGeneration:
            turns_at.append(turns.num)
            return await generate(spec, client)

        monkeypatch.setattr(api.generator, "generate", noting)
        _, answer = await api.post("/v1/completions", {"prompt": ["a"] * 200, "n": 2, "max_tokens": 1})
    assert [choice["index"] for choice in answer["choices"]] == list(range(400))
    assert len(set(turns_at)) == 200


async def test_a_chat_of_more_parts_than_the_context_has_tokens_is_not_rendered(api: Api) -> None:
    parts = [{"type": "text", "text": "a"}] * 300
    status, answer = await api.post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]}
    )
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert "301 messages, parts" in answer["error"]["message"]


async def test_a_chat_of_many_messages_is_rendered_in_a_thread(
    api: Api, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    render, threads = tokenizer.apply_chat_template, []

    def noting(*messages: Any, **options: Any) -> str:  # noqa: ANN401 (whatever it is given)
        threads.append(threading.current_thread() is threading.main_thread())
        return render(*messages, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", noting)
    for num_parts in (50, 150):
        content = [{"type": "text", "text": ""}] * num_parts
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        assert (await api.post("/v1/chat/completions", body))[0] == 200
    assert threads == [True, False]
    status, answer = await api.post("/v1/chat/completions", {"messages": [{"role": "none"}] * 150})
    assert (status, answer["error"]["param"]) == (400, "messages[0].role")


async def test_others_have_their_turn_between_rows_of_an_answer() -> None:
    """Few rows are made at once; many are JSON already, so that the answer's end does not encode them."""
    async with Turns() as turns:
        assert await rows(range(100), str, width=20) == [str(number) for number in range(100)]
        assert turns.num == 0
        made = await rows(range(2_000), str, width=20)
        assert turns.num >= 15
    assert msgspec.json.encode(made) == msgspec.json.encode([str(number) for number in range(2_000)])
