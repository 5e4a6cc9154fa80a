"""LiveSettings: all of a change, or nothing and why."""

from __future__ import annotations

import math

import pytest

from pdserve.decode.growth_estimate import GrowthEstimate
from pdserve.decode.local_prefill import LocalPrefillPolicy
from pdserve.decode.settings import decode_settings
from pdserve.messages.operation import SettingValue
from pdserve.prefill.limits import PrefillLimits
from pdserve.prefill.settings import prefill_settings
from pdserve.runtime.config import LIVE_FLAGS


def policy() -> LocalPrefillPolicy:
    return LocalPrefillPolicy(threshold=5, chunk_tokens=8, page_size=4, page_bytes=64)


def test_prefill_reads_what_was_set() -> None:
    limits = PrefillLimits(max_batch_tokens=8, max_batch_rows=4, max_waiting=3)
    settings = prefill_settings(limits)
    assert settings.change({"chunked_prefill_size": 16, "max_queued_prefills": 1}) == ""
    assert (limits.max_batch_tokens, limits.max_waiting) == (16, 1)
    assert settings.values() == {"chunked_prefill_size": 16, "max_queued_prefills": 1}


def test_decode_reads_what_was_set() -> None:
    growth, local_prefill = GrowthEstimate(), policy()
    settings = decode_settings(growth, local_prefill)
    assert settings.change({"schedule_conservativeness": 11, "local_prefill_threshold": None}) == ""
    assert growth.share == 1.0
    assert settings.values() == {"schedule_conservativeness": 11, "local_prefill_threshold": None}
    assert not local_prefill.is_local(num_tokens=9, num_cached=0, num_ahead_on_prefill=9, num_running=0)
    assert settings.change({"local_prefill_threshold": 9}) == ""
    assert local_prefill.is_local(num_tokens=9, num_cached=0, num_ahead_on_prefill=9, num_running=0)


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"page_size": 4}, "page_size cannot be changed while this node runs"),
        ({"local_prefill_threshold": -1}, "0 or more is expected"),
        ({"local_prefill_threshold": 1.5}, "an integer is expected"),
        ({"local_prefill_threshold": True}, "an integer is expected"),
        ({"schedule_conservativeness": 0.0}, "a number above 0 is expected"),
        ({"schedule_conservativeness": math.inf}, "a number above 0 is expected"),
        ({"schedule_conservativeness": math.nan}, "a number above 0 is expected"),
        ({"schedule_conservativeness": None}, "schedule_conservativeness: a number is expected"),
        ({"schedule_conservativeness": True}, "schedule_conservativeness True: a number is expected"),
    ],
)
def test_one_wrong_value_changes_nothing(wanted: dict[str, SettingValue], reason: str) -> None:
    settings = decode_settings(GrowthEstimate(), policy())
    before = settings.values()
    right: dict[str, SettingValue] = {"schedule_conservativeness": 2.0, "local_prefill_threshold": 7}
    assert reason in settings.change({**right, **wanted})
    assert settings.values() == before


def test_the_list_of_settings_is_what_the_nodes_have() -> None:
    limits = PrefillLimits(max_batch_tokens=8, max_batch_rows=4, max_waiting=3)
    of_role = {
        "prefill": prefill_settings(limits).values().keys(),
        "decode": decode_settings(GrowthEstimate(), policy()).values().keys(),
    }
    for role, names in of_role.items():
        assert {name for name, flag in LIVE_FLAGS.items() if role in flag.live_on} == names
