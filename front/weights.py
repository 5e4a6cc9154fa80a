"""Updates and reads of one node's weights, asked by HTTP of this node alone."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

from ..api.control.tensor_bodies import in_parts
from ..api.generation import AdminReply, GroupReply, UpdateMode
from ..links.entry_lookup import EntryLookup, NoNodeError
from ..messages.weights import (
    STAGE_PART_BYTES,
    FromDisk,
    FromGpuMemory,
    FromGroup,
    FromPeer,
    FromServed,
    FromSharedMemory,
    FromTensors,
    MemoryTag,
    UpdateGroupSpec,
    WeightChecksReply,
    WeightSource,
    WeightsReply,
    of_one_node,
)
from .scheduler_link import SchedulerLink


class FrontWeights:
    """The weights of the one node behind this front, for `WeightCalls`."""

    def __init__(self, link: SchedulerLink, url: str, lookup: EntryLookup) -> None:
        self._link = link
        self._url = url
        self._lookup = lookup

    async def update_weights_from_disk(
        self, model_path: str, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        return await self._update(_new_update(), FromDisk(model_path=model_path), weight_version, mode)

    async def update_weights_from_tensor(
        self, body: AsyncIterator[bytes], weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        update_id, offset, refusal = _new_update(), 0, ""
        client = self._link.client
        async for part in in_parts(body, STAGE_PART_BYTES):
            if not refusal:  # otherwise read to its end, so that the caller hears the reason
                staged = await client.stage_weights(update_id, offset, part)
                refusal = "" if staged.success else staged.message
            offset += len(part)
        if refusal:
            await client.discard_weights(update_id)
            return AdminReply(False, refusal)
        return await self._update(update_id, FromTensors(num_bytes=offset), weight_version, mode)

    async def update_weights_from_distributed(
        self, source: FromGroup, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        return await self._update(_new_update(), source, weight_version, mode)

    async def update_weights_from_ipc(
        self, source: FromSharedMemory | FromGpuMemory, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        return await self._update(_new_update(), source, weight_version, mode)

    async def update_weights_from_peer(
        self, peer_url: str, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        try:
            entry = await self._lookup(peer_url)
        except NoNodeError as error:
            return AdminReply(False, str(error))
        version = weight_version or entry.weight_version
        return await self._update(_new_update(), FromPeer(zmq_address=entry.zmq_address), version, mode)

    async def update_weight_version(self, weight_version: str, mode: UpdateMode) -> AdminReply:
        return await self._update(_new_update(), FromServed(), weight_version, mode)

    async def save_model(self, target: str, *, is_remote: bool, max_shard_bytes: int) -> AdminReply:
        reply = await self._link.client.save_weights(
            target, is_remote=is_remote, max_shard_bytes=max_shard_bytes
        )
        return AdminReply(reply.success, reply.message or f"{self._url} has saved {target}")

    async def init_weights_update_group(self, group: UpdateGroupSpec, rank_offset: int) -> GroupReply:
        reply = await self._link.client.join_update_group(group, rank_offset)
        return GroupReply(reply.success, reply.message, {self._url: rank_offset})

    async def destroy_weights_update_group(self, name: str) -> AdminReply:
        reply = await self._link.client.leave_update_group(name)
        return AdminReply(reply.success, reply.message)

    async def release_memory_occupation(self, tags: tuple[MemoryTag, ...]) -> AdminReply:
        reply = await self._link.client.release_memory(tags)
        return AdminReply(reply.success, reply.message)

    async def resume_memory_occupation(self, tags: tuple[MemoryTag, ...]) -> AdminReply:
        reply = await self._link.client.resume_memory(tags)
        return AdminReply(reply.success, reply.message)

    async def released_memory(self) -> frozenset[MemoryTag]:
        reply = await self._link.client.resume_memory((), if_released=True)
        return frozenset(reply.released)

    async def weights_by_name(self, name: str, truncate_size: int) -> dict[str, WeightsReply]:
        return {self._url: await self._link.client.get_weights(name, truncate_size)}

    async def check_weights(self) -> dict[str, WeightChecksReply]:
        return {self._url: await self._link.client.check_weights()}

    async def _update(
        self, update_id: str, source: WeightSource, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        """Busy, it says no: what runs here belongs to routers, which alone can let it end or go on later."""
        client = self._link.client
        prepared = await client.prepare_weights(update_id, source, weight_version or update_id)
        if not prepared.success:
            return AdminReply(False, prepared.message)
        if mode == "abort":
            await client.abort(all_requests=True)
        committed = await client.commit_weights(update_id)
        if not committed.success:
            await client.discard_weights(update_id)
        return AdminReply(committed.success, committed.message)


def _new_update() -> str:
    """Nobody but this node has it."""
    return of_one_node(uuid.uuid4().hex)
