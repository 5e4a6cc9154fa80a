"""What is told of a decode node: its load, its gauges, where a request is."""

from __future__ import annotations

from ..components.load_inquirer import LoadInquirer
from ..components.metrics_reporter import MetricsReporter
from ..messages.node import NodeLoad
from ..node.loop import Peers, RequestView
from .handoffs import Handoffs
from .request_pages import RequestPages
from .running import Running
from .session_pins import SessionPins
from .waiting import Waiting

_WAITS_FOR = {
    "waiting": "KV pages and places in the batch",
    "handoff": "the prefill node",
    "local_prefill": "its prompt's chunks",
    "running": "the next step",
}


class DecodeReport:
    """A `Report`."""

    def __init__(
        self,
        *,
        waiting: Waiting,
        handoffs: Handoffs,
        running: Running,
        pages: RequestPages,
        pins: SessionPins,
        load_inquirer: LoadInquirer,
        metrics: MetricsReporter,
    ) -> None:
        self._waiting = waiting
        self._handoffs = handoffs
        self._running = running
        self._pages = pages
        self._pins = pins
        self._load_inquirer = load_inquirer
        self._metrics = metrics

    def observe(self) -> None:
        self._metrics.observe_pages(self._pages.counts())
        self._metrics.observe_sessions(num_sessions=len(self._pins), num_pinned_pages=self._pages.num_pinned)
        self._metrics.observe_queues(
            num_decode_prealloc=len(self._waiting), num_decode_transfer=len(self._handoffs)
        )
        self._handoffs.observe()

    def load(self, now: float) -> NodeLoad:
        del now
        return self._load_inquirer.load(
            pages=self._pages.counts(),
            num_locked_pages=self._pages.num_locked,
            num_evictable_pages=self._pages.num_evictable,
            num_pinned_pages=self._pages.num_pinned,
            num_running_reqs=len(self._running),
            num_waiting_reqs=len(self._waiting) + len(self._handoffs),
            num_queued_tokens=self._running.num_queued_tokens
            + sum(request.work.num_tokens for request in self._waiting),
        )

    def num_in_states(self) -> dict[str, int]:
        return {
            "waiting": len(self._waiting),
            "handoff": len(self._handoffs),
            "local_prefill": self._running.num_prefilling,
            "running": self._running.num_decoding,
        }

    def find(self, request_id: str) -> RequestView | None:
        for stage in (self._waiting, self._handoffs, self._running):
            for request in stage:
                if request.key.request_id == request_id:
                    state = stage.state_of(request)
                    details = {
                        "attempt": request.key.attempt,
                        "num_prompt_tokens": len(request.work.prompt_ids),
                        "num_cached_tokens": request.num_cached,
                        "num_output_tokens": sum(each.num_output_tokens for each in request.sequences),
                    }
                    return RequestView(state, request.since_s, _WAITS_FOR[state], details)
        return None

    def peers(self) -> Peers:
        return self._handoffs.peers()
