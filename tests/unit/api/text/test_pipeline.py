"""From prompts to pieces, with no surface and no HTTP."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry

from pdserve.api.generation import ChoiceDelta, GenerateSpec
from pdserve.api.text.detokenizer import TextOptions
from pdserve.api.text.growing import GrowingOutputs
from pdserve.api.text.pieces import Content, OutputDelta, joined
from pdserve.api.text.pipeline import Pipeline, TextJob, TextRun, Wanted
from pdserve.api.text.prompts import Prompt
from pdserve.api.text.request_log import RequestLog
from pdserve.api.text.timelines import Laps, Timelines
from pdserve.api.text.tokenization import Tokenizer
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.timeline import SpanClock
from pdserve.messages.work import Work
from pdserve.tests.unit.api.fakes import FakeGenerator, FakeSessions


class Bench:
    """A pipeline over a generator that does as it is told."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.generator = FakeGenerator(tokenizer.encode(" quick brown fox"))
        self.clock = SpanClock.start()
        self.pipeline = Pipeline(
            tokenizer=tokenizer,
            generator=self.generator,
            timelines=Timelines(self.clock, CollectorRegistry(), "tiny"),
            weight_version=lambda: "7",
            request_log=RequestLog(),
            sessions=FakeSessions(),
        )

    def job(
        self,
        text: str,
        *,
        num_choices: int = 1,
        options: TextOptions | None = None,
        wanted: Wanted = "outputs",
        echoes: bool = False,
        logprobs: int | None = None,
    ) -> TextJob:
        ids = tuple(self.tokenizer.encode(text))
        return TextJob(
            spec=GenerateSpec(
                request_id=f"r-{text}",
                work=Work(
                    prompt_ids=ids,
                    choices=tuple(range(num_choices)),
                    sampling=SamplingParams(
                        max_tokens=20, num_logprobs=logprobs, num_prompt_logprobs=logprobs
                    ),
                ),
            ),
            options=options or TextOptions(),
            wanted=wanted,
            echo=Prompt(ids, text) if echoes else None,
        )

    def run(self, *jobs: TextJob) -> TextRun:
        return TextRun(self.pipeline, jobs, Laps(self.clock, self.clock.now()))


async def read(run: TextRun) -> list[OutputDelta]:
    return [delta async for delta in run.deltas()]


async def test_outputs_are_numbered_through_and_each_begins_once(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer)
    run = bench.run(bench.job("a", num_choices=2), bench.job("b", num_choices=3))
    deltas = await read(run)
    assert {delta.output.index: (delta.output.prompt, delta.output.choice) for delta in deltas} == {
        0: (0, 0),
        1: (0, 1),
        2: (1, 0),
        3: (1, 1),
        4: (1, 2),
    }
    for index in range(5):
        mine = [delta for delta in deltas if delta.output.index == index]
        assert [delta.is_first for delta in mine] == [True, *[False] * (len(mine) - 1)]
        whole = joined(mine)
        assert whole.pieces == (Content(" quick brown fox"),)
        assert whole.num_tokens == len(whole.token_ids) == len(bench.generator.token_ids)
    assert run.counts().completion == 5 * len(bench.generator.token_ids)


async def test_an_echo_stands_before_each_output_and_moves_its_positions(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer)
    deltas = await read(bench.run(bench.job("The", num_choices=2, echoes=True, logprobs=1)))
    for choice in range(2):
        whole = joined([delta for delta in deltas if delta.output.choice == choice])
        assert whole.echo is not None
        assert whole.echo.text == "The"
        assert whole.echo.text_offsets[0] == 0
        assert whole.text_offsets[0] == len("The")
        assert whole.content == " quick brown fox"


async def test_an_echo_alone_asks_no_node(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer)
    jobs = [bench.job(text, wanted="echo", echoes=True) for text in ("a", "b")]
    deltas = await read(bench.run(*jobs))
    assert [(delta.echo.text, delta.finish_reason) for delta in deltas if delta.echo] == [
        *(("a", "length"), ("b", "length"))
    ]
    assert bench.generator.generations == []


async def test_an_output_ends_for_its_node_where_its_text_ends(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer)
    deltas = await read(bench.run(bench.job("a", options=TextOptions(stops=("brown",)))))
    whole = joined(deltas)
    assert (whole.content, whole.finish_reason, whole.matched) == (" quick ", "stop", "brown")
    assert bench.generator.generations[0].stopped == [0]


async def test_growing_outputs_hold_all_so_far(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer)
    growing = GrowingOutputs()
    deltas = await read(bench.run(bench.job("a", num_choices=2, echoes=True)))
    shown = [growing.push(delta) for delta in deltas]
    for index in range(2):
        mine = [delta for delta in deltas if delta.output.index == index]
        seen = [delta for delta in shown if delta is not None and delta.output.index == index]
        assert seen == [joined(mine[: end + 1]) for end in range(len(mine))]


async def test_a_reader_that_stops_reading_ends_what_runs(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer)
    token_id = bench.generator.token_ids[0]
    bench.generator.script = lambda _: [ChoiceDelta(0, (token_id,)), asyncio.Event()]
    deltas = bench.run(bench.job("a")).deltas()
    assert (await anext(deltas)).num_tokens == 1
    await deltas.aclose()
    assert bench.generator.generations[0].is_cancelled
