"""What is asked by HTTP of what runs on this node alone."""

from __future__ import annotations

from ..api.generation import AdminReply
from ..messages.operation import CloseSession, ContinueGeneration, PauseGeneration
from ..runtime.pause_gate import PauseMode
from .scheduler_link import SchedulerLink


class FrontControl:
    """`Control` of the one node behind this front, and what it holds of sessions."""

    def __init__(self, link: SchedulerLink) -> None:
        self._link = link

    async def flush_cache(self, timeout_s: float) -> AdminReply:
        reply = await self._link.client.flush_cache(timeout_s)
        return AdminReply(reply.success, reply.message)

    async def abort_requests(self, request_id: str, all_requests: bool) -> AdminReply:
        reply = await self._link.client.abort(request_id, all_requests=all_requests)
        return AdminReply(reply.success, reply.message)

    async def pause_generation(self, mode: PauseMode, *, drains: bool) -> AdminReply:
        """This node alone: what a router sends meanwhile waits here."""
        if drains:
            return AdminReply(
                False, "A node cannot keep requests away: pause with `wait` through the router."
            )
        reply = await self._link.client.operate(PauseGeneration(mode=mode))
        return AdminReply(reply.success, reply.message)

    async def continue_generation(self) -> AdminReply:
        reply = await self._link.client.operate(ContinueGeneration())
        return AdminReply(reply.success, reply.message)

    async def assert_peer_death(self, incarnation: str) -> AdminReply:
        reply = await self._link.client.assert_peer_death(incarnation)
        return AdminReply(reply.success, reply.message)

    async def close_session(self, session_id: str) -> AdminReply:
        """The router that opened it knows nothing of this."""
        reply = await self._link.client.operate(CloseSession(session_id=session_id))
        return AdminReply(reply.success, reply.message)
