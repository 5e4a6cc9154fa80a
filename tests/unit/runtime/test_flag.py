"""Flags are made from the fields of dataclasses."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from pdserve.runtime.flag import Flag, Settings, above_0, flag, flag_found_at_start, flags_of, within


@dataclass(frozen=True, kw_only=True)
class Oven(Settings):
    """the oven"""

    roles: ClassVar = frozenset({"baker"})

    heat: float = flag(180.0, "degrees", "--temperature", fault=within(20, 300))
    mode: Literal["fan", "grill"] = flag("fan", "how it heats", spellings=(("air", "fan"),))
    max_trays: int | None = flag(None, "at once", fault=within(1))
    bread: tuple[str, ...] = flag((), "kinds", fault=lambda kind: "" if kind else " is empty; give a kind")
    light: bool = flag(False, "on")
    shelf: int = flag_found_at_start(lambda: 3, "from below")
    serial: str = ""


FLAGS = {each.field: each for each in flags_of(Oven)}


def parsed(*arguments: str) -> dict[str, object]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    group = parser.add_argument_group("the oven")
    for each in FLAGS.values():
        each.declare(group)
    return vars(parser.parse_args(arguments))


def test_a_field_says_all_of_its_flag() -> None:
    assert list(FLAGS) == ["heat", "mode", "max_trays", "bread", "light", "shelf"], "serial is none"
    assert FLAGS["heat"].names == ("--heat", "--temperature")
    assert {each.group for each in FLAGS.values()} == {"the oven"}
    assert {each.roles for each in FLAGS.values()} == {frozenset({"baker"})}

    def shape(each: Flag) -> tuple[object, ...]:
        return each.kind, each.choices, each.repeatable, each.default

    assert shape(FLAGS["heat"]) == (float, (), False, 180.0)
    assert shape(FLAGS["mode"]) == (str, ("fan", "grill"), False, "fan")
    assert shape(FLAGS["max_trays"]) == (int, (), False, None)
    assert shape(FLAGS["bread"]) == (str, (), True, ())
    assert shape(FLAGS["light"]) == (bool, (), False, False)
    assert shape(FLAGS["shelf"]) == (int, (), False, None)


def test_the_dataclass_is_one_as_any_other() -> None:
    assert Oven(heat=200.0) == Oven(heat=200.0, shelf=3, serial="")


def test_what_is_not_given_is_absent() -> None:
    assert parsed() == {}
    assert parsed(
        "--temperature=90", "--mode", "air", "--bread", "rye", "--bread", "spelt", "--no-light"
    ) == {
        "heat": 90.0,
        "mode": "fan",
        "bread": ["rye", "spelt"],
        "light": False,
    }


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("heat", 300.0, ""),
        ("heat", 301.0, "--heat 301.0: 20 to 300 is expected"),
        ("heat", math.nan, "--heat nan: 20 to 300 is expected"),
        ("max_trays", None, ""),
        ("max_trays", 0, "--max-trays 0: 1 or more is expected"),
        ("bread", ("rye", ""), "--bread is empty; give a kind"),
    ],
)
def test_a_complaint_begins_with_the_flag(name: str, value: object, complaint: str) -> None:
    assert FLAGS[name].complaint(value) == complaint


@pytest.mark.parametrize(
    ("value", "fits"), [(0.0, False), (1e-9, True), (math.inf, False), (math.nan, False)]
)
def test_above_0_is_finite(value: float, fits: bool) -> None:
    assert (above_0(value) == "") is fits


def test_nothing_is_without_end() -> None:
    assert within(0)(math.inf) == " inf: 0 or more is expected"
