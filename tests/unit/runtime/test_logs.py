"""The log: text for people, one JSON object a line for machines."""

from __future__ import annotations

import json
import logging
import re

import pytest

from pdserve.runtime.logs import LEVELS, configure_logging

pytestmark = pytest.mark.usefixtures("logging_as_it_was")


def test_json_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("decode", "info", "json")
    logging.getLogger("pdserve.decode.main").info("%d pages\nof %s", 3, "döcode")
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry.pop("time"))
    assert entry == {
        "level": "info",
        "process": "decode",
        "logger": "pdserve.decode.main",
        "message": "3 pages\nof döcode",
    }


def test_json_holds_a_traceback_on_the_same_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("decode", "info", "json")
    try:
        raise ValueError("no such page")
    except ValueError:
        logging.getLogger("pdserve").exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["exception"].endswith("ValueError: no such page")


def test_text_names_process_and_level(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("prefill", "info", "text")
    logging.getLogger("pdserve.x").warning("the queue is full")
    logged = capsys.readouterr().err
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} prefill  W the queue is full\n", logged)


@pytest.mark.parametrize("level", LEVELS)
def test_only_messages_of_the_level_or_above_are_shown(
    level: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("router", level, "json")
    for name in LEVELS:
        logging.getLogger("pdserve").log(getattr(logging, name.upper()), name)
    shown = [json.loads(line)["level"] for line in capsys.readouterr().err.splitlines()]
    assert shown == list(LEVELS[LEVELS.index(level) :])


def test_other_libraries_are_heard_from_warnings_on(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("router", "debug", "text")
    logging.getLogger("asyncio").info("not shown")
    logging.getLogger("asyncio").warning("shown")
    assert capsys.readouterr().err.count("shown") == 1


def test_configuring_twice_does_not_log_twice(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("router", "info", "text")
    configure_logging("router", "info", "text")
    logging.getLogger("pdserve").info("once")
    assert len(capsys.readouterr().err.splitlines()) == 1
