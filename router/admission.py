"""The router's queue: bounded by length and by wait, retries first, oldest first, clients in turns.

Values and ``now`` in, decisions out.

How long a new request would wait for its first token is told by Little's law: those that go first and have
none yet, here and on nodes, over the rate at which first tokens came of late (`first_token_rate.py`). Where
that is longer than anybody wants to wait it is refused at once, and told when to come again: what is accepted
is then answered in time, however many ask. Clients (API keys) take turns by start-time fair queueing (Goyal,
Vin, Cheng 1996): a ticket's tag is one more than the client's last, or than the one served.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ..runtime.errors import RequestError
from .first_token_rate import FirstTokenRate
from .pairing import Pair

MAX_RETRY_AFTER_S = 60.0
SHORT_QUEUE = 16  # for each node that prefills, as many may wait however long it takes: no overload
COLD_RATE = 16.0  # first tokens a second that each of them is taken for as long as none was measured


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
    """A request *waits* from its offer to its first token (`answered`), or until it is given up.

    `max_wait_s`: how long a new request may be expected to; infinity for any time.
    """

    def __init__(self, *, max_new: int, patience_s: float, max_wait_s: float = math.inf) -> None:
        self._max_new = max_new
        self._patience_s = patience_s
        self._max_wait_s = max_wait_s
        self._rate = FirstTokenRate(horizon_s=max_wait_s)
        self._waiting: set[str] = set()  # requests without a first token
        self._num_servers = 1
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
    def num_waiting(self) -> int:
        """Requests without a first token, those that were dispatched included."""
        return len(self._waiting)

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
        self._rate.forget()

    def pause(self, *, new_only: bool = False) -> None:
        """Nothing goes, retries included, or with `new_only` no new request. Apart from holds: a weight
        update in a pause ends its hold and not the pause."""
        self._pause = "new" if new_only else "all"
        for ticket in self._tickets:
            ticket.unpaired_since = None

    def resume(self) -> None:
        self._pause = ""
        self._rate.forget()

    def serve_with(self, num_servers: int, now: float) -> None:
        """So many nodes prefill now."""
        self._num_servers = max(1, num_servers)
        self._measure(now)

    def check_wait(self, client: str, now: float) -> None:
        """Raises RequestError 429 when a new request of this client would wait for too long.

        Not while new ones are held or no pair of nodes is ready: how long that takes, no rate tells.
        """
        self._measure(now)
        if self._stands or math.isinf(self._max_wait_s):
            return
        first_behind = bisect_right(self._tickets, (True, 0, self._next_tag(client)), key=_place)
        num_ahead = len(self._waiting) - (len(self._tickets) - first_behind)
        if num_ahead < SHORT_QUEUE * self._num_servers:
            return
        rate = self._rate.per_s(COLD_RATE * self._num_servers)
        if num_ahead <= rate * self._max_wait_s:
            return
        wait_s = num_ahead / rate if rate else math.inf
        raise RequestError(
            f"{num_ahead} requests go first, which takes about {min(wait_s, 9999.0):.1f} s; --max-queue-wait "
            f"is {self._max_wait_s:g} s",
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
        self._measure(now)
        self._waiting.add(request_id)
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
                tag=0.0,
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
        self._tag = max(self._tag, ticket.tag)
        self.remove(ticket)

    def answered(self, request_id: str, now: float) -> None:
        """Its first token came."""
        if request_id in self._waiting:
            self._measure(now)
            self._rate.came()
            self._waiting.remove(request_id)

    def remove(self, ticket: Ticket) -> None:
        self._tickets.remove(ticket)
        self._num_new -= ticket.is_new

    def remove_request(self, request_id: str, now: float) -> None:
        """Nobody works on it any more: it has ended, or was given up."""
        for ticket in self.of_request(request_id):
            self.remove(ticket)
        self._measure(now)
        self._waiting.discard(request_id)

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

    @property
    def _stands(self) -> bool:
        """Nothing new goes, for a reason that has nothing to do with how much there is to do."""
        no_pair = bool(self._tickets) and self._tickets[-1].unpaired_since is not None
        return self._held or bool(self._pause) or no_pair

    def _measure(self, now: float) -> None:
        """Called before what changes how many wait: the time since the call before was spent with so many."""
        is_backlog = len(self._waiting) > SHORT_QUEUE * self._num_servers
        self._rate.advance(now, counts=is_backlog and not self._stands)

    def _insert(self, ticket: Ticket) -> Ticket:
        insort(self._tickets, ticket)
        return ticket

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence
