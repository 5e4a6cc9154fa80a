"""The one way from prompts to pieces, for every surface: generations run, and their tokens become text.

What nodes send of a choice (`ChoiceDelta`: ids, logprobs) passes the request's log and the choice's
`Detokenizer` (text, stop strings, positions) and comes out as an `OutputDelta`; its first has the prompt's
echo, where that was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, TypeAlias

from ...messages.node import FinishReason
from ...messages.timeline import SpanClock, span_between
from ..generation import (
    ChoiceDelta,
    GenerateSpec,
    Generation,
    GenerationInfo,
    Generator,
    Sessions,
    SessionTurn,
    WeightSpan,
)
from ..slices import SLICE_DELTAS, spaced
from .detokenizer import Detokenizer, TextOptions
from .echo import echo_of
from .pieces import Echo, Output, OutputDelta
from .prompts import Prompt
from .request_log import RequestLog
from .timelines import Laps, TimelineBody, Timelines, timeline_body
from .tokenization import Tokenizer

# Of a prompt: its continuations; what the model says of its own tokens, of whose continuations none is told;
# or nothing but its text, for which no node is needed.
Wanted: TypeAlias = Literal["outputs", "scores", "echo"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextJob:
    """One prompt, and how its text is wanted."""

    spec: GenerateSpec
    options: TextOptions
    wanted: Wanted = "outputs"
    echo: Prompt | None = None  # the same prompt, where it is to stand before its outputs
    turn: SessionTurn | None = None  # what its output is of a session


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
    sessions: Sessions


class TextRun:
    """One generation per prompt, with an output for each of its choices. ``deltas`` runs them.

    A prompt's facts (``info``) are there from its first delta on, and complete when ``deltas`` has ended.
    """

    def __init__(self, pipeline: Pipeline, jobs: Sequence[TextJob], laps: Laps) -> None:
        self._pipeline = pipeline
        self._jobs = jobs
        self._laps = laps
        self._generations: dict[int, Generation] = {}  # prompt -> its generation, once it has started
        self._num_completion_tokens = 0
        # Of each prompt's outputs.
        self._first_index = [0, *accumulate(len(job.spec.work.choices) for job in jobs)]
        self._echoes: dict[int, Echo] = {}  # by prompt
        self._turn_ids: defaultdict[int, list[int]] = defaultdict(list)  # by prompt, of sessions

    @property
    def request_ids(self) -> list[str]:
        """Of the generations, in the prompts' order."""
        return [job.spec.request_id for job in self._jobs]

    def spec(self, prompt: int) -> GenerateSpec:
        return self._jobs[prompt].spec

    def info(self, prompt: int) -> GenerationInfo:
        return self._generations[prompt].info

    @property
    def weight_version(self) -> str:
        """The version of the weights that answered (the latest, should they have changed between prompts)."""
        versions = [generation.info.weight_version for generation in self._generations.values()]
        return next(filter(None, reversed(versions)), self._pipeline.weight_version())

    def weight_versions(self, output: Output) -> list[WeightSpan]:
        """Which weights made which of its tokens; empty unless they changed in mid-answer."""
        generation = self._generations.get(output.prompt)
        spans = [] if generation is None else generation.info.weight_spans.get(output.choice, [])
        return [] if len(spans) < 2 else spans

    async def deltas(self) -> AsyncGenerator[OutputDelta, None]:
        """As tokens come, each output's in order. However this ends, nothing goes on running.

        A token whose text must wait (half a character, the beginning of a stop string) is given at once with
        empty text, as vLLM does: who measures the time between tokens sees each when it came.
        """
        if all(job.wanted == "echo" for job in self._jobs):
            for prompt in range(len(self._jobs)):
                yield await self._without_tokens(prompt, "length")
            return
        detokenizers: dict[tuple[int, int], Detokenizer] = {}
        async with self._arrivals() as arrivals:
            async for prompt, delta in arrivals:
                if self._jobs[prompt].wanted == "scores":
                    if delta.finish_reason is not None:
                        reason: FinishReason = "abort" if delta.finish_reason == "abort" else "length"
                        ended = await self._without_tokens(prompt, reason)
                        self._note_turn(ended)
                        yield ended
                    continue
                key = (prompt, delta.choice)
                if (detokenizer := detokenizers.get(key)) is None:
                    detokenizer = detokenizers[key] = await self._detokenizer(prompt, delta.choice)
                if detokenizer.is_finished:
                    continue
                info = self._generations[prompt].info
                first = None if info.first_token_unix_s else _FirstToken(info, self._pipeline.timelines.clock)
                shown = detokenizer.push(delta)
                if shown.finish_reason is not None and delta.finish_reason is None:
                    self._generations[prompt].stop_choice(delta.choice)
                self._num_completion_tokens += len(shown.token_ids)
                self._note_turn(shown)
                if first is not None:
                    first.detokenized()
                yield shown
                if first is not None:  # who reads this asks for more once the event has been written
                    first.streamed()

    async def _detokenizer(self, prompt: int, choice: int) -> Detokenizer:
        job = self._jobs[prompt]
        return Detokenizer(
            self._pipeline.tokenizer,
            job.options,
            Output(prompt, choice, self._first_index[prompt] + choice),
            job.spec.work.prompt_ids,
            await self._echo(prompt),
        )

    async def _without_tokens(self, prompt: int, reason: FinishReason) -> OutputDelta:
        """All of the first choice's output, where none of its tokens is told."""
        output = Output(prompt, 0, self._first_index[prompt])
        echo = await self._echo(prompt)
        return OutputDelta(output, (), (), (), (), 0, reason, is_first=True, echo=echo)

    async def _echo(self, prompt: int) -> Echo | None:
        """One for all of the prompt's outputs."""
        job = self._jobs[prompt]
        if job.echo is None:
            return None
        if prompt not in self._echoes:
            self._echoes[prompt] = await echo_of(
                self._pipeline.tokenizer,
                job.echo,
                skip_special_tokens=job.options.skip_special_tokens,
                with_offsets=job.spec.work.sampling.num_logprobs is not None,
            )
        return self._echoes[prompt]

    def _note_turn(self, delta: OutputDelta) -> None:
        """What the client is about to see of a session; with its end another turn may continue it."""
        prompt = delta.output.prompt
        if (turn := self._jobs[prompt].turn) is not None:
            self._turn_ids[prompt] += delta.token_ids
            if delta.finish_reason in ("stop", "length"):
                self._pipeline.sessions.finish_turn(turn, tuple(self._turn_ids[prompt]))

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
            prompt=sum(len(job.spec.work.prompt_ids) for job in self._jobs),
            completion=self._num_completion_tokens,
            cached=sum(generation.info.report.num_cached_tokens for generation in self._generations.values()),
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
