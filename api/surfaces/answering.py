"""From an HTTP request to its body; and the life of its answer, streamed or whole, whoever ends it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ..http.answers import JsonResponse
from ..http.bodies import parse_request, read_object
from ..http.errors import CLIENT_CLOSED_REQUEST
from ..http.fields import FieldRules
from ..http.in_flight import InFlightRequests
from ..http.sse import ClientLeftError, EventStream, event, unless_client_leaves
from ..slices import spaced
from ..text.growing import GrowingOutputs
from ..text.pieces import OutputDelta, joined
from ..text.pipeline import TextRun
from ..text.timelines import Laps
from .metrics import RequestMeter
from .serving import Serving

S = TypeVar("S", bound=msgspec.Struct)


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


class Renderer(Protocol):
    """Writes one answer in the form of a surface, as JSON documents."""

    async def chunks(self, delta: OutputDelta) -> Sequence[bytes]:
        """What a stream shows of it, an event each."""
        ...

    async def last_chunks(self) -> Sequence[bytes]:
        """What ends a stream behind all outputs."""
        ...

    async def output(self, delta: OutputDelta) -> bytes:
        """One output, as it stands in a whole answer."""
        ...

    async def whole(self, outputs: Sequence[bytes]) -> list[bytes]:
        """The whole answer, in pieces."""
        ...


class Answer:
    """What becomes of a run: `renderer` writes it, `meter` counts it.

    `is_growing`: each event of a stream holds all of its output so far.
    """

    def __init__(
        self, run: TextRun, renderer: Renderer, meter: RequestMeter, *, is_growing: bool = False
    ) -> None:
        self._run = run
        self._renderer = renderer
        self._meter = meter
        self._growing = GrowingOutputs() if is_growing else None

    async def respond(
        self, http: Request, in_flight: InFlightRequests, *, request_id: str, stream: bool
    ) -> Response:
        """Run it, known by `request_id` while it is in flight. A client that leaves ends it."""
        if not stream:
            return await respond_whole(http, in_flight, request_id, self._run.request_ids, self._whole)
        end = in_flight.begin(request_id, self._run.request_ids)
        return EventStream(self._events(), cut=in_flight.cut, on_end=end)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._run.deltas()) as deltas:
            async for delta in deltas:
                self._meter.add_chunk(delta.output.index, len(delta.token_ids), delta.finish_reason)
                shown = delta if self._growing is None else self._growing.push(delta)
                if shown is not None:
                    for chunk in await self._renderer.chunks(shown):
                        yield event(chunk)
        self._meter.answered(self._run.counts().prompt)
        for chunk in await self._renderer.last_chunks():
            yield event(chunk)

    async def _whole(self) -> list[bytes]:
        parts: defaultdict[int, list[OutputDelta]] = defaultdict(list)  # by the output's index
        async with aclosing(self._run.deltas()) as deltas:
            async for delta in deltas:
                parts[delta.output.index].append(delta)
        outputs: list[bytes] = []
        async for _, some in spaced(sorted(parts.items())):
            output = joined(some)
            self._meter.add_chunk(output.output.index, output.num_tokens, output.finish_reason)
            outputs.append(await self._renderer.output(output))
        self._meter.answered(self._run.counts().prompt)
        return await self._renderer.whole(outputs)


async def respond_whole(
    http: Request,
    in_flight: InFlightRequests,
    request_id: str,
    generation_ids: Sequence[str],
    whole: Callable[[], Coroutine[Any, Any, list[bytes]]],
) -> Response:
    """What `whole` makes, the pieces of one JSON document; the request is in flight until it has."""
    end = in_flight.begin(request_id, generation_ids)
    try:
        pieces = await unless_client_leaves(http.receive, whole(), in_flight.cut)
    except ClientLeftError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        end()
    return JsonResponse(pieces)
