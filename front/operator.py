"""What an operator asks by HTTP of this node alone."""

from __future__ import annotations

from typing import Any

import msgspec

from ..api.control.operations import ProfileOutcome
from ..api.generation import AdminReply
from ..messages.operation import ClusterOperation
from ..runtime.timing import Timing
from .scheduler_link import SchedulerLink


class FrontOperator:
    """The `Operator` of one node."""

    def __init__(self, link: SchedulerLink, url: str, timing: Timing) -> None:
        self._link = link
        self._timing = timing
        self._url = url

    async def operate(self, operation: ClusterOperation) -> AdminReply:
        reply = await self._link.client.operate(operation, self._timing.operation_s)
        return AdminReply(reply.success, reply.message)

    async def internal_state(self) -> dict[str, Any]:
        state: dict[str, Any] = msgspec.to_builtins(await self._link.client.internal_state())
        return state

    async def stop_profile(self) -> ProfileOutcome:
        reply = await self._link.client.stop_profile(self._timing.profile_end_s)
        return ProfileOutcome(
            success=reply.success,
            message=reply.message,
            traces={self._url: reply.all_traces},
        )
