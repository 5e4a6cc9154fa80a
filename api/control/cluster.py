"""The commands about what runs and what is cached, on all nodes or on one, and about who belongs to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
from starlette.requests import Request

from ...messages.bounds import Name
from ...messages.node import NodeEntry
from ...runtime.errors import RequestError
from ..generation import AdminReply, ClusterView, Control, Membership
from ..http.bodies import BodyLimits
from ..http.fields import FieldRules, Unsupported
from ..refusals import bad_value, node_url
from .commands import EITHER, NOTHING, Command, Takes, merged, takes


class RegisterRequest(msgspec.Struct, kw_only=True):
    """A node's registration. Without ``entry`` it is learned from the URL's /node_entry."""

    url: str
    entry: NodeEntry | None = None


class AbortRequest(msgspec.Struct, kw_only=True):
    rid: Name | None = None
    abort_all: bool = False


class AssertPeerDeathRequest(msgspec.Struct, kw_only=True):
    incarnation: Name


class PauseRequest(msgspec.Struct, kw_only=True):
    """What becomes of running requests: SGLang's names, and vLLM's ("keep" is "in_place")."""

    mode: Literal["abort", "retract", "in_place", "keep", "wait"] = "abort"


# Fields that SGLang's clients send along and that have no bearing here.
_REGISTER_RULES = FieldRules(
    harmless=frozenset({"worker_type", "bootstrap_port", "api_key", "labels", "priority", "model_id"})
)
_ABORT_RULES = FieldRules(harmless=frozenset({"abort_message", "finished_reason"}))
_PAUSE_RULES = FieldRules(unsupported={"clear_cache": Unsupported("`/flush_cache` does it")})


def control_commands(control: Control, generations_of: Callable[[str], Sequence[str]]) -> list[Command[Any]]:
    """`generations_of`: under which ids nodes know the requests that a client's id means."""

    async def flush_cache(timeout_s: float) -> AdminReply:
        return await control.flush_cache(timeout_s)

    async def pause_generation(asked: PauseRequest) -> AdminReply:
        match asked.mode:
            case "keep" | "wait":
                return await control.pause_generation("in_place", drains=asked.mode == "wait")
            case mode:
                return await control.pause_generation(mode, drains=False)

    async def continue_generation(_: None) -> AdminReply:
        return await control.continue_generation()

    async def abort_request(asked: AbortRequest) -> AdminReply:
        if asked.abort_all:
            return await control.abort_requests("", True)
        if not asked.rid:
            raise RequestError("Give `rid` or `abort_all`.", param="rid", code="missing_parameter")
        return merged([await control.abort_requests(each, False) for each in generations_of(asked.rid)])

    async def assert_peer_death(asked: AssertPeerDeathRequest) -> AdminReply:
        return await control.assert_peer_death(asked.incarnation)

    return [
        Command(
            name="flush_cache",
            paths=("/flush_cache",),
            takes=Takes(_flush_timeout_s),
            does=flush_cache,
            methods=EITHER,
        ),
        Command(
            name="flush_cache",
            paths=("/reset_prefix_cache",),
            takes=Takes(_flush_timeout_s),
            does=flush_cache,
        ),
        Command(
            name="pause_generation",
            paths=("/pause_generation",),
            takes=takes(PauseRequest, _PAUSE_RULES, optional=True),
            does=pause_generation,
        ),
        Command(
            name="continue_generation",
            paths=("/continue_generation",),
            takes=NOTHING,
            does=continue_generation,
        ),
        Command(
            name="abort_request",
            paths=("/abort_request",),
            takes=takes(AbortRequest, _ABORT_RULES),
            does=abort_request,
            failure_status=200,
            about="Idempotent: a request that is not there (any more) is no error.",
        ),
        Command(
            name="assert_peer_death",
            paths=("/assert_peer_death",),
            takes=takes(AssertPeerDeathRequest),
            does=assert_peer_death,
        ),
    ]


def membership_commands(membership: Membership, view: ClusterView) -> list[Command[Any]]:
    async def register_worker(asked: RegisterRequest) -> AdminReply:
        url = node_url("url", asked.url)
        if asked.entry is not None and asked.entry.url != url:
            raise bad_value("entry.url", "`entry.url` must be the same as `url`.")
        return await membership.register_worker(url, asked.entry)

    async def remove_worker(named: str) -> AdminReply:
        urls = {status.entry.incarnation: status.entry.url for status in view.workers()}
        return await membership.remove_worker(urls.get(named, named))

    return [
        Command(
            name="register_worker",
            paths=("/workers",),
            takes=takes(RegisterRequest, _REGISTER_RULES),
            does=register_worker,
            who="member",
        ),
        Command(
            name="remove_worker",
            paths=("/workers/{worker:path}",),
            takes=Takes(_named_worker),
            does=remove_worker,
            who="member",
            methods=("DELETE",),
            failure_status=404,
        ),
    ]


async def _named_worker(http: Request, _: BodyLimits) -> str:
    """An incarnation or a URL."""
    worker: str = http.path_params["worker"]
    return worker.rstrip("/")


async def _flush_timeout_s(http: Request, _: BodyLimits) -> float:
    text = http.query_params.get("timeout", "0")
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = -1.0
    if not 0 <= timeout_s <= 3600:
        raise bad_value("timeout", f"`timeout` must be 0 to 3600 seconds, got {text!r}.")
    return timeout_s
