"""What a model directory's `tokenizer.json` gives the harness: the vocabulary, and text for chat prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer

from ..runtime.errors import StartupError
from .datasets import Sample, Vocabulary


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model directory, or of a `tokenizer.json` itself."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise StartupError(f"--tokenizer {path}: {file} is not a file")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises bare Exception
        raise StartupError(f"--tokenizer {path}: {error}") from error


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    special_ids = (
        token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
    )
    return Vocabulary(tokenizer.get_vocab_size(with_added_tokens=True), special_ids)


def as_text(samples: Sequence[Sample], tokenizer: Tokenizer) -> list[Sample]:
    """The same samples with token ids decoded, for endpoints that take text only."""
    return [
        sample if isinstance(sample.prompt, str) else replace(sample, prompt=tokenizer.decode(sample.prompt))
        for sample in samples
    ]
