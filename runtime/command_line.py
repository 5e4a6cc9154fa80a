"""From command lines and `--config` files to the settings of a process, and back to command lines.

A value is resolved once, at start: default, then the YAML file's top level, then its block for the role
(``router:``, ``prefill:``, ``decode:``), then the command line. After that it is frozen.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from .cluster_secret import given_secret
from .config import FLAGS, SHIPPED_MODEL, NodeConfig, NodeRole, ProcessRole, RouterConfig, UpConfig
from .config_file import file_layers
from .errors import StartupError
from .flag import Flag, field_of, near_miss
from .foreign_flags import FOREIGN_FIELD, declare_foreign_flags, foreign_name, foreign_names


def add_flags(parser: argparse.ArgumentParser, roles: frozenset[str]) -> None:
    """Declare the flags that any of `roles` takes, and other servers'. What is not given is absent from the
    namespace."""
    parser.add_argument("--config", metavar="FILE", help="YAML file; keys are flag names")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in FLAGS:
        if not flag.roles & roles:
            continue
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        flag.declare(groups[flag.group])
        if flag.is_positional:
            parser.add_argument(
                f"{flag.field}_positional",
                nargs="?",
                metavar=flag.field.upper(),
                default=argparse.SUPPRESS,
                help=flag.help,
            )
    declare_foreign_flags(parser)


def suggestion(name: str) -> str:
    """Which flag may have been meant by an unknown one, for a complaint; empty when none is near."""
    known = [name for flag in FLAGS for name in flag.names]
    return near_miss(name, [*known, *foreign_names()])


def resolve(role: ProcessRole, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one role: defaults, then the YAML file, then what was given on the command line.

    Raises StartupError for a file that cannot be read, an unknown key or a value of the wrong type.
    """
    values: dict[str, Any] = {flag.field: flag.default for flag in FLAGS if role in flag.roles}
    foreign: tuple[str, ...] = ()
    if given.get("config"):
        for layer in file_layers(Path(given["config"]), role, FLAGS):
            foreign += layer.pop(FOREIGN_FIELD, ())
            values.update(layer)
    values.update({name: value for name, value in given.items() if name in values})
    if role != "up" and "model_positional" in given:
        if "model" in given and given["model"] != given["model_positional"]:
            both = f"{given['model_positional']!r} and --model {given['model']!r}"
            raise StartupError(f"two models were given, {both}; give one")
        values["model"] = given["model_positional"]
    elif "model" not in given:
        _check_names(given.get("served_model_name", ()))
    for flag in FLAGS:
        if flag.repeatable and flag.field in values:
            value = values[flag.field]
            items = (value,) if isinstance(value, str) else tuple(value)
            values[flag.field] = _from_json_lists(flag, items) if flag.takes_json_list else items
    for flag in FLAGS:
        if flag.field in values and (complaint := flag.complaint(values[flag.field])):
            raise StartupError(complaint)
    values[FOREIGN_FIELD] = (*foreign, *given.get(FOREIGN_FIELD, ()))
    return values


def _check_names(names: Sequence[str]) -> None:
    """Raises StartupError where the last of several names is a checkpoint's folder: somebody meant MODEL."""
    if len(names) > 1 and (Path(names[-1]).expanduser() / "config.json").is_file():
        raise StartupError(
            f"--served-model-name takes {names[-1]} for one more name; give MODEL before it, or by --model"
        )


def _from_json_lists(flag: Flag, items: Sequence[str]) -> tuple[str, ...]:
    flat: list[str] = []
    for item in items:
        if not item.lstrip().startswith("["):
            flat.append(item)
            continue
        try:
            flat += msgspec.json.decode(item, type=list[str])
        except msgspec.DecodeError as error:
            raise StartupError(f"{flag.names[0]} {item}: a JSON list of strings is expected") from error
    return tuple(flat)


def router_config(given: Mapping[str, Any]) -> RouterConfig:
    """Raises StartupError, as all of these do."""
    return RouterConfig(**_filled(resolve("router", given), given))


def node_config(role: NodeRole, given: Mapping[str, Any]) -> NodeConfig:
    values = _filled(resolve(role, given), given)
    if values["deterministic"] and values["dtype"] == "auto":
        values["dtype"] = "float32"
    if values["num_threads"] is None:
        del values["num_threads"]
    return NodeConfig(role=role, **values)


def up_config(given: Mapping[str, Any]) -> UpConfig:
    values = resolve("up", given)
    del values[FOREIGN_FIELD]  # what it starts tells of them
    return UpConfig(**values)


def _filled(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` may hold a `cluster_secret` that the parent process handed over."""
    is_shipped = values["model"] == str(SHIPPED_MODEL)
    path_as_given = SHIPPED_MODEL.name if is_shipped else values["model"]
    return {
        **values,
        "cluster_secret": given.get("cluster_secret") or given_secret(values["cluster_secret_file"]),
        "served_model_name": tuple(dict.fromkeys(values["served_model_name"])) or (path_as_given,),
    }


def arguments_of(options: Mapping[str, Any], roles: frozenset[str]) -> list[str]:
    """Command-line arguments from names and values: `{"num_decode": 2}` is `["--num-decode=2"]`.

    Aliases count. Raises StartupError for a name that is no flag of `roles`, and for a value of another type
    than the flag's.
    """
    by_name = {field_of(name): flag for flag in FLAGS for name in flag.names if flag.roles & roles}
    arguments: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        flag = by_name.get(field_of(name))
        if flag is None:
            if (foreign := foreign_name(name, value)) is not None:
                if value is not False:
                    arguments += [foreign] if value is True else [f"{foreign}={value}"]
                continue
            raise StartupError(
                f"there is no option {name!r}{suggestion(name)}; options are the flags of `pdserve up`"
            )
        for item in value if flag.repeatable and isinstance(value, list | tuple) else (value,):
            try:
                plain = flag.plain(item)
            except ValueError as error:
                raise StartupError(f"{name}={item!r}: {error}") from error
            if not flag.takes(plain):
                raise StartupError(f"{name}={item!r}: {flag.wanted} is expected")
            arguments += flag.arguments(plain)
    return arguments


def forwarded_flags(given: Mapping[str, Any], role: ProcessRole, dropped: Sequence[str] = ()) -> list[str]:
    """The given flags that `role` takes, as arguments for a child process."""
    arguments: list[str] = []
    if given.get("config"):
        arguments.append(f"--config={given['config']}")
    if "model_positional" in given:
        arguments.append(f"--model={given['model_positional']}")
    for flag in FLAGS:
        if flag.field not in given or role not in flag.roles or flag.field in dropped:
            continue
        value = given[flag.field]
        for item in value if flag.repeatable else (value,):
            arguments += flag.arguments(item)
    return arguments
