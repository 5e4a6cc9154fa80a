"""The YAML file of ``--config``: flag names with their values, and a block for each role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import StartupError
from .flag import Flag, field_of, near_miss
from .foreign_flags import FOREIGN_FIELD, foreign_name


def file_layers(path: Path, role: str, flags: Sequence[Flag]) -> list[dict[str, Any]]:
    """What the file sets for `role`: its top level, then its block, which overrides it. Keys are the fields
    of `flags`, and FOREIGN_FIELD. Raises StartupError."""
    try:
        document = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise StartupError(f"--config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise StartupError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise StartupError(f"--config {path}: a mapping of flag names to values is expected")
    blocks = {
        name: document.pop(name, None)
        for name in ("router", "prefill", "decode")
        if _is_block(document, name)
    }
    top = _file_values(path, document, flags)
    block = blocks.get(role) or {}
    taken = {flag.field for flag in flags if role in flag.roles} | {FOREIGN_FIELD}
    return [
        {name: value for name, value in top.items() if name in taken},
        _file_values(path, block, [flag for flag in flags if role in flag.roles], f" in block {role}:"),
    ]


def _is_block(document: Mapping[str, Any], name: str) -> bool:
    # `router:` is a block, perhaps an empty one, but also the flag --router (a URL or a list of them).
    return name in document and isinstance(document[name], dict | None)


def _file_values(
    path: Path, mapping: Mapping[Any, Any], flags: Sequence[Flag], where: str = ""
) -> dict[str, Any]:
    by_name = {field_of(name): flag for flag in flags for name in flag.names}
    values: dict[str, Any] = {}
    foreign: tuple[str, ...] = ()
    for key, value in mapping.items():
        flag = by_name.get(field_of(str(key)))
        if flag is not None:
            values[flag.field] = _typed(path, flag, value)
        elif (name := foreign_name(str(key), value)) is not None:
            foreign += (name,)
        else:
            near = near_miss(str(key), [name.lstrip("-") for flag in by_name.values() for name in flag.names])
            raise StartupError(f"--config {path}: unknown key {key!r}{where}; keys are flag names{near}")
    return {**values, FOREIGN_FIELD: foreign}


def _typed(path: Path, flag: Flag, value: object) -> object:
    items = value if flag.repeatable and isinstance(value, list) else [value]
    try:
        plain = [flag.plain(item) for item in items]
    except ValueError as error:
        raise StartupError(f"--config {path}: {flag.names[0][2:]}: {error}") from error
    for item in plain:
        if not flag.takes(item):
            raise StartupError(f"--config {path}: {flag.names[0][2:]}: {item!r} is not {flag.wanted}")
    return plain if items is value else plain[0]
