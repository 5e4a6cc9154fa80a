"""The messages between a node's scheduler and those who use it: routers and the node's own HTTP front.

A node binds one zmq ROUTER socket; everyone else connects to it by DEALER. Calls carry a ``call_id`` that
the reply repeats. Generation is answered by any number of TokenOutputs, straight to whoever asked.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from .kv_layout import KVLayout
from .operation import InternalStateReply, NodeOperation, ProfileReply
from .sampling import SamplingParams, TokenLogprob
from .timeline import Span
from .weights import (
    CheckWeights,
    CommitWeights,
    DiscardWeights,
    GetWeights,
    JoinUpdateGroup,
    KeepWeights,
    LeaveUpdateGroup,
    MeetInbox,
    MemoryReply,
    OfferInbox,
    OpenWeights,
    PrepareWeights,
    ReadWeights,
    ReleaseMemory,
    ResumeMemory,
    SaveWeights,
    StageWeights,
    WeightBytesReply,
    WeightChecksReply,
    WeightImageReply,
    WeightsReply,
    WeightsWrittenReply,
    WriteWeights,
)

Role: TypeAlias = Literal["prefill", "decode"]


class NodeEntry(msgspec.Struct, frozen=True, kw_only=True):
    """How a node is known in the cluster."""

    url: str  # of its HTTP front: what people write
    role: Role
    incarnation: str
    zmq_address: str  # tcp://host:port of its scheduler
    model_name: str
    model_fingerprint: str
    weight_version: str
    colocated: bool = False  # a decode node that prefills locally
    update_id: str = ""  # of the update that its weights came with; empty: those it started with


class PeerTraffic(msgspec.Struct, frozen=True, kw_only=True):
    """What the writes of a prefill node to one decode node came to."""

    num_bytes: int  # in place, since the peer was first met
    busy_s: float  # time with writes to it outstanding
    bytes_per_s: float  # the rate of the last seconds of that time


class NodeLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A node's load right now; ``/v1/loads`` and pairing read it."""

    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_queued_tokens: int = 0  # prompt tokens accepted and not computed yet
    num_used_pages: int = 0
    num_free_pages: int = 0  # free or evictable
    num_total_pages: int = 0
    page_size: int = 0
    num_locked_pages: int = 0
    num_pinned_pages: int = 0  # on decode: of sessions
    num_reserved_pages: int = 0
    num_exposed_pages: int = 0
    num_quarantined_pages: int = 0
    max_running_requests: int = 0
    num_prompt_tokens_computed: int = 0
    num_prompt_tokens_received: int = 0  # on decode: their KV came from a prefill node
    num_cached_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    peers: dict[str, PeerTraffic] = {}  # prefill: decode incarnation -> what was written to it


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a router must know of the model that a node serves."""

    model_name: str
    model_path: str
    model_type: str
    architectures: tuple[str, ...]
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    weight_version: str
    model_fingerprint: str


# ---- to a node --------------------------------------------------------------------------------------


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """One attempt at (some choices of) one request. Sent to the decode node alone.

    At the first attempt ``output_ids`` is empty and ``choices`` names all n choices. After a failure each
    unfinished choice is tried again alone, with the output ids that the router kept.
    """

    request_id: str
    attempt: int  # unique within the request; grows
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    choices: tuple[int, ...]
    sampling: SamplingParams
    prefill_incarnation: str  # the paired prefill node; empty: prefill locally
    weight_version: str = ""  # that the router takes both nodes to serve; empty: whatever they do
    deadline_s: float  # remaining seconds
    stream_interval: int = 1  # tokens per TokenOutput; 0: one at the end
    priority: int = 0
    num_prefill_tokens_ahead: int = 0  # that the prefill node computes before the first token; 0: unknown
    session_id: str = ""  # whose pages stay here when it ends, for as long as nobody needs them
    session_timeout_s: float = 0.0  # or the session is idle for so long
    was_retracted: bool = False  # an earlier attempt was: all pages it can need are reserved before this one


class CancelRequest(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """Stop these choices of an attempt (all of them when ``choices`` is empty) and release what they hold."""

    request_id: str
    attempt: int
    choices: tuple[int, ...] = ()


class ResendFrom(msgspec.Struct, frozen=True, kw_only=True, tag="resend"):
    """The receiver saw a gap: send this choice's output again from ``position``."""

    request_id: str
    attempt: int
    choice: int
    position: int


class AbortRequests(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """Abort by exact request id, or every request when ``all_requests``."""

    call_id: int
    request_id: str = ""
    all_requests: bool = False


class AssertPeerDeath(msgspec.Struct, frozen=True, kw_only=True, tag="assert_peer_death"):
    """Every process of this incarnation is gone: its supervisor reaped them, or an operator knows.

    A decode node lets go of what it held for fear of a late write. It refuses while that incarnation answers.
    """

    call_id: int
    incarnation: str


class Roster(msgspec.Struct, frozen=True, kw_only=True, tag="roster"):
    """The nodes a router knows. A node takes the union over routers."""

    router_id: str
    nodes: tuple[NodeEntry, ...]


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag="ping"):
    call_id: int


class FlushCache(msgspec.Struct, frozen=True, kw_only=True, tag="flush"):
    """Drop the prefix cache when idle. ``timeout_s`` 0: now or never."""

    call_id: int
    timeout_s: float = 0.0


class GetServerInfo(msgspec.Struct, frozen=True, kw_only=True, tag="get_server_info"):
    call_id: int


class GetMetrics(msgspec.Struct, frozen=True, kw_only=True, tag="get_metrics"):
    call_id: int


