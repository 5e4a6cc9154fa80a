"""The router's queue: bounded, retries first, oldest first. Values and ``now`` in, decisions out."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ..runtime.errors import RequestError
from .pairing import Pair

MAX_RETRY_AFTER_S = 60.0


@dataclass(order=True, slots=True)
class Ticket:
    """Choices of one request that wait to be dispatched. Sorts by who goes first."""

    is_new: bool  # False: was dispatched before
    rank: int  # the negative of the request's priority
    arrived_at: float
    sequence: int
    request_id: str = field(compare=False)
    choices: tuple[int, ...] = field(compare=False)
    queued_at: float = field(compare=False)
    not_before: float = field(compare=False, default=0.0)
    avoid: tuple[Pair, ...] = field(compare=False, default=())
    waits_for: str = field(compare=False, default="")
    unpaired_since: float | None = field(compare=False, default=None)  # no pair of nodes for it since then


class AdmissionQueue:
    def __init__(self, *, max_new: int, patience_s: float) -> None:
        self._max_new = max_new
        self._patience_s = patience_s
        self._tickets: list[Ticket] = []
        self._num_new = 0
        self._sequence = 0
        self._last_taken_at = float("-inf")
        self._held = False
        self._holds_all = False
        self._pause: Literal["", "new", "all"] = ""

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._tickets)

    @property
    def num_new(self) -> int:
        return self._num_new

    @property
    def held(self) -> bool:
        return self._held

    @property
    def holds_all(self) -> bool:
        """Nothing goes, retries included."""
        return self._holds_all or self._pause == "all"

    def hold(self, *, all_tickets: bool = False) -> None:
        """New requests wait; those that were dispatched before still go, so that running ones drain. With
        `all_tickets` they wait too."""
        self._held = True
        self._holds_all = all_tickets
        for ticket in self._tickets:
            if ticket.is_new or all_tickets:
                ticket.unpaired_since = None

    def release(self) -> None:
        self._held = self._holds_all = False

    def pause(self, *, new_only: bool = False) -> None:
        """Nothing goes, retries included, or with `new_only` no new request. Apart from holds: a weight
        update in a pause ends its hold and not the pause."""
        self._pause = "new" if new_only else "all"
        for ticket in self._tickets:
            ticket.unpaired_since = None

    def resume(self) -> None:
        self._pause = ""

    def offer(self, request_id: str, choices: tuple[int, ...], priority: int, now: float) -> Ticket:
        """A new request. Raises RequestError 429 when the queue is full."""
        if self._num_new >= self._max_new:
            oldest = next(ticket for ticket in self._tickets if ticket.is_new)
            raise RequestError(
                f"the router's queue is full ({self._max_new} requests); try again later",
                status=429,
                code="queue_full",
                error_type="rate_limit_error",
                retry_after_s=min(MAX_RETRY_AFTER_S, max(1.0, now - oldest.arrived_at)),
            )
        self._num_new += 1
        return self._insert(
            Ticket(
                is_new=True,
                rank=-priority,
                arrived_at=now,
                sequence=self._next_sequence(),
                request_id=request_id,
                choices=choices,
                queued_at=now,
            )
        )

    def again(
        self,
        request_id: str,
        choices: tuple[int, ...],
        priority: int,
        *,
        arrived_at: float,
        now: float,
        delay_s: float = 0.0,
        avoid: tuple[Pair, ...] = (),
    ) -> Ticket:
        """Choices whose attempt ended without an answer: never refused, before all new requests."""
        return self._insert(
            Ticket(
                is_new=False,
                rank=-priority,
                arrived_at=arrived_at,
                sequence=self._next_sequence(),
                request_id=request_id,
                choices=choices,
                queued_at=now,
                not_before=now + delay_s,
                avoid=avoid,
            )
        )

    def due(self, now: float) -> Iterator[Ticket]:
        """Tickets that may go now, first the one that goes first. The queue may change meanwhile."""
        for ticket in tuple(self._tickets):
            if ticket.not_before <= now and self._may_go(ticket):
                yield ticket

    def _may_go(self, ticket: Ticket) -> bool:
        if ticket.is_new:
            return not self._held and not self._pause
        return not self.holds_all

    def is_overdue(self, ticket: Ticket, now: float) -> bool:
        """The gates are hints: when nothing has gone for a while, the first in the queue passes them."""
        return now - max(self._last_taken_at, ticket.queued_at, ticket.not_before) > self._patience_s

    def take(self, ticket: Ticket, now: float) -> None:
        """The ticket is dispatched."""
        self._last_taken_at = now
        self.remove(ticket)

    def remove(self, ticket: Ticket) -> None:
        self._tickets.remove(ticket)
        self._num_new -= ticket.is_new

    def remove_request(self, request_id: str) -> None:
        for ticket in self.of_request(request_id):
            self.remove(ticket)

    def remove_choice(self, request_id: str, choice: int) -> None:
        for ticket in self.of_request(request_id):
            ticket.choices = tuple(other for other in ticket.choices if other != choice)
            if not ticket.choices:
                self.remove(ticket)

    def of_request(self, request_id: str) -> list[Ticket]:
        return [ticket for ticket in self._tickets if ticket.request_id == request_id]

    def starved(self, now: float, timeout_s: float) -> list[Ticket]:
        """Tickets for which no pair of nodes was ready for ``timeout_s``."""
        return [
            ticket
            for ticket in self._tickets
            if ticket.unpaired_since is not None and now - ticket.unpaired_since >= timeout_s
        ]

    def _insert(self, ticket: Ticket) -> Ticket:
        insort(self._tickets, ticket)
        return ticket

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence
