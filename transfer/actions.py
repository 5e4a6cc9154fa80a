"""What the two state machines of the hand-off ask of the loop that runs them, and what they tell it.

`PrefillRooms` and `DecodeRooms` do no I/O: every call returns a list of these, to be executed in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ..messages.memory_region import MemoryRegion
from ..messages.node import FailureCode
from ..messages.peer import FirstToken, HandoffDone, PeerToDecode, PeerToPrefill, PrefillRequest, RoomId
from .copy_plan import Run

# ---- from PrefillRooms ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendToDecode:
    """Send on a control link, named as the ROUTER socket names it. Never blocks; a dead link drops it."""

    link: bytes
    message: PeerToDecode


@dataclass(frozen=True, slots=True)
class MeetPeer:
    """`Mover.first_contact`: now, the peer has just proved to be alive."""

    handle: int
    region: MemoryRegion
    rank: int = 0  # of ours, whose mover is asked; so below


@dataclass(frozen=True, slots=True)
class SubmitWrite:
    """`Mover.submit`."""

    handle: int
    region: MemoryRegion
    run: Run
    rank: int = 0


@dataclass(frozen=True, slots=True)
class CancelWrites:
    """`Mover.cancel`, of every rank: each knows its own."""

    handles: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DisconnectPeer:
    """`Mover.disconnect`: nothing is outstanding to this region any more."""

    region: MemoryRegion
    rank: int = 0


@dataclass(frozen=True, slots=True)
class AdmitRoom:
    """A room was opened: put the request into the queue."""

    request: PrefillRequest


@dataclass(frozen=True, slots=True)
class ReleaseRoom:
    """The room is over for the scheduler: stop computing it and unlock its source pages, now.

    Exactly one follows every AdmitRoom. `completed`: every page is in place on decode. Otherwise writes may
    still read the pages; what they carry lands in decode's quarantine, so the pages may be reused.
    `is_aborted`: decode needs the room no more, as when the first token was the last; no failure.
    """

    room: RoomId
    completed: bool
    reason: str = ""
    is_aborted: bool = False


PrefillAction: TypeAlias = (
    SendToDecode | MeetPeer | SubmitWrite | CancelWrites | DisconnectPeer | AdmitRoom | ReleaseRoom
)

# ---- from DecodeRooms -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenLink:
    """Connect a *new* DEALER socket to this prefill node; each epoch has its own."""

    address: str
    epoch: int


@dataclass(frozen=True, slots=True)
class CloseLink:
    """Close the epoch's socket and drop what it has not sent."""

    address: str
    epoch: int


@dataclass(frozen=True, slots=True)
class SendToPrefill:
    address: str
    message: PeerToPrefill


@dataclass(frozen=True, slots=True)
class PeerReady:
    """The pair may be used from now on."""

    address: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The pair may not be used any more. RoomEnded came before it for each of its open rooms."""

    address: str
    incarnation: str
    reason: str


@dataclass(frozen=True, slots=True)
class FirstTokenArrived:
    room: RoomId
    message: FirstToken


@dataclass(frozen=True, slots=True)
class HandoffComplete:
    """All bytes are in place and the room is closed: its pages are the request's own."""

    room: RoomId
    message: HandoffDone


@dataclass(frozen=True, slots=True)
class RoomEnded:
    """The room failed. Its exposed pages are free now, or `quarantined` until PagesReleased."""

    room: RoomId
    code: FailureCode
    reason: str
    retriable: bool
    quarantined: bool


@dataclass(frozen=True, slots=True)
class PagesReleased:
    """No write can reach these pages any more. Ends the quarantine of a failed or aborted room."""

    room: RoomId
    pages: tuple[int, ...]


DecodeAction: TypeAlias = (
    OpenLink
    | CloseLink
    | SendToPrefill
    | PeerReady
    | PeerLost
    | FirstTokenArrived
    | HandoffComplete
    | RoomEnded
    | PagesReleased
)
