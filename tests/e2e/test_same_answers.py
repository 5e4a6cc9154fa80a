"""A short slice of scripts/same_answers: the whole cluster against `transformers`, in fp32."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "same_answers.py"


@pytest.fixture(scope="module")
def same_answers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("same_answers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_cluster_answers_as_transformers_does(
    same_answers: ModuleType, family: str, tmp_path: Path
) -> None:
    tally = same_answers.run_family(family, tmp_path, quick=True)
    assert tally.failures == ()
    assert tally.num_requests > 25
    assert tally.num_tokens > 25 * 20
