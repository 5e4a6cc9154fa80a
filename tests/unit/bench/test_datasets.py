from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from pdserve.bench.datasets import (
    RandomLengths,
    Sample,
    TraceExpander,
    Vocabulary,
    file_samples,
    is_trace,
    random_samples,
    replay_offsets_s,
)
from pdserve.bench.tokenizer import as_text, load_tokenizer, vocabulary_of
from pdserve.runtime.errors import StartupError


def draw(lengths: RandomLengths, num: int = 200, seed: int = 0) -> list[Sample]:
    return random_samples(num, lengths, Vocabulary(50, special_ids=[0, 7]), np.random.default_rng(seed))


def test_random_lengths_prefix_and_ids() -> None:
    samples = draw(RandomLengths(input=20, output=8, prefix=5, range_ratio=0.5))
    prompts = [sample.prompt for sample in samples]
    assert len({tuple(prompt[:5]) for prompt in prompts}) == 1
    assert {len(prompt) - 5 for prompt in prompts} == set(range(10, 31))
    assert {sample.num_output_tokens for sample in samples} == set(range(4, 13))
    ids = {token_id for prompt in prompts for token_id in prompt}
    assert ids == set(range(50)) - {0, 7}


def test_random_samples_are_of_exact_length_and_decided_by_the_seed() -> None:
    lengths = RandomLengths(input=20, output=8)
    assert {(sample.num_prompt_tokens, sample.num_output_tokens) for sample in draw(lengths)} == {(20, 8)}
    assert draw(lengths, seed=1) == draw(lengths, seed=1) != draw(lengths, seed=2)


def write(path: Path, lines: Sequence[object]) -> Path:
    file = path / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    return file


def test_prompts_from_a_file(tmp_path: Path) -> None:
    lines = [
        {"prompt": "hello", "output_len": 5, "unknown": 1},
        {"prompt": [1, 2], "max_tokens": 6},
        {"prompt": "default"},
        {"prompt": "beyond the limit"},
    ]
    file = write(tmp_path, [lines[0], *lines[1:]])
    assert not is_trace(file)
    assert file_samples(file, 3, default_output_len=9, expander=None) == [
        Sample("hello", 5),
        Sample([1, 2], 6),
        Sample("default", 9),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "x"}, "data.jsonl:1: no output_len"),
        ({"prompt": "x", "output_len": 0}, "at least 1"),
        ({"prompt": "", "output_len": 1}, "prompt is empty"),
        ({"prompt": 7, "output_len": 1}, "data.jsonl:1"),
        ({"output_len": 1}, "neither a prompt nor an input_length"),
        ({"input_length": 4, "output_length": 1}, "--vocab-size"),
    ],
)
def test_unusable_lines(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(StartupError, match=message):
        file_samples(write(tmp_path, [line]), 10, None, None)


def test_unusable_files(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="No such file"):
        file_samples(tmp_path / "absent", 1, None, None)
    with pytest.raises(StartupError, match="No such file"):
        is_trace(tmp_path / "absent")
    with pytest.raises(StartupError, match="no samples"):
        file_samples(write(tmp_path, []), 1, None, None)


def test_trace_entries_share_prefixes_as_their_hashes_say(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 500, "input_length": 10, "output_length": 3, "hash_ids": [11, 12, 13]},
        {"timestamp": 1500, "input_length": 12, "output_length": 4, "hash_ids": [11, 12, -5]},
        {"timestamp": 1750, "input_length": 12, "output_length": 4, "hash_ids": [11]},
    ]
    file = write(tmp_path, lines)
    assert is_trace(file)
    expander = TraceExpander(Vocabulary(1000), block_size=4, seed=3)
    first, second, third = file_samples(file, 10, None, expander)
    assert [sample.num_prompt_tokens for sample in (first, second, third)] == [10, 12, 12]
    assert first.prompt[:8] == second.prompt[:8]
    assert first.prompt[8:10] != second.prompt[8:10]
    assert third.prompt[:4] == first.prompt[:4]
    assert third.prompt[4:8] != first.prompt[4:8]
    assert file_samples(file, 10, None, expander) == [first, second, third]
    assert replay_offsets_s([first, second, third], speed=2.0) == [0.0, 0.5, 0.625]


def test_timestamps_that_cannot_be_replayed() -> None:
    with pytest.raises(StartupError, match="sample 0 has no timestamp"):
        replay_offsets_s([Sample("x", 1)], 1.0)
    with pytest.raises(StartupError, match="sample 1 has a timestamp before"):
        replay_offsets_s([Sample("x", 1, 2.0), Sample("x", 1, 1.0)], 1.0)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_vocabulary_and_text_of_a_tokenizer(model_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    ids = set(vocabulary_of(tokenizer).draw(200, np.random.default_rng(0)))
    assert ids == {0, 1, 2}
    samples = as_text([Sample([1, 2], 4), Sample("kept", 5)], tokenizer)
    assert samples == [Sample("b c", 4), Sample("kept", 5)]


def test_tokenizers_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="not a file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StartupError, match="--tokenizer"):
        load_tokenizer(tmp_path)


def test_an_empty_vocabulary() -> None:
    with pytest.raises(StartupError, match="leaves none"):
        Vocabulary(1, special_ids=[0])
