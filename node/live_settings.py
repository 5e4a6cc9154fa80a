"""The settings of a node that may be changed while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..messages.operation import SettingValue


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """`set` is given only what passed the checks."""

    name: str
    get: Callable[[], SettingValue]
    set: Callable[[SettingValue], None]
    is_whole: bool = True
    minimum: float = 1  # for one that is not whole: its value is above
    may_be_none: bool = False

    def refusal(self, value: SettingValue) -> str:
        """Why it cannot be this; empty if it can."""
        if value is None:
            return "" if self.may_be_none else f"{self.name}: a number is expected"
        if isinstance(value, bool) or (self.is_whole and not isinstance(value, int)):
            return f"{self.name} {value}: an integer is expected"
        is_enough = value >= self.minimum if self.is_whole else self.minimum < value < math.inf
        wanted = f"{self.minimum:g} or more" if self.is_whole else f"a number above {self.minimum:g}"
        return "" if is_enough else f"{self.name} {value}: {wanted} is expected"


class LiveSettings:
    def __init__(self, settings: Sequence[Setting]) -> None:
        self._settings = {setting.name: setting for setting in settings}

    def values(self) -> dict[str, SettingValue]:
        return {name: setting.get() for name, setting in self._settings.items()}

    def change(self, wanted: Mapping[str, SettingValue]) -> str:
        """All of them, or none; returns why none, empty if all."""
        for name, value in wanted.items():
            if (setting := self._settings.get(name)) is None:
                known = ", ".join(self._settings) or "none"
                return f"{name} cannot be changed while this node runs; these can: {known}"
            if reason := setting.refusal(value):
                return reason
        for name, value in wanted.items():
            self._settings[name].set(value)
        return ""
