"""The settings of a node that may be changed while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..messages.operation import SettingValue
from ..runtime.config import LIVE_FLAGS


@dataclass(frozen=True, slots=True)
class Setting:
    """The flag of this name, where it may be changed. `set` is given only what the flag takes."""

    name: str
    get: Callable[[], SettingValue]
    set: Callable[[SettingValue], None]

    def refusal(self, value: SettingValue) -> str:
        """Why it cannot be this; empty if it can."""
        flag = LIVE_FLAGS[self.name]
        if value is None and flag.default is None:
            return ""
        if not flag.takes(value):
            shown = "" if value is None else f" {value}"
            return f"{self.name}{shown}: {'an integer' if flag.kind is int else 'a number'} is expected"
        return f"{self.name}{fault}" if (fault := flag.fault(value)) else ""


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
