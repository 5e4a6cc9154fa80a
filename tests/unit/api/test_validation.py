from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdserve.api.generation import ModelCard
from pdserve.api.validation import GenerationDefaults, check_prompt, resolve_max_tokens
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
