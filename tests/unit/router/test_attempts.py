"""One request's record: exactly-once acceptance, new attempts, and their limits, under a fake clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from pdserve.api.generation import ChoiceDelta, GenerateSpec, GenerationInfo
from pdserve.messages.node import AttemptFailed, FailureCode, Finish, FinishReason, ResendFrom, TokenOutput
from pdserve.messages.report import PromptReport
from pdserve.messages.sampling import TokenLogprob
from pdserve.messages.timeline import Span, SpanDates
from pdserve.router.attempts import AttemptEnded, RequestRecord
from pdserve.router.ledger import Attempt
from pdserve.router.pairing import Chosen, Pair
from pdserve.runtime.errors import RequestError
from pdserve.tests.present import at_present

EOS = 2
PAIR, OTHER = Pair("p", "d"), Pair("q", "e")
MakeRecord = Callable[..., RequestRecord]


@pytest.fixture
def make(spec: Callable[..., GenerateSpec]) -> MakeRecord:
    def make(clock_lead_s: Callable[[str], float] = lambda node: 0.0, **changes: object) -> RequestRecord:
        return RequestRecord(
            spec(**changes),
            GenerationInfo(num_attempts=0),
            arrived_at=0.0,
            deadline=100.0,
            max_attempts=3,
            resend_interval_s=0.5,
            eos_token_ids=(EOS,),
            max_model_len=50,
            dates=SpanDates(1000.0),
            clock_lead_s=clock_lead_s,
        )

    return make


def start(record: RequestRecord, *choices: int, pair: Pair = PAIR) -> Attempt:
    return record.open_attempt(choices or (0,), Chosen(pair, 3, 1), now=0.0)


def tokens(
    attempt: int,
    position: int,
    *token_ids: int,
    choice: int = 0,
    finish: FinishReason | None = None,
    report: PromptReport | None = None,
    weight_version: str = "",
    spans: tuple[Span, ...] = (),
) -> TokenOutput:
    return TokenOutput(
        request_id="r",
        attempt=attempt,
        choice=choice,
        position=position,
        token_ids=token_ids,
        finish=Finish(reason=finish) if finish else None,
        report=report,
        weight_version=weight_version,
        spans=spans,
    )


def failed(attempt: int, code: FailureCode = "peer_lost", retriable: bool = True) -> AttemptFailed:
    return AttemptFailed(
        request_id="r", attempt=attempt, code=code, reason=f"why {code}", retriable=retriable
    )


def retried(ended: AttemptEnded) -> list[tuple[int, ...]]:
    assert ended.closed == []
    return [retry.choices for retry in ended.retries]


# ---- acceptance -----------------------------------------------------------------------------------------


def test_tokens_in_order_are_taken_and_the_last_ends_the_choice(make: MakeRecord) -> None:
    record = make()
    attempt = start(record)
    assert record.on_tokens(tokens(1, 0, 5, 6), 0.0) == ChoiceDelta(0, (5, 6))
    assert not at_present(record.done)
    assert record.on_tokens(tokens(1, 2, 7, finish="stop"), 0.0) == ChoiceDelta(0, (7,), (), "stop", None)
    assert record.done
    assert record.choices[0].kept_ids == [5, 6, 7]
    assert attempt.open_choices == set()


def test_an_end_may_come_without_tokens(make: MakeRecord) -> None:
    record = make()
    start(record)
    record.on_tokens(tokens(1, 0, 5), 0.0)
    assert record.on_tokens(tokens(1, 1, finish="length"), 0.0) == ChoiceDelta(0, (), (), "length")


@pytest.mark.parametrize(
    "late",
    [tokens(1, 0, 5), tokens(1, 0, 5, 6), tokens(1, 0, 5, 6, 7), tokens(2, 2, 7), tokens(0, 2, 7)],
    ids=["repeated", "repeated whole", "overlapping", "later attempt", "earlier attempt"],
)
def test_everything_else_is_dropped(make: MakeRecord, late: TokenOutput) -> None:
    record = make()
    start(record)
    record.on_tokens(tokens(1, 0, 5, 6), 0.0)
    assert record.on_tokens(late, 0.0) is None
    assert record.choices[0].kept_ids == [5, 6]


@pytest.mark.parametrize("choice", [-1, 1])
def test_an_unknown_choice_is_dropped(make: MakeRecord, choice: int) -> None:
    record = make()
    start(record)
    assert record.on_tokens(tokens(1, 0, 5, choice=choice), 0.0) is None


def test_nothing_is_taken_after_the_end(make: MakeRecord) -> None:
    record = make()
    start(record)
    record.on_tokens(tokens(1, 0, 5, finish="stop"), 0.0)
    assert record.on_tokens(tokens(1, 1, 6), 0.0) is None
    assert record.on_tokens(tokens(1, 1, finish="stop"), 0.0) is None


def test_a_gap_is_asked_for_again_once_per_interval(make: MakeRecord) -> None:
    record = make()
    start(record)
    record.on_tokens(tokens(1, 0, 5), 0.0)
    wanted = ResendFrom(request_id="r", attempt=1, choice=0, position=1)
    assert record.on_tokens(tokens(1, 3, 8), 1.0) == wanted
    assert record.on_tokens(tokens(1, 4, 9), 1.4) is None
    assert record.on_tokens(tokens(1, 5, 9), 1.5) == wanted
    assert record.on_tokens(tokens(1, 1, 6, 7, 8), 1.6) == ChoiceDelta(0, (6, 7, 8))


def test_any_order_and_repetition_gives_each_token_once(make: MakeRecord) -> None:
    """The network is a liar; what is asked for again comes some time."""
    stream = list(range(100, 140))
    for seed in range(20):
        rng = random.Random(seed)
        record = make(max_tokens=40)
        start(record)
        taken: list[int] = []
        now = 0.0
        while not record.done:
            now += 1.0
            position = rng.randrange(len(stream))
            count = rng.randrange(1, 5)
            end = min(position + count, len(stream))
            finish: FinishReason | None = "length" if end == len(stream) else None
            delta = record.on_tokens(tokens(1, position, *stream[position:end], finish=finish), now)
            if isinstance(delta, ResendFrom):
                assert delta.position == len(taken)
            elif delta is not None:
                taken.extend(delta.token_ids)
        assert taken == stream


def test_facts_of_the_prompt_are_kept_once(make: MakeRecord) -> None:
    record = make(num_prompt_logprobs=0)
    report = PromptReport(logprobs=(None, TokenLogprob(2, -1.0)), num_cached_tokens=4)
    attempt = start(record)
    assert record.message(attempt, (0,), now=0.0, stream_interval=1).work.sampling.num_prompt_logprobs == 0
    record.on_tokens(tokens(1, 0, 5, report=report, weight_version="v1"), 0.0)
    record.on_failed(failed(1))
    attempt = start(record)
    assert record.message(attempt, (0,), now=0.0, stream_interval=1).work.sampling.num_prompt_logprobs is None
    record.on_tokens(tokens(2, 1, 6, report=PromptReport(), weight_version="v1"), 0.0)
    info = record.info
    assert (info.report, info.weight_version) == (report, "v1")
    assert info.num_attempts == 2


def test_spans_of_all_attempts_are_gathered_each_once(make: MakeRecord) -> None:
    record = make(num_choices=2)
    start(record, 0, 1)
    prefill, step = Span("prefill", 1.0, 0.5), Span("first_decode_step", 2.0, 0.1)
    record.on_tokens(tokens(1, 0, 5, finish="stop", spans=(prefill, step)), 0.0)
    record.on_tokens(tokens(1, 0, 5, choice=1, finish="stop", spans=(prefill, step)), 0.0)
    assert record.info.spans == [prefill, step]


def test_the_two_ways_between_router_and_decode_are_spans(make: MakeRecord) -> None:
    """Decode's clock is 5 s ahead; ours showed 1000 s more than our monotonic one."""
    record = make(clock_lead_s={"d": 5.0}.__getitem__)
    attempt = start(record)
    attempt.sent_s = 1.0
    theirs = (Span("decode_queue", 1006.5, 0.5), Span("relay", 1008.0, 0.25))
    record.on_tokens(tokens(1, 0, 5, spans=theirs), now=4.0)
    assert record.info.spans == [
        Span("decode_queue", 1001.5, 0.5),
        Span("relay", 1003.0, 0.25),
        Span("to_decode", 1001.0, 0.5),
        Span("to_router", 1003.25, 0.75),
    ]
    assert record.info.arrived_unix_s == 1004.0


