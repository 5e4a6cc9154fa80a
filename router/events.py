"""What happens to a router, and what it then does: the values that `RouterState` takes and gives.

A node is named by its incarnation, a request by its id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ..api.generation import ChoiceDelta, GenerateSpec, GenerationInfo, UpdateMode
from ..messages.node import (
    AttemptFailed,
    ClientToNode,
    GenerateRequest,
    NodeEntry,
    Pong,
    TokenOutputs,
)
from ..runtime.errors import RequestError
from ..runtime.pause_gate import PauseMode
from .ledger import Attempt

# ---- events: of requests --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrival:
    """A new request. `info` is its reader's, and fills up while it runs; clients (API keys) take turns."""

    spec: GenerateSpec
    info: GenerationInfo
    client: str = ""


@dataclass(frozen=True, slots=True)
class Sent:
    """The message that opens this attempt has been sent just now."""

    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class ChoiceStopped:
    """Its reader wants no more of this choice."""

    request_id: str
    choice: int


@dataclass(frozen=True, slots=True)
class ReaderLeft:
    request_id: str


@dataclass(frozen=True, slots=True)
class Abort:
    """Each ends with finish reason "abort", behind all tokens that nodes have of it."""

    request_ids: tuple[str, ...]


# ---- events: of nodes -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Registered:
    """A node says that it is there, or a person says so (`by_hand`)."""

    entry: NodeEntry
    by_hand: bool = False


@dataclass(frozen=True, slots=True)
class TakenOut:
    """The node at this URL is to get no new work, and to be forgotten once what it works on has ended."""

    url: str


@dataclass(frozen=True, slots=True)
class Found:
    """A `LookUp` was answered."""

    url: str
    entry: NodeEntry


@dataclass(frozen=True, slots=True)
class NotFound:
    url: str
    reason: str


@dataclass(frozen=True, slots=True)
class LinkRefused:
    """`OpenLink` failed at once: the address is none."""

    incarnation: str
    reason: str


@dataclass(frozen=True, slots=True)
class LinkLost:
    """It ended by itself."""

    incarnation: str
    reason: str


@dataclass(frozen=True, slots=True)
class Pinged:
    """A ping leaves just now."""

    incarnation: str


@dataclass(frozen=True, slots=True)
class Ponged:
    incarnation: str  # who was asked
    pong: Pong


@dataclass(frozen=True, slots=True)
class PingUnanswered:
    """For a whole lease."""

    incarnation: str
    reason: str


# ---- events: of operators, and of time ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing goes, retries included, and no deadline runs out."""

    mode: PauseMode


@dataclass(frozen=True, slots=True)
class PauseArrivals:
    """New requests wait; those that were dispatched before go on."""


@dataclass(frozen=True, slots=True)
class Resume:
    """The end of both."""


@dataclass(frozen=True, slots=True)
class Hold:
    """New requests wait for other weights, and running ones do as the mode says."""

    mode: UpdateMode


@dataclass(frozen=True, slots=True)
class Release:
    """The end of a `Hold`."""


@dataclass(frozen=True, slots=True)
class CachesDropped:
    """What nodes cached is gone."""


@dataclass(frozen=True, slots=True)
class NodesStandStill:
    """They may be silent for as long as they load and swap weights: nobody is suspected until `NodesMove`."""


@dataclass(frozen=True, slots=True)
class NodesMove:
    pass


@dataclass(frozen=True, slots=True)
class Listen:
    """Something waits for what nodes will say of themselves, or (`is_on` False) nothing does any more."""

    is_on: bool


@dataclass(frozen=True, slots=True)
class ShutDown:
    """No request is accepted any more, and those that run fail."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: `RouterState.due_at` is reached."""


# Those that come with every request, and every second.
FrequentEvent: TypeAlias = (
    Arrival | Sent | TokenOutputs | AttemptFailed | ChoiceStopped | ReaderLeft | Pinged | Ponged | Tick
)
RareEvent: TypeAlias = (
    Abort
    | Registered
    | TakenOut
    | Found
    | NotFound
    | LinkRefused
    | LinkLost
    | PingUnanswered
    | Pause
    | PauseArrivals
    | Resume
    | Hold
    | Release
    | CachesDropped
    | NodesStandStill
    | NodesMove
    | Listen
    | ShutDown
)
Event: TypeAlias = FrequentEvent | RareEvent

# ---- actions: for readers -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Deliver:
    request_id: str
    delta: ChoiceDelta


@dataclass(frozen=True, slots=True)
class End:
    """The last of this request: every choice has finished, or its reader has left."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Fail:
    """The last of this request."""

    request_id: str
    error: RequestError


# ---- actions: for nodes ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send it to the attempt's decode node, and say `Sent`. Whoever waits for the request's begin goes on."""

    attempt: Attempt
    message: GenerateRequest


@dataclass(frozen=True, slots=True)
class Send:
    incarnation: str
    message: ClientToNode


@dataclass(frozen=True, slots=True)
class Ping:
    """Say `Pinged` as it leaves. `Ponged` follows, or after a lease `PingUnanswered`, if the link lasts."""

    incarnation: str


@dataclass(frozen=True, slots=True)
class OpenLink:
    """`LinkRefused` follows when this cannot be, or `LinkLost` once it ends."""

    incarnation: str
    address: str


@dataclass(frozen=True, slots=True)
class CloseLink:
    """Nothing is heard of it any more."""

    incarnation: str


@dataclass(frozen=True, slots=True)
class LookUp:
    """Ask this URL for its /node_entry: `Found` or `NotFound` follows."""

    url: str


@dataclass(frozen=True, slots=True)
class Log:
    level: int  # of `logging`
    text: str


Action: TypeAlias = Deliver | End | Fail | Dispatch | Send | Ping | OpenLink | CloseLink | LookUp | Log
