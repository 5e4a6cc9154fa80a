"""The router's process around `RouterState`: turns what happens into events, and carries out the actions.

A request here: `generate` tells of its arrival and waits for its first `Dispatch`; what nodes send is told as
it comes, and delivered to the request's reader; a reader that leaves is told of. One timer ticks when the
state is due.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

from ..api.generation import GenerateSpec, GenerationInfo
from ..links.entry_lookup import EntryLookup, NoNodeError
from ..links.node_calls import NodeCalls, NodeUnavailableError
from ..messages.node import ClientToNode
from ..runtime.containment import Containment
from .connector import Connector
from .events import (
    Action,
    Arrival,
    CloseLink,
    Deliver,
    Dispatch,
    End,
    Event,
    Fail,
    Found,
    LinkLost,
    LinkRefused,
    Listen,
    Log,
    LookUp,
    NotFound,
    OpenLink,
    Ping,
    Pinged,
    PingUnanswered,
    Ponged,
    Send,
    Sent,
    ShutDown,
    Tick,
)
from .generation import RoutedGeneration
from .state import RouterState

log = logging.getLogger(__name__)

SHORTEST_SLEEP_S = 0.001
WAIT_POLL_S = 0.02


@dataclass(slots=True, eq=False)
class _Connection:
    link: NodeCalls
    ping: asyncio.Task[None] | None = None


class RouterService:
    """Implements `Generator` of `pdserve.api.generation`. Make it in a running loop.

    `lease_s`: a ping that is not answered for so long never is.
    """

    def __init__(
        self,
        state: RouterState,
        *,
        connect: Connector,
        lookup: EntryLookup,
        lease_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.state = state
        self._connect = connect
        self._lookup = lookup
        self._lease_s = lease_s
        self._clock = clock
        self._generations: dict[str, RoutedGeneration] = {}  # by request id
        self._connections: dict[str, _Connection] = {}  # by incarnation
        self._containment = Containment()
        self._wakes_at = -math.inf  # the timer; it is awake until then
        self._is_due_sooner = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.crashed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the exception of a background task that failed: the process must end."""

    # ---- process life ---------------------------------------------------------------------------

    def start(self) -> None:
        self.spawn(self._tick())

    async def close(self) -> None:
        self.tell(ShutDown())
        for incarnation in list(self._connections):
            self._close_link(incarnation)
        for task in self._tasks:
            if not task.get_name().startswith("close "):
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str | None = None) -> asyncio.Task[None]:
        """A background task; its failure is the process's failure, told by ``crashed``."""
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.critical("a task of the router failed", exc_info=error)
        if not self.crashed.done():
            self.crashed.set_exception(error)

    async def _tick(self) -> None:
        while True:
            self.tell(Tick())
            while (wait_s := self.state.due_at - self._clock()) > 0:
                self._wakes_at = self.state.due_at
                self._is_due_sooner.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(SHORTEST_SLEEP_S, wait_s)):
                        await self._is_due_sooner.wait()
            await asyncio.sleep(0)

    # ---- Generator ------------------------------------------------------------------------------

    def check_wait(self, client: str) -> None:
        self.state.requests.check_wait(client, self._clock())

    async def generate(self, spec: GenerateSpec, client: str = "") -> RoutedGeneration:
        """Returns once the request is dispatched. Raises RequestError when it is refused or cannot be."""
        info = GenerationInfo(num_attempts=0)
        actions = self.state.handle(Arrival(spec, info, client), self._clock())
        generation = RoutedGeneration(spec.request_id, info, self.tell)
        self._generations[spec.request_id] = generation
        self._carry_out(actions)
        try:
            await generation.dispatched
        except asyncio.CancelledError:
            generation.cancel()
            raise
        return generation

    # ---- for the parts that coordinate nodes ----------------------------------------------------

    def tell(self, event: Event) -> None:
        """Raises RequestError where `RouterState.handle` does."""
        self._carry_out(self.state.handle(event, self._clock()))

    def links(self) -> Mapping[str, NodeCalls]:
        """url -> link of every node that is connected."""
        return {
            node.entry.url: self._connections[node.incarnation].link
            for node in self.state.nodes
            if node.incarnation in self._connections
        }

    async def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Whether it has come true in time."""
        deadline = self._clock() + timeout_s
        while not condition():
            if self._clock() >= deadline:
                return False
            await asyncio.sleep(WAIT_POLL_S)
        return True

    async def hears(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Whether what the nodes say of themselves meets it in time; they are asked at once, and often."""
        self.tell(Listen(is_on=True))
        try:
            return await self.until(condition, timeout_s)
        finally:
            self.tell(Listen(is_on=False))

    # ---- actions --------------------------------------------------------------------------------

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Deliver(request_id, delta):
                    self._generations[request_id].push(delta)
                case Dispatch(attempt, message):
                    self._send(attempt.pair.decode, message)
                    self._generations[attempt.request_id].mark_dispatched()
                    self.tell(Sent(attempt.request_id, attempt.number))
                case End(request_id):
                    self._generations.pop(request_id).end()
                case Fail(request_id, error):
                    self._generations.pop(request_id).fail(error)
                case Send(incarnation, message):
                    self._send(incarnation, message)
                case Ping(incarnation):
                    if (connection := self._connections.get(incarnation)) is not None:
                        connection.ping = self.spawn(self._ping(incarnation, connection.link))
                case OpenLink(incarnation, address):
                    self._open_link(incarnation, address)
                case CloseLink(incarnation):
                    self._close_link(incarnation)
                case LookUp(url):
                    self.spawn(self._look_up(url))
                case Log(level, text):
                    log.log(level, "%s", text)
                case _:
                    assert_never(action)
        if self.state.due_at < self._wakes_at:
            self._is_due_sooner.set()

    def _send(self, incarnation: str, message: ClientToNode) -> None:
        """What cannot be sent is lost, as on the way: the loss of the link is told apart."""
        if (connection := self._connections.get(incarnation)) is not None:
            with contextlib.suppress(NodeUnavailableError):
                connection.link.send(message)

    def _open_link(self, incarnation: str, address: str) -> None:
        try:
            link = self._connect(
                address,
                on_stream=self.tell,
                on_lost=lambda reason: self.tell(LinkLost(incarnation, reason)),
            )
        except NodeUnavailableError as error:
            self.tell(LinkRefused(incarnation, str(error)))
        else:
            self._connections[incarnation] = _Connection(link)

    def _close_link(self, incarnation: str) -> None:
        connection = self._connections.pop(incarnation)
        if connection.ping is not None:
            connection.ping.cancel()
        self.spawn(connection.link.close(), name=f"close {incarnation}")

    async def _ping(self, incarnation: str, link: NodeCalls) -> None:
        self.tell(Pinged(incarnation))
        try:
            pong = await link.ping(self._lease_s)
        except NodeUnavailableError as error:
            log.debug("%s", error)
            self.tell(PingUnanswered(incarnation, str(error)))
        else:
            self.tell(Ponged(incarnation, pong))

    async def _look_up(self, url: str) -> None:
        with self._containment.around(f"the entry of {url}", lambda why: self.tell(NotFound(url, why))):
            try:
                entry = await self._lookup(url)
            except NoNodeError as error:
                self.tell(NotFound(url, str(error)))
            else:
                self.tell(Found(url, entry))
