"""The router's queue: bounded by length and by wait, retries first, oldest first, clients in turns.

Values and ``now`` in, decisions out.

How long a new request would wait is told from the rate at which the queue was served in the last seconds.
Where that is longer than anybody wants to wait it is refused at once, and told when to come again: what
is accepted is then answered in time, however many ask. Clients (API keys) take turns by start-time fair
queueing (Goyal, Vin, Cheng 1996): a ticket's tag is one more than the client's last, or than the one served.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ..runtime.errors import RequestError
from .pairing import Pair

MAX_RETRY_AFTER_S = 60.0
RATE_WINDOW_S = 10.0  # of which the rate of service is that
MIN_WINDOW_S = 0.5  # less tells no rate
SHORT_QUEUE = 16  # as many may wait however long it takes: no overload


@dataclass(order=True, slots=True)
class Ticket:
    """Choices of one request that wait to be dispatched. Sorts by who goes first."""

    is_new: bool  # False: was dispatched before
    rank: int  # the negative of the request's priority
    tag: float  # of fair queueing, of a new one; 0 of others
    arrived_at: float
    sequence: int
    request_id: str = field(compare=False)
    choices: tuple[int, ...] = field(compare=False)
    queued_at: float = field(compare=False)
    not_before: float = field(compare=False, default=0.0)
    avoid: tuple[Pair, ...] = field(compare=False, default=())
    waits_for: str = field(compare=False, default="")
    unpaired_since: float | None = field(compare=False, default=None)  # no pair of nodes for it since then


def _place(ticket: Ticket) -> tuple[bool, int, float]:
    return ticket.is_new, ticket.rank, ticket.tag


class AdmissionQueue:
    """`max_wait_s`: how long a new request may be expected to wait; infinity for any time."""

    def __init__(self, *, max_new: int, patience_s: float, max_wait_s: float = math.inf) -> None:
        self._max_new = max_new
        self._patience_s = patience_s
        self._max_wait_s = max_wait_s
        self._taken_at: deque[float] = deque()  # within the window, while others waited
        self._served_since: float | None = None  # the queue was not empty, and might go; None: it is not so
        self._tag = 0.0  # of the newest that was taken
        self._last_tags: dict[str, float] = {}  # by client
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
        self._forget_rate()

    def pause(self, *, new_only: bool = False) -> None:
        """Nothing goes, retries included, or with `new_only` no new request. Apart from holds: a weight
        update in a pause ends its hold and not the pause."""
        self._pause = "new" if new_only else "all"
        for ticket in self._tickets:
            ticket.unpaired_since = None

    def resume(self) -> None:
        self._pause = ""
        self._forget_rate()

    def check_wait(self, client: str, now: float) -> None:
        """Raises RequestError 429 when a new request of this client would wait for too long.

        Not while new ones are held or no pair of nodes is ready: how long that takes, no rate tells.
        """
        stands = self._held or self._pause or any(each.unpaired_since is not None for each in self._tickets)
        if stands or len(self._tickets) < SHORT_QUEUE:
            return
        num_ahead = bisect_right(self._tickets, (True, 0, self._next_tag(client)), key=_place)
        rate = self._rate(now)
        if rate is None or num_ahead < SHORT_QUEUE or num_ahead <= rate * self._max_wait_s:
            return
        wait_s = num_ahead / rate if rate else math.inf
        raise RequestError(
            f"{num_ahead} requests go first, which takes about {wait_s:.1f} s; --max-queue-wait is "
            f"{self._max_wait_s:g} s",
            status=429,
            code="queue_wait",
            error_type="rate_limit_error",
            retry_after_s=min(MAX_RETRY_AFTER_S, max(1.0, wait_s - self._max_wait_s)),
        )

    def offer(
        self, request_id: str, choices: tuple[int, ...], priority: int, now: float, client: str = ""
    ) -> Ticket:
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
        if not self._num_new:
            self._last_tags.clear()
        tag = self._last_tags[client] = self._next_tag(client)
        self._num_new += 1
        return self._insert(
            Ticket(
                is_new=True,
                rank=-priority,
                tag=tag,
                arrived_at=now,
                sequence=self._next_sequence(),
                request_id=request_id,
                choices=choices,
                queued_at=now,
            ),
            now,
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
                tag=0.0,
                arrived_at=arrived_at,
                sequence=self._next_sequence(),
                request_id=request_id,
                choices=choices,
                queued_at=now,
                not_before=now + delay_s,
                avoid=avoid,
            ),
            now,
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
        self._tag = max(self._tag, ticket.tag)
        self._taken_at.append(now)
        self.remove(ticket)

    def remove(self, ticket: Ticket) -> None:
        self._tickets.remove(ticket)
        self._num_new -= ticket.is_new
        if not self._tickets:
            self._forget_rate()

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

    def _next_tag(self, client: str) -> float:
        return max(self._tag, self._last_tags.get(client, 0.0)) + 1.0

    def _rate(self, now: float) -> float | None:
        """Tickets taken per second of late; None while too little is known."""
        if self._served_since is None or now - self._served_since < MIN_WINDOW_S:
            return None
        while self._taken_at and self._taken_at[0] < now - RATE_WINDOW_S:
            self._taken_at.popleft()
        return len(self._taken_at) / min(RATE_WINDOW_S, now - self._served_since)

    def _forget_rate(self) -> None:
        self._taken_at.clear()
        self._served_since = None

    def _insert(self, ticket: Ticket, now: float) -> Ticket:
        if self._served_since is None:
            self._served_since = now
        insort(self._tickets, ticket)
        return ticket

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence
