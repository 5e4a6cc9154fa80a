"""The messages between a node's scheduler and those who use it: routers and the node's own HTTP front.

A node binds one zmq ROUTER socket; everyone else connects to it by DEALER. Calls carry a ``call_id`` that
the reply repeats. Generation is answered by any number of TokenOutputs, straight to whoever asked.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from .bounds import (
    MAX_TOKENS,
    Choice,
    Choices,
    Count,
    Finite,
    Int64,
    Name,
    Names,
    Number,
    Page,
    Path,
    Pid,
    Rank,
    Rate,
    Seconds,
    Text,
    TokenId,
    TokenIds,
    ZmqAddress,
)
from .kv_layout import KVLayout
from .operation import InternalStateReply, NodeOperation, ProfileReply
from .order import Order
from .report import PromptReport
from .sampling import HiddenStateRows, Logprobs
from .timeline import Spans
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
from .work import Work

Role: TypeAlias = Literal["prefill", "decode"]
MAX_PRIORITY = 10**6
Priority: TypeAlias = Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
_FEW = Meta(max_length=2**16)  # of nodes, ranks, flags
_Flag: TypeAlias = Text | Int64 | Finite | bool | Annotated[list[Text], _FEW] | None


class NodeEntry(msgspec.Struct, frozen=True, kw_only=True):
    """How a node is known in the cluster."""

    url: Name  # of its HTTP front: what people write
    role: Role
    incarnation: Name
    zmq_address: ZmqAddress  # tcp://host:port of its scheduler
    model_name: Name
    model_fingerprint: Name
    weight_version: Name
    colocated: bool = False  # a decode node that prefills locally
    update_id: Name = ""  # of the update that its weights came with; empty: those it started with
    vocab_size: Count = 0  # token ids of its model; 0: it does not say
    max_model_len: Count = 0  # tokens of prompt and output that it takes; 0: it does not say
    vocabulary_digest: Name = ""  # of the tokenizer in its model's folder; empty: there is none
    # Of the files of that folder by which text becomes a prompt; empty: it does not say.
    text_digests: Annotated[dict[Name, Name], Meta(max_length=16)] = {}


class PeerTraffic(msgspec.Struct, frozen=True, kw_only=True):
    """What the writes of a prefill node to one decode node came to."""

    num_bytes: Count  # in place, since the peer was first met
    busy_s: Seconds  # time with writes to it outstanding
    bytes_per_s: Rate  # the rate of the last seconds of that time


class NodeLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A node's load right now; ``/v1/loads`` and pairing read it."""

    num_running_reqs: Count = 0
    num_waiting_reqs: Count = 0
    num_queued_tokens: Count = 0  # prompt tokens accepted and not computed yet
    num_used_pages: Count = 0
    num_free_pages: Count = 0  # free or evictable
    num_total_pages: Count = 0
    page_size: Count = 0
    num_locked_pages: Count = 0
    num_pinned_pages: Count = 0  # on decode: of sessions
    num_reserved_pages: Count = 0
    num_exposed_pages: Count = 0
    num_quarantined_pages: Count = 0
    max_running_requests: Count = 0
    num_prompt_tokens_computed: Count = 0
    num_prompt_tokens_received: Count = 0  # on decode: their KV came from a prefill node
    num_cached_prompt_tokens: Count = 0
    num_generated_tokens: Count = 0
    # On prefill: decode incarnation -> what was written to it.
    peers: Annotated[dict[Name, PeerTraffic], _FEW] = {}


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a router must know of the model that a node serves."""

    model_name: Name
    model_path: Path
    model_type: Name
    architectures: Annotated[tuple[Name, ...], _FEW]
    vocab_size: TokenId
    max_model_len: Count
    eos_token_ids: Annotated[tuple[TokenId, ...], _FEW]
    dtype: Name
    weight_version: Name
    model_fingerprint: Name


# ---- to a node --------------------------------------------------------------------------------------


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """One attempt at (some choices of) one request. Sent to the decode node alone.

    At the first attempt the work is the whole request's. After a failure each unfinished choice is tried
    again alone, with the output ids that the router kept.
    """

    request_id: Name
    attempt: Number  # unique within the request; grows
    work: Work
    prefill_incarnation: Name  # the paired prefill node; empty: prefill locally
    weight_version: Name = ""  # that the router takes both nodes to serve; empty: whatever they do
    deadline_s: Seconds  # remaining seconds
    stream_interval: Count = 1  # tokens per TokenOutput; 0: one at the end
    priority: Priority = 0
    num_prefill_tokens_ahead: Count = 0  # that the prefill node computes before the first token; 0: unknown
    session_id: Name = ""  # whose pages stay here when it ends, for as long as nobody needs them
    session_timeout_s: Seconds = 0.0  # or the session is idle for so long
    was_retracted: bool = False  # an earlier attempt was: all pages it can need are reserved before this one


class CancelRequest(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """Stop these choices of an attempt (all of them when ``choices`` is empty) and release what they hold.

    ``aborts``: all of them end with finish reason "abort", behind what they have; else nobody reads them.
    """

    request_id: Name
    attempt: Number
    choices: Choices = ()
    aborts: bool = False


class ResendFrom(msgspec.Struct, frozen=True, kw_only=True, tag="resend"):
    """The receiver saw a gap: send this choice's output again from ``position``."""

    request_id: Name
    attempt: Number
    choice: Choice
    position: Count