# ---- new attempts ---------------------------------------------------------------------------------------


def test_a_new_attempt_carries_what_was_kept(make: MakeRecord) -> None:
    record = make(prompt=(1, 2, 3))
    start(record)
    record.on_tokens(tokens(1, 0, 5, 6, weight_version="v1"), 0.0)
    ended = record.on_failed(failed(1))
    assert retried(ended) == [(0,)]
    assert ended.retries[0].avoid == (PAIR,)
    assert record.pinned_weight_version == "v1"
    assert record.num_tokens((0,)) == 5
    attempt = start(record, pair=OTHER)
    message = record.message(attempt, (0,), now=30.0, stream_interval=1)
    assert (message.attempt, message.work.prompt_ids, message.work.output_ids) == (2, (1, 2, 3), (5, 6))
    assert (message.prefill_incarnation, message.deadline_s) == ("q", 70.0)
    assert record.on_tokens(tokens(1, 2, 7), 0.0) is None
    assert record.on_tokens(tokens(2, 2, 7), 0.0) == ChoiceDelta(0, (7,))


def test_choices_without_any_token_are_tried_again_together(make: MakeRecord) -> None:
    record = make(num_choices=3)
    start(record, 0, 1, 2)
    assert retried(record.on_failed(failed(1))) == [(0, 1, 2)]


