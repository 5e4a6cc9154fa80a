"""From a prepared answer to an HTTP response, streamed or whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from .errors import CLIENT_CLOSED_REQUEST
from .in_flight import InFlightRequests
from .sse import ClientLeftError, EventStream, unless_client_leaves
from .text_run import TextJob


class Answer(Protocol):
    """One request's answer in the making; use one of the two, once."""

    def events(self) -> AsyncGenerator[bytes, None]: ...

    async def whole(self) -> bytes: ...


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
    end = in_flight.begin(request_id, [job.spec.request_id for job in jobs])
    if stream:
        return EventStream(answer.events(), on_end=end)
    try:
        body = await unless_client_leaves(http.receive, answer.whole())
    except ClientLeftError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        end()
    return Response(body, media_type="application/json")
