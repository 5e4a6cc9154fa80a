"""Releases the memory of all nodes of the cluster and resumes it, while requests wait."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping

from ...api.generation import AdminReply
from ...links.node_calls import NodeCalls
from ...messages.weights import MemoryReply, MemoryTag
from ...runtime.timing import Timing
from ..events import CachesDropped, Hold, Release
from ..service import RouterService
from .rollout import NodeAnswer, ask_all, failures


class MemoryReleases:
    """One call at a time, and no update of weights beside it."""

    def __init__(self, timing: Timing, service: RouterService) -> None:
        self._timing = timing
        self._service = service
        self._requests = service.state.requests
        self._registry = service.state.nodes
        self._released: set[MemoryTag] = set()  # by this router, which holds requests meanwhile
        self.is_moving = False

    @property
    def is_released(self) -> bool:
        return bool(self._released)

    async def release(self, tags: tuple[MemoryTag, ...], links: Mapping[str, NodeCalls]) -> AdminReply:
        """By all of `links` (url -> link) or by none, when running requests have ended."""
        with self._moving():
            self._service.tell(Hold("wait"))
            try:
                drain_s = self._timing.weight_drain_s
                if not await self._service.until(lambda: self._requests.num_working == 0, drain_s):
                    return AdminReply(False, "requests were still running")
                answers = await ask_all(links, lambda link: link.release_memory(tags))
                if reasons := failures(answers):
                    # Of a node that was not reached nobody knows.
                    urls = [answer.url for answer in answers if answer.success or answer.reply is None]
                    stuck = await self._take_back(tags, {url: links[url] for url in urls})
                    return AdminReply(False, f"{reasons}; to be resumed: {stuck}" if stuck else reasons)
                self._released |= set(tags)
                self._service.tell(CachesDropped())
                return AdminReply(True, f"{len(links)} nodes have released {', '.join(tags)}")
            finally:
                if not self._released:
                    self._service.tell(Release())

    async def resume(self, tags: tuple[MemoryTag, ...], links: Mapping[str, NodeCalls]) -> AdminReply:
        """By those of `links` that have released it. A node that was started again meanwhile has its
        memory, and what was released may have been so by another router. A resume that failed on some node
        can be asked for again.
        """
        if not links:
            return AdminReply(False, "no node is connected")
        with self._moving():
            known = await self._ask_to_resume((), links)  # who has released what
            released = self._released | _still_released(known)
            if missing := [tag for tag in tags if tag not in released]:
                return AdminReply(False, failures(known) or f"not released: {', '.join(missing)}")
            before = self._incarnations()
            answers = await self._ask_to_resume(tags, links)
            if reasons := failures(answers):
                return AdminReply(False, reasons)
            text = f"{len(links)} nodes have {', '.join(tags)} again"
            self._released &= _still_released(answers)
            if _still_released(answers):
                return AdminReply(True, text)
            is_ready = await self._service.hears(
                lambda: self._are_known(answers, before) and bool(self._registry.ready_pairs()),
                self._timing.weight_ready_s,
            )
            self._service.tell(Release())
            if not is_ready:
                return AdminReply(False, f"memory is resumed, but {self._registry.explain_no_pair()}")
            return AdminReply(True, text)

    async def released(self, links: Mapping[str, NodeCalls]) -> frozenset[MemoryTag]:
        """What any of `links` has released, whichever router asked for it."""
        return _still_released(await self._ask_to_resume((), links))

    @contextlib.contextmanager
    def _moving(self) -> Iterator[None]:
        self.is_moving = True
        try:
            yield
        finally:
            self.is_moving = False

    async def _take_back(self, tags: tuple[MemoryTag, ...], links: Mapping[str, NodeCalls]) -> str:
        """Who may have released it and not resumed."""
        before = self._incarnations()
        answers = await self._ask_to_resume(tags, links)
        await self._service.hears(lambda: self._are_known(answers, before), self._timing.weight_ready_s)
        return failures(answers)

    async def _ask_to_resume(
        self, tags: tuple[MemoryTag, ...], links: Mapping[str, NodeCalls]
    ) -> list[NodeAnswer[MemoryReply]]:
        return await ask_all(links, lambda link: link.resume_memory(tags, if_released=True))

    def _incarnations(self) -> frozenset[str]:
        return frozenset(node.incarnation for node in self._registry)

    def _are_known(self, answers: Collection[NodeAnswer[MemoryReply]], before: frozenset[str]) -> bool:
        """Every node that has all its memory again has said who it is now: not one of those `before`."""
        renewed = {
            answer.url
            for answer in answers
            if answer.reply is not None and answer.reply.resumed and not answer.reply.released
        }
        nodes = [node for node in self._registry if node.entry.url in renewed]
        return all(self._registry.healthy(node) and node.incarnation not in before for node in nodes)


def _still_released(answers: Collection[NodeAnswer[MemoryReply]]) -> frozenset[MemoryTag]:
    replies = [answer.reply for answer in answers if answer.reply is not None]
    return frozenset(tag for reply in replies for tag in reply.released)
