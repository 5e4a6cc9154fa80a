"""What may be changed on a prefill node while it runs."""

from __future__ import annotations

from ..messages.operation import SettingValue
from ..node.live_settings import LiveSettings, Setting
from .limits import PrefillLimits


def prefill_settings(limits: PrefillLimits) -> LiveSettings:
    def set_chunk(value: SettingValue) -> None:
        assert isinstance(value, int)
        limits.max_batch_tokens = value

    def set_queue(value: SettingValue) -> None:
        assert isinstance(value, int)
        limits.max_waiting = value

    return LiveSettings(
        [
            Setting(name="chunked_prefill_size", get=lambda: limits.max_batch_tokens, set=set_chunk),
            Setting(name="max_queued_prefills", get=lambda: limits.max_waiting, set=set_queue),
        ]
    )
