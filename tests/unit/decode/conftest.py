"""Requests as the decode scheduler holds them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pdserve.components.output_streamer import StreamKey
from pdserve.decode.sequence import DecodeRequest
from pdserve.messages.node import GenerateRequest
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.work import Work


@dataclasses.dataclass(frozen=True)
class Requests:
    """Builds them: `make("a", num_tokens=10)`."""

    def __call__(
        self,
        request_id: str = "a",
        *,
        num_tokens: int = 10,
        prompt_ids: tuple[int, ...] = (),
        output_ids: tuple[int, ...] = (),
        choices: tuple[int, ...] = (0,),
        arrived_s: float = 0.0,
        was_retracted: bool = False,
        **sampling: Any,  # noqa: ANN401, the fields of SamplingParams
    ) -> DecodeRequest:
        key = StreamKey(b"router", request_id, 1)
        prompt_ids = prompt_ids or tuple(range(1, num_tokens + 1))
        message = GenerateRequest(
            request_id=request_id,
            attempt=1,
            work=Work(
                prompt_ids=prompt_ids,
                output_ids=output_ids,
                choices=choices,
                sampling=SamplingParams(**sampling),
            ),
            prefill_incarnation="prefill",
            deadline_s=10.0,
            was_retracted=was_retracted,
        )
        return DecodeRequest.of(key, message, number=0, now=arrived_s, reached_s=arrived_s)


@pytest.fixture
def make() -> Requests:
    return Requests()