def test_once_there_are_tokens_each_choice_is_tried_again_alone(make: MakeRecord) -> None:
    record = make(num_choices=3)
    start(record, 0, 1, 2)
    record.on_tokens(tokens(1, 0, 5, choice=0), 0.0)
    record.on_tokens(tokens(1, 0, 5, choice=1, finish="stop"), 0.0)
    assert retried(record.on_failed(failed(1))) == [(0,), (2,)]
    first, second = start(record, 0), start(record, 2)
    assert (first.number, second.number) == (2, 3)
    assert record.message(first, (0,), now=0.0, stream_interval=1).work.output_ids == (5,)
    assert record.message(second, (2,), now=0.0, stream_interval=1).work.output_ids == ()
    assert record.on_tokens(tokens(2, 0, 9, choice=2), 0.0) is None  # the other choice's attempt
    assert record.on_tokens(tokens(3, 0, 9, choice=2), 0.0) == ChoiceDelta(2, (9,))


def test_a_late_failure_changes_nothing(make: MakeRecord) -> None:
    record = make()
    start(record)
    record.on_failed(failed(1))
    start(record)
    assert record.on_failed(failed(1)) == AttemptEnded([], [])
    assert record.choices[0].num_failures == 1


@pytest.mark.parametrize("code", ["busy", "version_skew", "not_ready", "retracted", "shutting_down"])
def test_what_is_nobodys_failure_costs_no_attempt(make: MakeRecord, code: FailureCode) -> None:
    record = make()
    for number in range(1, 11):
        start(record)
        ended = record.on_failed(failed(number, code))
        assert ended.retries[0].num_free_failures == number
    assert record.choices[0].num_failures == 0
    start(record)
    record.on_tokens(tokens(11, 0, 5), 0.0)
    assert record.choices[0].num_free_failures == 0


def test_busy_avoids_the_pair_for_the_next_attempt_only(make: MakeRecord) -> None:
    record = make()
    start(record, pair=PAIR)
    assert record.on_failed(failed(1, "busy")).retries[0].avoid == (PAIR,)
    start(record, pair=OTHER)
    assert record.on_failed(failed(2, "busy")).retries[0].avoid == (OTHER,)


def test_what_was_retracted_says_so_from_then_on_and_may_go_back(make: MakeRecord) -> None:
    record = make()
    attempt = start(record, pair=PAIR)
    assert not record.message(attempt, (0,), now=0.0, stream_interval=1).was_retracted
    record.on_tokens(tokens(1, 0, 5), 0.0)
    retry = record.on_failed(failed(1, "retracted")).retries[0]
    assert retry.avoid == ()
    attempt = start(record, pair=OTHER)
    message = record.message(attempt, (0,), now=0.0, stream_interval=1)
    assert (message.was_retracted, message.work.output_ids) == (True, (5,))
    assert record.num_growth_tokens((0,)) == record.spec.work.sampling.max_tokens - 1
    record.on_failed(failed(2))
    attempt = start(record, pair=PAIR)
    assert record.message(attempt, (0,), now=0.0, stream_interval=1).was_retracted


def test_pairs_that_failed_are_avoided_for_good(make: MakeRecord) -> None:
    record = make()
    start(record, pair=PAIR)
    record.on_failed(failed(1))
    start(record, pair=OTHER)
    assert record.on_failed(failed(2, "transfer_failed")).retries[0].avoid == (PAIR, OTHER)


