"""What is told while a checkpoint is read."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pdserve.engine.load_progress import LoadProgress
from pdserve.engine.model_weights import load_weights
from pdserve.engine.tensor_parallel import WHOLE, Shard
from pdserve.models.config import ModelConfig

FILE_OF = {"a": Path("/m/1"), "b": Path("/m/2"), "c": Path("/m/1")}
NUM_BYTES = {"a": 1 << 30, "b": 1 << 29, "c": 1 << 30}


class Stream(io.StringIO):
    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


def told(stream: Stream) -> str:
    with LoadProgress(Path("/m"), FILE_OF, NUM_BYTES, stream=stream) as progress:
        for name in FILE_OF:
            progress.read(name)
    return stream.getvalue()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, logger="pdserve")
    return lambda: [line for line in caplog.messages if " is read, " in line]


def test_a_log_has_a_line_for_each_file(lines: Callable[[], list[str]]) -> None:
    assert told(Stream(is_terminal=False)) == ""
    assert lines() == [
        "/m/2 is read, 1 of 2 files, 1.50 GiB",
        "/m/1 is read, 2 of 2 files, 2.50 GiB",
    ]


def test_a_terminal_has_a_bar(lines: Callable[[], list[str]]) -> None:
    shown = told(Stream(is_terminal=True))
    assert "reading m: 100%" in shown
    assert lines() == []


def test_who_wants_warnings_only_hears_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="pdserve")
    assert told(Stream(is_terminal=True)) + told(Stream(is_terminal=False)) == ""
    assert caplog.messages == []


@pytest.mark.parametrize("shard", [WHOLE, Shard(0, 2), Shard(1, 2)])
def test_rank_0_tells_of_every_file(
    checkpoint: Callable[..., Path], lines: Callable[[], list[str]], shard: Shard
) -> None:
    folder = checkpoint("llama", shards=2)
    config = ModelConfig.from_dir(folder)
    load_weights(folder, config, torch.float32, torch.device("cpu"), shard)
    assert len(lines()) == (2 if shard.rank == 0 else 0)
