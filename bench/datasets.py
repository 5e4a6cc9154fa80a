"""Samples to send: random token ids, JSONL prompts, or a Mooncake trace.

The same seed gives the same samples in any process. Nothing here talks to a server.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from ..runtime.errors import StartupError

HASH_MASK = (1 << 64) - 1
"""Trace hash ids seed generators, which take no negative numbers."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt and the number of tokens to ask for."""

    prompt: str | list[int]
    num_output_tokens: int
    timestamp_s: float | None = None
    """When a trace says the request came, from any origin."""

    @property
    def num_prompt_tokens(self) -> int | None:
        """None for text, which only a tokenizer can count."""
        return None if isinstance(self.prompt, str) else len(self.prompt)


class Vocabulary:
    """The token ids that random prompts may hold: all below `size` but the special ones."""

    def __init__(self, size: int, special_ids: Iterable[int] = ()) -> None:
        special = np.fromiter(special_ids, dtype=np.int64)
        self._ids = np.setdiff1d(np.arange(size, dtype=np.int64), special)
        if len(self._ids) == 0:
            raise StartupError(f"a vocabulary of {size} ids leaves none to draw prompts from")

    def draw(self, num_tokens: int, rng: np.random.Generator) -> list[int]:
        drawn = self._ids[rng.integers(0, len(self._ids), size=num_tokens)]
        return [int(token_id) for token_id in drawn]


@dataclass(frozen=True, slots=True)
class RandomLengths:
    """Lengths of random samples in tokens.

    Each is drawn evenly from [length × (1 − range_ratio), length × (1 + range_ratio)]; `prefix` tokens, the
    same for every sample, come before the input.
    """

    input: int
    output: int
    prefix: int = 0
    range_ratio: float = 0.0


def random_samples(
    num_samples: int, lengths: RandomLengths, vocabulary: Vocabulary, rng: np.random.Generator
) -> list[Sample]:
    """Samples of random token ids, so that every server sees the same tokens, not the same text."""
    prefix = vocabulary.draw(lengths.prefix, rng)
    num_inputs = _draw_lengths(num_samples, lengths.input, lengths.range_ratio, rng)
    num_outputs = _draw_lengths(num_samples, lengths.output, lengths.range_ratio, rng)
    return [
        Sample(prefix + vocabulary.draw(num_input, rng), num_output)
        for num_input, num_output in zip(num_inputs, num_outputs, strict=True)
    ]


def _draw_lengths(num: int, length: int, range_ratio: float, rng: np.random.Generator) -> list[int]:
    low = max(1, round(length * (1 - range_ratio)))
    high = max(low, round(length * (1 + range_ratio)))
    return [int(drawn) for drawn in rng.integers(low, high + 1, size=num)]


class _Line(msgspec.Struct, frozen=True):
    """A line of a dataset file: a prompt, or a Mooncake trace entry with lengths and block hashes."""

    prompt: str | list[int] | None = None
    output_len: int | None = None
    max_tokens: int | None = None
    timestamp: float | None = None
    input_length: int | None = None
    output_length: int | None = None
    hash_ids: list[int] = []

    @property
    def num_output_tokens(self) -> int | None:
        for length in (self.output_len, self.max_tokens, self.output_length):
            if length is not None:
                return length
        return None


@dataclass(frozen=True, slots=True)
class TraceExpander:
    """Turns block hashes of a Mooncake trace into token ids.

    A hash id always becomes the same `block_size` tokens, so prompts share prefixes exactly as the trace
    says. Tokens past the listed blocks are the line's own.
    """

    vocabulary: Vocabulary
    block_size: int
    seed: int

    def prompt(self, line_number: int, input_length: int, hash_ids: Sequence[int]) -> list[int]:
        tokens: list[int] = []
        for hash_id in hash_ids:
            rng = np.random.default_rng([self.seed, 0, hash_id & HASH_MASK])
            tokens += self.vocabulary.draw(self.block_size, rng)
        own = np.random.default_rng([self.seed, 1, line_number])
        tokens += self.vocabulary.draw(max(0, input_length - len(tokens)), own)
        return tokens[:input_length]


def file_samples(
    path: Path, max_samples: int, default_output_len: int | None, expander: TraceExpander | None
) -> list[Sample]:
    """The first `max_samples` lines of a JSONL file.

    A line is `{"prompt": text or token ids, "output_len" or "max_tokens": n}` or a Mooncake trace entry
    `{"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}`, which needs an `expander`.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise StartupError(f"--dataset-path {path}: {error.strerror}") from error
    samples: list[Sample] = []
    for number, raw in enumerate(lines, start=1):
        if len(samples) == max_samples:
            break
        if raw.strip():
            samples.append(_sample(f"{path}:{number}", number, raw, default_output_len, expander))
    if not samples:
        raise StartupError(f"--dataset-path {path} holds no samples")
    return samples


def _sample(
    where: str, number: int, raw: bytes, default_output_len: int | None, expander: TraceExpander | None
) -> Sample:
    try:
        line = msgspec.json.decode(raw, type=_Line)
    except msgspec.DecodeError as error:
        raise StartupError(f"{where}: {error}") from error
    num_output_tokens = default_output_len if line.num_output_tokens is None else line.num_output_tokens
    if num_output_tokens is None:
        raise StartupError(f"{where}: no output_len or max_tokens; add one or give --output-len")
    if num_output_tokens < 1:
        raise StartupError(f"{where}: the output length must be at least 1, not {num_output_tokens}")
    timestamp_s = None if line.timestamp is None else line.timestamp / 1e3
    if line.prompt is not None:
        if not line.prompt:
            raise StartupError(f"{where}: the prompt is empty")
        return Sample(line.prompt, num_output_tokens, timestamp_s)
    if line.input_length is None or line.input_length < 1:
        raise StartupError(f"{where}: neither a prompt nor an input_length of at least 1")
    if expander is None:
        raise StartupError(f"{where}: a trace entry needs a vocabulary; give --vocab-size or --tokenizer")
    prompt = expander.prompt(number, line.input_length, line.hash_ids)
    return Sample(prompt, num_output_tokens, timestamp_s)


def is_trace(path: Path) -> bool:
    """Whether the file's first line is a trace entry rather than a prompt."""
    try:
        with path.open("rb") as file:
            first = next((line for line in file if line.strip()), b"{}")
        return msgspec.json.decode(first, type=_Line).prompt is None
    except OSError as error:
        raise StartupError(f"--dataset-path {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise StartupError(f"{path}: {error}") from error


def replay_offsets_s(samples: Sequence[Sample], speed: float) -> list[float]:
    """Seconds from the first sample at which a trace sends each, `speed` times as fast."""
    offsets_s: list[float] = []
    for number, sample in enumerate(samples):
        if sample.timestamp_s is None:
            raise StartupError(f"sample {number} has no timestamp to replay")
        origin_s = samples[0].timestamp_s or 0.0
        offset_s = (sample.timestamp_s - origin_s) / speed
        if offsets_s and offset_s < offsets_s[-1]:
            raise StartupError(f"sample {number} has a timestamp before the one above it")
        offsets_s.append(offset_s)
    return offsets_s
