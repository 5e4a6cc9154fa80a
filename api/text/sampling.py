"""From the sampling fields of a request to a SamplingParams: every bound and every default, in one place."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import msgspec

from ...messages.node import MAX_PRIORITY
from ...messages.sampling import (
    MAX_BIAS,
    MAX_LOGIT_BIASES,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_OUTPUT_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_STOP_TOKEN_IDS,
    MAX_TEMPERATURE,
    MIN_REPETITION_PENALTY,
    HiddenStates,
    SamplingParams,
)
from ...models.config import read_generation_defaults
from ...runtime.errors import RequestError
from ..generation import ModelCard
from ..refusals import bad_value, check_range

_log = logging.getLogger(__name__)

GREEDY_BELOW_TEMPERATURE = 1e-5  # where dividing logits by it would overflow
MAX_STOPS = 16
MAX_CHOICES = 128  # of a prompt
MAX_LOGPROBS = 20


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a request that does not say gets: from the checkpoint's generation_config.json."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_directory(cls, directory: str | Path) -> GenerationDefaults:
        """Of a value that no request might have, a warning tells: nobody could do anything about it then."""
        values = read_generation_defaults(Path(directory))
        values.pop("eos_token_id", None)  # the model's business
        if values.get("top_p") == 0:  # transformers keeps the likeliest token then
            del values["top_p"]
            values["top_k"] = 1
        defaults = cls()
        for name, value in values.items():
            try:
                _check_bounds(name, value)
            except RequestError as error:
                _log.warning("generation_config.json is ignored here: %s", error.message)
            else:
                defaults = msgspec.structs.replace(defaults, **{name: value})
        return defaults


def resolve_max_tokens(
    wanted: int | None,
    default: int | None,
    num_prompt: int,
    card: ModelCard,
    name: str,
) -> int:
    """`wanted`, which must fit the context, or `default` (None: the rest) as far as it fits."""
    rest = card.max_model_len - num_prompt
    if wanted is None:
        return rest if default is None else min(default, rest)
    if wanted < 1:
        raise bad_value(name, f"`{name}` must be at least 1, got {wanted}.")
    if wanted > rest:
        raise RequestError(
            f"The model's context is {card.max_model_len} tokens; the prompt has {num_prompt} and `{name}` "
            f"asks for {wanted} more.",
            param=name,
            code="context_length_exceeded",
        )
    return wanted


def checked_priority(priority: int) -> int:
    check_range("priority", priority, -MAX_PRIORITY, MAX_PRIORITY)
    return priority


def checked_choices(num_choices: int) -> int:
    check_range("n", num_choices, 1, MAX_CHOICES)
    return num_choices


def checked_logprobs(name: str, num_top: int | None) -> int | None:
    """How many of the likeliest tokens are told beside each; None: no logprobs."""
    if num_top is not None:
        check_range(name, num_top, 0, MAX_LOGPROBS)
    return num_top


def parse_stops(stop: str | list[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise bad_value("stop", f"`stop` takes at most {MAX_STOPS} strings, got {len(stops)}.")
    if "" in stops:
        raise bad_value("stop", "`stop` must not hold an empty string.")
    return stops


class SamplingFields(msgspec.Struct, kw_only=True):
    """The sampling fields that the bodies of all endpoints share: a body that takes them is a subclass.

    An endpoint that calls one otherwise says so in `client_names`, and sets it from what it takes instead.
    """

    client_names: ClassVar[Mapping[str, str]] = {}

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # -1 and 0 keep all
    min_p: float | None = None
    seed: int | None = None  # any; its lowest 64 bits count
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] = {}
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    min_tokens: int = 0
    logprob_token_ids: list[int] | None = None

    def client_name(self, field: str) -> str:
        return self.client_names.get(field, field)


def sampling_params(
    wanted: SamplingFields,
    defaults: GenerationDefaults,
    card: ModelCard,
    *,
    draw_seed: Callable[[], int],
    max_tokens: int,
    num_logprobs: int | None,
    num_prompt_logprobs: int | None,
    prompt_logprobs_start: int = 0,
    hidden_states: HiddenStates = "none",
) -> SamplingParams:
    temperature = defaults.temperature if wanted.temperature is None else wanted.temperature
    top_p = defaults.top_p if wanted.top_p is None else wanted.top_p
    top_k = defaults.top_k if wanted.top_k is None else wanted.top_k
    min_p = defaults.min_p if wanted.min_p is None else wanted.min_p
    repetition_penalty = (
        defaults.repetition_penalty if wanted.repetition_penalty is None else wanted.repetition_penalty
    )
    frequency_penalty = 0.0 if wanted.frequency_penalty is None else wanted.frequency_penalty
    presence_penalty = 0.0 if wanted.presence_penalty is None else wanted.presence_penalty
    for name, value in (
        ("temperature", temperature),
        ("top_p", top_p),
        ("top_k", top_k),
        ("min_p", min_p),
        ("repetition_penalty", repetition_penalty),
        ("frequency_penalty", frequency_penalty),
        ("presence_penalty", presence_penalty),
    ):
        _check_bounds(name, value)
    if wanted.min_tokens < 0 or wanted.min_tokens > max_tokens:
        name = wanted.client_name("min_tokens")
        raise bad_value(name, f"`{name}` must be between 0 and the {max_tokens} tokens at most generated.")
    return SamplingParams(
        temperature=0.0 if temperature < GREEDY_BELOW_TEMPERATURE else temperature,
        top_p=top_p,
        top_k=min(max(top_k, 0), card.vocab_size),  # any integer is accepted, nodes compute with 64 bits
        min_p=min_p,
        seed=(draw_seed() if wanted.seed is None else wanted.seed) % 2**64,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        logit_bias=_logit_bias(wanted.logit_bias, card),
        stop_token_ids=_stop_token_ids(wanted.stop_token_ids, card),
        ignore_eos=wanted.ignore_eos,
        min_tokens=wanted.min_tokens,
        max_tokens=max_tokens,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        prompt_logprobs_start=prompt_logprobs_start,
        logprob_token_ids=_logprob_token_ids(wanted, card, are_told=num_logprobs is not None),
        hidden_states=hidden_states,
    )


_RANGES: Mapping[str, tuple[float, float]] = {  # both ends are taken
    "temperature": (0, MAX_TEMPERATURE),
    "min_p": (0, 1),
    "repetition_penalty": (MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
    "frequency_penalty": (-MAX_OUTPUT_PENALTY, MAX_OUTPUT_PENALTY),
    "presence_penalty": (-MAX_OUTPUT_PENALTY, MAX_OUTPUT_PENALTY),
}


def _check_bounds(name: str, value: float) -> None:
    match name:
        case "top_p":
            if not 0 < value <= 1:
                raise bad_value(name, f"`{name}` must be above 0 and at most 1, got {value}.")
        case "top_k":
            if value < -1:
                raise bad_value(name, f"`{name}` must be -1 or 0 (all), or positive, got {value}.")
        case _:
            check_range(name, value, *_RANGES[name])


def _logit_bias(biases: Mapping[str, float], card: ModelCard) -> dict[int, float]:
    if len(biases) > MAX_LOGIT_BIASES:
        raise bad_value("logit_bias", f"`logit_bias` takes at most {MAX_LOGIT_BIASES} tokens.")
    checked: dict[int, float] = {}
    for key, bias in biases.items():
        if not re.fullmatch(r"[0-9]{1,18}", key) or int(key) >= card.vocab_size:
            raise bad_value("logit_bias", f"`logit_bias`: {key!r} is no token id below {card.vocab_size}.")
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise bad_value(
                "logit_bias", f"`logit_bias` must be between {-MAX_BIAS:g} and {MAX_BIAS:g}, got {bias}."
            )
        checked[int(key)] = bias
    return checked


def _logprob_token_ids(wanted: SamplingFields, card: ModelCard, *, are_told: bool) -> tuple[int, ...]:
    if not (token_ids := wanted.logprob_token_ids):
        return ()
    name = wanted.client_name("logprob_token_ids")
    if not are_told:
        raise bad_value(name, f"`{name}` tells more logprobs of each token: ask for logprobs, too.")
    if len(token_ids) > MAX_LOGPROB_TOKEN_IDS:
        raise bad_value(name, f"`{name}` takes at most {MAX_LOGPROB_TOKEN_IDS} ids, got {len(token_ids)}.")
    for token_id in token_ids:
        if not 0 <= token_id < card.vocab_size:
            raise bad_value(name, f"`{name}`: {token_id} is no token id below {card.vocab_size}.")
    return tuple(token_ids)


def _stop_token_ids(token_ids: Sequence[int], card: ModelCard) -> tuple[int, ...]:
    if len(token_ids) > MAX_STOP_TOKEN_IDS:
        raise bad_value("stop_token_ids", f"`stop_token_ids` takes at most {MAX_STOP_TOKEN_IDS} ids.")
    for token_id in token_ids:
        if not 0 <= token_id < card.vocab_size:
            raise bad_value("stop_token_ids", f"Token id {token_id} is outside the vocabulary.")
    return tuple(dict.fromkeys(token_ids))
