"""What a batch is sent as. That the ranks compute the same from it is tested in test_tensor_parallel.py."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch

from pdserve.engine.batch_codec import decode_batch, encode_batch
from pdserve.engine.forward_batch import ForwardBatch
from pdserve.engine.schedule_batch import ScheduleBatch, ScheduledRow
from pdserve.messages.sampling import SamplingParams
from pdserve.messages.work import Work
from pdserve.models.config import ModelConfig, kv_layout
from pdserve.runtime.config import SHIPPED_MODEL


@pytest.fixture
def batch() -> ForwardBatch:
    config = ModelConfig.from_dir(SHIPPED_MODEL)
    row = ScheduledRow(
        row_id="only",
        work=Work(prompt_ids=(5, 6, 7), choices=(0,), sampling=SamplingParams(temperature=0.0)),
        token_ids=(5, 6, 7),
        start=0,
        num_tokens=3,
        pages=[2],
        choices=(0,),
    )
    layout = kv_layout(config, page_size=4, dtype="float32")
    return ForwardBatch.build(ScheduleBatch((row,)), step=1, config=config, layout=layout)


def test_other_ranks_get_what_they_compute_and_nothing_to_sample(batch: ForwardBatch) -> None:
    sent = decode_batch(encode_batch(batch))
    assert sent.step == 1
    assert torch.equal(sent.token_ids, batch.token_ids)
    assert torch.equal(sent.slot_pages, batch.slot_pages)
    assert (sent.row_ids, sent.sampling, sent.entries) == ((), None, ())


def test_a_type_that_it_does_not_know_is_named(batch: ForwardBatch) -> None:
    foreign: Any = Fraction(1, 2)
    with pytest.raises(NotImplementedError, match="a forward batch with a Fraction cannot be sent"):
        encode_batch(replace(batch, step=foreign))
