"""scripts/dev second_host: what makes it fail, and that it says when it tried nothing."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import pytest

from pdserve.tests.scripts import load_script


@pytest.fixture(scope="module")
def second_host() -> ModuleType:
    return load_script("second_host")


def test_without_root_nothing_is_tried(
    second_host: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["second_host"])
    assert second_host.main() == second_host.SKIPPED
    said = capsys.readouterr()
    assert said.err == "second_host: nothing was tried: network namespaces take root\n"
    assert said.out == ""


@pytest.mark.parametrize(
    ("case", "got_in", "flags", "code"),
    [
        ("secret", False, {}, 0),
        ("secret", True, {}, 1),
        ("loopback", True, {}, 1),
        ("secret", True, {"is_guarded": False}, 0),
        ("insecure", True, {}, 0),
        ("insecure", False, {}, 1),
        ("insecure", False, {"opens": False}, 0),
    ],
)
def test_what_got_in_fails_it_and_so_does_an_attempt_that_never_does(
    second_host: ModuleType,
    case: str,
    got_in: bool,
    flags: dict[str, bool],
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = second_host.Row("generate over zmq", "stranger", "HTTP 200", got_in, **flags)
    assert second_host.report({case: [row]}) == code
    _, _, shown, *_ = capsys.readouterr().out.splitlines()
    assert shown.startswith("| generate over zmq | stranger | ")
    assert (second_host.OPEN in shown) == got_in
