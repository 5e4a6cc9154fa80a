"""What is told of a prefill node: its load, its gauges, where a request is."""

from __future__ import annotations

from ..components.load_inquirer import LoadInquirer
from ..components.metrics_reporter import MetricsReporter
from ..messages.node import NodeLoad
from ..node.loop import Peers, RequestView
from ..transfer.prefill_rooms import PrefillRooms
from .job import JobState
from .jobs import PrefillJobs

_WAITS_FOR = {
    JobState.WAITING: "KV pages of its whole prompt",
    JobState.COMPUTING: "its prompt's chunks",
    JobState.SENDING: "its last pages to be in place on decode",
}


class PrefillReport:
    """A `Report`."""

    def __init__(
        self,
        jobs: PrefillJobs,
        rooms: PrefillRooms,
        load_inquirer: LoadInquirer,
        metrics: MetricsReporter,
    ) -> None:
        self._jobs = jobs
        self._rooms = rooms
        self._load_inquirer = load_inquirer
        self._metrics = metrics

    def observe(self) -> None:
        self._metrics.observe_pages(self._jobs.page_counts())
        self._metrics.observe_queues(num_prefill_inflight=self._jobs.num_in(JobState.SENDING))

    def load(self, now: float) -> NodeLoad:
        num_waiting = self._jobs.num_in(JobState.WAITING)
        return self._load_inquirer.load(
            pages=self._jobs.page_counts(),
            num_locked_pages=self._jobs.num_locked_pages,
            num_evictable_pages=self._jobs.num_evictable_pages,
            num_running_reqs=len(self._jobs) - num_waiting,
            num_waiting_reqs=num_waiting,
            num_queued_tokens=sum(job.prompt.num_tokens - job.prompt.num_computed for job in self._jobs),
            peers=self._rooms.traffic(now),
        )

    def num_in_states(self) -> dict[str, int]:
        return {state.value: self._jobs.num_in(state) for state in JobState}

    def find(self, request_id: str) -> RequestView | None:
        for job in self._jobs:
            if job.message.request_id == request_id:
                details = {
                    "room": job.room.counter,
                    "num_tokens": job.prompt.num_tokens,
                    "num_cached_tokens": job.prompt.num_cached,
                    "num_computed_tokens": job.prompt.num_computed,
                }
                return RequestView(job.state.value, job.state_since_s, _WAITS_FOR[job.state], details)
        return None

    def peers(self) -> Peers:
        return Peers()
