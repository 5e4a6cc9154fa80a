"""One client of the simulated cluster: its request, when it leaves, and what it got."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..api.generation import ChoiceDelta, GenerateSpec, GenerationInfo
from ..messages.sampling import SamplingParams
from ..messages.work import Work
from ..router.events import ChoiceStopped, ReaderLeft
from ..runtime.errors import RequestError
from .clock import EventQueue
from .plan import RequestPlan
from .router import SimulatedRouter
from .situations import Statistics


@dataclass(slots=True)
class Outcome:
    """What a client got."""

    request: RequestPlan
    tokens: list[list[int]]  # by choice
    info: GenerationInfo
    finishes: dict[int, str] = field(default_factory=dict)
    error: RequestError | None = None
    has_left: bool = False
    ended_at: float | None = None

    @property
    def is_over(self) -> bool:
        return self.ended_at is not None

    @property
    def summary(self) -> str:
        ends = "left" if self.has_left else str(self.error or self.finishes)
        return f"{ends}, {[len(tokens) for tokens in self.tokens]} tokens, {self.info.num_attempts} attempts"


class Client:
    """A `Reader`. What it gets after its end it does not read."""

    def __init__(
        self, request: RequestPlan, router: SimulatedRouter, events: EventQueue, statistics: Statistics
    ) -> None:
        self._request = request
        self._router = router
        self._events = events
        self._statistics = statistics
        tokens: list[list[int]] = [[] for _ in range(request.num_choices)]
        self.outcome = Outcome(request, tokens, GenerationInfo(num_attempts=0))

    @property
    def request_id(self) -> str:
        return f"r{self._request.name}"

    def arrive(self) -> None:
        request = self._request
        spec = GenerateSpec(
            request_id=self.request_id,
            work=Work(
                prompt_ids=request.prompt,
                choices=tuple(range(request.num_choices)),
                sampling=SamplingParams(max_tokens=request.max_tokens, stop_token_ids=request.stop_token_ids),
            ),
            stream=request.streams,
            timeout_s=request.timeout_s,
        )
        if request.leaves_after_s is not None:
            self._events.after(request.leaves_after_s, self._leave)
        try:
            self._router.generate(spec, self.outcome.info, self)
        except RequestError as error:
            self.fail(error)

    def _leave(self) -> None:
        if self.outcome.is_over:
            return
        self._events.note(f"client {self._request.name} leaves")
        if self.outcome.info.num_attempts == 0:
            self._statistics.count("cancels of a queued request")
        self.outcome.has_left = True
        self.end()
        self._router.tell(ReaderLeft(self.request_id))

    # ---- Reader -------------------------------------------------------------------------------------

    def deliver(self, delta: ChoiceDelta) -> None:
        outcome = self.outcome
        if outcome.is_over:
            return
        if delta.choice in outcome.finishes:
            is_stopped = outcome.finishes[delta.choice] == "stopped by its reader"
            assert is_stopped, f"{self.request_id}: choice {delta.choice} goes on after its end"
            return
        tokens = outcome.tokens[delta.choice]
        tokens += delta.token_ids
        if delta.finish_reason is not None:
            outcome.finishes[delta.choice] = delta.finish_reason
        stop_at = self._request.stops_choice_at
        is_enough = delta.choice == 0 and stop_at is not None and len(tokens) >= stop_at
        if is_enough and 0 not in outcome.finishes:
            outcome.finishes[0] = "stopped by its reader"
            self._router.tell(ChoiceStopped(self.request_id, 0))

    def end(self) -> None:
        if not self.outcome.is_over:
            self.outcome.ended_at = self._events.now
            self._events.note(f"client {self._request.name}: {self.outcome.summary}")

    def fail(self, error: RequestError) -> None:
        if not self.outcome.is_over:
            self.outcome.error = error
            self.end()
