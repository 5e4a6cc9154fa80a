"""Where the time of requests went: what this process measures, what is kept for a while, what is counted.

Life of a timeline:

1. `Laps`, first thing in a handler, measures what comes before the generation.
2. `start`, when the generation runs: its `GenerationInfo` collects the spans of every process from here on.
3. `end`: its stages are counted, it may be exported, and `find` knows it for a while longer.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType
from prometheus_client import CollectorRegistry, Histogram

from ...messages.timeline import OVERLAPPING, Span, SpanClock, unaccounted_s
from ..generation import GenerateSpec, GenerationInfo
from ..request_ids import bare_id
from ..slices import rows

KEPT_TIMELINES = 1000
KEPT_S = 300.0
LENGTH_BUCKETS = tuple(factor * 10**power for power in range(6) for factor in (1, 2, 5))  # tokens

_LABELS = ("model_name", "role")
_STAGE_BUCKETS_S = (
    *(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0),
)


@dataclass(slots=True)
class Laps:
    """What happens to an HTTP request before its generations start: each lap begins where the last ended."""

    clock: SpanClock
    received: float  # monotonic seconds
    client: str = ""  # the API key that it showed
    traceparent: str = ""  # W3C headers, as the client sent them
    tracestate: str = ""
    reached: float = field(init=False)
    spans: list[Span] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.reached = self.received

    def lap(self, name: str) -> None:
        now = self.clock.now()
        self.spans.append(self.clock.span(name, self.reached, now))
        self.reached = now

    def branch(self) -> Laps:
        """Of one of the generations that begin here: what is lapped on it is not the others'."""
        branch = copy(self)
        branch.spans = [*self.spans]
        return branch


@dataclass(frozen=True, slots=True)
class Timeline:
    """One generation's, as far as it has come. Times are wall-clock seconds of this process."""

    request_id: str
    received_unix_s: float
    ended_unix_s: float  # 0 while it runs
    first_token_unix_s: float  # given to the client; 0: none was
    num_attempts: int
    num_prompt_tokens: int
    num_cached_tokens: int
    spans: tuple[Span, ...]  # in order of their starts
    traceparent: str = ""
    tracestate: str = ""

    @property
    def ttft_s(self) -> float | None:
        return self.first_token_unix_s - self.received_unix_s if self.first_token_unix_s else None

    @property
    def unaccounted_s(self) -> float | None:
        """The part of `ttft_s` that no span names."""
        if not self.first_token_unix_s:
            return None
        return unaccounted_s(self.spans, self.received_unix_s, self.first_token_unix_s)


@dataclass(slots=True)
class _Running:
    spec: GenerateSpec
    info: GenerationInfo
    laps: Laps


class Timelines:
    """Those of the generations that run, and of the last `KEPT_TIMELINES` that ended, for `KEPT_S`."""

    def __init__(
        self,
        clock: SpanClock,
        registry: CollectorRegistry,
        model_name: str,
        export: Callable[[Timeline], None] | None = None,
    ) -> None:
        self.clock = clock
        self._export = export
        self._running: dict[str, _Running] = {}
        self._ended: OrderedDict[str, Timeline] = OrderedDict()
        self._labels = (model_name, "router")
        self._stage_seconds = Histogram(
            "pd_request_stage_seconds",
            "Time of a request in a stage of its timeline, spans of one stage added up.",
            (*_LABELS, "stage"),
            buckets=_STAGE_BUCKETS_S,
            registry=registry,
        )
        self._unaccounted_seconds = Histogram(
            "pd_request_unaccounted_seconds",
            "The part of the time to first token that no stage names.",
            _LABELS,
            buckets=_STAGE_BUCKETS_S,
            registry=registry,
        ).labels(*self._labels)

        self._prompt_tokens = Histogram(
            "pd_request_prompt_tokens",
            "Prompt tokens of a generation, however it ended.",
            _LABELS,
            buckets=LENGTH_BUCKETS,
            registry=registry,
        ).labels(*self._labels)

    def start(self, spec: GenerateSpec, info: GenerationInfo, laps: Laps) -> None:
        """The generation is under way; `info` goes on filling up."""
        info.spans.extend(laps.spans)
        self._running[spec.request_id] = _Running(spec, info, laps)

    def end(self, request_id: str) -> None:
        """Whatever way it ended."""
        running = self._running.pop(request_id, None)
        if running is None:
            return
        now = self.clock.unix_now()
        timeline = _timeline(running, now)
        self._ended[bare_id(request_id)] = timeline
        self._ended.move_to_end(bare_id(request_id))
        self._drop_old(now)
        self._count(timeline)
        if self._export is not None:
            self._export(timeline)

    def find(self, request_id: str) -> Timeline | None:
        """By the generation's id, with or without the answer's prefix. None: unknown, or too long ago."""
        running = self._running.get(request_id)
        if running is not None:
            return _timeline(running, 0.0)
        self._drop_old(self.clock.unix_now())
        return self._ended.get(bare_id(request_id))

    def _drop_old(self, now: float) -> None:
        while self._ended:
            oldest = next(iter(self._ended))
            if len(self._ended) <= KEPT_TIMELINES and now - self._ended[oldest].ended_unix_s < KEPT_S:
                return
            del self._ended[oldest]

    def _count(self, timeline: Timeline) -> None:
        seconds: defaultdict[str, float] = defaultdict(float)
        for span in timeline.spans:
            seconds[span.name] += span.duration_s
        self._prompt_tokens.observe(timeline.num_prompt_tokens)
        for stage, total in seconds.items():
            self._stage_seconds.labels(*self._labels, stage).observe(total)
        if (left := timeline.unaccounted_s) is not None:
            self._unaccounted_seconds.observe(left)


