"""Requests that forwards compute on: prompts that this node prefills itself, and choices that grow.

All their pages are in place or their own. Each step samples one token of every choice; chunks of prompts ride
along, short ones while others decode.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import assert_never

from ..components.load_inquirer import LoadInquirer
from ..components.metrics_reporter import MetricsReporter, StepKind
from ..components.output_streamer import StreamKey
from ..components.prompt_job import PromptJob
from ..engine.engine_thread import Forwards
from ..engine.forward_batch import ForwardBatch, ForwardOutput, RowOutput
from ..engine.schedule_batch import ScheduleBatch
from ..messages.node import FailureCode
from ..messages.report import SampledToken
from ..runtime.containment import Containment
from .batching import ChunkRow, DecodeRow, LocalPrefill, Row, decode_row, prefill_rows
from .growth_estimate import GrowthEstimate
from .limits import DecodeLimits
from .local_prefill import LocalPrefillPolicy
from .outputs import Outputs
from .request_pages import RequestPages
from .retraction import choose_victim
from .sequence import DecodeRequest, Sequence
from .timeline import Timeline

_log = logging.getLogger(__name__)


class Running:
    """`build` makes a forward of rows; what it raises is a row's fault. `local_prefill` is told what steps
    take, and says how long the chunks beside them may be."""

    def __init__(
        self,
        *,
        pages: RequestPages,
        growth: GrowthEstimate,
        outputs: Outputs,
        timeline: Timeline,
        local_prefill: LocalPrefillPolicy,
        engine: Forwards,
        build: Callable[[ScheduleBatch], ForwardBatch],
        load_inquirer: LoadInquirer,
        metrics: MetricsReporter,
        limits: DecodeLimits,
    ) -> None:
        self.containment = Containment()
        self._pages = pages
        self._growth = growth
        self._outputs = outputs
        self._timeline = timeline
        self._local_prefill = local_prefill
        self._engine = engine
        self._build = build
        self._load_inquirer = load_inquirer
        self._metrics = metrics
        self._limits = limits
        self._prefilling: dict[StreamKey, LocalPrefill] = {}
        self._decoding: dict[StreamKey, DecodeRequest] = {}
        self._forward: list[Row] = []  # on the engine thread

    def __len__(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    def __iter__(self) -> Iterator[DecodeRequest]:
        for prefill in self._prefilling.values():
            yield prefill.request
        yield from self._decoding.values()

    def __contains__(self, key: StreamKey) -> bool:
        return key in self._decoding or key in self._prefilling

    @property
    def num_prefilling(self) -> int:
        return len(self._prefilling)

    @property
    def num_decoding(self) -> int:
        return len(self._decoding)

    @property
    def num_queued_tokens(self) -> int:
        """Of prompts, that no forward has."""
        return sum(prefill.job.num_unscheduled for prefill in self._prefilling.values())

    @property
    def has_forward(self) -> bool:
        return bool(self._forward)

    def is_prefilling(self, key: StreamKey) -> bool:
        return key in self._prefilling

    def state_of(self, request: DecodeRequest) -> str:
        return "local_prefill" if request.key in self._prefilling else "running"

    # ---- begun --------------------------------------------------------------------------------------

    def prefill(self, request: DecodeRequest, now: float) -> None:
        """This node computes the prompt itself."""
        self._timeline.note(request, "decode_queue")
        self._pages.allocate_prompt(request)
        job = PromptJob.of(request.key.request_id, request.work)
        job.take_pages(request.sequences[0].pages, request.num_cached)
        self._load_inquirer.count_prompt(num_cached=request.num_cached)
        request.since_s = now
        self._prefilling[request.key] = LocalPrefill(request, job)
        self._timeline.note(request, "reserve")

    def decode(self, request: DecodeRequest, now: float) -> None:
        """All pages of its prompt are in place: choices fork, and grow from the next step on."""
        request.since_s = now
        self._decoding[request.key] = request
        for sequence in request.live_sequences:
            sequence.token_ids = array("q", sequence.token_ids)
        self._pages.fork(request)

    # ---- a step -------------------------------------------------------------------------------------

    def launch(self, pages_come_back: Callable[[], bool]) -> None:
        """One forward at a time: each needs the tokens of the one before. `pages_come_back`: whether others
        than those here hold pages that will be free at some time."""
        if self._forward:
            return
        rows: list[Row] = list(self._decode_rows(pages_come_back))
        budget = self._limits.max_batch_tokens - len(rows)
        if rows:
            budget = min(budget, self._local_prefill.chunk_tokens)
        rows += prefill_rows(self._prefilling.values(), budget)
        if not rows:
            return
        try:
            batch = self._build(ScheduleBatch(rows=tuple(row.row for row in rows)))
        except Exception:  # which of them is at fault says each one alone
            if not self._give_up_faulty(rows):
                raise
            self.launch(pages_come_back)
            return
        for row in rows:
            self._mark_in_forward(row)
        self._forward = rows
        self._engine.submit(batch)

    def _give_up_faulty(self, rows: Iterable[Row]) -> bool:
        """Fails the requests of whose rows no batch can be made. False: there is none."""
        num_before = self.containment.num_faults
        for row in rows:

            def give_up(why: str, request: DecodeRequest = row.request) -> None:
                self._fail(request, "invalid", why, retriable=False)

            if row.request.live_sequences:
                with self.containment.around("a row", give_up):
                    self._build(ScheduleBatch(rows=(row.row,)))
        return self.containment.num_faults > num_before

    def _decode_rows(self, pages_come_back: Callable[[], bool]) -> list[DecodeRow]:
        """One token of every choice that has a page for it. Who came first finds pages first."""
        rows: list[DecodeRow] = []
        has_retracted = False
        for request in list(self._decoding.values()):
            for sequence in request.live_sequences:
                while not (sequence.is_finished or self._pages.make_room(sequence)):
                    in_order = sorted(self, key=lambda each: each.number)
                    victim = choose_victim(in_order, may_wait=len(self) > 1 or pages_come_back())
                    if victim is None:
                        break
                    self._retract(victim)
                    has_retracted = True
                else:
                    rows.append(decode_row(request, sequence))
        rows = [row for row in rows if not row.sequence.is_finished]
        if rows and not has_retracted:
            self._growth.step()
        return rows

    def _retract(self, request: DecodeRequest) -> None:
        """It is tried again, and admitted only when all that it can need is there."""
        _log.info("request %s is retracted: too few pages for all that runs", request.message.request_id)
        self._metrics.count_retraction()
        reason = "the decode node has too few KV pages for all that runs"
        self._fail(request, "retracted", reason, retriable=True)
        going_on = [
            (other, sequence) for other in self._decoding.values() for sequence in other.live_sequences
        ]
        self._growth.retracted(
            num_output_tokens=sum(sequence.num_output_tokens for _, sequence in going_on),
            max_tokens=sum(other.work.sampling.max_tokens for other, _ in going_on),
            num_sequences=len(going_on),
        )

    def _mark_in_forward(self, row: Row) -> None:
        match row:
            case DecodeRow():
                row.sequence.in_forward = True
            case ChunkRow():
                self._timeline.note(row.request, "prefill_queue")
                row.prefill.job.scheduled(row.row)
            case _:
                assert_never(row)

    # ---- its results --------------------------------------------------------------------------------

    def apply(self, output: ForwardOutput, now: float) -> None:
        rows, self._forward = self._forward, []
        self._measure(rows, output)
        for row, result in zip(rows, output.rows, strict=True):
            match row:
                case DecodeRow():
                    self._apply_decoded(row.request, row.sequence, result, output)
                case ChunkRow():
                    self._timeline.chunk(row.request, row, output)
                    self._apply_prefilled(row, result, now)
                case _:
                    assert_never(row)

    def _measure(self, rows: list[Row], output: ForwardOutput) -> None:
        step_s = output.finished - output.started
        kinds = {type(row) for row in rows}
        kind: StepKind = "mixed" if len(kinds) > 1 else "decode" if DecodeRow in kinds else "prefill"
        self._metrics.count_step(kind, step_s)
        if kind == "prefill":
            self._local_prefill.measured_local(sum(row.row.num_tokens for row in rows), step_s)
        elif kind == "decode":
            self._local_prefill.measured_step(step_s)

    def _apply_decoded(
        self, request: DecodeRequest, sequence: Sequence, result: RowOutput, output: ForwardOutput
    ) -> None:
        sequence.in_forward = False
        if self._decoding.get(request.key) is request:
            self._timeline.first_step(request, output)
        if sequence.is_finished:  # cancelled while it was computed
            self._free(request, sequence)
            return
        self._load_inquirer.count_generated(1)
        self._take_token(request, sequence, result.tokens[0])
        self._forget_if_over(request)

    def _apply_prefilled(self, row: ChunkRow, result: RowOutput, now: float) -> None:
        request, job = row.request, row.prefill.job
        self._load_inquirer.count_prompt(num_computed=row.row.num_tokens)
        job.computed(row.row, result)
        if not request.live_sequences:  # cancelled while it was computed
            self._free_prefill(row.prefill)
            return
        if not result.tokens:
            return
        self._outputs.prompt_done(request, job.report())
        self._load_inquirer.count_generated(len(result.tokens))
        del self._prefilling[request.key]
        self.decode(request, now)
        for sequence, sampled in zip(request.sequences, result.tokens, strict=True):
            self._take_token(request, sequence, sampled)
        self._forget_if_over(request)

    def _take_token(self, request: DecodeRequest, sequence: Sequence, sampled: SampledToken) -> None:
        self._outputs.take(request, sequence, sampled)
        if sequence.is_finished:
            self._free(request, sequence)

    def _forget_if_over(self, request: DecodeRequest) -> None:
        if not request.live_sequences:
            self._decoding.pop(request.key, None)

    # ---- gone ---------------------------------------------------------------------------------------

    def cancel(self, key: StreamKey, choices: tuple[int, ...], now: float) -> None:
        """These choices, or all of them.

        While its prompt is computed it is all: no choice has a token yet that could be a reason to end alone.
        """
        del now
        if (prefill := self._prefilling.get(key)) is not None:
            self._end(prefill.request, self._outputs.discard(prefill.request, ()))
        else:
            request = self._decoding[key]
            self._end(request, self._outputs.discard(request, choices))

    def abort(self, request: DecodeRequest, now: float) -> None:
        del now
        self._end(request, self._outputs.abort(request))

    def fail(
        self, request: DecodeRequest, code: FailureCode, reason: str, now: float, *, retriable: bool
    ) -> None:
        del now
        self._fail(request, code, reason, retriable=retriable)

    def _fail(self, request: DecodeRequest, code: FailureCode, reason: str, *, retriable: bool) -> None:
        self._end(request, self._outputs.fail(request, code, reason, retriable=retriable))

    def _end(self, request: DecodeRequest, ended: list[Sequence]) -> None:
        """Their pages go back unless a forward may still write them."""
        prefill = self._prefilling.pop(request.key, None)
        if prefill is not None:
            if prefill.job.num_forwards == 0:
                self._free_prefill(prefill)
            return
        for sequence in ended:
            if not sequence.in_forward:
                self._free(request, sequence)
        self._forget_if_over(request)

    def _free(self, request: DecodeRequest, sequence: Sequence) -> None:
        """The KV of every token but the last is in its pages."""
        self._pages.free(request, sequence, num_computed=len(sequence.token_ids) - 1)

    def _free_prefill(self, prefill: LocalPrefill) -> None:
        """What is computed of the prompt is in the first choice's pages; the others have none."""
        first, *others = prefill.request.sequences
        self._pages.free(prefill.request, first, num_computed=prefill.job.num_computed)
        for sequence in others:
            self._pages.free(prefill.request, sequence)

    # ---- what there is ------------------------------------------------------------------------------

    def sequences(self) -> list[Sequence]:
        """Of every request, and cancelled ones that a forward still writes. For checks."""
        found = {id(sequence): sequence for request in self for sequence in request.sequences}
        for row in self._forward:
            in_forward = [row.sequence] if isinstance(row, DecodeRow) else row.request.sequences
            found.update({id(sequence): sequence for sequence in in_forward})
        return list(found.values())
