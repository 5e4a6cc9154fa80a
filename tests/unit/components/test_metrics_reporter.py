"""MetricsReporter: names that promtool takes, labels, and counters that equal the load's totals."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pdserve.components.metrics_reporter import MetricsReporter
from pdserve.components.page_allocator import PageCounts
from pdserve.messages.node import NodeLoad, PeerTraffic

PAGES = PageCounts(free=1, exposed=2, private=3, shared=4, quarantined=5, total=15)


def samples(reporter: MetricsReporter) -> dict[str, float]:
    """Sample name with its own labels → value; model_name and role are checked here."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(reporter.render()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("model_name"), labels.pop("role")) == ("tiny", "decode")
            name = sample.name + "".join(f"{{{key}={value}}}" for key, value in labels.items())
            values[name] = sample.value
    return values


@pytest.fixture
def reporter() -> MetricsReporter:
    return MetricsReporter("tiny", "decode")


def use_everything(reporter: MetricsReporter) -> None:
    reporter.observe_load(NodeLoad(num_total_pages=10, num_used_pages=4, num_generated_tokens=5))
    reporter.observe_pages(PAGES)
    reporter.observe_queues(num_prefill_inflight=1, num_decode_prealloc=2, num_decode_transfer=3)
    reporter.count_step("decode", 0.01)
    reporter.count_transfer(1_000, 0.5)
    reporter.count_room("done")
    reporter.count_pull("link", 100, 0.5)


def test_gauges_are_the_last_load(reporter: MetricsReporter) -> None:
    reporter.observe_load(NodeLoad(num_running_reqs=9, num_waiting_reqs=9, num_total_pages=1))
    reporter.observe_load(
        NodeLoad(
            num_running_reqs=2,
            num_waiting_reqs=3,
            num_queued_tokens=70,
            num_used_pages=5,
            num_total_pages=20,
            num_prompt_tokens_computed=30,
            num_cached_prompt_tokens=10,
        )
    )
    values = samples(reporter)
    assert values["pd_num_running_reqs"] == 2
    assert values["pd_num_queue_reqs"] == 3
    assert values["pd_num_queued_tokens"] == 70
    assert values["pd_token_usage"] == values["pd_kv_cache_usage_perc"] == 0.25
    assert values["pd_cache_hit_rate"] == 0.25


def test_a_load_of_nothing_divides_by_nothing(reporter: MetricsReporter) -> None:
    reporter.observe_load(NodeLoad())
    values = samples(reporter)
    assert values["pd_token_usage"] == 0
    assert values["pd_cache_hit_rate"] == 0


def test_counters_equal_the_totals_however_often_they_are_read(reporter: MetricsReporter) -> None:
    for total in (0, 7, 7, 19):
        reporter.observe_load(
            NodeLoad(
                num_prompt_tokens_computed=total,
                num_cached_prompt_tokens=2 * total,
                num_generated_tokens=3 * total,
            )
        )
        values = samples(reporter)
        assert values["pd_computed_prompt_tokens_total"] == total
        assert values["pd_prefix_cache_hits_total"] == 2 * total
        assert values["pd_prefix_cache_queries_total"] == 3 * total
        assert values["pd_sampled_tokens_total"] == 3 * total


def test_the_process_is_told_of_once_asked(reporter: MetricsReporter) -> None:
    assert "process_" not in reporter.render()
    reporter.include_process()
    assert "process_resident_memory_bytes " in reporter.render()


def test_queues_and_pages(reporter: MetricsReporter) -> None:
    use_everything(reporter)
    values = samples(reporter)
    assert values["pd_num_prefill_inflight_queue_reqs"] == 1
    assert values["pd_num_decode_prealloc_queue_reqs"] == 2
    assert values["pd_num_decode_transfer_queue_reqs"] == 3
    states = ["free", "exposed", "private", "shared", "quarantined"]
    assert [values[f"pd_num_pages{{state={state}}}"] for state in states] == [1, 2, 3, 4, 5]


