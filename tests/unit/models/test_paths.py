"""Which folder each file of a model is read from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pdserve.models.paths import ModelPaths
from pdserve.runtime.config import SHIPPED_MODEL
from pdserve.runtime.errors import StartupError


def test_all_is_in_the_models_folder() -> None:
    for generation_config in ("auto", "vllm"):
        paths = ModelPaths.given(str(SHIPPED_MODEL), "", generation_config)
        assert {paths.model, paths.tokenizer_folder, paths.generation_folder} == {SHIPPED_MODEL}


def test_flags_name_others_and_their_eos_ids_count(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9]}))
    shutil.copy(SHIPPED_MODEL / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "="}))
    own = ModelPaths.given(str(SHIPPED_MODEL), "", "auto").read_config()
    paths = ModelPaths.given(str(SHIPPED_MODEL), str(tmp_path), str(tmp_path))
    assert (paths.tokenizer_folder, paths.generation_folder) == (tmp_path, tmp_path)
    equals = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]["="]
    assert set(paths.read_config().eos_token_ids) - set(own.eos_token_ids) == {9, equals}
    assert paths.with_model(SHIPPED_MODEL) == paths


@pytest.mark.parametrize(
    ("tokenizer", "generation_config", "named"),
    [
        ("/no/such", "auto", "--tokenizer /no/such: a folder with a tokenizer.json"),
        ("", "/no/such", "--generation-config /no/such: auto, vllm or a folder with a generation_config"),
    ],
)
def test_a_folder_without_the_file_is_named(tokenizer: str, generation_config: str, named: str) -> None:
    with pytest.raises(StartupError, match=named):
        ModelPaths.given(str(SHIPPED_MODEL), tokenizer, generation_config)


def test_a_model_that_is_not_there_is_told_what_could_be() -> None:
    with pytest.raises(StartupError, match=r"no model at gpt2: a folder .* or OWNER/NAME on the hub"):
        ModelPaths.given("gpt2", "", "auto")


def test_f1_a_digest_is_of_what_a_file_says(tmp_path: Path) -> None:
    def digests() -> dict[str, str]:
        return ModelPaths(tmp_path).text_digests()

    assert digests() == {}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_text('{"a": 1, "b": [2]}')
    (tmp_path / "chat_template.jinja").write_text("{{ 1 }}")
    (tmp_path / "config.json").write_text("{}")
    before = digests()
    assert sorted(before) == [
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    (tmp_path / "tokenizer.json").write_text('{\n"b": [2], "a": 1}')
    assert digests() == before, "the same, written otherwise"
    (tmp_path / "tokenizer.json").write_text('{"a": 1, "b": [3]}')
    (tmp_path / "generation_config.json").write_text("no JSON")
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    (tmp_path / "chat_template.jinja").write_text("{{  1 }}")
    after = digests()
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)
