"""The commands by which an operator looks into running processes and sets them: of a cluster, or of one node.

Names and JSON are SGLang's.
"""

from __future__ import annotations

import gc
import re
import uuid
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ...messages.bounds import Name, Path
from ...messages.operation import (
    MAX_FORWARD_SLEEP_S,
    Activity,
    ClusterOperation,
    ConfigureLogging,
    FreezeGc,
    ProfileSteps,
    SetInternalState,
    SettingValue,
    SlowDown,
    StartProfile,
)
from ...runtime.logs import LogLevel, set_log_level
from ..generation import AdminReply
from ..http.answers import json_response
from ..http.bodies import BodyLimits, parse_request, read_object
from ..http.fields import FieldRules, Unsupported
from ..http.mounting import GET, Route
from ..refusals import bad_value
from ..text.request_log import LEVELS, RequestLog
from .commands import EITHER, NOTHING, Command, Takes, takes

_FILE_SAFE = re.compile(r"[A-Za-z0-9._-]{1,100}")
_DEFAULT_OUTPUT_DIR = "/tmp"


class ProfileOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What `/stop_profile` answers."""

    success: bool
    message: str
    traces: dict[str, list[str]] = {}  # node URL -> files, on the node
    merged: str = ""  # all of them on one clock, on the router


class Operator(Protocol):
    """Does it: on all nodes of a router, or on the one node of a front."""

    async def operate(self, operation: ClusterOperation) -> AdminReply: ...

    async def internal_state(self) -> dict[str, Any]: ...

    async def stop_profile(self) -> ProfileOutcome: ...


# ---- bodies -----------------------------------------------------------------------------------------


class SetInternalStateRequest(msgspec.Struct, kw_only=True):
    """Flags that may be changed while nodes run, by their names with underscores."""

    server_args: dict[Name, SettingValue]


class ConfigureLoggingRequest(msgspec.Struct, kw_only=True):
    """What is absent stays as it is."""

    log_requests: bool | None = None
    log_requests_level: int | None = None
    log_level: LogLevel | None = None  # of every process


class SlowDownRequest(msgspec.Struct, kw_only=True):
    forward_sleep_time: float | None = None  # seconds before each forward; none or 0: no more


class StartProfileRequest(msgspec.Struct, kw_only=True):
    output_dir: Path | None = None  # on each node; default /tmp
    num_steps: ProfileSteps | None = None  # of each stage with `profile_by_stage`; default: 32
    activities: list[Activity] | None = None
    profile_by_stage: bool = False
    record_shapes: bool | None = None
    with_stack: bool | None = None
    profile_id: str | None = None  # begins the files' names


_STATE_RULES = FieldRules()
_LOGGING_RULES = FieldRules(
    unsupported=dict.fromkeys(
        ("log_requests_format", "dump_requests_folder", "dump_requests_threshold", "crash_dump_folder"),
        Unsupported("requests are told in the log alone", ("",)),
    ),
)
_PROFILE_RULES = FieldRules(
    harmless=frozenset({"profile_prefix"}),
    unsupported={
        "start_step": Unsupported("it begins at once", (0,)),
        "merge_profiles": Unsupported("a trace is of one process", (True, False)),
        "profile_stages": Unsupported("`profile_by_stage` tells them apart"),
    },
)


def operator_commands(operator: Operator, request_log: RequestLog | None = None) -> list[Command[Any]]:
    """`request_log`: of a process that knows requests; None on a node's front."""

    async def configure_logging(asked: ConfigureLoggingRequest) -> AdminReply:
        if asked.log_requests_level is not None and asked.log_requests_level not in LEVELS:
            raise bad_value("log_requests_level", "`log_requests_level` must be 0 to 3.")
        if request_log is not None:
            if asked.log_requests is not None:
                request_log.is_on = asked.log_requests
            if asked.log_requests_level is not None:
                request_log.level = asked.log_requests_level
        if asked.log_level is None:
            return AdminReply(True, "set")
        set_log_level(asked.log_level)
        return await operator.operate(ConfigureLogging(log_level=asked.log_level))

    async def slow_down(asked: SlowDownRequest) -> AdminReply:
        seconds = asked.forward_sleep_time or 0.0
        if not seconds <= MAX_FORWARD_SLEEP_S:
            raise bad_value(
                "forward_sleep_time", f"`forward_sleep_time` must be at most {MAX_FORWARD_SLEEP_S:g} s."
            )
        return await operator.operate(SlowDown(forward_sleep_s=max(0.0, seconds)))

    async def freeze_gc(_: None) -> AdminReply:
        gc.freeze()
        return await operator.operate(FreezeGc())

    async def start_profile(asked: StartProfileRequest) -> AdminReply:
        profile_id = asked.profile_id or uuid.uuid4().hex[:8]
        if not _FILE_SAFE.fullmatch(profile_id):
            raise bad_value("profile_id", "`profile_id` takes letters, digits, dots, dashes and underscores.")
        start = StartProfile(
            profile_id=profile_id,
            output_dir=asked.output_dir or _DEFAULT_OUTPUT_DIR,
            num_steps=asked.num_steps,
            by_stage=asked.profile_by_stage,
            activities=tuple(asked.activities or ("CPU", "GPU")),
            record_shapes=bool(asked.record_shapes),
            with_stack=bool(asked.with_stack),
        )
        return await operator.operate(start)

    async def stop_profile(_: None) -> ProfileOutcome:
        return await operator.stop_profile()

    return [
        Command(
            name="set_internal_state",
            paths=("/set_internal_state",),
            takes=Takes(_wanted_settings, SetInternalStateRequest),
            does=operator.operate,
        ),
        Command(
            name="configure_logging",
            paths=("/configure_logging",),
            takes=takes(ConfigureLoggingRequest, _LOGGING_RULES, optional=True),
            does=configure_logging,
            about="Of this process at once; the log level of all nodes too.",
        ),
        Command(
            name="slow_down",
            paths=("/slow_down",),
            takes=takes(SlowDownRequest, optional=True),
            does=slow_down,
        ),
        Command(name="freeze_gc", paths=("/freeze_gc",), takes=NOTHING, does=freeze_gc, methods=EITHER),
        Command(
            name="start_profile",
            paths=("/start_profile",),
            takes=takes(StartProfileRequest, _PROFILE_RULES, optional=True),
            does=start_profile,
            methods=EITHER,
        ),
        Command(
            name="stop_profile",
            paths=("/stop_profile",),
            takes=NOTHING,
            does=stop_profile,
            methods=EITHER,
            answer=ProfileOutcome,
        ),
    ]


def get_internal_state(operator: Operator) -> Route:
    async def handle(_: Request) -> Response:
        return json_response(await operator.internal_state())

    return Route(GET, ("/get_internal_state",), handle, name="get_internal_state")


async def _wanted_settings(http: Request, limits: BodyLimits) -> SetInternalState:
    """Null is a value here ("no limit"), which `parse_request` takes for an absent field."""
    raw = await read_object(http, limits, optional=True)
    asked = parse_request(raw, SetInternalStateRequest, _STATE_RULES)
    nulls = {name: None for name, value in raw["server_args"].items() if value is None}
    if not (settings := {**asked.server_args, **nulls}):
        raise bad_value("server_args", "`server_args` names no setting.")
    return SetInternalState(settings=settings)
