"""A Generator and an administration that do as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeAlias

from pdserve.api.control.operations import ProfileOutcome
from pdserve.api.generation import (
    AdminReply,
    ChoiceDelta,
    GenerateSpec,
    GenerationInfo,
    GroupReply,
    SessionTurn,
    TurnParams,
    UpdateMode,
    WeightSpan,
    WorkerStatus,
)
from pdserve.messages.node import NodeEntry, NodeLoad
from pdserve.messages.operation import ClusterOperation
from pdserve.messages.report import PromptReport
from pdserve.messages.sampling import TokenLogprob
from pdserve.messages.timeline import Span
from pdserve.messages.weights import (
    FromGpuMemory,
    FromGroup,
    FromSharedMemory,
    MemoryTag,
    UpdateGroupSpec,
    WeightChecksReply,
    WeightsReply,
)
from pdserve.router.sessions import SessionTable
from pdserve.runtime.errors import RequestError

# A delta to give, an error to raise, or an event to wait for.
Step: TypeAlias = ChoiceDelta | RequestError | asyncio.Event

ENTRY = NodeEntry(
    url="http://127.0.0.1:8100",
    role="prefill",
    incarnation="p-1",
    zmq_address="tcp://127.0.0.1:5555",
    model_name="org/tiny",
    model_fingerprint="f",
    weight_version="7",
)


def logprob_of(token_id: int, num_top: int, named_ids: Sequence[int] = ()) -> TokenLogprob:
    """The chosen token is the second best; the best is the next id. Of a named one it is the id itself."""
    ranked = [(token_id + 1, -0.5), (token_id, -1.0), (token_id + 2, -2.0)]
    named = tuple((each, -float(each)) for each in named_ids)
    return TokenLogprob(token_id, -1.0, tuple(ranked[:num_top]), named)


class FakeGeneration:
    def __init__(
        self,
        spec: GenerateSpec,
        steps: Sequence[Step],
        weight_spans: dict[int, list[WeightSpan]],
        prompt_states: bytes,
    ) -> None:
        self.spec = spec
        self.steps = steps
        self.stopped: list[int] = []
        self.is_cancelled = False
        self.has_ended = False
        sampling = spec.work.sampling
        num_top, named_ids = sampling.num_prompt_logprobs, sampling.logprob_token_ids
        prompt_logprobs: list[TokenLogprob | None] = []
        if num_top is not None:
            for position, token_id in enumerate(spec.work.prompt_ids):
                if position >= sampling.prompt_logprobs_start:
                    logprob = logprob_of(token_id, num_top, named_ids) if position else None
                    prompt_logprobs.append(logprob)
        self.info = GenerationInfo(
            report=PromptReport(
                logprobs=tuple(prompt_logprobs), hidden_states=prompt_states, num_cached_tokens=2
            ),
            weight_version="7",
            weight_spans=weight_spans,
            spans=[
                Span("prefill_chunk", 101.5, 0.25, num_tokens=3),
                Span("queue", 100.0, 1.5),
                Span("handoff", 101.75, 0.5, 4096),
            ],
        )

    async def __aiter__(self) -> AsyncIterator[ChoiceDelta]:
        for step in self.steps:
            match step:
                case ChoiceDelta():
                    if step.choice not in self.stopped:
                        yield step
                case RequestError():
                    raise step
                case asyncio.Event():
                    await step.wait()
        self.has_ended = True

    def stop_choice(self, choice: int) -> None:
        self.stopped.append(choice)

    def cancel(self) -> None:
        self.is_cancelled = not self.has_ended


def one_by_one(
    token_ids: Sequence[int],
    spec: GenerateSpec,
    *,
    choice: int = 0,
    finish: str = "length",
    matched: int | None = None,
) -> list[ChoiceDelta]:
    """The tokens of a choice, a delta each, with logprobs where the spec asks for them."""
    num_top, named_ids = spec.work.sampling.num_logprobs, spec.work.sampling.logprob_token_ids
    return [
        ChoiceDelta(
            choice,
            (token_id,),
            () if num_top is None else (logprob_of(token_id, num_top, named_ids),),
            finish if position == len(token_ids) - 1 else None,  # type: ignore[arg-type]
            matched if position == len(token_ids) - 1 else None,
        )
        for position, token_id in enumerate(token_ids)
    ]


class FakeGenerator:
    """Every choice gets ``token_ids`` (at most max_tokens of them), unless ``script`` says otherwise."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = tuple(token_ids)
        self.script: Callable[[GenerateSpec], Sequence[Step]] | None = None
        self.refusal: RequestError | None = None
        self.overload: RequestError | None = None
        self.clients: list[str] = []  # of all requests that came
        self.prompt_hidden_states = b""
        self.weight_spans: dict[int, list[WeightSpan]] = {}
        self.generations: list[FakeGeneration] = []

    @property
    def specs(self) -> list[GenerateSpec]:
        return [generation.spec for generation in self.generations]

    def check_wait(self, client: str) -> None:
        self.clients.append(client)
        if self.overload is not None:
            raise self.overload

    async def generate(self, spec: GenerateSpec, client: str = "") -> FakeGeneration:
        if self.refusal is not None:
            raise self.refusal
        steps = self._default(spec) if self.script is None else self.script(spec)
        self.generations.append(FakeGeneration(spec, steps, self.weight_spans, self.prompt_hidden_states))
        return self.generations[-1]

    def _default(self, spec: GenerateSpec) -> list[Step]:
        ids = self.token_ids[: spec.work.sampling.max_tokens]
        choices = [one_by_one(ids, spec, choice=choice) for choice in spec.work.choices]
        return [delta for together in zip(*choices, strict=True) for delta in together]