class AbortRequests(Order, frozen=True, kw_only=True, tag="abort"):
    """Abort by exact request id, or every request when ``all_requests``."""

    request_id: Name = ""
    all_requests: bool = False


class AssertPeerDeath(msgspec.Struct, frozen=True, kw_only=True, tag="assert_peer_death"):
    """Every process of this incarnation is gone: its supervisor reaped them, or an operator knows.

    A decode node lets go of what it held for fear of a late write. It refuses while that incarnation answers.
    """

    call_id: Number
    incarnation: Name


class Roster(msgspec.Struct, frozen=True, kw_only=True, tag="roster"):
    """The nodes a router knows. A node takes the union over routers."""

    router_id: Name
    nodes: Annotated[tuple[NodeEntry, ...], _FEW]


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag="ping"):
    call_id: Number


class FlushCache(Order, frozen=True, kw_only=True, tag="flush"):
    """Drop the prefix cache when idle. ``timeout_s`` 0: now or never."""

    timeout_s: Seconds = 0.0


class GetServerInfo(msgspec.Struct, frozen=True, kw_only=True, tag="get_server_info"):
    call_id: Number


class GetMetrics(msgspec.Struct, frozen=True, kw_only=True, tag="get_metrics"):
    call_id: Number


class GetRequestState(msgspec.Struct, frozen=True, kw_only=True, tag="get_request_state"):
    call_id: Number
    request_id: Name


# What prefill and decode nodes answer alike (`node/control.py`).
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
    matched: TokenId | None = None


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one choice. ``position`` counts the choice's output tokens before ``token_ids[0]``,
    those kept from earlier attempts included; the router takes only exactly the next position."""

    request_id: Name
    attempt: Number
    choice: Choice
    position: Count
    token_ids: TokenIds
    logprobs: Logprobs = ()  # as long as token_ids, when asked for
    hidden_states: HiddenStateRows = ()  # float32, as long as token_ids: what each was sampled from
    report: PromptReport | None = None  # once, with the first token of the attempt's first choice
    weight_version: Name = ""  # of the attempt, with the first token of each choice
    finish: Finish | None = None
    spans: Spans = ()


class TokenOutputs(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """All that one step has for one receiver."""

    outputs: Annotated[tuple[TokenOutput, ...], Meta(max_length=MAX_TOKENS)]


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

    request_id: Name
    attempt: Number
    code: FailureCode
    reason: Text
    retriable: bool


def renewed(incarnation: str) -> str:
    """The next incarnation of a process that goes on: its pages have moved, so no old word of them counts."""
    process, _, number = incarnation.partition("~")
    return f"{process}~{int(number or 0) + 1}"


def is_same_process(incarnation: str, other: str) -> bool:
    return incarnation.partition("~")[0] == other.partition("~")[0]


class Pong(msgspec.Struct, frozen=True, kw_only=True, tag="pong"):
    """Answers Ping from the scheduler's own loop."""

    call_id: Number
    entry: NodeEntry
    load: NodeLoad
    ready_peers: Names  # incarnations of prefill nodes that this decode node may use
    refused_peers: Annotated[dict[Name, Text], _FEW]  # url -> reason
    # By incarnation of the prefill node that may still write them.
    quarantined_pages: Annotated[dict[Name, Count], _FEW] = {}
    draining: bool = False
    unix_s: Seconds = 0.0  # the node's clock when it was sent


class CallReply(msgspec.Struct, frozen=True, kw_only=True, tag="reply"):
    """The outcome of a control call. ``code``: of a no that callers act upon, one that asking again does not
    change."""

    call_id: Number
    success: bool
    message: Text = ""
    code: Literal["", "not_prepared"] = ""


class RankInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One rank of a replica: its process, and the address of its memory for peers."""

    rank: Rank
    pid: Pid
    session: Text


class ServerInfoReply(msgspec.Struct, frozen=True, kw_only=True, tag="server_info"):
    call_id: Number
    entry: NodeEntry
    model: ModelInfo
    config: Annotated[dict[Name, _Flag], _FEW]  # the resolved flags
    load: NodeLoad
    kv_layout: KVLayout | None = None
    transport: Name = ""  # what KV pages really travel over: "tcp", "rdma" or "shm"
    ranks: Annotated[tuple[RankInfo, ...], _FEW] = ()  # as many as the TP size


class MetricsReply(msgspec.Struct, frozen=True, kw_only=True, tag="metrics"):
    call_id: Number
    text: Page  # Prometheus exposition format


class RequestStateReply(msgspec.Struct, frozen=True, kw_only=True, tag="request_state"):
    """Where a request is on this node; ``state`` is empty when the node does not know it."""

    call_id: Number
    state: Name = ""
    age_s: Seconds = 0.0  # in this state
    waits_for: Text = ""
    details: Annotated[dict[Name, Text | Int64 | Finite], _FEW] = {}


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
