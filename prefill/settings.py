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
            Setting("chunked_prefill_size", lambda: limits.max_batch_tokens, set_chunk),
            Setting("max_queued_prefills", lambda: limits.max_waiting, set_queue),
        ]
    )
