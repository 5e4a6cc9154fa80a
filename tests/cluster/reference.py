"""The same checkpoint in `transformers`, fp32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


class Reference:
    def __init__(self, model_dir: Path) -> None:
        torch.set_num_threads(1)
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def hidden_states(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[len(token_ids), hidden_size]: of the last layer, behind the final norm."""
        out = self._model(torch.tensor([list(token_ids)]), output_hidden_states=True)
        states: torch.Tensor = out.hidden_states[-1][0].float()
        return states

    @torch.inference_mode()
    def logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[len(token_ids), vocab_size]: row i is the distribution of token i + 1."""
        logits = self._model(torch.tensor([list(token_ids)])).logits[0].float()
        return torch.log_softmax(logits, -1)