def _timeline(running: _Running, ended_unix_s: float) -> Timeline:
    spec, info, laps = running.spec, running.info, running.laps
    return Timeline(
        request_id=spec.request_id,
        received_unix_s=laps.clock.unix_s(laps.received),
        ended_unix_s=ended_unix_s,
        first_token_unix_s=info.first_token_unix_s,
        num_attempts=info.num_attempts,
        num_prompt_tokens=len(spec.work.prompt_ids),
        num_cached_tokens=info.report.num_cached_tokens,
        spans=tuple(sorted(info.spans, key=lambda span: span.start_unix_s)),
        traceparent=laps.traceparent,
        tracestate=laps.tracestate,
    )


# ---- as clients are told it --------------------------------------------------------------------------


class SpanBody(msgspec.Struct, frozen=True, kw_only=True):
    """One stretch of a request's life; starts are relative to the earliest."""

    name: str
    start_s: float
    duration_s: float
    num_bytes: int | UnsetType = UNSET
    num_tokens: int | UnsetType = UNSET  # of a chunk
    overlaps: bool | UnsetType = UNSET  # runs beside other spans: not to be added up
    prompt: int | UnsetType = UNSET  # which prompt of a batch


class TimelineBody(msgspec.Struct, frozen=True, kw_only=True):
    spans: list[SpanBody]
    ttft_s: float | UnsetType = UNSET  # as this server sees it; of one prompt
    unaccounted_s: float | UnsetType = UNSET  # the part of it that no span names


async def timeline_body(timelines: Sequence[Timeline]) -> TimelineBody:
    """What an answer shows: of one generation, or of a batch's prompts in their order. Others run meanwhile
    where it is long."""
    is_batch = len(timelines) > 1
    spans = [(prompt, span) for prompt, each in enumerate(timelines) for span in each.spans]
    spans.sort(key=lambda entry: entry[1].start_unix_s)
    origin_s = spans[0][1].start_unix_s if spans else 0.0
    ttft_s: float | UnsetType = UNSET
    unaccounted: float | UnsetType = UNSET
    if not is_batch and timelines and timelines[0].ttft_s is not None:
        ttft_s, unaccounted = timelines[0].ttft_s, timelines[0].unaccounted_s or 0.0
    return TimelineBody(
        spans=await rows(spans, lambda each: _span_body(each[1], origin_s, each[0] if is_batch else UNSET)),
        ttft_s=ttft_s,
        unaccounted_s=unaccounted,
    )


def _span_body(span: Span, origin_s: float, prompt: int | UnsetType) -> SpanBody:
    return SpanBody(
        name=span.name,
        start_s=span.start_unix_s - origin_s,
        duration_s=span.duration_s,
        num_bytes=span.num_bytes or UNSET,
        num_tokens=span.num_tokens or UNSET,
        overlaps=True if span.name in OVERLAPPING else UNSET,
        prompt=prompt,
    )
