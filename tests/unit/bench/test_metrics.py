"""Numbers computed by hand. In every record of these tests, times are seconds after sending."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pdserve.bench.metrics import (
    Metric,
    Summary,
    SummaryOptions,
    meets,
    parse_goodput,
    peak_concurrency,
    peak_tokens_per_s,
    span_stats,
    stat_ms,
    summarize,
)
from pdserve.bench.records import CountSource, MeasuredRequest, Outcome, SpanTime
from pdserve.runtime.errors import StartupError

MakeRecord = Callable[..., MeasuredRequest]


def options(**changes: object) -> SummaryOptions:
    fields: dict[str, object] = {
        "percentiles": (90.0, 99.0),
        "slos_ms": {},
        "open_loop": True,
        "max_client_delay_ms": 10.0,
    }
    return SummaryOptions(**fields | changes)  # type: ignore[arg-type]


def test_latencies_of_one_request(make_record: MakeRecord) -> None:
    record = make_record([(0.5, 1), (0.6, 1), (0.9, 3)], due_s=10.0, released_s=10.2, sent_s=10.25)
    assert record.ttft_s == pytest.approx(0.5)
    assert record.e2e_s == pytest.approx(0.9)
    assert record.tpot_s == pytest.approx(0.4 / 4)
    assert record.second_token_gap_s == pytest.approx(0.1)
    assert record.itls_s == pytest.approx([0.1, 0.1, 0.1, 0.1])
    assert record.chunk_gaps_s == pytest.approx([0.1, 0.3])
    assert record.mean_itl_s == pytest.approx(0.1)
    assert record.queue_s == pytest.approx(0.2)
    assert record.send_delay_s == pytest.approx(0.05)


def test_mean_itl_is_weighted_by_token(make_record: MakeRecord) -> None:
    record = make_record([(0.0, 1), (0.1, 1), (0.4, 3)])
    assert record.itls_s == pytest.approx([0.1, 0.1, 0.1, 0.1])
    record = make_record([(0.0, 1), (0.2, 1), (0.5, 3)])
    assert record.itls_s == pytest.approx([0.2, 0.1, 0.1, 0.1])
    assert record.mean_itl_s == pytest.approx(0.5 / 4)


def test_short_answers(make_record: MakeRecord) -> None:
    one = make_record([(0.5, 1)])
    assert (one.tpot_s, one.mean_itl_s, one.second_token_gap_s, one.itls_s) == (None, None, None, [])
    two_at_once = make_record([(0.5, 2)])
    assert (two_at_once.tpot_s, two_at_once.second_token_gap_s) == (0.0, 0.0)
    none = make_record([], outcome=Outcome.TRUNCATED)
    assert (none.ttft_s, none.e2e_s, none.tpot_s, none.second_token_gap_s) == (None, None, None, None)


def test_stat_is_numpys() -> None:
    stat = stat_ms([0.001, 0.002, 0.003, 0.004], (50.0, 90.0, 99.0))
    assert (stat.num_samples, stat.mean, stat.median) == (4, 2.5, 2.5)
    assert stat.std == pytest.approx(1.25**0.5)
    assert stat.percentiles[50.0] == 2.5
    assert stat.percentiles[90.0] == pytest.approx(3.7)
    assert stat.percentiles[99.0] == pytest.approx(3.97)


def three(make_record: MakeRecord) -> Summary:
    records = [
        make_record([(0.1, 1), (0.2, 1), (0.4, 2)], due_s=0.0, sent_s=0.001, num_prompt_tokens=10),
        make_record([(0.3, 1), (0.5, 1)], due_s=1.0, sent_s=1.002, num_prompt_tokens=20),
        make_record([(0.9, 1)], due_s=1.0, sent_s=1.5, outcome=Outcome.TRUNCATED),
    ]
    slos = {Metric.TTFT: 200.0, Metric.ITL: 101.0}
    return summarize(records, 2.0, [0.001, 0.003], options(slos_ms=slos))


def test_summary_counts_only_good_requests(make_record: MakeRecord) -> None:
    summary = three(make_record)
    assert (summary.num_requests, summary.completed, summary.failed) == (3, 2, 1)
    assert summary.outcomes == {Outcome.OK: 2, Outcome.TRUNCATED: 1}
    assert (summary.total_input_tokens, summary.total_output_tokens) == (30, 6)
    assert (summary.request_throughput, summary.output_throughput) == (1.0, 3.0)
    assert summary.total_token_throughput == 18.0
    assert summary.tokens_per_chunk == 6 / 5
    assert summary.count_sources == {CountSource.CONTINUOUS_USAGE: 2}
    assert summary.request_goodput == 0.5
    assert summary.slo_attainment == pytest.approx(1 / 3)


def test_summary_latencies(make_record: MakeRecord) -> None:
    stats = three(make_record).stats
    assert stats[Metric.TTFT].mean == pytest.approx(200.0)
    assert stats[Metric.ITL].num_samples == 4
    assert stats[Metric.ITL].mean == pytest.approx((100 + 100 + 100 + 200) / 4)
    assert stats[Metric.ITL].median == pytest.approx(100.0)
    assert stats[Metric.TPOT].mean == pytest.approx((300 / 3 + 200) / 2)
    assert stats[Metric.SECOND_TOKEN].mean == pytest.approx(150.0)
    assert stats[Metric.E2EL].mean == pytest.approx(450.0)
    assert stats[Metric.TTFT_FROM_SCHEDULE].mean == pytest.approx((101 + 302) / 2)
    assert stats[Metric.E2EL_FROM_SCHEDULE].mean == pytest.approx((401 + 502) / 2)
    assert stats[Metric.CHUNK_GAP].num_samples == 3


def test_refusals_are_timed_and_no_other_failures(make_record: MakeRecord) -> None:
    records = [
        make_record([], outcome=Outcome.HTTP_4XX, status=429, sent_s=1.0, ended_s=1.01),
        make_record([], outcome=Outcome.HTTP_5XX, status=503, sent_s=1.0, ended_s=1.03),
        make_record([], outcome=Outcome.HTTP_4XX, status=400, sent_s=1.0, ended_s=2.0),
        make_record([], outcome=Outcome.CONNECT, status=None, sent_s=1.0, ended_s=2.0),
        make_record([(0.1, 1)], sent_s=1.0),
    ]
    refusals = summarize(records, 1.0, [], options()).stats[Metric.REFUSAL]
    assert refusals.num_samples == 2
    assert refusals.mean == pytest.approx(20.0)


def test_a_late_client_makes_the_run_invalid(make_record: MakeRecord) -> None:
    summary = three(make_record)
    assert summary.max_send_delay_ms == pytest.approx(500.0)
    assert summary.max_loop_lag_ms == pytest.approx(3.0)
    assert [reason.split(" ms")[0] for reason in summary.invalid_reasons] == ["p99 send delay 490.0"]
    late = [make_record([(0.1, 1)], due_s=0.0, sent_s=0.5)]
    assert summarize(late, 1.0, [], options(open_loop=False)).invalid_reasons == ()
    assert summarize(late, 1.0, [0.02], options(open_loop=False)).invalid_reasons == (
        "p99 event-loop lag 20.0 ms > 10 ms",
    )


def test_closed_loop_has_no_latency_from_schedule(make_record: MakeRecord) -> None:
    summary = summarize([make_record([(0.1, 1)])], 1.0, [], options(open_loop=False))
    assert Metric.TTFT_FROM_SCHEDULE not in summary.stats
    assert Metric.TPOT not in summary.stats


def test_summary_of_nothing_good(make_record: MakeRecord) -> None:
    summary = summarize([make_record([], outcome=Outcome.CONNECT)], 1.0, [], options())
    assert (summary.completed, summary.failed, dict(summary.stats)) == (0, 1, {})
    assert (summary.max_output_tokens_per_s, summary.max_concurrent_requests) == (0.0, 0)
    assert summary.request_goodput is None
    assert summary.tokens_per_chunk is None


def test_peaks(make_record: MakeRecord) -> None:
    good = [
        make_record([(0.2, 1), (1.1, 4)], due_s=5.0),
        make_record([(0.9, 2), (1.0, 1)], due_s=5.5),
        make_record([(0.5, 1)], due_s=6.5),
    ]
    # Seconds after 5.0: 0.2 (1); 1.1 (4), 1.4 (2), 1.5 (1); 2.0 (1). The third starts as the second ends.
    assert peak_tokens_per_s(good) == 7.0
    assert peak_concurrency(good) == 2


def test_goodput_limits_are_inclusive_and_cover_each_metric(make_record: MakeRecord) -> None:
    record = make_record([(0.5, 1), (0.75, 1)])
    for metric, value in ((Metric.TTFT, 500), (Metric.ITL, 250), (Metric.TPOT, 250), (Metric.E2EL, 750)):
        assert meets(record, {metric: value})
        assert not meets(record, {metric: value - 1})
    assert meets(make_record([(0.5, 1)]), {Metric.ITL: 1, Metric.TPOT: 1})
    assert not meets(make_record([(0.1, 1)], outcome=Outcome.COUNT_MISMATCH), {})


def test_parse_goodput() -> None:
    assert parse_goodput(["ttft:500", "itl:50.5"]) == {Metric.TTFT: 500.0, Metric.ITL: 50.5}
    assert parse_goodput([]) == {}


@pytest.mark.parametrize(
    "pairs",
    [
        ["ttft"],
        ["ttft:x"],
        ["send_delay:1"],
        ["ttft:-1"],
        ["ttft:nan"],
        ["ttft:inf"],
        ["itl:1", "itl:2"],
        [":3"],
    ],
)
def test_parse_goodput_errors(pairs: list[str]) -> None:
    with pytest.raises(StartupError, match="--goodput"):
        parse_goodput(pairs)


def test_spans_of_one_name_are_added_up_per_request(make_record: MakeRecord) -> None:
    first = make_record(
        [(0.1, 1)], spans=(SpanTime("p", 0.02), SpanTime("wire", 0.001), SpanTime("wire", 0.003))
    )
    second = make_record([(0.1, 1)], spans=(SpanTime("p", 0.04),))
    prefill, wire = span_stats([first, second])
    assert (prefill.name, prefill.num_requests) == ("p", 2)
    assert prefill.mean_ms == pytest.approx(30.0)
    assert prefill.p99_ms == pytest.approx(39.8)
    assert (wire.name, wire.num_requests) == ("wire", 1)
    assert wire.mean_ms == pytest.approx(4.0)