class FakeAdmin:
    def __init__(self) -> None:
        self.ready: tuple[bool, str] = (True, "")
        self.calls: list[tuple[Any, ...]] = []
        self.reply = AdminReply(True, "done")
        self.states: dict[str, dict[str, Any]] = {}
        self.metrics: Callable[[], str] = str
        self.named_weights: dict[str, WeightsReply] = {}
        self.weight_checks: dict[str, WeightChecksReply] = {}
        self.released: frozenset[MemoryTag] = frozenset()

    def readiness(self) -> tuple[bool, str]:
        return self.ready

    def workers(self) -> list[WorkerStatus]:
        load = NodeLoad(num_running_reqs=3, num_waiting_reqs=1, num_used_pages=4, page_size=16)
        return [WorkerStatus(entry=ENTRY, healthy=True, ready=True, lease_s=4.5, load=load)]

    async def register_worker(self, url: str, entry: NodeEntry | None) -> AdminReply:
        self.calls.append(("register", url, entry))
        return self.reply

    async def remove_worker(self, url: str) -> AdminReply:
        self.calls.append(("remove", url))
        return self.reply

    async def flush_cache(self, timeout_s: float) -> AdminReply:
        self.calls.append(("flush", timeout_s))
        return self.reply

    async def abort_requests(self, request_id: str, all_requests: bool) -> AdminReply:
        self.calls.append(("abort", request_id, all_requests))
        return self.reply

    async def assert_peer_death(self, incarnation: str) -> AdminReply:
        self.calls.append(("dead", incarnation))
        return self.reply

    async def update_weights_from_disk(
        self, model_path: str, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        self.calls.append(("update", model_path, weight_version, mode))
        return self.reply

    async def update_weights_from_tensor(
        self, body: AsyncIterator[bytes], weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        self.calls.append(("update", b"".join([piece async for piece in body]), weight_version, mode))
        return self.reply

    async def update_weights_from_distributed(
        self, source: FromGroup, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        self.calls.append(("update", source, weight_version, mode))
        return self.reply

    async def update_weights_from_ipc(
        self, source: FromSharedMemory | FromGpuMemory, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        self.calls.append(("update ipc", source, weight_version, mode))
        return self.reply

    async def update_weights_from_peer(
        self, peer_url: str, weight_version: str | None, mode: UpdateMode
    ) -> AdminReply:
        self.calls.append(("update peer", peer_url, weight_version, mode))
        return self.reply

    async def update_weight_version(self, weight_version: str, mode: UpdateMode) -> AdminReply:
        self.calls.append(("update version", weight_version, mode))
        return self.reply

    async def save_model(self, target: str, *, is_remote: bool, max_shard_bytes: int) -> AdminReply:
        self.calls.append(("save", target, is_remote, max_shard_bytes))
        return self.reply

    async def init_weights_update_group(self, group: UpdateGroupSpec, rank_offset: int) -> GroupReply:
        self.calls.append(("init group", group, rank_offset))
        return GroupReply(self.reply.success, self.reply.message, {"http://d": rank_offset})

    async def destroy_weights_update_group(self, name: str) -> AdminReply:
        self.calls.append(("destroy group", name))
        return self.reply

    async def release_memory_occupation(self, tags: tuple[MemoryTag, ...]) -> AdminReply:
        self.calls.append(("release", tags))
        return self.reply

    async def resume_memory_occupation(self, tags: tuple[MemoryTag, ...]) -> AdminReply:
        self.calls.append(("resume", tags))
        return self.reply

    async def released_memory(self) -> frozenset[MemoryTag]:
        return self.released

    async def weights_by_name(self, name: str, truncate_size: int) -> dict[str, WeightsReply]:
        self.calls.append(("get weights", name, truncate_size))
        return self.named_weights

    async def check_weights(self) -> dict[str, WeightChecksReply]:
        self.calls.append(("check weights",))
        return self.weight_checks

    async def pause_generation(self, mode: str, *, drains: bool) -> AdminReply:
        self.calls.append(("pause", mode, drains))
        return self.reply

    async def continue_generation(self) -> AdminReply:
        self.calls.append(("continue",))
        return self.reply

    async def operate(self, operation: ClusterOperation) -> AdminReply:
        self.calls.append(("operate", operation))
        return self.reply

    async def internal_state(self) -> dict[str, Any]:
        return {"internal_states": [{"role": "prefill"}]}

    async def stop_profile(self) -> ProfileOutcome:
        return ProfileOutcome(success=self.reply.success, message=self.reply.message)

    async def request_state(self, request_id: str) -> dict[str, Any] | None:
        return self.states.get(request_id)

    async def server_info(self) -> dict[str, Any]:
        return {"role": "router", "internal_states": [{}]}

    def weight_version(self) -> str:
        return "7"

    async def metrics_text(self) -> str:
        return self.metrics()


class FakeSessions:
    """The router's own table, at one node and a standing clock."""

    def __init__(self) -> None:
        self.table = SessionTable(max_sessions=4, idle_timeout_s=60.0)
        self.now = 100.0

    def open_session(self, session_id: str, capacity: int, idle_timeout_s: float | None) -> str:
        return self.table.open(
            session_id,
            home="d-1",
            address="127.0.0.1:8200",
            capacity=capacity,
            idle_timeout_s=idle_timeout_s,
            now=self.now,
        )

    async def close_session(self, session_id: str) -> AdminReply:
        closed = self.table.close(session_id)
        return AdminReply(closed, "closed" if closed else f"there is no session {session_id!r}")

    def begin_turn(self, params: TurnParams, request_id: str, new_ids: tuple[int, ...]) -> SessionTurn:
        return self.table.begin(params, request_id, new_ids, self.now)

    def finish_turn(self, turn: SessionTurn, output_ids: tuple[int, ...]) -> None:
        self.table.finish(turn, output_ids, self.now)
