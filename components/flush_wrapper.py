"""Decides when the prefix cache is flushed, and what the caller is told.

A flush is done at once when the node is idle. Otherwise a caller that gave a timeout waits: one request at
most is pending, flushed as soon as the node is idle, or told that it timed out. The part returns decisions;
the loop drops the cache and sends the replies:

    match self.flush.poll(now, idle):
        case FlushNow() as flush:
            self.send(flush.client, flush.reply(flushed=self.cache.reset()))
        case FlushRefused(client=client, reply=reply):
            self.send(client, reply)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from ..messages.node import CallReply, FlushCache


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushNow:
    """The node is idle: drop the cache, then send `reply` to `client`."""

    client: bytes
    call_id: int

    def reply(self, *, flushed: bool) -> CallReply:
        """The answer once the cache was dropped, or held locked pages after all (``flushed`` false)."""
        message = "Cache flushed." if flushed else "The cache was not flushed: some of its pages are in use."
        return CallReply(call_id=self.call_id, success=flushed, message=message)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlushRefused:
    """Nothing is flushed: send `reply` to `client`."""

    client: bytes
    reply: CallReply


FlushDecision: TypeAlias = FlushNow | FlushRefused


@dataclass(frozen=True, slots=True)
class _Pending:
    client: bytes
    call_id: int
    deadline: float


class FlushWrapper:
    """Holds the one flush that waits for the node to be idle."""

    def __init__(self) -> None:
        self._pending: _Pending | None = None

    @property
    def deadline(self) -> float:
        """When the pending flush times out, on the clock of `now`; infinity if none is pending."""
        return math.inf if self._pending is None else self._pending.deadline

    def handle(self, message: FlushCache, client: bytes, now: float, idle: bool) -> FlushDecision | None:
        """Decide on a new request; None: it waits, and `poll` will tell."""
        if self._pending is not None:
            return _refused(client, message.call_id, "Another flush_cache is already in progress.")
        if idle:
            return FlushNow(client=client, call_id=message.call_id)
        if message.timeout_s <= 0:
            return _refused(client, message.call_id, "The node is not idle, and no timeout was given.")
        self._pending = _Pending(client, message.call_id, now + message.timeout_s)
        return None

    def poll(self, now: float, idle: bool) -> FlushDecision | None:
        """Decide on the pending request, if it is time. An idle node flushes even at the deadline."""
        pending = self._pending
        if pending is None or (not idle and now < pending.deadline):
            return None
        self._pending = None
        if idle:
            return FlushNow(client=pending.client, call_id=pending.call_id)
        return _refused(pending.client, pending.call_id, "Timed out waiting for idle state.")


def _refused(client: bytes, call_id: int, why: str) -> FlushRefused:
    return FlushRefused(client=client, reply=CallReply(call_id=call_id, success=False, message=why))
