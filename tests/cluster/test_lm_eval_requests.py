"""Exactly what lm-eval's local-completions model sends, and what it reads in the answers.

It scores continuations: batches of prompts as token ids, echoed with their logprobs, plus one greedy token.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from pdserve.bench.local_cluster import LocalCluster
from pdserve.tests.cluster.helpers import COMPLETIONS, random_ids, request
from pdserve.tests.cluster.reference import Reference

TOLERANCE = 1e-4
EMPTY_KEY = {"Authorization": "Bearer "}
# Around pages of 16 and chunks of 64.
LENGTHS = (2, 15, 16, 17, 64, 65, 150)


def score(cluster: LocalCluster, prompts: list[list[int]], max_tokens: int, **fields: object) -> list[Any]:
    """The choices, one per prompt."""
    body = {
        "prompt": prompts,
        "model": "tiny-python",
        "max_tokens": max_tokens,
        "temperature": 0,
        "echo": True,
        "logprobs": 1,
        "seed": 1234,
        **fields,
    }
    reply = request(cluster.url, COMPLETIONS, body, headers=EMPTY_KEY)
    assert reply.status == 200, reply.text
    choices: list[Any] = reply.json["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(prompts)))
    return choices


def check_scores(choice: Any, prompt: list[int], num_generated: int, reference: Reference) -> None:  # noqa: ANN401
    logprobs = choice["logprobs"]
    chosen, top = logprobs["token_logprobs"], logprobs["top_logprobs"]
    num_tokens = len(prompt) + num_generated
    assert {len(column) for column in logprobs.values()} == {num_tokens}
    assert chosen[0] is None
    assert top[0] is None
    expected = reference.logprobs(prompt)
    for position in range(1, len(prompt)):
        row = expected[position - 1]
        assert chosen[position] == pytest.approx(float(row[prompt[position]]), abs=TOLERANCE)
        assert max(top[position].values()) == pytest.approx(float(row.max()), abs=TOLERANCE)
        assert max(top[position].values()) >= chosen[position]
    if num_generated:
        assert chosen[-1] == pytest.approx(float(expected[-1].max()), abs=TOLERANCE)
        assert max(top[-1].values()) == chosen[-1]


@pytest.mark.parametrize("max_tokens", [1, 0])
def test_scores_of_a_batch_equal_those_of_transformers(
    cluster: LocalCluster, reference: Reference, max_tokens: int
) -> None:
    prompts = [random_ids(100 + length, length) for length in LENGTHS]
    for choice, prompt in zip(score(cluster, prompts, max_tokens), prompts, strict=True):
        check_scores(choice, prompt, max_tokens, reference)
        assert choice["finish_reason"] == "length"


def test_scores_do_not_depend_on_what_is_cached(cluster: LocalCluster, reference: Reference) -> None:
    """A prompt's logprobs need its logits, so the cached prefix must be computed again."""
    cluster.flush()
    prompt = random_ids(7, 100)
    plain = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
    cluster.post(COMPLETIONS, plain)
    answer = cluster.post(COMPLETIONS, plain)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 96, "this test needs a prefix hit"
    for longer in (prompt, [*prompt, *random_ids(8, 30)]):
        (choice,) = score(cluster, [longer], 1)
        check_scores(choice, longer, 1, reference)


def test_a_prompt_of_one_token(cluster: LocalCluster) -> None:
    (choice,) = score(cluster, [[5]], 1)
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert len(choice["logprobs"]["tokens"]) == 2
    (choice,) = score(cluster, [[5]], 0)
    assert choice["logprobs"]["token_logprobs"] == [None]


def test_text_offsets_and_tokens_make_up_the_text(cluster: LocalCluster) -> None:
    prompt = cluster.post("/tokenize", {"prompt": "def add(a, b):\n    return"})["tokens"]
    (choice,) = score(cluster, [prompt], 1)
    logprobs, text = choice["logprobs"], choice["text"]
    assert text.startswith("def add(a, b):\n    return")
    ends = [*logprobs["text_offset"][1:], len(text)]
    pieces = [text[start:end] for start, end in zip(logprobs["text_offset"], ends, strict=True)]
    assert pieces == logprobs["tokens"]


def test_prompt_logprobs_in_vllms_form(cluster: LocalCluster, reference: Reference) -> None:
    prompt = random_ids(9, 70)
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "prompt_logprobs": 3}
    for _ in range(2):  # the second time its prefix is cached
        (choice,) = cluster.post(COMPLETIONS, body)["choices"]
        rows = choice["prompt_logprobs"]
        assert choice["logprobs"] is None
        assert rows[0] is None
        assert len(rows) == len(prompt)
        expected = reference.logprobs(prompt)
        for position, row in enumerate(rows[1:], 1):
            want = expected[position - 1]
            assert 3 <= len(row) <= 4
            assert row[str(prompt[position])]["logprob"] == pytest.approx(
                float(want[prompt[position]]), abs=TOLERANCE
            )
            ranked = sorted((v["rank"], v["logprob"]) for v in row.values() if v["rank"] is not None)
            assert [rank for rank, _ in ranked] == [1, 2, 3]
            assert [logprob for _, logprob in ranked] == pytest.approx(
                want.topk(3).values.tolist(), abs=TOLERANCE
            )


def test_logprobs_of_named_tokens_on_both_nodes(cluster: LocalCluster, reference: Reference) -> None:
    """The prompt's and the first token's are prefill's, the others decode's."""
    prompt, named = random_ids(12, 40), [17, 3, 250]
    body = {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
        "token_ids_logprob": named,
    }
    answer = cluster.post("/generate", body)
    told = answer["meta_info"]
    rows = [*told["input_token_ids_logprobs"], *told["output_token_ids_logprobs"]]
    expected = reference.logprobs([*prompt, *answer["output_ids"]])
    assert rows[0] is None, "nothing precedes the first token"
    assert len(rows) == 43
    for position, row in enumerate(rows[1:]):
        assert [token_id for _, token_id, _ in row] == named
        assert [logprob for logprob, _, _ in row] == pytest.approx(
            expected[position, named].tolist(), abs=TOLERANCE
        )


def test_streamed_echo_says_the_same(cluster: LocalCluster) -> None:
    prompt = random_ids(11, 40)
    (whole,) = score(cluster, [prompt], 3, ignore_eos=True)
    body = {"prompt": prompt, "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 1}
    reply = request(cluster.url, COMPLETIONS, {**body, "stream": True, "ignore_eos": True})
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line)["choices"][0] for line in lines]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for column in ("tokens", "token_logprobs", "text_offset"):
        assert [item for chunk in chunks for item in chunk["logprobs"][column]] == whole["logprobs"][column]
