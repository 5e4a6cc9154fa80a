"""Control calls as rows of a table: under which routes each stands, what it takes, who may, what is done.

A command changes something and reports whether that was done. A router and a node's front mount the same
rows, over what does them: on all nodes, or on the one. What only asks is a `Route` of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ..generation import AdminReply
from ..http.answers import Outcome, json_response
from ..http.bodies import BodyLimits, parse_request, read_object
from ..http.fields import FieldRules
from ..http.mounting import POST, Route, Who
from ..http.openapi import reports

B = TypeVar("B")
S = TypeVar("S", bound=msgspec.Struct)

EITHER = ("GET", "POST")
_NO_RULES = FieldRules()


class CommandReply(Protocol):
    """The answer's body: a struct or dataclass."""

    @property
    def success(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Takes(Generic[B]):
    """How a request becomes what the command is given. `body`: the JSON that it is read from, if any."""

    read: Callable[[Request, BodyLimits], Awaitable[B]]
    body: type[msgspec.Struct] | None = None


def takes(body: type[S], rules: FieldRules = _NO_RULES, *, optional: bool = False) -> Takes[S]:
    """The body alone. `rules`: of fields beyond its own; `optional`: no body is an empty one."""

    async def read(http: Request, limits: BodyLimits) -> S:
        return parse_request(await read_object(http, limits, optional=optional), body, rules)

    return Takes(read, body)


async def _read_nothing(_: Request, __: BodyLimits) -> None: ...


NOTHING: Takes[None] = Takes(_read_nothing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Command(Generic[B]):
    """`does` raises RequestError for what cannot be meant. `failure_status`: of a reply without success."""

    name: str
    paths: tuple[str, ...]
    takes: Takes[B]
    does: Callable[[B], Awaitable[CommandReply]]
    who: Who = "admin"
    methods: tuple[str, ...] = POST
    answer: type[msgspec.Struct] = Outcome
    failure_status: int = 400
    about: str = ""

    def route(self, limits: BodyLimits) -> Route:
        async def handle(http: Request) -> Response:
            reply = await self.does(await self.takes.read(http, limits))
            return json_response(reply, 200 if reply.success else self.failure_status)

        bodies = reports(self.takes.body, self.answer)
        return Route(self.methods, self.paths, handle, bodies, who=self.who, name=self.name, about=self.about)


def routes_of(commands: Sequence[Command[Any]], limits: BodyLimits) -> list[Route]:
    return [command.route(limits) for command in commands]


def merged(replies: Sequence[AdminReply]) -> AdminReply:
    """Of one call in several parts: done when all are, and what each has to say."""
    message = "; ".join(reply.message for reply in replies if reply.message)
    return AdminReply(all(reply.success for reply in replies), message)
