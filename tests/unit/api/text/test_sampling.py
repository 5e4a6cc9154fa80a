from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from pdserve.api.generation import ModelCard
from pdserve.api.text.prompts import check_prompt
from pdserve.api.text.sampling import GenerationDefaults, SamplingFields, resolve_max_tokens, sampling_params
from pdserve.messages.sampling import SamplingParams
from pdserve.runtime.errors import RequestError


def test_defaults_come_from_generation_config(tmp_path: Path) -> None:
    assert GenerationDefaults.from_directory(tmp_path) == GenerationDefaults()
    config = {"temperature": 0.6, "top_k": 20, "top_p": None, "do_sample": True, "eos_token_id": [1, 2]}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert GenerationDefaults.from_directory(tmp_path) == GenerationDefaults(temperature=0.6, top_k=20)


def test_a_prompt_that_is_too_long_is_told_both_numbers(card: ModelCard) -> None:
    check_prompt([5] * 255, card, "prompt")
    with pytest.raises(RequestError, match=r"256 tokens.*context of 256 tokens"):
        check_prompt([5] * 256, card, "prompt")


def test_max_tokens_fits_the_context(card: ModelCard) -> None:
    assert resolve_max_tokens(None, 16, 250, card, "max_tokens") == 6
    assert resolve_max_tokens(None, None, 6, card, "max_tokens") == 250
    assert resolve_max_tokens(250, 16, 6, card, "max_tokens") == 250
    with pytest.raises(RequestError, match=r"256 tokens; the prompt has 6 .* asks for 251"):
        resolve_max_tokens(251, 16, 6, card, "max_tokens")


def sampling(card: ModelCard, *, top_k: int | None = None, seed: int = 0) -> SamplingParams:
    return sampling_params(
        SamplingFields(top_k=top_k, seed=seed),
        GenerationDefaults(),
        card,
        draw_seed=lambda: 7,
        max_tokens=8,
        num_logprobs=None,
        num_prompt_logprobs=None,
    )


@pytest.mark.parametrize("number", [2**31, 2**63, 2**64, 10**30])
def test_integers_of_any_size_fit_a_message(card: ModelCard, number: int) -> None:
    """A message holds 64 bits and the engine computes with signed ones: more would end the node."""
    params = sampling(card, top_k=number, seed=number)
    assert (params.top_k, params.seed) == (card.vocab_size, number % 2**64)
    msgspec.msgpack.encode(params)


def test_top_k_of_all_is_one_value(card: ModelCard) -> None:
    assert [sampling(card, top_k=top_k).top_k for top_k in (-1, 0, 1, card.vocab_size + 1)] == [
        *(0, 0, 1, card.vocab_size)
    ]


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [("top_p", 1.5, "at most 1"), ("temperature", -1, "between 0"), ("min_p", 2, "between 0")],
)
def test_defaults_that_no_request_may_have_are_ignored_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, value: float, bound: str
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value, "top_k": 20}))
    assert GenerationDefaults.from_directory(tmp_path) == GenerationDefaults(top_k=20)
    assert name in caplog.text
    assert bound in caplog.text


def test_a_default_top_p_of_0_keeps_the_likeliest_token(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 0}))
    assert GenerationDefaults.from_directory(tmp_path) == GenerationDefaults(top_k=1)


def test_a_prompt_of_the_whole_context_can_be_scored(card: ModelCard) -> None:
    check_prompt([5] * 256, card, "prompt", generates=False)
    with pytest.raises(RequestError, match=r"257 tokens.*context of 256 tokens must hold it\."):
        check_prompt([5] * 257, card, "prompt", generates=False)
