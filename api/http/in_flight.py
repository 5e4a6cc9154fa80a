"""The HTTP requests being answered: their ids, and the door that closes when the server drains."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Callable, Sequence

from ...runtime.errors import RequestError
from ..request_ids import bare_id, is_safe_id


class InFlightRequests:
    """Every generating HTTP request, by id.

    An id that a client puts into a body (``rid``, ``request_id``) is its own handle on the request, so a
    second one in flight is refused (409). An id from the X-Request-ID header may name a whole trace: there, a
    second request gets a suffix. ``/abort_request`` and ``/requests`` take ids with and without the answer's
    prefix.
    """

    def __init__(self) -> None:
        self._generation_ids: dict[str, tuple[str, ...]] = {}
        self._active: set[str] = set()  # every generation's id
        self._is_draining = False
        self._is_open = True
        self._cut: asyncio.Future[None] | None = None
        self._emptied = asyncio.Event()
        self._emptied.set()

    def __len__(self) -> int:
        return len(self._generation_ids)

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def drain(self, *, refuses: bool = True) -> None:
        """Those in flight go on; new requests are refused from now on, or with `refuses` False are the last
        ones of their connections."""
        self._is_draining = True
        self._is_open = not refuses

    async def wait_empty(self, timeout_s: float) -> bool:
        """False when some were still in flight after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._emptied.wait()
        except TimeoutError:
            return False
        return True

    @property
    def cut(self) -> asyncio.Future[None]:
        """Done when no answer may go on, see `cut_off`; of the running event loop."""
        if self._cut is None:
            self._cut = asyncio.get_running_loop().create_future()
        return self._cut

    def cut_off(self) -> None:
        """The server waits no longer: what is in flight ends now, and its client is told so."""
        if not self.cut.done():
            self.cut.set_result(None)

    def check_open(self) -> None:
        if not self._is_open:
            raise draining_error("The server is shutting down.")

    def choose_id(self, from_body: str | None, from_header: str, body_field: str = "rid") -> str:
        if from_body is None:
            in_use = bare_id(from_header) in self._generation_ids
            return f"{from_header}-{uuid.uuid4().hex[:8]}" if in_use else from_header
        if not is_safe_id(from_body):
            raise RequestError(
                f"`{body_field}` must be 1 to 256 visible ASCII characters.",
                param=body_field,
                code="invalid_value",
            )
        return from_body

    def begin(self, request_id: str, generation_ids: Sequence[str]) -> Callable[[], None]:
        """`request_id` is in flight until what this returns is called. Raises RequestError (409) if it, or
        one of its generations, is in flight already."""
        key = bare_id(request_id)
        if key in self._generation_ids or not self._active.isdisjoint(generation_ids):
            raise RequestError(
                f"A request with the id {request_id!r} is in flight.",
                status=409,
                param="rid",
                code="duplicate_request_id",
            )
        self._generation_ids[key] = tuple(generation_ids)
        self._active.update(generation_ids)
        self._emptied.clear()

        def end() -> None:
            self._active.difference_update(self._generation_ids.pop(key))
            if not self._generation_ids:
                self._emptied.set()

        return end

    def generations_matching(self, request_id: str) -> tuple[str, ...]:
        """The cluster's ids of the request of this id, else of all requests whose ids begin so (SGLang
        aborts by prefix); the id itself when there are none."""
        bare = bare_id(request_id)
        if bare in self._generation_ids:
            return self._generation_ids[bare]
        found = [ids for key, ids in self._generation_ids.items() if key.startswith(bare)]
        return tuple(itertools.chain.from_iterable(found)) or (request_id,)

    def generations_of(self, request_id: str) -> tuple[str, ...]:
        """The cluster's ids of a request; the id itself when it is none of ours."""
        return self._generation_ids.get(bare_id(request_id), (request_id,))


def draining_error(message: str) -> RequestError:
    return RequestError(
        message, status=503, code="draining", error_type="service_unavailable", retry_after_s=1.0
    )
