"""What each node has to do, kept current between its pongs by what this router sent and saw end.

A pong tells a node's figures as of the ping: pings and requests travel on one ordered connection. So now's
figure is the reported one plus how much this router's own share has grown since that ping; other routers'
shares are in the reported one. Errors do not accumulate, the next pong corrects them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from ..messages.node import NodeLoad
from .pairing import Pair


@dataclass(slots=True, eq=False)
class Attempt:
    """One dispatch of some choices of one request to one pair of nodes."""

    request_id: str
    number: int
    pair: Pair
    open_choices: set[int]
    num_uncached_tokens: int  # expected work of the prefill
    num_pages: int  # expected on decode
    num_tokens_ahead: int = 0  # on prefill, up to the first token
    weight: int = 1  # choices it was sent with: sequences on decode
    awaits_first_token: bool = True
    since: float = 0.0  # it was opened; its first token came
    sent_s: float = 0.0  # the message that opened it
    clock_lead_s: float | None = None  # decode's clock ahead of ours, as of its first spans


@dataclass(slots=True)
class _Gauge:
    reported: int = 0
    own: int = 0
    own_at_ping: int = 0
    own_at_reported_ping: int = 0

    def ping(self) -> None:
        self.own_at_ping = self.own

    def pong(self, reported: int) -> None:
        self.reported = reported
        self.own_at_reported_ping = self.own_at_ping

    @property
    def value(self) -> int:
        return max(0, self.reported + self.own - self.own_at_reported_ping)


@dataclass(slots=True)
class _NodeLedger:
    queued_tokens: _Gauge = field(default_factory=_Gauge)
    active: _Gauge = field(default_factory=_Gauge)
    used_pages: _Gauge = field(default_factory=_Gauge)
    total_pages: int = 0
    is_full: bool = False  # it said Busy; believed until something moves there
    last_used: int = 0


class Ledger:
    """Which attempts run where, and the estimates that pairing reads."""

    def __init__(self) -> None:
        self._nodes: dict[str, _NodeLedger] = {}
        self._attempts: dict[tuple[str, int], Attempt] = {}
        self._num_dispatched = 0

    def __len__(self) -> int:
        return len(self._attempts)

    def __iter__(self) -> Iterator[Attempt]:
        return iter(self._attempts.values())

    # ---- nodes ----------------------------------------------------------------------------------

    def nodes(self) -> Collection[str]:
        """Of which there are estimates."""
        return self._nodes.keys()

    def add_node(self, incarnation: str) -> None:
        self._nodes.setdefault(incarnation, _NodeLedger())

    def forget_node(self, incarnation: str) -> None:
        self._nodes.pop(incarnation, None)

    def ping(self, incarnation: str) -> None:
        node = self._nodes.get(incarnation)
        if node is not None:
            for gauge in (node.queued_tokens, node.active, node.used_pages):
                gauge.ping()

    def pong(self, incarnation: str, load: NodeLoad) -> None:
        node = self._nodes.get(incarnation)
        if node is None:
            return
        node.queued_tokens.pong(load.num_queued_tokens)
        node.active.pong(load.num_running_reqs + load.num_waiting_reqs)
        node.used_pages.pong(load.num_total_pages - load.num_free_pages)
        node.total_pages = load.num_total_pages
        node.is_full = False

    def full(self, incarnation: str) -> None:
        """The node answered Busy."""
        node = self._nodes.get(incarnation)
        if node is not None:
            node.is_full = True

    # ---- attempts -------------------------------------------------------------------------------

    def open(self, attempt: Attempt) -> None:
        self._attempts[attempt.request_id, attempt.number] = attempt
        self._num_dispatched += 1
        prefill, decode = self._prefill(attempt), self._nodes.get(attempt.pair.decode)
        if prefill is not None:
            prefill.queued_tokens.own += attempt.num_uncached_tokens
            prefill.last_used = self._num_dispatched
        if decode is not None:
            decode.active.own += attempt.weight
            decode.used_pages.own += attempt.num_pages
            decode.last_used = self._num_dispatched

    def first_token(self, attempt: Attempt) -> None:
        """The prefill is done with its prompt."""
        if not attempt.awaits_first_token:
            return
        attempt.awaits_first_token = False
        prefill = self._prefill(attempt)
        if prefill is not None:
            prefill.queued_tokens.own -= attempt.num_uncached_tokens
            prefill.is_full = False

    def close(self, attempt: Attempt) -> bool:
        """False if it was closed before."""
        if self._attempts.pop((attempt.request_id, attempt.number), None) is None:
            return False
        self.first_token(attempt)
        decode = self._nodes.get(attempt.pair.decode)
        if decode is not None:
            decode.active.own -= attempt.weight
            decode.used_pages.own -= attempt.num_pages
        return True

    def get(self, request_id: str, number: int) -> Attempt | None:
        """The attempt, while it is open."""
        return self._attempts.get((request_id, number))

    def is_working(self, incarnation: str) -> bool:
        """Whether an open attempt decodes there, or waits for its first token from there."""
        return any(
            attempt.pair.decode == incarnation
            or (attempt.pair.prefill == incarnation and attempt.awaits_first_token)
            for attempt in self._attempts.values()
        )

    def on_decode(self, incarnation: str) -> list[Attempt]:
        return [attempt for attempt in self._attempts.values() if attempt.pair.decode == incarnation]

    def _prefill(self, attempt: Attempt) -> _NodeLedger | None:
        return self._nodes.get(attempt.pair.prefill or attempt.pair.decode)

    # ---- estimates ------------------------------------------------------------------------------

    def queued_tokens(self, incarnation: str) -> int:
        return self._nodes[incarnation].queued_tokens.value

    def num_active(self, incarnation: str) -> int:
        return self._nodes[incarnation].active.value

    def num_free_pages(self, incarnation: str) -> int:
        node = self._nodes[incarnation]
        return node.total_pages - node.used_pages.value

    def is_full(self, incarnation: str) -> bool:
        return self._nodes[incarnation].is_full

    def last_used(self, incarnation: str) -> int:
        return self._nodes[incarnation].last_used
