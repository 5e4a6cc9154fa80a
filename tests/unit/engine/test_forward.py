"""Logits through chunks, pages and mixed batches equal transformers' over the whole sequence, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pdserve.engine import operators
from pdserve.engine.device import HOST
from pdserve.engine.forward_batch import ForwardBatch
from pdserve.engine.kv_pool import KVPool, pool_bytes
from pdserve.engine.model_runner import ModelRunner
from pdserve.engine.model_weights import load_weights
from pdserve.engine.operators import EAGER
from pdserve.engine.schedule_batch import ScheduleBatch
from pdserve.messages.sampling import SamplingParams, TokenLogprob
from pdserve.models.config import ModelConfig, kv_layout
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.tests.kernel_device import virtual
from pdserve.tests.unit.engine.conftest import CPU, Harness

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "llama-config-4": ("llama", {"config_style": 4}),
    "qwen3-config-4": ("qwen3", {"config_style": 4}),
    "mistral-3-shards": ("mistral", {"shards": 3}),
    "llama-tied": ("llama", {"overrides": {"tie_word_embeddings": True}}),
    "qwen2-untied": ("qwen2", {"overrides": {"tie_word_embeddings": False}}),
    "llama-biases": ("llama", {"overrides": {"attention_bias": True, "mlp_bias": True}}),
    "qwen3-bias-gqa": ("qwen3", {"overrides": {"attention_bias": True, "num_attention_heads": 14}}),
    "llama-rope-linear": (
        "llama",
        {"overrides": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}},
    ),
    "llama-rope-llama3": ("llama", {"overrides": {"rope_parameters": LLAMA3}}),
    "llama-rope-llama3-config-4": ("llama", {"overrides": {"rope_parameters": LLAMA3}, "config_style": 4}),
    "qwen2-rope-yarn": ("qwen2", {"overrides": {"rope_parameters": YARN}}),
    "qwen2-rope-yarn-config-4": ("qwen2", {"overrides": {"rope_parameters": YARN}, "config_style": 4}),
    "mistral-rope-yarn-mscale": (
        "mistral",
        {"overrides": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False}}},
    ),
}
TOLERANCE = 1e-4
NAMED = (377, 4)
WITH_LOGPROBS = SamplingParams(
    temperature=0.0, num_logprobs=3, num_prompt_logprobs=2, logprob_token_ids=NAMED
)


def transformers_logprobs(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """``[len(token_ids), V]``: row p is the distribution of the token at position p + 1."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits.log_softmax(dim=-1)


def assert_logprob(actual: TokenLogprob, expected: torch.Tensor, num_top: int) -> None:
    assert actual.logprob == pytest.approx(expected[actual.token_id].item(), abs=TOLERANCE)
    assert len(actual.top) == num_top
    best = expected.topk(num_top).values.tolist()
    assert [logprob for _, logprob in actual.top] == pytest.approx(best, abs=TOLERANCE)
    assert [token_id for token_id, _ in actual.named] == list(NAMED)
    for token_id, logprob in (*actual.top, *actual.named):
        assert logprob == pytest.approx(expected[token_id].item(), abs=TOLERANCE)


@pytest.mark.parametrize(("model", "options"), VARIANTS.values(), ids=VARIANTS.keys())
def test_chunks_equal_transformers(
    checkpoint: Callable[..., Path],
    harness: Callable[..., Any],
    prompt: Callable[..., list[int]],
    model: str,
    options: dict[str, Any],
) -> None:
    """Chunks that end within pages and at their ends, and chunks of one token, then two decode steps."""
    folder = checkpoint(model, **options)
    engine = harness(folder)
    token_ids = prompt(61)
    pages = engine.pages(63)
    whole = engine.row(token_ids, pages=pages, sampling=WITH_LOGPROBS, choices=())
    prompt_logprobs: list[TokenLogprob] = []
    for start, end in ((0, 13), (13, 14), (14, 32), (32, 60)):
        output = engine.forward(replace(whole, start=start, num_tokens=end - start))["row"]
        assert output.tokens == ()
        prompt_logprobs += output.report.logprobs
    sampled: list[TokenLogprob] = []
    for position in (60, 61, 62):
        row = replace(whole, token_ids=token_ids, start=position, num_tokens=1, choices=(0,))
        (token,) = engine.forward(row)["row"].tokens
        assert token.logprob is not None
        assert token.token_id == token.logprob.token_id
        sampled.append(token.logprob)
        token_ids = [*token_ids, token.token_id]

    expected = transformers_logprobs(folder, token_ids)
    assert [logprob.token_id for logprob in prompt_logprobs] == token_ids[1:61]
    for position, logprob in enumerate(prompt_logprobs):
        assert_logprob(logprob, expected[position], num_top=2)
    for position, logprob in zip((60, 61, 62), sampled, strict=True):
        assert_logprob(logprob, expected[position], num_top=3)
        assert logprob.token_id == expected[position].argmax().item()


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_hidden_states_equal_transformers(
    checkpoint: Callable[..., Path],
    harness: Callable[..., Any],
    prompt: Callable[..., list[int]],
    model: str,
) -> None:
    """Those of a prompt in two chunks beside another row, of the sampled token, and of a decode step."""
    folder = checkpoint(model)
    engine = harness(folder)
    token_ids = prompt(21)
    wanted = SamplingParams(temperature=0.0, hidden_states="all")
    whole = engine.row(token_ids, pages=engine.pages(23), sampling=wanted, choices=())
    other = engine.row(prompt(5, 1), row_id="other", pages=engine.pages(6))
    first = engine.forward(replace(whole, num_tokens=13), other)
    last = engine.forward(replace(whole, start=13, num_tokens=8, choices=(0,)))["row"]
    assert (first["other"].report.hidden_states, first["other"].tokens[0].hidden_state) == (b"", b"")
    token_ids = [*token_ids, last.tokens[0].token_id]
    decoded = engine.forward(replace(whole, token_ids=token_ids, start=21, num_tokens=1, choices=(0,)))["row"]
    assert decoded.report.hidden_states == b""

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids]), output_hidden_states=True).hidden_states[-1][0]
    states = first["row"].report.hidden_states + last.report.hidden_states
    actual = torch.frombuffer(bytearray(states), dtype=torch.float32).view(21, -1)
    assert torch.allclose(actual, expected[:21], atol=TOLERANCE)
    sampled = torch.frombuffer(
        bytearray(last.tokens[0].hidden_state + decoded.tokens[0].hidden_state), dtype=torch.float32
    )
    assert torch.allclose(sampled.view(2, -1), expected[20:], atol=TOLERANCE)


@pytest.mark.parametrize("padding_bytes", [0, 12], ids=["dense", "padded-stride"])
@pytest.mark.parametrize("model", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_mixed_batch_equals_transformers(
    checkpoint: Callable[..., Path],
    harness: Callable[..., Any],
    prompt: Callable[..., list[int]],
    model: str,
    padding_bytes: int,
) -> None:
    """Decode rows of one page and of many beside whole prompts, late chunks and one that samples nothing."""
    folder = checkpoint(model)
    engine = harness(folder, padding_bytes=padding_bytes, num_pages=192)
    spans = {
        "a": (0, 9),
        "b": (30, 1),
        "c": (2, 1),
        "d": (31, 1),
        "e": (17, 20),
        "f": (0, 1),
        "g": (90, 1),
        "h": (86, 1),
    }
    rows = {}
    for seed, (row_id, (start, num_tokens)) in enumerate(spans.items()):
        token_ids = prompt(start + num_tokens, seed)
        row = engine.row(token_ids, row_id=row_id, sampling=WITH_LOGPROBS)
        if start:
            engine.forward(replace(row, num_tokens=start, choices=()))
        rows[row_id] = replace(row, start=start, num_tokens=num_tokens)
    rows["a"] = replace(rows["a"], choices=())
    outputs = engine.forward(*rows.values())
    assert outputs["a"].tokens == ()
    for row_id, row in rows.items():
        expected = transformers_logprobs(folder, list(row.token_ids))[-1]
        for token in outputs[row_id].tokens:
            assert token.logprob is not None
            assert_logprob(token.logprob, expected, num_top=3)


def test_prompt_logprobs_start_and_end_where_they_should(
    checkpoint: Callable[..., Path], harness: Callable[..., Any], prompt: Callable[..., list[int]]
) -> None:
    """Positions 7 to 18 of a prompt of 19: none before, no outputs behind, no gap at a chunk's end."""
    engine = harness(checkpoint("llama"))
    token_ids = prompt(22)  # three outputs are being computed again
    sampling = SamplingParams(num_prompt_logprobs=0, prompt_logprobs_start=7)
    row = replace(
        engine.row(token_ids[:19], sampling, pages=engine.pages(22)), token_ids=token_ids, choices=()
    )
    got = [
        [
            logprob.token_id
            for logprob in engine.forward(replace(row, start=a, num_tokens=b - a))["row"].report.logprobs
        ]
        for a, b in ((0, 6), (6, 7), (7, 15), (15, 20), (20, 22))
    ]
    assert got == [[], token_ids[7:8], token_ids[8:16], token_ids[16:19], []]


def test_many_prompt_logprobs_are_computed_in_blocks(
    checkpoint: Callable[..., Path], harness: Callable[..., Any], prompt: Callable[..., list[int]]
) -> None:
    folder = checkpoint("mistral")
    engine = harness(folder)
    token_ids = prompt(300)
    output = engine.forward(engine.row(token_ids, SamplingParams(temperature=0.0, num_prompt_logprobs=0)))[
        "row"
    ]
    expected = transformers_logprobs(folder, token_ids)
    assert len(output.report.logprobs) == 299
    for position, logprob in enumerate(output.report.logprobs):
        assert logprob.top == ()
        assert logprob.logprob == pytest.approx(
            expected[position, token_ids[position + 1]].item(), abs=TOLERANCE
        )


def test_a_forked_choice_goes_on_alone(
    checkpoint: Callable[..., Path], harness: Callable[..., Any], prompt: Callable[..., list[int]]
) -> None:
    """Two choices share full pages; the partial one is copied in the step that first writes to it."""
    folder = checkpoint("qwen3")
    engine = harness(folder)
    token_ids = prompt(10)  # two full pages of 4, and half of one
    first = engine.row(token_ids, row_id=0, choices=(0, 1), pages=engine.pages(12), sampling=WITH_LOGPROBS)
    assert [token.choice for token in engine.forward(first)[0].tokens] == [0, 1]
    (copy,) = engine.pages(1)
    second_pages = [*first.pages[:2], copy]
    rows = [
        replace(
            first,
            token_ids=[*token_ids, token],
            start=10,
            num_tokens=1,
            row_id=choice,
            choices=(choice,),
            pages=pages,
        )
        for choice, (token, pages) in enumerate(((50, first.pages), (60, second_pages)))
    ]
    engine.pool.copy_pages([first.pages[2]], [copy])
    outputs = engine.forward(*rows)
    for row in rows:
        (token,) = outputs[row.row_id].tokens
        assert token.logprob is not None
        assert_logprob(token.logprob, transformers_logprobs(folder, list(row.token_ids))[-1], num_top=3)


def test_bfloat16_is_close_to_float32(
    checkpoint: Callable[..., Path], harness: Callable[..., Any], prompt: Callable[..., list[int]]
) -> None:
    folder = checkpoint("llama")
    engine = harness(folder, dtype="bfloat16")
    token_ids = prompt(40)
    output = engine.forward(engine.row(token_ids, sampling=WITH_LOGPROBS))["row"]
    expected = transformers_logprobs(folder, token_ids)
    errors = [
        logprob.logprob - expected[position, logprob.token_id].item()
        for position, logprob in enumerate(output.report.logprobs)
    ]
    assert torch.tensor(errors).square().mean().sqrt().item() < 0.1


def test_swapped_weights_are_used(
    checkpoint: Callable[..., Path], harness: Callable[..., Any], prompt: Callable[..., list[int]]
) -> None:
    one, other = harness(checkpoint("qwen3")), harness(checkpoint("qwen3", seed=5))
    token_ids = prompt(12)
    before = one.forward(one.row(token_ids, sampling=WITH_LOGPROBS))["row"]
    expected = other.forward(other.row(token_ids, sampling=WITH_LOGPROBS))["row"]
    assert before != expected
    new = load_weights(checkpoint("qwen3", seed=5), one.config, torch.float32, torch.device("cpu"))
    one.runner.swap_weights(new)
    assert one.forward(one.row(token_ids, sampling=WITH_LOGPROBS))["row"] == expected


def test_what_is_appended_after_building_is_not_seen(
    checkpoint: Callable[..., Path], harness: Callable[..., Any], prompt: Callable[..., list[int]]
) -> None:
    engine = harness(checkpoint("llama"))
    token_ids = prompt(9)
    row = engine.row(
        token_ids, sampling=SamplingParams(temperature=0.0, repetition_penalty=5.0, num_logprobs=1)
    )
    expected = engine.forward(row)["row"]
    batch = ForwardBatch.build(ScheduleBatch((row,)), step=1, config=engine.config, layout=engine.layout)
    best = expected.tokens[0].token_id
    token_ids += [best] * 9
    assert engine.runner.forward(batch).rows[0] == expected


@pytest.mark.parametrize("is_deterministic", [False, True], ids=["eager", "deterministic"])
def test_no_page_is_touched_but_those_of_the_rows(is_deterministic: bool) -> None:
    """The pool is larger than any memory: whoever copies all of it fails."""
    config = ModelConfig.from_dir(SHIPPED_MODEL)
    layout = kv_layout(config, 16, "float32")
    num_pages = 2**44 // layout.stride_bytes
    pool = KVPool(layout, num_pages, CPU, memory=virtual(pool_bytes(layout, num_pages), torch.uint8))
    weights = load_weights(SHIPPED_MODEL, config, torch.float32, CPU)
    chosen = operators.deterministic(operators.survey(config, weights)) if is_deterministic else EAGER
    harness = Harness(config, layout, pool, ModelRunner(config, weights, pool, HOST, operators=chosen))
    ids, pages = list(range(3, 60)), [5, num_pages - 3, num_pages // 2, num_pages - 2]
    ids.append(harness.forward(harness.row(ids, pages=pages))["row"].tokens[0].token_id)
    row = harness.row(ids, pages=pages, start=57, num_tokens=1)
    expected = harness.forward(row)["row"].tokens
    pool.copy_pages([num_pages - 3], [7])
    pool.poison([num_pages - 3])
    moved = replace(row, pages=[5, 7, *pages[2:]])
    outputs = harness.forward(moved, replace(moved, row_id="another"))
    assert outputs["row"].tokens[0].token_id == outputs["another"].tokens[0].token_id == expected[0].token_id