def test_the_third_failure_is_the_last(make: MakeRecord) -> None:
    record = make()
    for number in (1, 2):
        start(record)
        record.on_failed(failed(number))
    start(record)
    with pytest.raises(
        RequestError, match="3 attempts failed without a token; the last one: why peer_lost"
    ) as error:
        record.on_failed(failed(3))
    assert (error.value.status, error.value.code) == (503, "peer_lost")


def test_a_token_clears_the_count(make: MakeRecord) -> None:
    """A long stream outlives any number of nodes, as long as it goes on in between."""
    record = make(max_tokens=40)
    for number in range(1, 11):
        start(record)
        record.on_tokens(tokens(number, number - 1, 5), 0.0)
        assert retried(record.on_failed(failed(number))) == [(0,)]
        assert record.choices[0].num_failures == 1
    for number in (11, 12):
        start(record)
        if number == 12:
            with pytest.raises(RequestError):
                record.on_failed(failed(number))
        else:
            record.on_failed(failed(number))


def test_failures_are_counted_by_choice(make: MakeRecord) -> None:
    record = make(num_choices=2)
    start(record, 0, 1)
    record.on_tokens(tokens(1, 0, 5), 0.0)
    record.on_failed(failed(1))
    start(record, 0)
    start(record, 1)
    record.on_failed(failed(2))
    assert [choice.num_failures for choice in record.choices] == [2, 1]


@pytest.mark.parametrize(
    ("code", "status"),
    [("invalid", 400), ("deadline", 504), ("shutting_down", 503), ("transfer_failed", 500)],
)
def test_what_cannot_be_tried_again_fails_the_request(
    make: MakeRecord, code: FailureCode, status: int
) -> None:
    record = make()
    start(record)
    with pytest.raises(RequestError, match=f"why {code}") as error:
        record.on_failed(failed(1, code, retriable=False))
    assert error.value.status == status


# ---- kept ids that are complete -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kept", "delta"),
    [
        ({}, (5, EOS), ChoiceDelta(0, (), (), "stop", EOS)),
        ({"stop_token_ids": (9,)}, (5, 9), ChoiceDelta(0, (), (), "stop", 9)),
        ({"max_tokens": 2}, (5, 6), ChoiceDelta(0, (), (), "length")),
        ({"prompt": tuple(range(3, 51))}, (5, 6), ChoiceDelta(0, (), (), "length")),
    ],
    ids=["EOS", "stop id", "max_tokens", "context"],
)
def test_kept_ids_that_are_complete_are_closed_not_tried_again(
    make: MakeRecord, changes: dict[str, Any], kept: tuple[int, ...], delta: ChoiceDelta
) -> None:
    record = make(**changes)
    start(record)
    record.on_tokens(tokens(1, 0, *kept), 0.0)
    assert record.on_failed(failed(1)) == AttemptEnded([delta], [])
    assert record.done


@pytest.mark.parametrize("changes", [{"ignore_eos": True}, {"min_tokens": 3}])
def test_an_eos_that_does_not_count_is_continued(make: MakeRecord, changes: dict[str, Any]) -> None:
    record = make(**changes)
    start(record)
    record.on_tokens(tokens(1, 0, 5, EOS), 0.0)
    assert retried(record.on_failed(failed(1))) == [(0,)]


def test_complete_choices_are_closed_even_at_the_last_failure(make: MakeRecord) -> None:
    record = make()
    for number in (1, 2):
        start(record)
        record.on_failed(failed(number))
    start(record)
    record.on_tokens(tokens(3, 0, EOS), 0.0)
    assert record.on_failed(failed(3)).closed == [ChoiceDelta(0, (), (), "stop", EOS)]


# ---- the reader -----------------------------------------------------------------------------------------


def test_a_stopped_choice_takes_no_more(make: MakeRecord) -> None:
    record = make(num_choices=2)
    attempt = start(record, 0, 1)
    assert record.stop_choice(0) is attempt
    assert record.stop_choice(0) is None
    assert record.on_tokens(tokens(1, 0, 5), 0.0) is None
    assert attempt.open_choices == {1}
    record.stop_choice(1)
    assert record.done


def test_abort_ends_what_is_open(make: MakeRecord) -> None:
    record = make(num_choices=2)
    start(record, 0, 1)
    record.on_tokens(tokens(1, 0, 5, finish="stop"), 0.0)
    assert record.abort() == [ChoiceDelta(1, (), (), "abort")]
    assert record.done


def test_cached_pages_count_only_before_the_prompt_logprobs(make: MakeRecord) -> None:
    assert make().num_usable_cached(32) == 32
    assert make(num_prompt_logprobs=1, prompt_logprobs_start=8).num_usable_cached(32) == 8
