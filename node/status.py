"""Who this node is, for everyone who asks: its entry in the roster, its model, its flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import msgspec

from ..messages.kv_layout import KVLayout
from ..messages.memory_region import MemoryRegion
from ..messages.node import ModelInfo, NodeEntry, NodeLoad, Pong, RankInfo, ServerInfoReply, renewed
from ..messages.peer import PeerIdentity
from ..runtime.config import SECRET_FIELDS, NodeConfig


def announce(status: NodeStatus, identity: PeerIdentity, *, is_released: bool) -> PeerIdentity:
    """The node's true identity once memory was released or is back, which makes it a new incarnation."""
    incarnation = identity.incarnation
    if not is_released:
        incarnation = renewed(incarnation)
    status.set_released(is_released=is_released, incarnation=incarnation)
    return msgspec.structs.replace(identity, incarnation=incarnation)


class NodeStatus:
    """Holds what is said of this node, and renews it when its weights change."""

    def __init__(
        self,
        entry: NodeEntry,
        model: ModelInfo,
        config: NodeConfig,
        layout: KVLayout,
        transport: str,
        ranks: tuple[RankInfo, ...] = (),
    ) -> None:
        self.entry = entry
        self.model = model
        self._layout = layout
        self._transport = transport
        self._ranks = ranks
        self._is_released = False
        self._config = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(config).items()
            if name not in SECRET_FIELDS
        }

    def shown(self, identity: PeerIdentity) -> PeerIdentity:
        """What peers are told: a node whose memory is released has no model that another one could have."""
        return msgspec.structs.replace(identity, model_fingerprint=self._fingerprint)

    def set_released(self, *, is_released: bool, incarnation: str) -> None:
        self._is_released = is_released
        self.entry = msgspec.structs.replace(
            self.entry, incarnation=incarnation, model_fingerprint=self._fingerprint
        )

    def set_regions(self, regions: Sequence[MemoryRegion]) -> None:
        """Of each rank: its memory was registered again."""
        self._ranks = tuple(
            msgspec.structs.replace(rank, session=region.session)
            for rank, region in zip(self._ranks, regions, strict=True)
        )

    @property
    def _fingerprint(self) -> str:
        if not self._is_released:
            return self.model.model_fingerprint
        # Of each node another: two that have none must not take theirs for the same.
        return f"none, the memory of {self.entry.incarnation} is released"

    @property
    def weight_version(self) -> str:
        return self.model.weight_version

    def renew(
        self, model_path: str, model_fingerprint: str, weight_version: str, update_id: str = ""
    ) -> None:
        """Other weights serve from here on."""
        self.model = msgspec.structs.replace(
            self.model,
            model_path=model_path,
            model_fingerprint=model_fingerprint,
            weight_version=weight_version,
        )
        self.entry = msgspec.structs.replace(
            self.entry,
            model_fingerprint=self._fingerprint,
            weight_version=weight_version,
            update_id=update_id,
        )

    def pong(
        self,
        call_id: int,
        load: NodeLoad,
        *,
        ready_peers: Sequence[str],
        refused_peers: Mapping[str, str],
        is_draining: bool,
        quarantined_pages: Mapping[str, int] | None = None,
        unix_s: float = 0.0,
    ) -> Pong:
        return Pong(
            call_id=call_id,
            entry=self.entry,
            load=load,
            ready_peers=tuple(ready_peers),
            refused_peers=dict(refused_peers),
            quarantined_pages=dict(quarantined_pages or {}),
            draining=is_draining,
            unix_s=unix_s,
        )

    def server_info(self, call_id: int, load: NodeLoad) -> ServerInfoReply:
        return ServerInfoReply(
            call_id=call_id,
            entry=self.entry,
            model=self.model,
            config=self._config,
            load=load,
            kv_layout=self._layout,
            transport=self._transport,
            ranks=self._ranks,
        )
