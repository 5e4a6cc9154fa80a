"""Models by their name on a hub, from a cache as huggingface_hub lays it out; nothing is fetched."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub.errors import HFValidationError

from pdserve.runtime.errors import StartupError
from pdserve.runtime.hub import ModelFolders, is_hub_name

NAME = "someone/Tiny-1.0"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """With one model, whose branch is `main` and whose tag is `v1`."""
    folder = tmp_path / "cache" / "models--someone--Tiny-1.0"
    (folder / "refs").mkdir(parents=True)
    (folder / "blobs").mkdir()
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        blob = folder / "blobs" / f"blob-of-{name}"
        blob.write_text("{}")
        (snapshot / name).symlink_to(blob)
    for ref in ("main", "v1"):
        (folder / "refs" / ref).write_text(COMMIT)
    return tmp_path / "cache"


def find(model: str, cache: Path, revision: str = "", *, with_weights: bool = True) -> Path:
    return Path(
        ModelFolders().find(model, revision=revision, cache_dir=str(cache), with_weights=with_weights)
    )


@pytest.mark.parametrize("revision", ["", "v1", COMMIT])
def test_a_name_is_the_folder_in_the_cache(cache: Path, revision: str) -> None:
    folder = find(NAME, cache, revision)
    assert folder == cache / "models--someone--Tiny-1.0" / "snapshots" / COMMIT
    assert (folder / "config.json").read_text() == "{}"


@pytest.mark.parametrize(("model", "revision"), [("someone/Other", ""), (NAME, "v2")])
def test_what_is_not_in_the_cache_is_one_line(cache: Path, model: str, revision: str) -> None:
    with pytest.raises(StartupError, match=f"no model at {model}: .*the hub cannot be reached") as caught:
        find(model, cache, revision)
    assert "\n" not in str(caught.value)
    assert revision in str(caught.value)


def test_another_answer_of_the_hub_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise HFValidationError("an odd\nname")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(StartupError, match=f"{NAME} cannot be fetched: an odd name"):
        find(NAME, cache)


def test_each_is_looked_up_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch may move between two children of one cluster."""
    asked: list[str] = []

    def snapshot_download(name: str, **_: object) -> str:
        asked.append(name)
        return f"/cache/{len(asked)}"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    folders = ModelFolders()
    found = [
        folders.find(NAME, revision=revision, cache_dir="", with_weights=with_weights)
        for revision in ("", "", "v1")
        for with_weights in (True, False)
    ]
    assert found == ["/cache/1"] * 4 + ["/cache/2"] * 2


def test_a_folder_that_is_there_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(NAME)
    (tmp_path / NAME).mkdir(parents=True)
    assert not is_hub_name(NAME)


@pytest.mark.parametrize("model", ["gpt2", "/models/a", "./a/b", "~/a", "../a", "a/b/c", "a b/c", "", "a/"])
def test_other_texts_are_no_names(model: str) -> None:
    assert not is_hub_name(model)