def test_transfers_rooms_and_steps(reporter: MetricsReporter) -> None:
    reporter.count_transfer(1_000, 0.5)
    reporter.count_transfer(3_000, 1.0)
    reporter.count_transfer(500, 0.0)  # below the clock's resolution: no speed to tell
    reporter.count_room("done")
    reporter.count_room("done")
    reporter.count_room("failed")
    reporter.count_step("prefill", 0.25)
    reporter.count_step("decode", 0.015)
    reporter.count_step("decode", 0.005)
    values = samples(reporter)
    assert values["pd_kv_transfer_bytes_total"] == 4_500
    assert values["pd_kv_transfer_seconds_count"] == 3
    assert values["pd_kv_transfer_seconds_sum"] == 1.5
    assert values["pd_kv_transfer_speed_bytes_per_second"] == 3_000
    assert values["pd_rooms_total{outcome=done}"] == 2
    assert values["pd_rooms_total{outcome=failed}"] == 1
    assert values["pd_step_seconds_count{kind=prefill}"] == 1
    assert values["pd_step_seconds_sum{kind=decode}"] == pytest.approx(0.02)


def test_what_weights_have_cost(reporter: MetricsReporter) -> None:
    reporter.count_version_refusal()
    reporter.count_version_refusal()
    for number in (0, 2, 3):
        reporter.observe_crossed_rooms(number)
        reporter.observe_faults(num_contained=2 * number, num_malformed=number)
    reporter.count_pull("mooncake/rdma", 100, 0.5)
    reporter.count_pull("mooncake/rdma", 50, 0.25)
    reporter.count_pull("link", 10, 2.0)
    values = samples(reporter)
    assert values["pd_version_refusals_total"] == 2
    assert values["pd_crossed_rooms_total"] == 3
    assert values["pd_contained_faults_total"] == 6
    assert values["pd_malformed_messages_total"] == 3
    assert values["pd_weight_pull_bytes_total{over=mooncake/rdma}"] == 150
    assert values["pd_weight_pull_seconds_total{over=mooncake/rdma}"] == 0.75
    assert values["pd_weight_pull_bytes_total{over=link}"] == 10


def test_reporters_share_nothing() -> None:
    first, second = MetricsReporter("tiny", "decode"), MetricsReporter("tiny", "decode")
    first.count_transfer(10, 1.0)
    assert samples(second)["pd_kv_transfer_bytes_total"] == 0


def test_names_keep_promtools_rules(reporter: MetricsReporter) -> None:
    """promlint's rules on names, types and units, for machines without promtool."""
    use_everything(reporter)
    abbreviated = r"_(s|ms|us|ns|sec|b|kb|mb|gb|tb|pb|m|h|d)(_|$)"
    reserved = ("_total", "_count", "_sum", "_bucket")
    for family in text_string_to_metric_families(reporter.render()):
        name = family.name
        assert re.fullmatch(r"pd_[a-z0-9]+(_[a-z0-9]+)*", name), name
        assert family.documentation or name.endswith("_created")
        assert not re.search(abbreviated, name), name
        assert not name.endswith(reserved), name  # the parser strips a counter's own _total
        assert not re.search(r"counter|gauge|histogram|summary", name), name


@pytest.mark.process
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_is_content(reporter: MetricsReporter) -> None:
    use_everything(reporter)
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=reporter.render(), capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_each_peer_has_its_own_counters_while_it_is_there(reporter: MetricsReporter) -> None:
    first = PeerTraffic(num_bytes=100, busy_s=0.5, bytes_per_s=200.0)
    reporter.observe_load(NodeLoad(peers={"d1": first}))
    second = PeerTraffic(num_bytes=150, busy_s=1.0, bytes_per_s=120.0)
    reporter.observe_load(NodeLoad(peers={"d1": second, "d2": first}))
    values = samples(reporter)
    assert values["pd_kv_peer_bytes_total{peer=d1}"] == 150
    assert values["pd_kv_peer_busy_seconds_total{peer=d1}"] == 1.0
    assert values["pd_kv_peer_bytes_per_second{peer=d1}"] == 120.0
    assert values["pd_kv_peer_bytes_total{peer=d2}"] == 100
    reporter.observe_load(NodeLoad(peers={"d2": first}))
    assert not any("peer=d1" in name for name in samples(reporter))
    assert samples(reporter)["pd_kv_peer_bytes_total{peer=d2}"] == 100
