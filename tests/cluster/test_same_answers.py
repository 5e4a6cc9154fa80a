"""A short slice of scripts/dev same_answers: the whole cluster against `transformers`, in fp32."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from pdserve.tests.scripts import load_script


@pytest.fixture(scope="module")
def same_answers() -> ModuleType:
    return load_script("same_answers")


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_the_cluster_answers_as_transformers_does(
    same_answers: ModuleType, family: str, tmp_path: Path
) -> None:
    tally = same_answers.run_family(family, tmp_path, quick=True)
    assert tally.failures == ()
    assert tally.num_requests > 25
    assert tally.num_tokens > 25 * 20
