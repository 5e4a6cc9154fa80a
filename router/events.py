"""What happens to a router, and what it then does: the values that `RouterState` takes and gives.

A node is named by its incarnation, a request by its id. They are structs because one is made for every token.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

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


class Arrival(msgspec.Struct, frozen=True):
    """A new request. `info` is its reader's, and fills up while it runs; clients (API keys) take turns."""

    spec: GenerateSpec
    info: GenerationInfo
    client: str = ""


class Sent(msgspec.Struct, frozen=True):
    """The message that opens this attempt has been sent just now."""

    request_id: str
    attempt: int


class ChoiceStopped(msgspec.Struct, frozen=True):
    """Its reader wants no more of this choice."""

    request_id: str
    choice: int


class ReaderLeft(msgspec.Struct, frozen=True):
    request_id: str


class Abort(msgspec.Struct, frozen=True):
    """Each ends with finish reason "abort", behind all tokens that nodes have of it."""

    request_ids: tuple[str, ...]


# ---- events: of nodes -----------------------------------------------------------------------------------


class Registered(msgspec.Struct, frozen=True):
    """A node says that it is there, or a person says so (`by_hand`)."""

    entry: NodeEntry
    by_hand: bool = False


class TakenOut(msgspec.Struct, frozen=True):
    """The node at this URL is to get no new work, and to be forgotten once what it works on has ended."""

    url: str


class Found(msgspec.Struct, frozen=True):
    """A `LookUp` was answered."""

    url: str
    entry: NodeEntry


class NotFound(msgspec.Struct, frozen=True):
    url: str
    reason: str


class LinkRefused(msgspec.Struct, frozen=True):
    """`OpenLink` failed at once: the address is none."""

    incarnation: str
    reason: str


class LinkLost(msgspec.Struct, frozen=True):
    """It ended by itself."""

    incarnation: str
    reason: str


class Pinged(msgspec.Struct, frozen=True):
    """A ping leaves just now."""

    incarnation: str


class Ponged(msgspec.Struct, frozen=True):
    incarnation: str  # who was asked
    pong: Pong


class PingUnanswered(msgspec.Struct, frozen=True):
    """For a whole lease."""

    incarnation: str
    reason: str


# ---- events: of operators, and of time ------------------------------------------------------------------


class Pause(msgspec.Struct, frozen=True):
    """Nothing goes, retries included, and no deadline runs out."""

    mode: PauseMode


class PauseArrivals(msgspec.Struct, frozen=True):
    """New requests wait; those that were dispatched before go on."""


class Resume(msgspec.Struct, frozen=True):
    """The end of both."""


class Hold(msgspec.Struct, frozen=True):
    """New requests wait for other weights, and running ones do as the mode says."""

    mode: UpdateMode


class Release(msgspec.Struct, frozen=True):
    """The end of a `Hold`."""


class CachesDropped(msgspec.Struct, frozen=True):
    """What nodes cached is gone."""


class NodesStandStill(msgspec.Struct, frozen=True):
    """They may be silent for as long as they load and swap weights: nobody is suspected until `NodesMove`."""


class NodesMove(msgspec.Struct, frozen=True):
    pass


class Listen(msgspec.Struct, frozen=True):
    """Something waits for what nodes will say of themselves, or (`is_on` False) nothing does any more."""

    is_on: bool


class ShutDown(msgspec.Struct, frozen=True):
    """No request is accepted any more, and those that run fail."""


class Tick(msgspec.Struct, frozen=True):
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


class Deliver(msgspec.Struct, frozen=True):
    request_id: str
    delta: ChoiceDelta


class End(msgspec.Struct, frozen=True):
    """The last of this request: every choice has finished, or its reader has left."""

    request_id: str


class Fail(msgspec.Struct, frozen=True):
    """The last of this request."""

    request_id: str
    error: RequestError


# ---- actions: for nodes ---------------------------------------------------------------------------------


class Dispatch(msgspec.Struct, frozen=True):
    """Send it to the attempt's decode node, and say `Sent`. Whoever waits for the request's begin goes on."""

    attempt: Attempt
    message: GenerateRequest


class Send(msgspec.Struct, frozen=True):
    incarnation: str
    message: ClientToNode


class Ping(msgspec.Struct, frozen=True):
    """Say `Pinged` as it leaves. `Ponged` follows, or after a lease `PingUnanswered`, if the link lasts."""

    incarnation: str


class OpenLink(msgspec.Struct, frozen=True):
    """`LinkRefused` follows when this cannot be, or `LinkLost` once it ends."""

    incarnation: str
    address: str


class CloseLink(msgspec.Struct, frozen=True):
    """Nothing is heard of it any more."""

    incarnation: str


class LookUp(msgspec.Struct, frozen=True):
    """Ask this URL for its /node_entry: `Found` or `NotFound` follows."""

    url: str


class Log(msgspec.Struct, frozen=True):
    level: int  # of `logging`
    text: str


Action: TypeAlias = Deliver | End | Fail | Dispatch | Send | Ping | OpenLink | CloseLink | LookUp | Log
