"""What the HTTP surfaces need from whoever runs requests: the router, or a node's own front.

The API layer turns text into a GenerateSpec and token events back into text; it knows nothing of nodes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..messages.node import FinishReason, NodeEntry, NodeLoad
from ..messages.sampling import SamplingParams, TokenLogprob
from ..messages.timeline import Span
from ..runtime.pause_gate import PauseMode


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """The served model, as clients see it."""

    name: str  # the served model name
    path: str
    model_type: str
    architectures: tuple[str, ...]
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    created: int  # unix seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateSpec:
    """One validated request: ``num_choices`` continuations of one prompt.

    ``sampling.seed`` is set and ``sampling.max_tokens`` is resolved; prompt + max_tokens fits the context.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    num_choices: int = 1
    stream: bool = False  # False: tokens may arrive in fewer, larger deltas
    priority: int = 0
    timeout_s: float | None = None  # None: the server's default


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """New tokens of one choice, in order, each exactly once. ``finish_reason`` is set on the last."""

    choice: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()  # as long as token_ids when asked for
    finish_reason: FinishReason | None = None
    matched: int | None = None  # the stop or EOS token id that ended it (it is the last of token_ids)


@dataclass(slots=True)
class GenerationInfo:
    """Facts of one generation that fill up while it runs; complete when the iterator has ended."""

    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()  # set before the first delta
    num_cached_tokens: int = 0
    weight_version: str = ""
    num_attempts: int = 1
    spans: list[Span] = field(default_factory=list)
    arrived_unix_s: float = 0.0  # when the first token came from decode
    first_token_unix_s: float = 0.0  # when it was given to the client


class Generation(Protocol):
    """A running request. Iterate to the end, or ``cancel``; both release everything on every node."""

    @property
    def info(self) -> GenerationInfo: ...

    def __aiter__(self) -> AsyncIterator[ChoiceDelta]:
        """Ends when every choice has finished. Raises RequestError when the request failed."""
        ...

    def stop_choice(self, choice: int) -> None:
        """The caller has found the end of this choice in its text: no more deltas of it."""
        ...

    def cancel(self) -> None:
        """The client is gone. Idempotent."""
        ...


class Generator(Protocol):
    async def generate(self, spec: GenerateSpec) -> Generation:
        """Queue and start a request.

        Raises RequestError: 429 with Retry-After when the queue is full, 503 when no pair of nodes is ready.
        """
        ...


@dataclass(frozen=True, slots=True)
class AdminReply:
    success: bool
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerStatus:
    """One row of ``/workers``."""

    entry: NodeEntry
    healthy: bool  # its lease holds and its scheduler answers pings
    ready: bool  # may be paired right now
    lease_s: float  # remaining seconds; 0 for a lapsed one
    load: NodeLoad
    ready_peers: tuple[str, ...] = ()
    refused_peers: dict[str, str] = field(default_factory=dict)
    quarantined_pages: dict[str, int] = field(default_factory=dict)  # by incarnation of the peer


class ClusterAdmin(Protocol):
    """The control calls of a whole cluster, or of one node behind its front."""

    def readiness(self) -> tuple[bool, str]:
        """Whether requests are accepted, and if not, why."""
        ...

    def workers(self) -> list[WorkerStatus]: ...

    async def register_worker(self, url: str, entry: NodeEntry | None) -> AdminReply:
        """Add a node or renew its lease. Without ``entry`` it is learned from the URL's /server_info."""
        ...

    async def remove_worker(self, url: str) -> AdminReply: ...

    async def flush_cache(self, timeout_s: float) -> AdminReply: ...

    async def abort_requests(self, request_id: str, all_requests: bool) -> AdminReply: ...

    async def pause_generation(self, mode: PauseMode, *, drains: bool) -> AdminReply:
        """Nothing is computed until `continue_generation`, and no deadline runs out. `drains`: running
        requests end before."""
        ...

    async def continue_generation(self) -> AdminReply: ...

    async def assert_peer_death(self, incarnation: str) -> AdminReply:
        """No process of this incarnation lives any more, says an operator or its supervisor."""
        ...

    async def update_weights_from_disk(self, model_path: str, weight_version: str | None) -> AdminReply: ...

    async def request_state(self, request_id: str) -> dict[str, Any] | None:
        """Which state a request is in, for how long, what it waits for; None if unknown."""
        ...

    async def server_info(self) -> dict[str, Any]: ...

    def weight_version(self) -> str: ...

    async def metrics_text(self) -> str: ...
