"""What may be changed on a decode node while it runs."""

from __future__ import annotations

from ..messages.operation import SettingValue
from ..node.live_settings import LiveSettings, Setting
from .growth_estimate import GrowthEstimate
from .local_prefill import LocalPrefillPolicy


def decode_settings(growth: GrowthEstimate, local_prefill: LocalPrefillPolicy) -> LiveSettings:
    def set_conservativeness(value: SettingValue) -> None:
        assert value is not None
        growth.set_conservativeness(value)

    def set_threshold(value: SettingValue) -> None:
        assert value is None or isinstance(value, int)
        local_prefill.threshold = value

    return LiveSettings(
        [
            Setting("schedule_conservativeness", lambda: growth.conservativeness, set_conservativeness),
            Setting("local_prefill_threshold", lambda: local_prefill.threshold, set_threshold),
        ]
    )
