"""A scheduler's control socket that answers as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import zmq
import zmq.asyncio

from pdserve.components.request_receiver import refusals
from pdserve.messages.codec import Codec
from pdserve.messages.link_guard import LinkKeys
from pdserve.messages.malformed import malformed
from pdserve.messages.node import (
    AbortRequests,
    AssertPeerDeath,
    CallReply,
    CancelRequest,
    ClientToNode,
    FlushCache,
    GenerateRequest,
    GetMetrics,
    GetRequestState,
    GetServerInfo,
    MetricsReply,
    ModelInfo,
    NodeEntry,
    NodeLoad,
    Ping,
    Pong,
    RankInfo,
    RequestStateReply,
    ResendFrom,
    Roster,
    ServerInfoReply,
)
from pdserve.messages.operation import (
    CloseSession,
    ConfigureLogging,
    ContinueGeneration,
    FreezeGc,
    GetInternalState,
    InternalState,
    InternalStateReply,
    PauseGeneration,
    ProfileReply,
    SetInternalState,
    SlowDown,
    StartProfile,
    StopProfile,
)
from pdserve.messages.weights import (
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

STATE = InternalState(
    settings={"max_queued_prefills": 32},
    requests={"waiting": 1},
    pause="",
    forward_sleep_s=0.0,
    is_profiling=False,
    log_level="info",
    is_gc_frozen=False,
    memory_rss_bytes=1000,
)
MODEL = ModelInfo(
    model_name="org/tiny",
    model_path="/models/tiny",
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    vocab_size=404,
    max_model_len=256,
    eos_token_ids=(2,),
    dtype="float32",
    weight_version="7",
    model_fingerprint="f",
)
LOAD = NodeLoad(
    num_running_reqs=2, num_waiting_reqs=1, num_total_pages=10, page_size=16, max_running_requests=64
)
RANKS = tuple(RankInfo(rank=rank, pid=10 + rank, session=f"h:{rank}") for rank in range(2))


class FakeScheduler:
    def __init__(self, context: zmq.asyncio.Context, keys: LinkKeys | None = None) -> None:
        self._socket = context.socket(zmq.ROUTER)
        if keys is not None:
            keys.secure_server(self._socket)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"
        self.entry = NodeEntry(
            url="",
            role="decode",
            incarnation="d-1",
            zmq_address=self.address,
            model_name="org/tiny",
            model_fingerprint="f",
            weight_version="7",
        )
        self.received: list[ClientToNode] = []
        self.is_silent = False
        self.is_draining = False
        self.unix_s = 0.0
        self.outcome: Callable[[ClientToNode], tuple[bool, str]] = lambda _: (True, "done")
        self._codec: Codec[ClientToNode] = Codec(ClientToNode)
        self._client = b""
        self._task = asyncio.create_task(self._serve())

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        self._socket.close(linger=0)

    async def send(self, message: msgspec.Struct) -> None:
        await self._socket.send_multipart([self._client, self._codec.encode(message)])

    async def send_raw(self, data: bytes) -> None:
        await self._socket.send_multipart([self._client, data])

    async def _serve(self) -> None:
        while True:
            self._client, data = await self._socket.recv_multipart()
            try:
                message = self._codec.decode(data)
            except msgspec.DecodeError as error:  # refused as a node does
                for refusal in refusals(malformed(data, error).head, f"malformed: {error}"):
                    await self.send(refusal)
                continue
            self.received.append(message)
            reply = self._reply(message)
            if reply is not None and not self.is_silent:
                await self.send(reply)

    def _reply(self, message: ClientToNode) -> msgspec.Struct | None:
        match message:
            case Ping(call_id=call_id):
                return Pong(
                    call_id=call_id,
                    entry=self.entry,
                    load=LOAD,
                    ready_peers=(),
                    refused_peers={},
                    unix_s=self.unix_s,
                    draining=self.is_draining,
                )
            case GetServerInfo(call_id=call_id):
                return ServerInfoReply(
                    call_id=call_id,
                    entry=self.entry,
                    model=MODEL,
                    config={"page_size": 16},
                    load=LOAD,
                    ranks=RANKS,
                )
            case GetInternalState(call_id=call_id):
                return InternalStateReply(call_id=call_id, state=STATE)
            case StopProfile(call_id=call_id):
                return ProfileReply(call_id=call_id, success=True, traces=("/tmp/a.trace.json.gz",))
            case GetMetrics(call_id=call_id):
                return MetricsReply(call_id=call_id, text="pd_x 1\n")
            case GetRequestState(call_id=call_id, request_id=request_id):
                state = "decoding" if request_id == "known" else ""
                return RequestStateReply(call_id=call_id, state=state, age_s=0.5)
            case (
                FlushCache()
                | AbortRequests()
                | AssertPeerDeath()
                | CloseSession()
                | StageWeights()
                | SetInternalState()
                | ConfigureLogging()
                | SlowDown()
                | FreezeGc()
                | StartProfile()
                | PauseGeneration()
                | ContinueGeneration()
                | PrepareWeights()
                | CommitWeights()
                | DiscardWeights()
                | JoinUpdateGroup()
                | LeaveUpdateGroup()
                | SaveWeights()
            ):
                success, text = self.outcome(message)
                return CallReply(call_id=message.call_id, success=success, message=text)
            case ReleaseMemory() | ResumeMemory():
                success, text = self.outcome(message)
                return MemoryReply(call_id=message.call_id, success=success, message=text)
            case GetWeights(call_id=call_id, truncate_size=size):
                return WeightsReply(call_id=call_id, success=True, values=[0.5] * size)
            case CheckWeights(call_id=call_id):
                return WeightChecksReply(call_id=call_id, success=True, tensors={"t": "ab"}, whole="cd")
            case OpenWeights(call_id=call_id):
                return WeightImageReply(call_id=call_id, success=False, message="no weights here")
            case ReadWeights(call_id=call_id):
                return WeightBytesReply(call_id=call_id, success=False, message="no weights here")
            case OfferInbox(call_id=call_id) | MeetInbox(call_id=call_id):
                return CallReply(call_id=call_id, success=False, message="no engine here")
            case WriteWeights(call_id=call_id):
                return WeightsWrittenReply(call_id=call_id, success=False, message="no weights here")
            case GenerateRequest() | CancelRequest() | ResendFrom() | Roster() | KeepWeights():
                return None
