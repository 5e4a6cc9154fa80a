"""The generations of one HTTP request while they run, as text."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET, UnsetType

from ...messages.timeline import SpanClock, span_between
from ..generation import (
    ChoiceDelta,
    GenerateSpec,
    Generation,
    GenerationInfo,
    Generator,
    WeightSpan,
)
from ..slices import SLICE_DELTAS, spaced
from .detokenizer import Detokenizer, TextDelta, TextOptions, empty_delta
from .request_log import RequestLog
from .timelines import Laps, TimelineBody, Timelines, timeline_body
from .tokenization import Tokenizer


@dataclass(frozen=True, slots=True)
class TextJob:
    """One prompt, and how its text is wanted."""

    spec: GenerateSpec
    options: TextOptions
    is_scored: bool = False  # only what is said of the prompt is wanted, not the one token that comes with it


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Of all prompts and choices of a request, so far."""

    prompt: int
    completion: int
    cached: int  # of the prompts' tokens, those that nobody had to compute


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """The way from prompts to text: what each run takes."""

    tokenizer: Tokenizer
    generator: Generator
    timelines: Timelines
    weight_version: Callable[[], str]
    request_log: RequestLog


class TextRun:
    """One generation per prompt, with ``num_choices`` choices each. ``deltas`` runs them.

    A prompt's facts (``info``) are there from its first delta on, and complete when ``deltas`` has ended.
    """

    def __init__(self, pipeline: Pipeline, jobs: Sequence[TextJob], laps: Laps) -> None:
        self._pipeline = pipeline
        self._jobs = jobs
        self._laps = laps
        self._generations: dict[int, Generation] = {}  # prompt -> its generation, once it has started
        self._num_completion_tokens = 0

    def info(self, prompt: int) -> GenerationInfo:
        return self._generations[prompt].info

    @property
    def weight_version(self) -> str:
        """The version of the weights that answered (the latest, should they have changed between prompts)."""
        versions = [generation.info.weight_version for generation in self._generations.values()]
        return next(filter(None, reversed(versions)), self._pipeline.weight_version())

    def weight_versions(self, prompt: int, choice: int) -> list[WeightSpan] | UnsetType:
        """Which weights made which of a choice's tokens, where they changed in mid-answer."""
        generation = self._generations.get(prompt)
        spans = [] if generation is None else generation.info.weight_spans.get(choice, [])
        return UNSET if len(spans) < 2 else spans

    async def deltas(self) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """(prompt, delta) as tokens come, each choice's in order. However this ends, nothing goes on running.

        A token whose text must wait (half a character, the beginning of a stop string) is given at once with
        empty text, as vLLM does: who measures the time between tokens sees each when it came.
        """
        detokenizers: dict[tuple[int, int], Detokenizer] = {}
        async with self._arrivals() as arrivals:
            async for prompt, delta in arrivals:
                if self._jobs[prompt].is_scored:
                    if delta.finish_reason is not None:
                        yield prompt, empty_delta("abort" if delta.finish_reason == "abort" else "length")
                    continue
                key = (prompt, delta.choice)
                if key not in detokenizers:
                    job = self._jobs[prompt]
                    detokenizers[key] = Detokenizer(
                        self._pipeline.tokenizer, job.options, job.spec.prompt_ids
                    )
                detokenizer = detokenizers[key]
                if detokenizer.is_finished:
                    continue
                info = self._generations[prompt].info
                first = None if info.first_token_unix_s else _FirstToken(info, self._pipeline.timelines.clock)
                shown = detokenizer.push(delta)
                if shown.finish_reason is not None and delta.finish_reason is None:
                    self._generations[prompt].stop_choice(delta.choice)
                self._num_completion_tokens += len(shown.token_ids)
                if first is not None:
                    first.detokenized()
                yield prompt, shown
                if first is not None:  # who reads this asks for more once the event has been written
                    first.streamed()

    @contextlib.asynccontextmanager
    async def _arrivals(self) -> AsyncGenerator[AsyncGenerator[tuple[int, ChoiceDelta], None], None]:
        # Asked before the body was read, and since then many others may have been let in. Once for all
        # prompts: what was begun is not broken off half-way.
        self._pipeline.generator.check_wait(self._laps.client)
        source = self._run(0) if len(self._jobs) == 1 else self._run_all()
        try:
            async with contextlib.aclosing(source) as arrivals:
                yield arrivals
        finally:
            async for job in spaced(self._jobs):
                self._pipeline.timelines.end(job.spec.request_id)

    async def _run(self, prompt: int) -> AsyncGenerator[tuple[int, ChoiceDelta], None]:
        spec = self._jobs[prompt].spec
        laps = self._laps.branch()
        laps.lap("prepare")
        log = self._pipeline.request_log.begins(spec)
        generation = await self._pipeline.generator.generate(spec, laps.client)
        self._generations[prompt] = generation
        self._pipeline.timelines.start(spec, generation.info, laps)
        try:
            async for delta in generation:
                log.take(delta)
                yield prompt, delta
        finally:
            generation.cancel()
            log.ends()

    async def _run_all(self) -> AsyncGenerator[tuple[int, ChoiceDelta], None]:
        arrivals: asyncio.Queue[tuple[int, ChoiceDelta] | asyncio.Task[None]] = asyncio.Queue()

        async def forward(prompt: int) -> None:
            async with contextlib.aclosing(self._run(prompt)) as deltas:
                async for delta in deltas:
                    arrivals.put_nowait(delta)

        running: set[asyncio.Task[None]] = set()

        def run(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
            task = asyncio.create_task(work)
            running.add(task)
            task.add_done_callback(arrivals.put_nowait)
            return task

        async def start() -> None:
            async for prompt in spaced(range(len(self._jobs))):
                run(forward(prompt))

        starting = run(start())
        try:
            num_arrived = 0
            while running:
                arrival = await arrivals.get()  # others do not run while something is there
                num_arrived += 1
                if num_arrived % SLICE_DELTAS == 0:
                    await asyncio.sleep(0)
                if isinstance(arrival, asyncio.Task):
                    running.remove(arrival)
                    arrival.result()
                else:
                    yield arrival
        finally:
            starting.cancel()
            try:
                async for task in spaced(tuple(running)):  # what runs for a prompt is stopped on every node
                    task.cancel()
            finally:
                for task in running:  # all of them, also where this is cancelled once more
                    task.cancel()
                if running:
                    await asyncio.wait(running)

    def counts(self) -> TokenCounts:
        return TokenCounts(
            prompt=sum(len(job.spec.prompt_ids) for job in self._jobs),
            completion=self._num_completion_tokens,
            cached=sum(generation.info.num_cached_tokens for generation in self._generations.values()),
        )

    async def timeline(self) -> TimelineBody:
        """Of all that was measured so far."""
        timelines = self._pipeline.timelines
        found = [timelines.find(job.spec.request_id) async for job in spaced(self._jobs)]
        return await timeline_body([timeline for timeline in found if timeline is not None])


class _FirstToken:
    """The last stages on the way to a generation's first token, as this process sees them."""

    def __init__(self, info: GenerationInfo, clock: SpanClock) -> None:
        self._info = info
        self._clock = clock
        self._note("deliver", info.arrived_unix_s or clock.unix_now())

    def detokenized(self) -> None:
        self._note("detokenize", self._reached)

    def streamed(self) -> None:
        self._note("stream_out", self._reached)

    def _note(self, name: str, start_unix_s: float) -> None:
        self._reached = self._clock.unix_now()
        self._info.first_token_unix_s = self._reached
        self._info.spans.append(span_between(name, start_unix_s, self._reached))
