"""One flag: its names, which values it takes, and how they are read from a command line or a file."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

# 4096, 32K and 32k, 1.5k; the decimals of vLLM's human_readable_int
_COUNT = re.compile(r"(-?[0-9]{1,18})([KMG]?)|([0-9]{1,12}(?:\.[0-9]{1,12})?)([kmg])", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """One setting. ``names[0]`` gives the field's name; the others are aliases of vLLM and SGLang."""

    names: tuple[str, ...]
    roles: frozenset[str]
    help: str
    default: Any = None
    kind: type = str
    choices: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()  # another word for a choice, and the choice
    repeatable: bool = False
    positional: bool = False
    takes_json_list: bool = False  # of a repeatable one, as vLLM writes it
    takes_several: bool = False  # of a repeatable one: values up to the next flag
    takes_suffix: bool = False  # of an int: 32k is 32000, 32K is 32768
    metavar: str = ""  # S, N, X or URL where empty
    is_hidden: bool = False  # from the help

    @property
    def field(self) -> str:
        return field_of(self.names[0])

    @property
    def wanted(self) -> str:
        """Which values it takes, for a complaint."""
        return " | ".join(self.choices) or self.kind.__name__

    def read(self, text: str) -> Any:  # noqa: ANN401  one of `kind`
        """The value that `text` spells. Raises ValueError."""
        if self.takes_suffix:
            return read_count(text)
        return self.kind(dict(self.spellings).get(text, text))

    def plain(self, value: object) -> object:
        """`value` of a file or a program, in the plain spelling where it is written in another one. Raises
        ValueError for a count that is none."""
        if isinstance(value, str) and (self.takes_suffix or self.spellings):
            return self.read(value)
        return value

    def takes(self, value: object) -> bool:
        """Whether a value that is plain is of this flag's kind, and one of its choices."""
        if isinstance(value, bool) or self.kind is bool:
            return isinstance(value, bool) and self.kind is bool
        is_number = self.kind is float and isinstance(value, int)
        return (is_number or isinstance(value, self.kind)) and (not self.choices or value in self.choices)

    def declare(self, parser: argparse.ArgumentParser) -> None:
        """To argparse. What is not given is absent from the namespace."""
        options: dict[str, Any] = {
            "dest": self.field,
            "default": argparse.SUPPRESS,
            "help": self._help_text(),
        }
        if self.kind is bool:
            options["action"] = argparse.BooleanOptionalAction if len(self.names) == 1 else "store_true"
        else:
            options["type"] = self._read_argument
            if self.choices:
                options["choices"] = self.choices
            else:
                usual = {int: "N", float: "X"}.get(self.kind, "URL" if self.repeatable else "S")
                options["metavar"] = self.metavar or usual
            if self.takes_several:
                options |= {"action": "extend", "nargs": "+"}
            elif self.repeatable:
                options["action"] = "append"
        parser.add_argument(*self.names, **options)
        if self.positional:
            parser.add_argument(
                "model_positional", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help=self.help
            )

    def arguments(self, value: object) -> list[str]:
        """Of a command line that gives it this value; one of a repeatable flag's."""
        if self.kind is not bool:
            return [f"{self.names[0]}={value}"]  # with `=`, because a value may begin with a dash
        if value:
            return [self.names[0]]
        return [self.names[0].replace("--", "--no-", 1)] if len(self.names) == 1 else []

    def _read_argument(self, text: str) -> Any:  # noqa: ANN401  one of `kind`
        try:
            return self.read(text)
        except ValueError as error:
            says = str(error) if self.takes_suffix else f"invalid {self.kind.__name__} value: {text!r}"
            raise argparse.ArgumentTypeError(says) from error

    def _help_text(self) -> str:
        if self.is_hidden:
            return argparse.SUPPRESS
        shown = self.default not in (None, (), "", False) and not self.positional
        return f"{self.help} (default: {self.default})" if shown else self.help


def read_count(text: str) -> int:
    """A number of tokens as vLLM takes it: k, m and g are powers of 1000 and may have decimals, K, M and G
    powers of 1024. Raises ValueError."""
    match = _COUNT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no number of tokens, such as 32768, 32k (32000) or 32K (32768)")
    whole, binary, decimal, thousands = match.groups()
    if whole is not None:
        return int(whole) << 10 * " KMG".index(binary or " ")
    return int(Decimal(decimal) * 1000 ** " kmg".index(thousands))


def field_of(name: str) -> str:
    """A flag's name as a key of a file or a program's option: ``--tp-size`` is ``tp_size``."""
    return name.lstrip("-").replace("-", "_")


def near_miss(name: str, known: Iterable[str]) -> str:
    """``; did you mean --max-model-len?`` for a complaint about an unknown name; empty when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""
