"""What an operator asks by HTTP of this node alone."""

from __future__ import annotations

from typing import Any

import msgspec

from ..api.control.operations import ProfileOutcome
from ..api.generation import AdminReply
from ..messages.operation import ClusterOperation
from .scheduler_link import SchedulerLink


class FrontOperator:
    """The `Operator` of one node."""

    def __init__(self, link: SchedulerLink, url: str) -> None:
        self._link = link
        self._url = url

    async def operate(self, operation: ClusterOperation) -> AdminReply:
        reply = await self._link.client.operate(operation)
        return AdminReply(reply.success, reply.message)

    async def internal_state(self) -> dict[str, Any]:
        state: dict[str, Any] = msgspec.to_builtins(await self._link.client.internal_state())
        return state

    async def stop_profile(self) -> ProfileOutcome:
        reply = await self._link.client.stop_profile()
        return ProfileOutcome(
            success=reply.success,
            message=reply.message,
            traces={self._url: reply.all_traces},
        )
