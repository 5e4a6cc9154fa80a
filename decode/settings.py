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
            Setting(
                name="schedule_conservativeness",
                get=lambda: growth.conservativeness,
                set=set_conservativeness,
                is_whole=False,
                minimum=0,
            ),
            Setting(
                name="local_prefill_threshold",
                get=lambda: local_prefill.threshold,
                set=set_threshold,
                minimum=0,
                may_be_none=True,
            ),
        ]
    )
