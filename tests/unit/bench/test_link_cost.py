"""The cost of a guarded link: both kinds are measured, and the guarded one is one."""

from __future__ import annotations

import argparse

import pytest

from pdserve.bench import link_cost
from pdserve.messages.link_guard import LinkKeys
from pdserve.runtime.cluster_secret import new_secret
from pdserve.runtime.errors import StartupError


def test_both_kinds_of_link_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    link_cost.add_arguments(parser)
    arguments = ["--rows", "1", "3", "--repeats", "2", "--steps", "20", "--round-trips", "2"]
    assert link_cost.main(parser.parse_args(arguments)) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["1", "3"]
    assert all(row.count("|") == header.count("|") for row in rows)


def test_every_step_arrives() -> None:
    link = link_cost.Link(LinkKeys.of(new_secret()))
    link.steps(link_cost.step_of(2), 40)
    link.round_trip()
    link.close()


def test_nothing_to_measure_is_refused() -> None:
    parser = argparse.ArgumentParser()
    link_cost.add_arguments(parser)
    with pytest.raises(StartupError, match="1 or more"):
        link_cost.main(parser.parse_args(["--steps", "0"]))
