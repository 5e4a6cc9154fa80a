"""The routes by which an operator looks into running processes and sets them: of a cluster, or of one node.

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
from ..http.answers import json_response, outcome
from ..http.bodies import BodyLimits, parse_request, read_object
from ..http.fields import FieldRules, Unsupported
from ..http.mounting import GET, POST, Operation
from ..http.openapi import reports
from ..refusals import bad_value
from ..text.request_log import LEVELS, RequestLog

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
_SLOW_RULES = FieldRules()
_PROFILE_RULES = FieldRules(
    harmless=frozenset({"profile_prefix"}),
    unsupported={
        "start_step": Unsupported("it begins at once", (0,)),
        "merge_profiles": Unsupported("a trace is of one process", (True, False)),
        "profile_stages": Unsupported("`profile_by_stage` tells them apart"),
    },
)


class OperationRoutes:
    """`request_log`: of a process that knows requests; None on a node's front."""

    def __init__(self, operator: Operator, limits: BodyLimits, request_log: RequestLog | None = None) -> None:
        self._operator = operator
        self._limits = limits
        self._request_log = request_log

    def operations(self) -> list[Operation]:
        either = ("GET", "POST")
        return [
            Operation(GET, ("/get_internal_state",), self.get_internal_state),
            Operation(
                POST,
                ("/set_internal_state",),
                self.set_internal_state,
                reports(SetInternalStateRequest),
                is_admin=True,
            ),
            Operation(
                POST,
                ("/configure_logging",),
                self.configure_logging,
                reports(ConfigureLoggingRequest),
                is_admin=True,
            ),
            Operation(POST, ("/slow_down",), self.slow_down, reports(SlowDownRequest), is_admin=True),
            Operation(either, ("/freeze_gc",), self.freeze_gc, reports(), is_admin=True),
            Operation(
                either, ("/start_profile",), self.start_profile, reports(StartProfileRequest), is_admin=True
            ),
            Operation(
                either, ("/stop_profile",), self.stop_profile, reports(answer=ProfileOutcome), is_admin=True
            ),
        ]

    async def get_internal_state(self, _: Request) -> Response:
        return json_response(await self._operator.internal_state())

    async def set_internal_state(self, http: Request) -> Response:
        raw = await self._object(http)
        body = parse_request(raw, SetInternalStateRequest, _STATE_RULES)
        # Null is a value here ("no limit"), which `parse_request` takes for an absent field.
        nulls = {name: None for name, value in raw["server_args"].items() if value is None}
        if not (settings := {**body.server_args, **nulls}):
            raise bad_value("server_args", "`server_args` names no setting.")
        return await self._operate(SetInternalState(settings=settings))

    async def configure_logging(self, http: Request) -> Response:
        """Of this process at once; the log level of all nodes too."""
        body = parse_request(await self._object(http), ConfigureLoggingRequest, _LOGGING_RULES)
        if body.log_requests_level is not None and body.log_requests_level not in LEVELS:
            raise bad_value("log_requests_level", "`log_requests_level` must be 0 to 3.")
        if self._request_log is not None:
            if body.log_requests is not None:
                self._request_log.is_on = body.log_requests
            if body.log_requests_level is not None:
                self._request_log.level = body.log_requests_level
        if body.log_level is None:
            return outcome(True, "set")
        set_log_level(body.log_level)
        return await self._operate(ConfigureLogging(log_level=body.log_level))

    async def slow_down(self, http: Request) -> Response:
        body = parse_request(await self._object(http), SlowDownRequest, _SLOW_RULES)
        seconds = body.forward_sleep_time or 0.0
        if not seconds <= MAX_FORWARD_SLEEP_S:
            raise bad_value(
                "forward_sleep_time", f"`forward_sleep_time` must be at most {MAX_FORWARD_SLEEP_S:g} s."
            )
        return await self._operate(SlowDown(forward_sleep_s=max(0.0, seconds)))

    async def freeze_gc(self, _: Request) -> Response:
        gc.freeze()
        return await self._operate(FreezeGc())

    async def start_profile(self, http: Request) -> Response:
        body = parse_request(await self._object(http), StartProfileRequest, _PROFILE_RULES)
        profile_id = body.profile_id or uuid.uuid4().hex[:8]
        if not _FILE_SAFE.fullmatch(profile_id):
            raise bad_value("profile_id", "`profile_id` takes letters, digits, dots, dashes and underscores.")
        start = StartProfile(
            profile_id=profile_id,
            output_dir=body.output_dir or _DEFAULT_OUTPUT_DIR,
            num_steps=body.num_steps,
            by_stage=body.profile_by_stage,
            activities=tuple(body.activities or ("CPU", "GPU")),
            record_shapes=bool(body.record_shapes),
            with_stack=bool(body.with_stack),
        )
        return await self._operate(start)

    async def stop_profile(self, _: Request) -> Response:
        done = await self._operator.stop_profile()
        return json_response(done, 200 if done.success else 400)

    async def _object(self, http: Request) -> dict[str, Any]:
        return await read_object(http, self._limits, optional=True)

    async def _operate(self, operation: ClusterOperation) -> Response:
        reply = await self._operator.operate(operation)
        return outcome(reply.success, reply.message)
