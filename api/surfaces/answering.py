"""From an HTTP request to its body, and from a prepared answer to the response, streamed or whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ..http.answers import JsonResponse
from ..http.bodies import parse_request, read_object
from ..http.errors import CLIENT_CLOSED_REQUEST
from ..http.fields import FieldRules
from ..http.in_flight import InFlightRequests
from ..http.sse import ClientLeftError, EventStream, unless_client_leaves
from ..text.pipeline import TextJob
from ..text.timelines import Laps
from .serving import Serving

S = TypeVar("S", bound=msgspec.Struct)


class Answer(Protocol):
    """One request's answer in the making; use one of the two, once."""

    def events(self) -> AsyncGenerator[bytes, None]: ...

    async def whole(self) -> list[bytes]: ...  # pieces of one JSON document


async def receive(
    http: Request, serving: Serving, request_type: type[S], rules: FieldRules
) -> tuple[S, Laps]:
    """The body, and the laps of the request's timeline. Raises RequestError."""
    state, headers = http.scope["state"], http.headers
    laps = Laps(
        serving.pipeline.timelines.clock,
        state["received_s"],
        state.get("client", ""),
        headers.get("traceparent", ""),
        headers.get("tracestate", ""),
    )
    raw = await read_object(http, serving.limits)
    return parse_request(raw, request_type, rules, strict=serving.limits.strict_fields), laps


async def respond(
    http: Request,
    answer: Answer,
    jobs: Sequence[TextJob],
    *,
    request_id: str,
    stream: bool,
    in_flight: InFlightRequests,
) -> Response:
    """Run the jobs as one request, known by `request_id` while it is in flight."""
    if not stream:
        return await respond_whole(http, answer.whole, jobs, request_id=request_id, in_flight=in_flight)
    end = in_flight.begin(request_id, [job.spec.request_id for job in jobs])
    return EventStream(answer.events(), on_end=end)


async def respond_whole(
    http: Request,
    whole: Callable[[], Coroutine[Any, Any, list[bytes]]],
    jobs: Sequence[TextJob],
    *,
    request_id: str,
    in_flight: InFlightRequests,
) -> Response:
    """Run the jobs as one request, known by `request_id` until `whole` has made its body: the pieces of one
    JSON document. A client that leaves meanwhile ends it."""
    end = in_flight.begin(request_id, [job.spec.request_id for job in jobs])
    try:
        pieces = await unless_client_leaves(http.receive, whole())
    except ClientLeftError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        end()
    return JsonResponse(pieces)
