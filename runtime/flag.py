"""A flag: its names, which values it takes, and how they are read from a command line or a file.

It is made from a field of a dataclass, by the field's name, type and default, and by what `flag` adds.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass
from decimal import Decimal
from typing import (
    Any,
    ClassVar,
    Literal,
    Self,
    TypeAlias,
    TypedDict,
    TypeVar,
    Union,
    Unpack,
    get_args,
    get_origin,
    get_type_hints,
)

# 4096, 32K and 32k, 1.5k; the decimals of vLLM's human_readable_int
_COUNT = re.compile(r"(-?[0-9]{1,18})([KMG]?)|([0-9]{1,12}(?:\.[0-9]{1,12})?)([kmg])", re.ASCII)


# Of a value: what is wrong with it, as the end of a line that begins with the flag; empty where nothing is.
Fault: TypeAlias = Callable[[Any], str]
T = TypeVar("T")


def no_fault(value: object) -> str:
    del value
    return ""


def within(low: float, high: float = math.inf, *, why: str = "") -> Fault:
    """Both are taken, infinity is not."""
    wanted = f"{low:g} or more is expected" if high == math.inf else f"{low:g} to {high:g} is expected"

    def fault(value: float) -> str:
        return "" if low <= value <= high and value < math.inf else f" {value}: {wanted}{why}"

    return fault


def above_0(value: float) -> str:
    return "" if 0 < value < math.inf else f" {value}: a number above 0 is expected"


class FlagOptions(TypedDict, total=False):
    """What is said of a flag, where it is not as usual."""

    fault: Fault  # of one value of a repeatable one
    spellings: tuple[tuple[str, str], ...]  # another word for a choice, and the choice
    is_positional: bool
    takes_json_list: bool  # of a repeatable one, as vLLM writes it
    takes_several: bool  # of a repeatable one: values up to the next flag
    takes_suffix: bool  # of an int: 32k is 32000, 32K is 32768
    metavar: str  # S, N, X or URL where it is not given
    is_hidden: bool  # from the help
    is_secret: bool
    live_on: frozenset[str]  # roles of nodes on which it may be changed while they run


def flag(default: T, help: str, *aliases: str, **options: Unpack[FlagOptions]) -> T:
    """A field of Settings that is a flag. `aliases`: of vLLM and SGLang."""
    metadata = {"help": help, "aliases": aliases, "options": options}
    field: T = dataclasses.field(default=default, metadata=metadata)
    return field


def flag_found_at_start(find: Callable[[], T], help: str, *aliases: str, **options: Unpack[FlagOptions]) -> T:
    """Likewise, of which the default is found at start."""
    metadata = {"help": help, "aliases": aliases, "options": options}
    field: T = dataclasses.field(default_factory=find, metadata=metadata)
    return field


class Settings:
    """What one owner is told: base of frozen dataclasses, whose docstrings are the titles in a help."""

    roles: ClassVar[frozenset[str]]  # that take its flags

    @classmethod
    def of(cls, config: Settings) -> Self:
        """This owner's own, out of what a process is told: one that shows them shows nothing else."""
        own = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # it is a dataclass
        return cls(**{name: value for name, value in vars(config).items() if name in own})

    def check(self) -> None:
        """Raises StartupError where its fields contradict one another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """One setting. ``names[0]`` is the field's name; the others are aliases."""

    names: tuple[str, ...]
    roles: frozenset[str]
    group: str  # the title above it in a help
    help: str
    default: Any  # None: there is none, or it is found at start
    kind: type
    choices: tuple[str, ...]
    repeatable: bool
    # See FlagOptions.
    fault: Fault = no_fault
    spellings: tuple[tuple[str, str], ...] = ()
    is_positional: bool = False
    takes_json_list: bool = False
    takes_several: bool = False
    takes_suffix: bool = False
    metavar: str = ""
    is_hidden: bool = False
    is_secret: bool = False
    live_on: frozenset[str] = frozenset()

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

    def complaint(self, value: object) -> str:
        """About a value as `read` gives it, or the first of several that is wrong; empty where none is."""
        if value is None:
            return ""
        items = value if self.repeatable and isinstance(value, list | tuple) else (value,)
        return next((f"{self.names[0]}{fault}" for item in items if (fault := self.fault(item))), "")

    def declare(self, group: argparse._ArgumentGroup) -> None:
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
        group.add_argument(*self.names, **options)

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
        shown = self.default not in (None, (), "", False) and not self.is_positional
        return f"{self.help} (default: {self.default})" if shown else self.help


def flags_of(owner: type[Settings]) -> Iterator[Flag]:
    """One for each field of the dataclass `owner` that is a flag."""
    types_of_fields = get_type_hints(owner)
    for each in dataclasses.fields(owner):  # type: ignore[arg-type]  # it is a dataclass
        if not each.metadata:
            continue
        kind, choices, repeatable = _kind(types_of_fields[each.name])
        yield Flag(
            names=(f"--{each.name.replace('_', '-')}", *each.metadata["aliases"]),
            roles=owner.roles,
            group=owner.__doc__ or "",
            help=each.metadata["help"],
            default=None if each.default is MISSING else each.default,
            kind=kind,
            choices=choices,
            repeatable=repeatable,
            **each.metadata["options"],
        )


def _kind(hint: Any) -> tuple[type, tuple[str, ...], bool]:  # noqa: ANN401  a type, or what stands for one
    """Of a field's type: that of one value, the only values, and whether there may be several."""
    if get_origin(hint) in (Union, types.UnionType):  # X | None
        (hint,) = (each for each in get_args(hint) if each is not type(None))
    if get_origin(hint) is tuple:  # tuple[X, ...]
        return get_args(hint)[0], (), True
    if get_origin(hint) is Literal:
        return str, get_args(hint), False
    return hint, (), False


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
