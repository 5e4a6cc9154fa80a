"""Updates of weights on all nodes at once, and questions about them: the coordinator of both phases.

1. *Prepare*: every node loads and checks beside the weights that serve. Traffic goes on.
2. New requests wait, running ones end.
3. *Commit*: every node swaps and shakes hands again under the new version; then the requests go on.

Whatever fails before 3 leaves the old weights serving everywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath

from ...api.control.tensor_bodies import in_parts
from ...api.generation import AdminReply, GroupReply, UpdateMode
from ...links.entry_lookup import EntryLookup, NoNodeError
from ...links.node_calls import NodeCalls, NodeUnavailableError
from ...messages.node import CallReply
from ...messages.weights import (
    STAGE_PART_BYTES,
    FromDisk,
    FromGpuMemory,
    FromGroup,
    FromPeer,
    FromServed,
    FromSharedMemory,
    FromTensors,
    KeepWeights,
    MemoryTag,
    UpdateGroupSpec,
    WeightChecksReply,
    WeightSource,
    WeightsReply,
    is_of_cluster,
)
from ...runtime.timing import Timing
from ..events import CachesDropped, Hold, NodesMove, NodesStandStill, Release
from ..registry import NodeRecord
from ..service import RouterService
from .memory_releases import MemoryReleases
from .rejoin import WeightRejoin
from .rollout import (
    NodeAnswer,
    ask_all,
    ask_one,
    commit_all,
    discard_all,
    failures,
    is_not_prepared,
    prepare_all,
)

LOOK_AGAIN_S = 0.2  # for nodes that were started again


@dataclass(frozen=True, slots=True)
class _Update:
    update_id: str
    source: WeightSource
    weight_version: str
    mode: UpdateMode
    links: Mapping[str, NodeCalls]  # of all nodes, by URL
    nodes: frozenset[str]  # their incarnations: one that is started again meanwhile takes no part
    before: frozenset[str]  # the updates that they served


class WeightUpdates:
    """Implements `WeightAdmin` of `pdserve.api.control.weights`.

    One update at a time. It runs to its end even if whoever asked for it leaves: half an update is no
    state to be in."""

    def __init__(
        self,
        timing: Timing,
        *,
        service: RouterService,
        lookup: EntryLookup,
        clock: Callable[[], float],
    ) -> None:
        self._timing = timing
        self._service = service
        self._requests = service.state.requests
        self._registry = service.state.nodes
        self._links = service.links
        self._lookup = lookup
        self._clock = clock
        self._memory = MemoryReleases(timing, service)
        self._rejoin = WeightRejoin(timing, service)
        self._num_alone = 0  # calls that bear no other update beside them
        self._is_committed = False  # the update that runs: it waits for nodes, and needs nothing of them
        self._running: asyncio.Task[AdminReply] | None = None

    async def update_weights_from_disk(
        self, model_path: str, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        version = weight_version or _new_version(PurePath(model_path).name)
        return await self._update_alone(FromDisk(model_path=model_path), version, mode)

    async def update_weights_from_tensor(
        self, body: AsyncIterator[bytes], weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        """The bytes are passed on to all nodes as they come."""
        async with self._alone() as refusal:
            version = weight_version or _new_version("tensors")
            return refusal or await self._update_from_tensors(body, version, mode)

    async def update_weights_from_distributed(
        self, source: FromGroup, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        version = weight_version or _new_version(source.group_name)
        return await self._update_alone(source, version, mode)

    async def update_weights_from_ipc(
        self, source: FromSharedMemory | FromGpuMemory, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        of = source.name if isinstance(source, FromSharedMemory) else "gpu"
        return await self._update_alone(source, weight_version or _new_version(of), mode)

    async def update_weights_from_peer(
        self, peer_url: str, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        known = self._registry.at_url(peer_url)
        try:
            entry = await self._lookup(peer_url) if known is None else known.entry
        except NoNodeError as error:
            return AdminReply(False, str(error))
        source = FromPeer(zmq_address=entry.zmq_address)
        return await self._update_alone(source, weight_version or entry.weight_version, mode)

    async def update_weight_version(self, weight_version: str, mode: UpdateMode) -> AdminReply:
        return await self._update_alone(FromServed(), weight_version, mode)

    async def _update_alone(self, source: WeightSource, weight_version: str, mode: UpdateMode) -> AdminReply:
        """From what every node can reach by itself."""
        async with self._alone() as refusal:
            return refusal or await self._run(uuid.uuid4().hex, source, weight_version, mode, self._links())

    async def _update_from_tensors(
        self, body: AsyncIterator[bytes], weight_version: str, mode: UpdateMode
    ) -> AdminReply:
        update_id, links = uuid.uuid4().hex, self._links()
        offset, reasons = 0, self._why_not(links)
        async for part in in_parts(body, STAGE_PART_BYTES):
            if not reasons:  # otherwise read to its end, so that the client hears the reason
                reasons = failures(
                    await ask_all(
                        links,
                        lambda link, offset=offset, part=part: link.stage_weights(  # type: ignore[misc]
                            update_id, offset, part
                        ),
                    )
                )
            offset += len(part)
        if reasons:
            await discard_all(links, update_id)
            return AdminReply(False, f"the old weights serve on; {reasons}")
        if refusal := self._busy():  # it has begun while this body came, and wins
            await discard_all(links, update_id)
            return refusal
        source = FromTensors(num_bytes=offset)
        return await self._run(update_id, source, weight_version, mode, links)

    async def weights_by_name(self, name: str, truncate_size: int) -> dict[str, WeightsReply]:
        """What every node (by URL) answers; one that does not answer is a reply without success."""
        answers = await ask_all(self._links(), lambda link: link.get_weights(name, truncate_size))
        silent = partial(WeightsReply, call_id=0, success=False)
        return {answer.url: answer.reply or silent(message=answer.message) for answer in answers}

    async def check_weights(self) -> dict[str, WeightChecksReply]:
        """Checksums from every node (by URL); one that does not answer is a reply without success."""
        answers = await ask_all(self._links(), lambda link: link.check_weights())
        silent = partial(WeightChecksReply, call_id=0, success=False)
        return {answer.url: answer.reply or silent(message=answer.message) for answer in answers}

    async def save_model(self, target: str, *, is_remote: bool, max_shard_bytes: int) -> AdminReply:
        """By one node, the first prefill node by URL: all hold the same."""
        links = self._links()
        nodes = sorted(self._registry, key=lambda node: (node.entry.role != "prefill", node.entry.url))
        for url in (node.entry.url for node in nodes if node.entry.url in links):
            answer = await ask_one(
                url,
                links[url],
                lambda link: link.save_weights(target, is_remote=is_remote, max_shard_bytes=max_shard_bytes),
            )
            return AdminReply(answer.success, f"{url} has saved {target}" if answer.success else str(answer))
        return AdminReply(False, "no node is connected")

    async def init_weights_update_group(self, group: UpdateGroupSpec, rank_offset: int) -> GroupReply:
        """Every node takes one rank from `rank_offset` on, prefill nodes first, in the order of their URLs.
        All have joined, or none is left in it."""
        links = self._links()
        if reason := self._why_not(links):
            return GroupReply(False, reason)
        nodes = sorted(self._registry, key=lambda node: (node.entry.role != "prefill", node.entry.url))
        ranks = {node.entry.url: rank_offset + index for index, node in enumerate(nodes)}
        if group.world_size != rank_offset + len(ranks):
            wanted = f"{rank_offset} ranks before the nodes' and {len(ranks)} nodes of one rank each"
            return GroupReply(False, f"world_size is {group.world_size}, but there are {wanted}", ranks)
        answers = await asyncio.gather(
            *(ask_one(url, links[url], partial(_join, group, rank)) for url, rank in ranks.items())
        )
        if reasons := failures(list(answers)):
            joined = {answer.url: links[answer.url] for answer in answers if answer.success}
            await self._leave(joined, group.name)
            return GroupReply(False, reasons, ranks)
        return GroupReply(True, f"{len(ranks)} nodes have joined group {group.name!r}", ranks)

    async def destroy_weights_update_group(self, name: str) -> AdminReply:
        answers = await self._leave(self._links(), name)
        if not answers:
            return AdminReply(False, "no node is connected")
        return AdminReply(not failures(answers), failures(answers) or f"group {name!r} is gone")

    async def _leave(self, links: Mapping[str, NodeCalls], name: str) -> list[NodeAnswer[CallReply]]:
        return await ask_all(links, lambda link: link.leave_update_group(name))

    async def release_memory_occupation(self, tags: tuple[MemoryTag, ...]) -> AdminReply:
        """On all nodes or on none. Running requests end first, and new ones wait until all is resumed."""
        async with self._alone() as refusal:
            links = self._links()
            if refusal is None and (reason := self._why_not(links)):
                refusal = AdminReply(False, reason)
            return refusal or await self._memory.release(tags, links)

    async def resume_memory_occupation(self, tags: tuple[MemoryTag, ...]) -> AdminReply:
        """On every node that has released it."""
        return self._busy() or await self._memory.resume(tags, self._links())

    async def released_memory(self) -> frozenset[MemoryTag]:
        return await self._memory.released(self._links())

    async def keep_together(self) -> None:
        """For ever: nodes that were started again come to the weights of the others, unless an update needs
        them."""
        while True:
            if self._num_alone == int(self._is_committed) and not self._memory.is_released:
                self._rejoin.tick(self._clock())
            await asyncio.sleep(LOOK_AGAIN_S)

    # ---- inside -------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[AdminReply | None]:
        """A node loads one update at a time: all have come to the weights of the others before, and none is
        on its way meanwhile. Yields a refusal where something else is going on."""
        self._num_alone += 1
        try:
            await self._rejoin.settled()
            if self._busy() is None and not self._memory.is_released:
                await self._rejoin.bring_all()
            yield self._busy()
        finally:
            self._num_alone -= 1

    def is_running(self) -> bool:
        return self._running is not None and not self._running.done()

    def _busy(self) -> AdminReply | None:
        if self.is_running():
            return AdminReply(False, "another weight update is running")
        if self._memory.is_moving:
            return AdminReply(False, "memory is being released or resumed")
        return None

    async def _run(
        self,
        update_id: str,
        source: WeightSource,
        weight_version: str,
        mode: UpdateMode,
        links: Mapping[str, NodeCalls],
    ) -> AdminReply:
        records = [node for node in self._registry if node.entry.url in links]
        nodes = frozenset(node.incarnation for node in records)
        before = frozenset(node.entry.update_id for node in records)
        update = _Update(update_id, source, weight_version, mode, links, nodes, before)
        self._running = asyncio.create_task(self._roll_out(update))
        return await asyncio.shield(self._running)

    async def _roll_out(self, update: _Update) -> AdminReply:
        self._service.tell(NodesStandStill())
        keeper = asyncio.create_task(self._keep(update))
        try:
            if reason := self._why_not(update.links):
                return AdminReply(False, reason)
            prepared = await prepare_all(update.links, update.update_id, update.source, update.weight_version)
            if reasons := failures(prepared):
                await self._discard(update)
                return AdminReply(False, f"the old weights serve on; {reasons}")
            if len({answer.message for answer in prepared}) > 1:  # some tensors, and nodes began with others
                await self._discard(update)
                prints = "; ".join(map(str, prepared))
                reason = f"nodes would serve different weights ({prints}): update every tensor"
                return AdminReply(False, f"the old weights serve on; {reason}")
            return await self._swap(update)
        finally:
            keeper.cancel()
            self._service.tell(NodesMove())

    async def _keep(self, update: _Update) -> None:
        """Nodes roll back what they prepared when nobody says for a while that the update goes on."""
        lease_s = self._timing.weight_lease_s
        message = KeepWeights(update_id=update.update_id, lease_s=lease_s)
        while True:
            for link in update.links.values():
                with contextlib.suppress(NodeUnavailableError):
                    link.send(message)
            await asyncio.sleep(lease_s / 6)

    async def _discard(self, update: _Update) -> None:
        await discard_all(update.links, update.update_id)

    async def _swap(self, update: _Update) -> AdminReply:
        self._service.tell(Hold(update.mode))
        try:
            drain_s = self._timing.weight_drain_s
            if not await self._service.until(lambda: self._requests.num_working == 0, drain_s):
                await self._discard(update)
                num_running = self._requests.num_working
                return AdminReply(False, f"{num_running} requests were still running; nothing was changed")
            committed = await commit_all(update.links, update.update_id, self._timing.weight_commit_s)
            if all(map(is_not_prepared, committed)):  # another router's came between on every node
                return AdminReply(False, f"this update changed nothing; {failures(committed)}")
            self._rejoin.committed(update.update_id)
            self._service.tell(CachesDropped())
            self._is_committed = True
            self._service.tell(NodesMove())  # one that is silent from here on is lost
            # A node that was not idle in time swaps by itself when it is.
            await self._service.hears(
                lambda: self._serve(update) or self._is_replaced(update), self._timing.weight_ready_s
            )
            if self._serve(update):
                return AdminReply(True, self._outcome(update))
            if self._is_replaced(update):
                version = update.weight_version
                return AdminReply(
                    False, f"another router's update took the place of weight version {version}"
                )
            if reasons := failures(committed):
                return AdminReply(False, f"{self._outcome(update)}; the update is decided, but {reasons}")
            return AdminReply(False, f"new weights are loaded, but {self._registry.explain_no_pair()}")
        finally:
            self._is_committed = False
            if not self._memory.is_released:
                self._service.tell(Release())

    def _why_not(self, links: Mapping[str, NodeCalls]) -> str:
        if not len(self._registry):
            return "no node is registered"
        silent = [
            node.entry.url
            for node in self._registry
            if not self._registry.healthy(node) or node.entry.url not in links
        ]
        return f"these nodes do not answer: {', '.join(silent)}" if silent else ""

    def _left(self, update: _Update) -> list[NodeRecord]:
        return [node for node in self._registry if node.incarnation in update.nodes]

    def _serve(self, update: _Update) -> bool:
        """All that took part and live do, and requests can go on."""
        left = self._left(update)
        # Not by the version's name, which the update before may have had too.
        everywhere = all(node.entry.update_id == update.update_id for node in left)
        return bool(left) and everywhere and bool(self._registry.ready_pairs() or self._memory.is_released)

    def _is_replaced(self, update: _Update) -> bool:
        """All that took part and live serve newer updates: this one will not come any more."""
        left = self._left(update)
        older = {update.update_id, *update.before}
        return (
            bool(left)
            and all(is_of_cluster(node.entry.update_id) for node in left)
            and not (older & {node.entry.update_id for node in left})
        )

    def _outcome(self, update: _Update) -> str:
        left = self._left(update)
        num_serving = sum(node.entry.update_id == update.update_id for node in left)
        text = f"{num_serving} nodes serve weight version {update.weight_version}"
        if num_lost := len(update.nodes) - len(left):
            text += f", {num_lost} died and read it when started again"
        return text


def _join(group: UpdateGroupSpec, rank: int, link: NodeCalls) -> Awaitable[CallReply]:
    return link.join_update_group(group, rank)


def _new_version(of: str) -> str:
    return f"{of}@{uuid.uuid4().hex[:8]}"
