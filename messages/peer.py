"""The control messages between a decode node and a prefill node: handshake, rooms, liveness.

Decode connects and leads. A *room* is one attempt at one hand-off; an *epoch* is one connection of a pair.
KV pages themselves do not travel here: prefill writes them one-sided into decode's memory.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from .bounds import (
    MAX_PAGES,
    Count,
    Name,
    Names,
    Number,
    Pages,
    Seconds,
    Text,
    Unsigned64,
    WorldSize,
)
from .kv_layout import KVLayout
from .memory_region import MemoryRegion
from .node import FailureCode
from .report import NOTHING_TOLD, PromptReport, SampledToken
from .timeline import Spans
from .work import Work

PROTOCOL_VERSION = 5


class RoomId(msgspec.Struct, frozen=True, array_like=True):
    """One attempt at one hand-off. ``counter`` only grows within a decode incarnation."""

    decode_incarnation: Name
    counter: Number


class PeerIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What both sides of a pair must agree on before any hand-off."""

    incarnation: Name  # uuid per start of the process
    protocol_version: Number
    model_fingerprint: Name
    weight_version: Name
    update_id: Name = ""  # of the update that these weights came with; empty: the node started with them
    layout: KVLayout  # of all heads; a rank's pool has `layout.of_rank(tp_size)`
    tp_size: WorldSize  # may differ between the two
    # With --deterministic: a digest of what the node's processor and threads make of given products; nodes
    # that compute with the same bits have the same. Empty without.
    arithmetic: Name = ""
    verifies_pages: bool = False  # decode only
    backend: Name  # "mooncake" | "nixl" | "shm"
    transport: Name  # "tcp" | "rdma" | "shm"


# ---- decode to prefill ------------------------------------------------------------------------------


class PeerHello(msgspec.Struct, frozen=True, kw_only=True, tag="peer_hello"):
    """Opens an epoch. Answered by PeerWelcome or PeerRefused."""

    epoch: Number
    identity: PeerIdentity
    regions: Annotated[tuple[MemoryRegion, ...], Meta(max_length=2**15)]  # of each rank
    num_pages: Count  # of each rank's pool: a page has the same number in all of them


class PeerPing(msgspec.Struct, frozen=True, kw_only=True, tag="peer_ping"):
    epoch: Number
    seq: Number


class ContactPong(msgspec.Struct, frozen=True, kw_only=True, tag="contact_pong"):
    """Answers ContactPing: decode is alive now, so prefill's engine may meet it."""

    epoch: Number


class PrefillRequest(msgspec.Struct, frozen=True, kw_only=True, tag="prefill_request"):
    """Everything prefill needs, in one message; the destination pages are already reserved."""

    room: RoomId
    epoch: Number
    request_id: Name
    attempt: Number
    work: Work  # prefill samples the first token of each of its choices
    dest_pages: Pages  # one per page of prompt and kept output, in order
    num_cached_tokens: Count  # leading tokens (whole pages) that decode already holds
    weight_version: Name
    deadline_s: Seconds  # remaining seconds
    digest_pages: Pages = ()  # indices into dest_pages: HandoffDone carries a digest of each


class AbortRoom(msgspec.Struct, frozen=True, kw_only=True, tag="abort_room"):
    """Repeated by decode until Drained."""

    room: RoomId
    epoch: Number


# ---- prefill to decode ------------------------------------------------------------------------------


class ContactPing(msgspec.Struct, frozen=True, kw_only=True, tag="contact_ping"):
    """Asks decode to prove that it is alive right before the first contact of the transfer engines."""

    epoch: Number


class PeerWelcome(msgspec.Struct, frozen=True, kw_only=True, tag="peer_welcome"):
    """The handshake and the first contact are done: the pair is ready."""

    epoch: Number
    identity: PeerIdentity
    contact_s: Seconds  # how long the first 8-byte write took
    settle_s: Seconds  # bytes of a failed write may still land for this long
    transfer_addresses: Names = ()  # host:port of every rank's transfer engine, where it has one


class PeerRefused(msgspec.Struct, frozen=True, kw_only=True, tag="peer_refused"):
    epoch: Number
    reason: Text  # one that a person can act on
    code: FailureCode = "peer_lost"  # how rooms end that were on their way
    update_id: Name = ""  # of prefill's identity: what it serves is decided, for decode too


class PeerPong(msgspec.Struct, frozen=True, kw_only=True, tag="peer_pong"):
    epoch: Number
    seq: Number
    busy_until_s: Seconds = 0.0  # a long hold is announced: no suspicion for this many seconds
    unix_s: Seconds = 0.0  # prefill's clock when it was sent


class FirstToken(msgspec.Struct, frozen=True, kw_only=True, tag="first_token"):
    """Sent as soon as it is sampled, while the last pages may still be in flight."""

    room: RoomId
    epoch: Number
    weight_version: Name  # that computed it, and the pages
    tokens: Annotated[tuple[SampledToken, ...], Meta(max_length=2**15)]  # one per choice
    report: PromptReport = NOTHING_TOLD
    spans: Spans = ()


class HandoffDone(msgspec.Struct, frozen=True, kw_only=True, tag="handoff_done"):
    """Every write is in place. Implies Drained(clean)."""

    room: RoomId
    epoch: Number
    num_bytes: Count
    spans: Spans = ()  # "handoff": first write to last byte; "wire": of each chunk
    # One for each of the request's digest_pages.
    digests: Annotated[tuple[Unsigned64, ...], Meta(max_length=MAX_PAGES)] = ()


class RoomBusy(msgspec.Struct, frozen=True, kw_only=True, tag="room_busy"):
    """Prefill's short queue is full; nothing was written. Implies Drained(clean). No failure."""

    room: RoomId
    epoch: Number


class RoomFailed(msgspec.Struct, frozen=True, kw_only=True, tag="room_failed"):
    """The room ended on prefill. ``retriable`` false: the request itself is at fault.

    ``code`` "version_skew" costs no attempt. Drained follows when nothing will be written any more.
    """

    room: RoomId
    epoch: Number
    reason: Text
    code: FailureCode
    retriable: bool


class Drained(msgspec.Struct, frozen=True, kw_only=True, tag="drained"):
    """Prefill will submit nothing more for this room.

    ``clean``: every write that was submitted is in place, or none was. Otherwise bytes already sent may
    still land for at most the backend's ``settle_s``.
    """

    room: RoomId
    epoch: Number
    clean: bool


PeerToPrefill: TypeAlias = PeerHello | PeerPing | ContactPong | PrefillRequest | AbortRoom
PeerToDecode: TypeAlias = (
    ContactPing
    | PeerWelcome
    | PeerRefused
    | PeerPong
    | FirstToken
    | HandoffDone
    | RoomBusy
    | RoomFailed
    | Drained
)
