"""The control calls of a whole cluster: nodes, caches, aborts, pauses, deaths, sessions."""

from __future__ import annotations

from collections.abc import Callable

from ..api.generation import AdminReply, SessionTurn, TurnParams
from ..links.entry_lookup import EntryLookup, NoNodeError
from ..messages.node import NodeEntry
from ..messages.operation import CloseSession, ContinueGeneration, PauseGeneration
from ..runtime.pause_gate import PauseMode
from ..runtime.timing import Timing
from .events import Abort, CachesDropped, Pause, PauseArrivals, Registered, Resume, TakenOut
from .operator import ClusterOperator
from .service import RouterService
from .updates.coordinator import WeightUpdates
from .updates.rollout import ask_all


class Administration:
    """Implements `Control` and `Membership` of `pdserve.api.generation`."""

    def __init__(
        self,
        timing: Timing,
        *,
        service: RouterService,
        weights: WeightUpdates,
        operator: ClusterOperator,
        lookup: EntryLookup,
    ) -> None:
        self._timing = timing
        self._service = service
        self._state = service.state
        self._weights = weights
        self._operator = operator
        self._lookup = lookup

    async def register_worker(self, url: str, entry: NodeEntry | None) -> AdminReply:
        """``entry`` None: a person names a URL; otherwise a node registers itself.

        Raises RequestError when there are too many nodes.
        """
        by_hand = entry is None
        if entry is None:
            try:
                entry = await self._lookup(url)
            except NoNodeError as error:
                return AdminReply(False, str(error))
        self._service.tell(Registered(entry, by_hand=by_hand))
        reason = self._state.why_refused(entry)
        return AdminReply(not reason, reason)

    async def remove_worker(self, url: str) -> AdminReply:
        if self._state.nodes.at_url(url) is None:
            return AdminReply(False, f"no node at {url}")
        self._service.tell(TakenOut(url))
        return AdminReply(True)

    async def flush_cache(self, timeout_s: float) -> AdminReply:
        answers = await ask_all(self._service.links(), lambda link: link.flush_cache(timeout_s))
        self._service.tell(CachesDropped())
        if not answers:
            return AdminReply(False, "no node is connected")
        return AdminReply(all(answer.success for answer in answers), "; ".join(map(str, answers)))

    async def abort_requests(self, request_id: str, all_requests: bool) -> AdminReply:
        """Ours end with finish reason "abort", behind all tokens that nodes have of them; nodes are asked by
        id too, others may have sent them the request.

        A request that is not known (any more) is no error.
        """
        requests = self._state.requests
        aborted = [record for record in requests if all_requests or record.request_id == request_id]
        self._service.tell(Abort(tuple(record.request_id for record in aborted)))
        answers = await ask_all(
            self._service.links(), lambda link: link.abort(request_id, all_requests=all_requests)
        )
        await self._service.until(
            lambda: all(requests.get(record.request_id) is not record for record in aborted),
            2 * self._timing.abort_grace_s,
        )
        if aborted or all_requests or any(answer.success for answer in answers):
            return AdminReply(True, f"{len(aborted)} requests of this router aborted")
        return AdminReply(True, f"no request {request_id!r} is known")

    async def pause_generation(self, mode: PauseMode, *, drains: bool) -> AdminReply:
        """On all nodes, and nothing is dispatched, until `continue_generation`. `drains`: running requests
        end before, and only new ones wait."""
        if self._weights.is_running():
            return AdminReply(False, "a weight update is running, which needs the nodes at work")
        requests = self._state.requests
        if drains and self._state.pause_mode and requests.num_running:
            return AdminReply(False, "it is paused already, so nothing that runs can end: continue it first")
        if drains:
            self._service.tell(PauseArrivals())
            if not await self._service.until(lambda: requests.num_running == 0, self._timing.weight_drain_s):
                self._service.tell(Resume())
                return AdminReply(False, f"{requests.num_running} requests were still running; not paused")
        self._service.tell(Pause(mode))
        if mode == "abort":
            await self.abort_requests("", True)
        return await self._operator.operate(PauseGeneration(mode=mode))

    async def continue_generation(self) -> AdminReply:
        """The nodes first, so that what is dispatched then finds none paused."""
        reply = await self._operator.operate(ContinueGeneration())
        self._service.tell(Resume())
        return reply

    async def assert_peer_death(self, incarnation: str) -> AdminReply:
        """All decode nodes must have heard it, but one that is silent: it may still find out by itself."""
        nodes = self._state.nodes
        node = nodes.get(incarnation)
        if node is not None and nodes.healthy(node):
            return AdminReply(False, f"{incarnation} is alive: it answers at {node.entry.url}")
        urls = {node.entry.url for node in nodes if node.entry.role == "decode"}
        links = {url: link for url, link in self._service.links().items() if url in urls}
        answers = await ask_all(links, lambda link: link.assert_peer_death(incarnation))
        if not urls:
            return AdminReply(False, "no decode node is registered")
        if missing := urls - links.keys():
            return AdminReply(False, f"these decode nodes are not connected: {', '.join(sorted(missing))}")
        return AdminReply(all(answer.success for answer in answers), "; ".join(map(str, answers)))


class SessionCalls:
    """Implements `Sessions` of `pdserve.api.generation`."""

    def __init__(self, service: RouterService, operator: ClusterOperator, clock: Callable[[], float]) -> None:
        self._state = service.state
        self._operator = operator
        self._clock = clock

    def open_session(self, session_id: str, capacity: int, idle_timeout_s: float | None) -> str:
        return self._state.open_session(session_id, capacity, idle_timeout_s, self._clock())

    async def close_session(self, session_id: str) -> AdminReply:
        """A decode node that does not hear it lets go when the session was idle for too long."""
        if not self._state.sessions.close(session_id):
            return AdminReply(False, f"there is no session {session_id!r}")
        await self._operator.operate(CloseSession(session_id=session_id))
        return AdminReply(True, "closed")

    def begin_turn(self, params: TurnParams, request_id: str, new_ids: tuple[int, ...]) -> SessionTurn:
        return self._state.sessions.begin(params, request_id, new_ids, self._clock())

    def finish_turn(self, turn: SessionTurn, output_ids: tuple[int, ...]) -> None:
        self._state.sessions.finish(turn, output_ids, self._clock())
