"""What every generating surface is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..generation import ModelCard, Sessions
from ..http.bodies import BodyLimits
from ..http.in_flight import InFlightRequests
from ..text.pipeline import Pipeline
from ..text.sampling import GenerationDefaults
from ..text.tokenization import Tokenizer
from .metrics import HttpMetrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    card: ModelCard
    tokenizer: Tokenizer
    pipeline: Pipeline
    defaults: GenerationDefaults
    draw_seed: Callable[[], int]  # of 64 bits, for a request that brings none
    limits: BodyLimits
    metrics: HttpMetrics
    in_flight: InFlightRequests
    sessions: Sessions
