"""Factories for the messages of a pair: one prefill node, one decode node, pages of 16 tokens."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from pdserve.messages.kv_layout import KVLayout
from pdserve.messages.memory_region import MemoryRegion
from pdserve.messages.peer import (
    PROTOCOL_VERSION,
    PeerHello,
    PeerIdentity,
    PrefillRequest,
    RoomId,
)
from pdserve.messages.report import SampledToken
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.work import Work

LAYOUT = KVLayout(num_kv_heads=2, num_layers=2, page_size=16, head_dim=8, dtype="float32")


@dataclasses.dataclass(frozen=True)
class Factory:
    layout: KVLayout = LAYOUT
    num_pages: int = 64
    token: tuple[SampledToken, ...] = (SampledToken(0, 7),)

    def identity(self, incarnation: str = "P1", **changes: object) -> PeerIdentity:
        identity = PeerIdentity(
            incarnation=incarnation,
            protocol_version=PROTOCOL_VERSION,
            model_fingerprint="model",
            weight_version="w1",
            layout=self.layout,
            tp_size=1,
            backend="mooncake",
            transport="tcp",
        )
        return msgspec.structs.replace(identity, **changes)

    def region(self, session: str = "10.0.0.2:15001") -> MemoryRegion:
        pool_bytes = self.num_pages * self.layout.stride_bytes
        return MemoryRegion(
            session=session,
            address=1 << 20,
            num_bytes=pool_bytes + 4096,
            scratch_address=(1 << 20) + pool_bytes,
        )

    def hello(self, epoch: int = 1, incarnation: str = "D1", **changes: object) -> PeerHello:
        return PeerHello(
            epoch=epoch,
            identity=self.identity(incarnation, **changes),
            regions=(self.region(),),
            num_pages=self.num_pages,
        )

    def request(
        self,
        counter: int = 1,
        *,
        epoch: int = 1,
        incarnation: str = "D1",
        num_tokens: int = 40,
        **changes: object,
    ) -> PrefillRequest:
        request = PrefillRequest(
            room=RoomId(incarnation, counter),
            epoch=epoch,
            request_id=f"r{counter}",
            attempt=1,
            work=Work(prompt_ids=tuple(range(num_tokens)), choices=(0,), sampling=SamplingParams()),
            dest_pages=tuple(range(10, 10 + self.layout.pages_for(num_tokens))),
            num_cached_tokens=0,
            weight_version="w1",
            deadline_s=30.0,
        )
        return msgspec.structs.replace(request, **changes)


@pytest.fixture
def make() -> Factory:
    return Factory()