class GetRequestState(msgspec.Struct, frozen=True, kw_only=True, tag="get_request_state"):
    call_id: int
    request_id: str


# What prefill and decode nodes answer alike (`components/node_control.py`).
ControlMessage: TypeAlias = (
    FlushCache
    | StageWeights
    | PrepareWeights
    | KeepWeights
    | CommitWeights
    | DiscardWeights
    | GetWeights
    | CheckWeights
    | OpenWeights
    | ReadWeights
    | OfferInbox
    | MeetInbox
    | WriteWeights
    | SaveWeights
    | JoinUpdateGroup
    | LeaveUpdateGroup
    | ReleaseMemory
    | ResumeMemory
    | GetServerInfo
    | GetMetrics
)
ClientToNode: TypeAlias = (
    GenerateRequest
    | CancelRequest
    | ResendFrom
    | AbortRequests
    | AssertPeerDeath
    | Roster
    | Ping
    | ControlMessage
    | GetRequestState
    | NodeOperation
)


# ---- from a node ------------------------------------------------------------------------------------

FinishReason: TypeAlias = Literal["stop", "length", "abort"]


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """Why a choice ended on decode. ``matched``: the stop or EOS token id."""

    reason: FinishReason
    matched: int | None = None


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one choice. ``position`` counts the choice's output tokens before ``token_ids[0]``,
    those kept from earlier attempts included; the router takes only exactly the next position."""

    request_id: str
    attempt: int
    choice: int
    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()  # as long as token_ids, when asked for
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()  # once, with the first token
    hidden_states: tuple[bytes, ...] = ()  # float32, as long as token_ids: what each was sampled from
    prompt_hidden_states: bytes = b""  # float32, [prompt tokens, hidden size]; once, with the first token
    num_cached_tokens: int = 0
    weight_version: str = ""
    finish: Finish | None = None
    spans: tuple[Span, ...] = ()


class TokenOutputs(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """All that one step has for one receiver."""

    outputs: tuple[TokenOutput, ...]


FailureCode: TypeAlias = Literal[
    "busy",  # prefill's queue was full: costs no attempt
    "version_skew",  # weights changed in between: costs no attempt
    "peer_lost",
    "transfer_failed",
    "not_ready",  # the pair is not connected: costs no attempt
    "paused",  # an operator stopped all work: costs no attempt
    "retracted",  # decode had too few pages for all that ran: costs no attempt
    "aborted",  # an operator's wish, told to the prefill node; not retriable
    "deadline",
    "shutting_down",
    "invalid",  # the request itself can never be served; not retriable
]


class AttemptFailed(msgspec.Struct, frozen=True, kw_only=True, tag="attempt_failed"):
    """This attempt's unfinished choices end here; everything sent before stands."""

    request_id: str
    attempt: int
    code: FailureCode
    reason: str
    retriable: bool


def renewed(incarnation: str) -> str:
    """The next incarnation of a process that goes on: its pages have moved, so no old word of them counts."""
    process, _, number = incarnation.partition("~")
    return f"{process}~{int(number or 0) + 1}"


def is_same_process(incarnation: str, other: str) -> bool:
    return incarnation.partition("~")[0] == other.partition("~")[0]


class Pong(msgspec.Struct, frozen=True, kw_only=True, tag="pong"):
    """Answers Ping from the scheduler's own loop."""

    call_id: int
    entry: NodeEntry
    load: NodeLoad
    ready_peers: tuple[str, ...]  # incarnations of prefill nodes that this decode node may use
    refused_peers: dict[str, str]  # url -> reason
    quarantined_pages: dict[str, int] = {}  # by incarnation of the prefill node that may still write them
    draining: bool = False
    unix_s: float = 0.0  # the node's clock when it was sent


class CallReply(msgspec.Struct, frozen=True, kw_only=True, tag="reply"):
    """The outcome of a control call. ``code``: of a no that callers act upon, one that asking again does not
    change."""

    call_id: int
    success: bool
    message: str = ""
    code: Literal["", "not_prepared"] = ""


class RankInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One rank of a replica: its process, and the address of its memory for peers."""

    rank: int
    pid: int
    session: str


class ServerInfoReply(msgspec.Struct, frozen=True, kw_only=True, tag="server_info"):
    call_id: int
    entry: NodeEntry
    model: ModelInfo
    config: dict[str, str | int | float | bool | list[str] | None]  # the resolved flags
    load: NodeLoad
    kv_layout: KVLayout | None = None
    transport: str = ""  # what KV pages really travel over: "tcp", "rdma" or "shm"
    ranks: tuple[RankInfo, ...] = ()  # as many as the TP size


class MetricsReply(msgspec.Struct, frozen=True, kw_only=True, tag="metrics"):
    call_id: int
    text: str  # Prometheus exposition format


class RequestStateReply(msgspec.Struct, frozen=True, kw_only=True, tag="request_state"):
    """Where a request is on this node; ``state`` is empty when the node does not know it."""

    call_id: int
    state: str = ""
    age_s: float = 0.0  # in this state
    waits_for: str = ""
    details: dict[str, str | int | float] = {}


NodeToClient: TypeAlias = (
    TokenOutputs
    | AttemptFailed
    | Pong
    | CallReply
    | ServerInfoReply
    | MetricsReply
    | RequestStateReply
    | WeightsReply
    | WeightChecksReply
    | WeightImageReply
    | WeightBytesReply
    | WeightsWrittenReply
    | MemoryReply
    | InternalStateReply
    | ProfileReply
)
