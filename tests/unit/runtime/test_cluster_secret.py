"""Where the cluster secret comes from, and what is derived from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdserve.runtime.cluster_secret import SECRET_VARIABLE, derived_key, given_secret, new_secret
from pdserve.runtime.errors import StartupError

SECRET = "s" * 32


@pytest.fixture(autouse=True)
def _no_secret_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)


def test_the_file_is_read_without_the_end_of_its_line(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\n")
    assert given_secret(str(path)) == SECRET


def test_the_environment_is_asked_where_no_file_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert given_secret("") == ""
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    assert given_secret("") == SECRET


@pytest.mark.parametrize("content", [b"", b"short\n", b"\xff" * 40, b"x" * 5000])
def test_what_could_be_guessed_or_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    with pytest.raises(StartupError, match="openssl rand") as refusal:
        given_secret(str(path))
    assert str(path) in str(refusal.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"--cluster-secret-file .*nowhere: No such file"):
        given_secret(str(tmp_path / "nowhere"))


def test_each_use_and_each_secret_has_a_key_of_its_own() -> None:
    keys = {derived_key(secret, use) for secret in (SECRET, new_secret()) for use in ("a", "b")}
    assert len(keys) == 4
    assert {len(key) for key in keys} == {32}
