"""Requests that wait for pages and for places in the batch: accepted, and admitted when their turn comes.

Nothing is reserved for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import msgspec

from ..components import request_limits
from ..components.metrics_reporter import MetricsReporter
from ..components.output_streamer import StreamKey
from ..messages.node import FailureCode, GenerateRequest
from ..messages.timeline import SpanClock
from ..node.control import NodeControl
from ..node.status import NodeStatus
from ..runtime.config import HIDDEN_STATES_FLAG
from ..weights.loaded import LoadedModel
from .admission import Capacity, choose_admitted
from .growth_estimate import GrowthEstimate
from .limits import DecodeLimits
from .outputs import Outputs
from .request_pages import RequestPages
from .sequence import DecodeRequest


class Waiting:
    def __init__(
        self,
        *,
        pages: RequestPages,
        growth: GrowthEstimate,
        outputs: Outputs,
        control: NodeControl[LoadedModel],
        status: NodeStatus,
        metrics: MetricsReporter,
        limits: DecodeLimits,
        clock: SpanClock,
        overtaking_s: float,
    ) -> None:
        self._pages = pages
        self._growth = growth
        self._outputs = outputs
        self._control = control
        self._status = status
        self._metrics = metrics
        self._limits = limits
        self._clock = clock
        self._overtaking_s = overtaking_s
        self._numbers = itertools.count()
        self._requests: dict[StreamKey, DecodeRequest] = {}  # in order of arrival

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[DecodeRequest]:
        return iter(self._requests.values())

    def __contains__(self, key: StreamKey) -> bool:
        return key in self._requests

    def state_of(self, request: DecodeRequest) -> str:
        del request
        return "waiting"

    # ---- accepted -----------------------------------------------------------------------------------

    def accept(
        self, link: bytes, message: GenerateRequest, now: float, *, has_prefill: bool, is_draining: bool
    ) -> None:
        """From here on the attempt is on record; or it is refused. `has_prefill`: the node that is to prefill
        is connected, or none is needed."""
        key = StreamKey(link, message.request_id, message.attempt)
        if key in self._outputs:
            return  # sent twice
        request = DecodeRequest.of(
            key, message, number=next(self._numbers), now=now, reached_s=self._clock.now()
        )
        if (refusal := self._refusal(request, has_prefill=has_prefill, is_draining=is_draining)) is not None:
            self._outputs.refuse(link, message, *refusal)
            return
        self._outputs.open(request, self._status.weight_version)
        self._requests[key] = request

    def _refusal(
        self, request: DecodeRequest, *, has_prefill: bool, is_draining: bool
    ) -> tuple[FailureCode, str] | None:
        message, ours = request.message, self._status.weight_version
        if is_draining:
            return "shutting_down", "the decode node shuts down"
        if self._control.awaits_swap or message.weight_version not in ("", ours):
            self._metrics.count_version_refusal()
            what = "about to change" if self._control.awaits_swap else repr(ours)
            return "version_skew", (
                f"the request wants weights {message.weight_version!r}, the decode node's are {what}"
            )
        if not self._control.takes_work:
            return "not_ready", "memory is released"
        if (reason := self._impossible(request)) is not None:
            return "invalid", reason
        if not has_prefill:
            return "not_ready", "the prefill node is not connected to this decode node"
        return None

    def _impossible(self, request: DecodeRequest) -> str | None:
        """Why this request can never be served here; None if it can."""
        work, limits = request.work, self._limits
        if not work.choices or len(set(work.choices)) != len(work.choices):
            return f"choices are {work.choices}: at least one is expected, and none twice"
        # The last token of an output is never read again, so scoring takes a prompt of the whole context.
        num_most = limits.max_model_len - (work.sampling.max_tokens > 1)
        if len(work.prompt_ids) > num_most:
            return (
                f"the prompt has {len(work.prompt_ids)} tokens; the decode node takes at most {num_most} "
                f"of its {limits.max_model_len} for prompt and output together"
            )
        need, num_choices = self._pages.need(request).total, len(request.sequences)
        if need > self._pages.num_pages or num_choices > limits.max_running:
            return (
                f"the request may need {need} KV pages and {num_choices} places in the batch; "
                f"the decode node has {self._pages.num_pages} and {limits.max_running}"
            )
        if work.sampling.hidden_states == "all" and not limits.returns_hidden_states:
            return f"the decode node was started without {HIDDEN_STATES_FLAG}"
        return request_limits.refusal(work, self._status.model)

    # ---- admitted -----------------------------------------------------------------------------------

    def admissible(
        self, admitted: Iterable[Iterable[DecodeRequest]], *, num_stranded_pages: int, now: float
    ) -> Iterator[DecodeRequest]:
        """Those for whom there are pages and places, in the order in which they are to have them.

        Whoever takes one calls `remove` before it asks for the next. `admitted`: the stages of those who have
        pages; they are looked at again for each. `num_stranded_pages`: in quarantine, perhaps for ever.
        """
        if not self._requests:
            return iter(())
        return choose_admitted(
            list(self),
            lambda: self.capacity(admitted, num_stranded_pages),
            self._demand,
            now,
            self._overtaking_s,
        )

    def capacity(self, admitted: Iterable[Iterable[DecodeRequest]], num_stranded_pages: int) -> Capacity:
        """What can be given away now."""
        held = list(itertools.chain.from_iterable(admitted))
        return Capacity(
            pages=self._pages.num_available - self._pages.num_expected(held, self._growth.share),
            sequences=self._limits.max_running - sum(len(request.live_sequences) for request in held),
            most_pages=self._pages.num_pages - num_stranded_pages,
        )

    def _demand(self, request: DecodeRequest) -> int:
        return self._pages.demand(request, self._growth.share)

    def is_old(self, request: DecodeRequest, now: float) -> bool:
        """Whether it has waited so long that others wait for it."""
        return now - request.arrived_s > self._overtaking_s

    def remove(self, request: DecodeRequest) -> None:
        """Another stage has it now."""
        del self._requests[request.key]

    # ---- gone ---------------------------------------------------------------------------------------

    def cancel(self, key: StreamKey, choices: tuple[int, ...], now: float) -> None:
        """These choices, or all of them; for those that stay alone pages will be reserved."""
        del now
        request = self._requests[key]
        self._outputs.discard(request, choices)
        request.sequences = request.live_sequences
        if not request.sequences:
            del self._requests[key]
            return
        left = tuple(sequence.choice for sequence in request.sequences)
        request.work = msgspec.structs.replace(request.work, choices=left)

    def abort(self, request: DecodeRequest, now: float) -> None:
        del now
        self._outputs.abort(request)
        self.remove(request)

    def fail(
        self, request: DecodeRequest, code: FailureCode, reason: str, now: float, *, retriable: bool
    ) -> None:
        del now
        self._outputs.fail(request, code, reason, retriable=retriable)
        self.remove(request)
