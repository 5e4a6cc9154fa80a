"""One request as the router keeps it: the ids of every choice, and whose attempt may add to them.

The life of a choice: *idle* (queued, no attempt) → *tried* (one current attempt) → idle again when the
attempt fails, or *finished*: ended by decode, closed from its kept ids, or stopped by whoever reads it.
Values and ``now`` in, decisions out; `Requests` acts on them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from ..api.generation import ChoiceDelta, GenerateSpec, GenerationInfo, WeightSpan
from ..components.page_need import num_choices_at_once
from ..components.stop_conditions import check_finish
from ..messages.node import (
    AttemptFailed,
    FailureCode,
    GenerateRequest,
    NodeLoad,
    ResendFrom,
    TokenOutput,
)
from ..messages.timeline import Span, SpanDates, moved, span_between
from ..runtime.errors import RequestError
from .ledger import Attempt
from .pairing import Chosen, Pair
from .prefix_index import page_hashes

COST_NO_ATTEMPT: frozenset[FailureCode] = frozenset(
    {"busy", "version_skew", "not_ready", "retracted", "paused", "shutting_down"}
)


@dataclass(slots=True)
class ChoiceState:
    index: int
    kept_ids: list[int] = field(default_factory=list)
    attempt: Attempt | None = None
    finished: bool = False
    num_failures: int = 0  # that count, since its last token
    num_free_failures: int = 0  # in a row
    was_retracted: bool = False
    failed_pairs: tuple[Pair, ...] = ()
    resend_asked_at: float = float("-inf")


@dataclass(frozen=True, slots=True)
class Retry:
    """These choices are to be tried again, in one attempt."""

    choices: tuple[int, ...]
    avoid: tuple[Pair, ...]
    num_failures: int
    num_free_failures: int  # in a row


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """What a failed attempt leads to: choices that turn out to be complete, and attempts to make."""

    closed: list[ChoiceDelta]
    retries: list[Retry]


class RequestRecord:
    """``on_tokens`` runs for every token of every stream: it is kept short."""

    def __init__(
        self,
        spec: GenerateSpec,
        info: GenerationInfo,
        *,
        arrived_at: float,
        deadline: float,
        max_attempts: int,
        resend_interval_s: float,
        eos_token_ids: Collection[int],
        max_model_len: int,
        dates: SpanDates,
        clock_lead_s: Callable[[str], float],  # of a decode node's clock ahead of ours, by incarnation
        attempt_numbers: Iterator[int] | None = None,
    ) -> None:
        self.spec = spec
        self.arrived_at = arrived_at
        self.deadline = deadline
        self.info = info
        self._dates = dates
        self._clock_lead_s = clock_lead_s
        self.choices = [ChoiceState(index) for index in spec.work.choices]
        self._max_attempts = max_attempts
        self._resend_interval_s = resend_interval_s
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        # A node keeps (request id, attempt) on record after its end, and a client may use its id again.
        self._attempt_numbers = attempt_numbers or itertools.count(1)
        self._num_unfinished = len(spec.work.choices)
        self.abort_by = math.inf  # when an abort ends without what nodes have yet to send; infinity: none
        self._weight_version = ""  # of the tokens that came last
        self._has_report = False  # on the prompt: what is told of it is told once
        self._page_hashes: dict[int, list[int]] = {}  # by page size

    @property
    def request_id(self) -> str:
        return self.spec.request_id

    @property
    def done(self) -> bool:
        return self._num_unfinished == 0

    @property
    def has_tokens(self) -> bool:
        return any(choice.kept_ids for choice in self.choices)

    @property
    def pinned_weight_version(self) -> str:
        """A stream is not continued by other weights than it has, but where it was retracted for them."""
        return self._weight_version if self.has_tokens else ""

    def continue_with_other_weights(self) -> None:
        """A stream that is retracted for new weights goes on with them."""
        self._weight_version = ""

    def settle_length(self, num_kv_tokens: int | None) -> None:
        """Nodes that can run it are known: a length that nobody asked for ends where their room for KV does,
        which the last token needs none of. Once it has begun, every attempt has the same length."""
        sampling = self.spec.work.sampling
        if not self.spec.has_default_length or num_kv_tokens is None or self.info.num_attempts:
            return
        room = max(1, sampling.min_tokens, num_kv_tokens + 1 - len(self.spec.work.prompt_ids))
        if room < sampling.max_tokens:
            fitting = msgspec.structs.replace(sampling, max_tokens=room)
            self.spec = replace(self.spec, work=msgspec.structs.replace(self.spec.work, sampling=fitting))

    def live_attempts(self) -> list[Attempt]:
        attempts = {id(c.attempt): c.attempt for c in self.choices if c.attempt is not None}
        return list(attempts.values())

    def num_tokens(self, choices: Sequence[int]) -> int:
        """What an attempt at these choices has to prefill."""
        return len(self.spec.work.prompt_ids) + len(self.choices[choices[0]].kept_ids)

    def at_once(self, choices: tuple[int, ...], decode: NodeLoad) -> tuple[int, ...]:
        """The first of these choices, as many as the decode node can run together."""
        if not decode.page_size or len(choices) == 1:
            return choices
        num = num_choices_at_once(
            num_prompt=len(self.spec.work.prompt_ids),
            max_tokens=self.spec.work.sampling.max_tokens,
            num_choices=len(choices),
            page_size=decode.page_size,
            num_pages=decode.num_total_pages,
            num_places=decode.max_running_requests or len(choices),
        )
        return choices[:num]

    def num_growth_tokens(self, choices: Sequence[int]) -> int:
        """What decode is to have room for beyond these tokens: it promises the next page, or all of it."""
        if not self.was_retracted(choices):
            return len(choices)
        num_left = self.spec.work.sampling.max_tokens - len(self.choices[choices[0]].kept_ids)
        return len(choices) * max(1, num_left)

    def was_retracted(self, choices: Sequence[int]) -> bool:
        return any(self.choices[index].was_retracted for index in choices)

    def has_failed_on(self, decode: str, choices: Sequence[int]) -> bool:
        """An attempt at one of these failed with this decode node, in a way that counts."""
        return any(pair.decode == decode for index in choices for pair in self.choices[index].failed_pairs)

    def page_hashes(self, page_size: int) -> list[int]:
        if page_size not in self._page_hashes:
            self._page_hashes[page_size] = page_hashes(
                self.spec.work.prompt_ids, page_size, salt=self.spec.work.cache_salt
            )
        return self._page_hashes[page_size]

    def answer_hashes(self, choice: int, page_size: int) -> list[int]:
        """Of the prompt with what a choice has generated: what the decode node holds in the end."""
        token_ids = (*self.spec.work.prompt_ids, *self.choices[choice].kept_ids)
        known = self.page_hashes(page_size)
        return page_hashes(token_ids, page_size, known=known, salt=self.spec.work.cache_salt)

    def num_usable_cached(self, num_cached_tokens: int) -> int:
        """Prompt logprobs and hidden states are wanted of positions that must then be computed."""
        work = self.spec.work
        if work.wants_prompt_states:
            return 0
        if work.prompt_logprobs_from is None:
            return num_cached_tokens
        return min(num_cached_tokens, work.prompt_logprobs_from)

    # ---- attempts -------------------------------------------------------------------------------

    def open_attempt(self, choices: tuple[int, ...], chosen: Chosen, now: float) -> Attempt:
        self.info.num_attempts += 1
        attempt = Attempt(
            request_id=self.request_id,
            number=next(self._attempt_numbers),
            pair=chosen.pair,
            open_choices=set(choices),
            num_uncached_tokens=chosen.num_uncached_tokens,
            num_tokens_ahead=chosen.num_tokens_ahead,
            num_pages=chosen.num_pages,
            weight=len(choices),
            since=now,
        )
        for index in choices:
            self.choices[index].attempt = attempt
        return attempt

    def message(
        self,
        attempt: Attempt,
        choices: tuple[int, ...],
        *,
        weight_version: str = "",
        now: float,
        stream_interval: int,
    ) -> GenerateRequest:
        session = self.spec.session
        work = msgspec.structs.replace(
            self.spec.work,
            output_ids=tuple(self.choices[choices[0]].kept_ids),
            choices=choices,
        )
        return GenerateRequest(
            request_id=self.request_id,
            attempt=attempt.number,
            work=work,
            prefill_incarnation=attempt.pair.prefill,
            weight_version=weight_version,
            deadline_s=max(0.0, self.deadline - now),
            stream_interval=stream_interval,
            priority=self.spec.priority,
            num_prefill_tokens_ahead=attempt.num_tokens_ahead,
            session_id="" if session is None else session.session_id,
            session_timeout_s=0.0 if session is None else session.idle_timeout_s,
            was_retracted=self.was_retracted(choices),
        )

    # ---- what decode says -----------------------------------------------------------------------

    def on_tokens(self, output: TokenOutput, now: float) -> ChoiceDelta | ResendFrom | None:
        """Takes only the current attempt at exactly the next position. A gap is asked for again."""
        if not 0 <= output.choice < len(self.choices):
            return None
        choice = self.choices[output.choice]
        attempt = choice.attempt
        if attempt is None or attempt.number != output.attempt:
            return None
        if output.position != len(choice.kept_ids):
            return self._on_other_position(choice, output, now)
        choice.kept_ids.extend(output.token_ids)
        choice.num_failures = choice.num_free_failures = 0
        if output.weight_version:
            self._on_opening(output)
            self._note_weights(choice, output)
        if output.spans:
            self._take_spans(attempt, output.spans, now)
        if not self.info.arrived_unix_s:
            self.info.arrived_unix_s = self._dates.unix_s(now)
        finish = output.finish
        if finish is None:
            return ChoiceDelta(
                choice.index, output.token_ids, output.logprobs, hidden_states=output.hidden_states
            )
        self._finish(choice)
        return ChoiceDelta(
            choice.index,
            output.token_ids,
            output.logprobs,
            finish.reason,
            finish.matched,
            hidden_states=output.hidden_states,
        )

    def _take_spans(self, attempt: Attempt, spans: Sequence[Span], now: float) -> None:
        """Each once: output that is sent again brings them again. On our clock, as of the first of them.

        The first message of an attempt was under way in between: from our sending to decode's first span, and
        from its last one, which ends as it sends, to now.
        """
        if attempt.clock_lead_s is None:
            attempt.clock_lead_s = self._clock_lead_s(attempt.pair.decode)
        seen = set(self.info.spans)
        new = [span for span in moved(spans, -attempt.clock_lead_s) if span not in seen]
        self.info.spans.extend(new)
        for span in new:
            if span.name == "decode_queue":
                sent_unix_s = self._dates.unix_s(attempt.sent_s)
                self.info.spans.append(span_between("to_decode", sent_unix_s, span.start_unix_s))
            elif span.name == "relay":
                arrived = self._dates.unix_s(now)
                self.info.spans.append(span_between("to_router", span.end_unix_s, arrived))

    def _on_opening(self, output: TokenOutput) -> None:
        """A choice's first message in an attempt tells of the prompt; what the first attempt says counts."""
        if not self.info.weight_version:
            self.info.weight_version = output.weight_version
        if output.report is not None and not self._has_report:
            self._has_report = True
            self.info.report = output.report
            self.spec = replace(self.spec, work=self.spec.work.told_of_prompt())

    def _note_weights(self, choice: ChoiceState, output: TokenOutput) -> None:
        self._weight_version = output.weight_version
        spans = self.info.weight_spans.setdefault(choice.index, [])
        if not spans or spans[-1].weight_version != output.weight_version:
            spans.append(WeightSpan(output.weight_version, output.position))

    def _on_other_position(self, choice: ChoiceState, output: TokenOutput, now: float) -> ResendFrom | None:
        is_gap = output.position > len(choice.kept_ids)
        if not is_gap or now - choice.resend_asked_at < self._resend_interval_s:
            return None
        choice.resend_asked_at = now
        return ResendFrom(
            request_id=self.request_id,
            attempt=output.attempt,
            choice=choice.index,
            position=len(choice.kept_ids),
        )

    def on_failed(self, failure: AttemptFailed) -> AttemptEnded:
        """The attempt's unfinished choices are tried again. Raises RequestError when the request has failed.

        All together while no choice of the request has a token yet, otherwise each alone with its own ids.
        """
        failed = [c for c in self.choices if c.attempt is not None and c.attempt.number == failure.attempt]
        if not failed:
            return AttemptEnded([], [])
        if self.is_aborting:
            return AttemptEnded(self._aborted(failed), [])
        if not failure.retriable or failure.code == "deadline":
            raise _request_error(failure)
        closed = []
        idle = []
        for choice in failed:
            assert choice.attempt is not None
            pair = choice.attempt.pair
            choice.attempt.open_choices.discard(choice.index)
            choice.attempt = None
            if (delta := self._close_if_complete(choice)) is not None:
                closed.append(delta)
                continue
            idle.append(choice)
            choice.was_retracted |= failure.code == "retracted"
            if failure.code in COST_NO_ATTEMPT:
                choice.num_free_failures += 1
            else:
                choice.num_failures += 1
                choice.failed_pairs = (*choice.failed_pairs, pair)
        if idle and max(choice.num_failures for choice in idle) >= self._max_attempts:
            raise RequestError(
                f"{self._max_attempts} attempts failed without a token; the last one: {failure.reason}",
                status=503,
                code=failure.code,
                error_type="service_unavailable",
                retry_after_s=1.0,
            )
        groups = [[choice] for choice in idle] if self.has_tokens else [idle] if idle else []
        # What was retracted finds its prefix where it was; elsewhere it goes only when there is more room.
        avoided = () if failure.code in ("retracted", "paused") else (pair,)
        return AttemptEnded(closed, [_retry(group, avoided) for group in groups])

    def _close_if_complete(self, choice: ChoiceState) -> ChoiceDelta | None:
        """The last id that was kept may have been the end: the failure came between it and its finish."""
        if not choice.kept_ids:
            return None
        finish = check_finish(
            choice.kept_ids[-1],
            len(choice.kept_ids),
            self.spec.work.sampling,
            self._eos_token_ids,
            self._max_model_len,
            len(self.spec.work.prompt_ids) + len(choice.kept_ids),
        )
        if finish is None:
            return None
        self._finish(choice)
        return ChoiceDelta(choice.index, (), (), finish.reason, finish.matched)

    # ---- what the reader says -------------------------------------------------------------------

    def stop_choice(self, index: int) -> Attempt | None:
        """The reader wants no more of this choice. Returns the attempt that works on it."""
        choice = self.choices[index]
        attempt = choice.attempt
        if not choice.finished:
            self._finish(choice)
        return attempt

    @property
    def is_aborting(self) -> bool:
        return self.abort_by < math.inf

    def begin_abort(self, abort_by: float) -> list[ChoiceDelta]:
        """Ends the choices that nobody works on; of the others, nodes are to send what they have."""
        self.abort_by = abort_by
        return self._aborted([choice for choice in self.choices if choice.attempt is None])

    def abort(self) -> list[ChoiceDelta]:
        """End every unfinished choice."""
        return self._aborted(self.choices)

    def _aborted(self, choices: Sequence[ChoiceState]) -> list[ChoiceDelta]:
        deltas = []
        for choice in choices:
            if not choice.finished:
                self._finish(choice)
                deltas.append(ChoiceDelta(choice.index, (), (), "abort"))
        return deltas

    def _finish(self, choice: ChoiceState) -> None:
        choice.finished = True
        self._num_unfinished -= 1
        if choice.attempt is not None:
            choice.attempt.open_choices.discard(choice.index)
            choice.attempt = None


def _retry(group: list[ChoiceState], avoided: tuple[Pair, ...]) -> Retry:
    """The pair that just failed is avoided even if that was no fault of its own, such as Busy."""
    avoid = dict.fromkeys((*(p for choice in group for p in choice.failed_pairs), *avoided))
    return Retry(
        choices=tuple(choice.index for choice in group),
        avoid=tuple(avoid),
        num_failures=max(choice.num_failures for choice in group),
        num_free_failures=max(choice.num_free_failures for choice in group),
    )


def _request_error(failure: AttemptFailed) -> RequestError:
    match failure.code:
        case "invalid":
            return RequestError(failure.reason, status=400, code="invalid_request")
        case "deadline":
            return RequestError(
                failure.reason, status=504, code="deadline_exceeded", error_type="timeout_error"
            )
        case "shutting_down":
            return RequestError(
                failure.reason,
                status=503,
                code=failure.code,
                error_type="service_unavailable",
                retry_after_s=1.0,
            )
        case _:
            return RequestError(failure.reason, status=500, code=failure.code, error_type="server_error")
