"""What an operator asks of all nodes at once: looking into them, setting them, profiling them together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..api.control.operations import ProfileOutcome
from ..api.generation import AdminReply
from ..links.node_calls import NodeCalls, NodeUnavailableError
from ..messages.node import CallReply
from ..messages.operation import ClusterOperation, ProfileReply, SetInternalState, StartProfile
from ..runtime.chrome_trace import NodeTrace, merge_traces
from ..runtime.config import LIVE_FLAGS
from ..runtime.errors import RequestError
from .registry import NodeRecord
from .service import RouterService
from .updates.rollout import ask_all


class ClusterOperator:
    """Implements `Operator` of `pdserve.api.control.operations`."""

    def __init__(self, service: RouterService) -> None:
        self._service = service
        self._state = service.state
        self._profile: StartProfile | None = None  # the last one that began

    async def operate(self, operation: ClusterOperation) -> AdminReply:
        """On every node, or for settings on those that have them; no is who does not answer."""
        links = self._service.links()
        if not links:
            return AdminReply(False, "no node is connected")
        if isinstance(operation, SetInternalState):
            return await self._set(operation, links)
        if isinstance(operation, StartProfile):
            self._profile = operation
        return await _all(links, lambda link: link.operate(operation))

    async def _set(self, wanted: SetInternalState, links: Mapping[str, NodeCalls]) -> AdminReply:
        for name in wanted.settings:
            if name not in LIVE_FLAGS:
                text = f"`{name}` cannot be changed while nodes run; these can: {', '.join(LIVE_FLAGS)}."
                raise RequestError(text, param=f"server_args.{name}", code="invalid_value")
        calls: dict[NodeCalls, SetInternalState] = {}
        asked: dict[str, NodeCalls] = {}
        for url, node in self._nodes().items():
            role = node.entry.role
            own = {name: value for name, value in wanted.settings.items() if role in LIVE_FLAGS[name].live_on}
            if own and url in links:
                asked[url] = links[url]
                calls[links[url]] = SetInternalState(settings=own)
        if not asked:
            return AdminReply(False, "no node that has these settings is connected")
        return await _all(asked, lambda link: link.operate(calls[link]))

    async def internal_state(self) -> dict[str, Any]:
        """Of each node, as far as it answers."""

        async def one(url: str, node: NodeRecord) -> dict[str, Any]:
            row = {"url": url, "role": node.entry.role, "load": msgspec.to_builtins(node.load)}
            link = self._service.links().get(url)
            try:
                if link is None:
                    return {**row, "error": "it is not connected"}
                return {**row, **msgspec.to_builtins(await link.internal_state())}
            except NodeUnavailableError as error:
                return {**row, "error": str(error)}

        rows = await asyncio.gather(*(one(url, node) for url, node in self._nodes().items()))
        return {"internal_states": list(rows)}

    async def stop_profile(self) -> ProfileOutcome:
        """Ends it everywhere, and puts the traces that this host can read together on one clock."""
        nodes = self._nodes()
        links = self._service.links()

        async def one(link: NodeCalls) -> ProfileReply:
            try:
                return await link.stop_profile()
            except NodeUnavailableError as error:
                return ProfileReply(call_id=0, success=False, message=str(error))

        replies = dict(zip(links, await asyncio.gather(*map(one, links.values())), strict=True))
        traces = [
            NodeTrace(Path(path), label, self._state.lead_s(node.incarnation))
            for url, node in nodes.items()
            if url in replies
            for path, label in _labelled(f"{node.entry.role} {url}", replies[url])
        ]
        merged, problem = await asyncio.to_thread(self._merge, traces)
        text = "; ".join(f"{url}: {reply.message}" for url, reply in replies.items() if not reply.success)
        return ProfileOutcome(
            success=bool(replies) and not text,
            message="; ".join(filter(None, (text or ("" if replies else "no node is connected"), problem))),
            traces={url: reply.all_traces for url, reply in replies.items()},
            merged=merged,
        )

    def _merge(self, traces: list[NodeTrace]) -> tuple[str, str]:
        """The merged file, and why there is none. Blocks."""
        if self._profile is None or not traces:
            return "", "nothing was recorded"
        path = Path(self._profile.output_dir) / f"{self._profile.profile_id}-merged.trace.json.gz"
        try:
            merge_traces(traces, path)
        except (OSError, EOFError, msgspec.DecodeError, KeyError) as error:
            return "", f"not merged, as the traces are not all on this host: {error}"
        return str(path), ""

    def _nodes(self) -> dict[str, NodeRecord]:
        return {node.entry.url: node for node in self._state.nodes}


def _labelled(node: str, reply: ProfileReply) -> list[tuple[str, str]]:
    """Its files, and whose they are."""
    own = [(path, node) for path in reply.traces]
    return own + [(path, f"{node}, TP rank {rank}") for rank, path in reply.rank_traces]


async def _all(
    links: Mapping[str, NodeCalls], ask: Callable[[NodeCalls], Awaitable[CallReply]]
) -> AdminReply:
    answers = await ask_all(links, ask)
    return AdminReply(all(answer.success for answer in answers), "; ".join(map(str, answers)))
