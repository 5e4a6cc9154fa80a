"""From a request's body to a GenerateSpec: every bound and every default, in one place.

Which fields beyond a request's own are ignored, and which refused, is in fields.py.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from fastapi import Request

from ...messages.node import MAX_PRIORITY
from ...messages.sampling import (
    MAX_BIAS,
    MAX_LOGIT_BIASES,
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
from ...runtime.http_urls import url_fault
from ..generation import ModelCard
from .errors import unsupported
from .fields import FieldRules, tell_ignored
from .json_slices import JSON_BOUNDS, JsonBounds, JsonTooLargeError, decode_slices
from .slices import in_slices

_log = logging.getLogger(__name__)

S = TypeVar("S", bound=msgspec.Struct)

GREEDY_BELOW_TEMPERATURE = 1e-5  # where dividing logits by it would overflow
MAX_STOPS = 16


@dataclass(kw_only=True, slots=True)
class BodyMemory:
    """What the bodies that are being received take together, but for the first `free_bytes` of each: small
    ones come in whoever else sends what."""

    max_bytes: int = 256 << 20
    free_bytes: int = 64 << 10
    held_bytes: int = 0

    def take(self, num_bytes: int) -> None:
        """Raises RequestError when there is no room for so many more."""
        if self.held_bytes + num_bytes > self.max_bytes:
            raise RequestError(
                f"Unfinished bodies fill the {self.max_bytes} bytes that all have together; try again later.",
                status=503,
                code="body_memory_full",
                error_type="service_unavailable",
                retry_after_s=1.0,
            )
        self.held_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self.held_bytes -= num_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds of a single HTTP request, and of all together."""

    body_memory: BodyMemory = field(default_factory=BodyMemory)
    max_body_bytes: int = 32 << 20
    json: JsonBounds = JSON_BOUNDS
    max_prompts: int = 1024
    max_choices: int = 128  # of a prompt
    max_outputs: int = 16_384  # prompts times choices
    max_logprobs: int = 20
    strict_fields: bool = False  # unknown fields of generating requests are refused, not ignored


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
                _SAMPLING_CHECKS[name](name, value)
            except RequestError as error:
                _log.warning("generation_config.json is ignored here: %s", error.message)
            else:
                defaults = msgspec.structs.replace(defaults, **{name: value})
        return defaults


# ---- bodies -----------------------------------------------------------------------------------------


async def read_object(request: Request, limits: Limits, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object that is the body, without holding the loop however large it is.

    A byte order mark before it is ignored (RFC 8259, 8.1); with `optional`, no body is an empty one. Raises
    RequestError: 415 when it is compressed, 413 when there is too much of it, 503 when too much of other
    bodies is here, 400 when it is no object.
    """
    body = await read_body(request, limits)
    if optional and not body:
        return {}
    if body.startswith(codecs.BOM_UTF8):
        del body[: len(codecs.BOM_UTF8)]
    try:
        value = await in_slices(decode_slices(body, limits.json))
    except JsonTooLargeError as error:
        raise _too_large(f"The body has {error}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.", code="invalid_json")
    return value


async def read_body(request: Request, limits: Limits) -> bytearray:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise RequestError(
            f"`Content-Encoding: {encoding}` is not supported: send the body as it is.",
            status=415,
            code="unsupported_content_encoding",
        )
    memory = limits.body_memory
    body = bytearray()
    num_held = 0
    try:
        async for part in request.stream():
            body += part
            if len(body) > limits.max_body_bytes:
                raise _too_large(f"The body is larger than {limits.max_body_bytes} bytes.")
            if (num_more := len(body) - memory.free_bytes - num_held) > 0:
                memory.take(num_more)
                num_held += num_more
        return body
    finally:
        memory.give_back(num_held)


def _too_large(message: str) -> RequestError:
    return RequestError(message, status=413, code="body_too_large")


def parse_request(
    value: Mapping[str, Any], request_type: type[S], rules: FieldRules, *, strict: bool = True
) -> S:
    """`value` as a `request_type`. Raises RequestError that names the field. `strict`: unknown fields are
    refused, also where the rules would have them ignored."""
    own_fields = request_type.__struct_fields__
    given: dict[str, Any] = {}
    for name, content in value.items():
        if content is None:
            continue
        if name in own_fields:
            given[name] = _without_nulls(content)
        elif (known := rules.unsupported.get(name)) is not None:
            if content not in known.inert:
                raise unsupported(name, known.reason)
        elif name not in rules.harmless:
            if strict or rules.refuse_unknown:
                raise unsupported(name, "unknown field")
            tell_ignored(name)
    try:
        return msgspec.convert(given, request_type)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None


def _without_nulls(content: Any) -> Any:  # noqa: ANN401 (any JSON)
    """Nulls inside option objects mean defaults, too; a list's nulls are left for the type check."""
    if isinstance(content, dict):
        return {name: inner for name, inner in content.items() if inner is not None}
    return content


_BOUND = re.compile(r"^Expected `[^`]+` (?:<=|>=|<|>|of length|matching|that's) ")


def _invalid(message: str) -> RequestError:
    """From msgspec's ``Expected `int`, got `str` - at `$.stop[0]```; a bound has no "got"."""
    missing = re.search(r"missing required field `(\w+)`", message)
    if missing:
        return RequestError(f"`{missing[1]}` is required.", param=missing[1], code="missing_parameter")
    what, _, path = message.partition(" - at `")
    what = re.sub(r"matching regex .*", "without NUL characters", what)  # all that bodies have patterns for
    param = path.rstrip("`").removeprefix("$").removeprefix(".") or None
    code = "invalid_value" if _BOUND.search(message) else "invalid_type"
    return RequestError(f"`{param}`: {what}." if param else f"{what}.", param=param, code=code)


# ---- values -----------------------------------------------------------------------------------------


def bad_value(param: str, message: str) -> RequestError:
    return RequestError(message, param=param, code="invalid_value")


def bad_type(param: str, message: str) -> RequestError:
    return RequestError(message, param=param, code="invalid_type")


def node_url(param: str, url: str) -> str:
    """As nodes name themselves, without a slash at its end. Raises RequestError for what cannot be one."""
    url = url.rstrip("/")
    if fault := url_fault(url, of_node=True):
        raise bad_value(param, f"`{param}`: {fault}.")
    return url


def check_model(model: str | None, card: ModelCard) -> None:
    if model and model not in card.names:
        raise model_not_found(model, card)


def model_not_found(model: str, card: ModelCard) -> RequestError:
    return RequestError(
        f"The model `{model}` does not exist; this server has {' and '.join(f'`{n}`' for n in card.names)}.",
        status=404,
        param="model",
        code="model_not_found",
        error_type="not_found_error",
    )


def check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise bad_value(name, f"`{name}` must be between {low:g} and {high:g}, got {value}.")


def check_ids(token_ids: Sequence[int], card: ModelCard, param: str) -> None:
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= card.vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < card.vocab_size)
        raise bad_value(param, f"Token id {wrong} is outside the vocabulary of {card.vocab_size} tokens.")


def check_prompt(prompt_ids: Sequence[int], card: ModelCard, param: str, *, generates: bool = True) -> None:
    """`generates`: tokens are wanted behind it, else only what the model says of it."""
    if not prompt_ids:
        raise bad_value(param, "The prompt is empty.")
    if len(prompt_ids) + generates > card.max_model_len:
        more = " and at least one more" if generates else ""
        raise RequestError(
            f"The prompt has {len(prompt_ids)} tokens; the model's context of {card.max_model_len} tokens "
            f"must hold it{more}.",
            param=param,
            code="context_length_exceeded",
        )
    check_ids(prompt_ids, card, param)  # of no more ids than the context has


def check_num_outputs(num_outputs: int, limits: Limits) -> None:
    """Of a request: prompts times choices."""
    if num_outputs > limits.max_outputs:
        raise bad_value(
            "n", f"`n` times the prompts must be at most {limits.max_outputs}, got {num_outputs}."
        )


def too_long_text(num_chars: int, card: ModelCard, param: str) -> RequestError:
    return RequestError(
        f"The prompt has {num_chars} characters; the model's context of {card.max_model_len} tokens cannot "
        "hold them.",
        param=param,
        code="context_length_exceeded",
    )


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


def parse_stops(stop: str | list[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise bad_value("stop", f"`stop` takes at most {MAX_STOPS} strings, got {len(stops)}.")
    if "" in stops:
        raise bad_value("stop", "`stop` must not hold an empty string.")
    return stops


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingFields:
    """The sampling fields that all endpoints share, under the names that the client used."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int  # any; its lowest 64 bits count
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    logit_bias: Mapping[str, float]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    min_tokens: int
    min_tokens_name: str = "min_tokens"


def sampling_params(
    wanted: SamplingFields,
    defaults: GenerationDefaults,
    card: ModelCard,
    *,
    max_tokens: int,
    num_logprobs: int | None,
    num_prompt_logprobs: int | None,
    prompt_logprobs_start: int = 0,
    hidden_states: HiddenStates = "none",
) -> SamplingParams:
    temperature = _or(wanted.temperature, defaults.temperature)
    _check_temperature("temperature", temperature)
    top_p = _or(wanted.top_p, defaults.top_p)
    _check_top_p("top_p", top_p)
    top_k = defaults.top_k if wanted.top_k is None else wanted.top_k
    _check_top_k("top_k", top_k)
    min_p = _or(wanted.min_p, defaults.min_p)
    _check_min_p("min_p", min_p)
    repetition_penalty = _or(wanted.repetition_penalty, defaults.repetition_penalty)
    _check_repetition_penalty("repetition_penalty", repetition_penalty)
    frequency_penalty = _or(wanted.frequency_penalty, 0.0)
    check_range("frequency_penalty", frequency_penalty, -MAX_OUTPUT_PENALTY, MAX_OUTPUT_PENALTY)
    presence_penalty = _or(wanted.presence_penalty, 0.0)
    check_range("presence_penalty", presence_penalty, -MAX_OUTPUT_PENALTY, MAX_OUTPUT_PENALTY)
    if wanted.min_tokens < 0 or wanted.min_tokens > max_tokens:
        name = wanted.min_tokens_name
        raise bad_value(name, f"`{name}` must be between 0 and the {max_tokens} tokens at most generated.")
    return SamplingParams(
        temperature=0.0 if temperature < GREEDY_BELOW_TEMPERATURE else temperature,
        top_p=top_p,
        top_k=min(max(top_k, 0), card.vocab_size),  # any integer is accepted, nodes compute with 64 bits
        min_p=min_p,
        seed=wanted.seed % 2**64,
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
        hidden_states=hidden_states,
    )


def _check_temperature(name: str, value: float) -> None:
    check_range(name, value, 0, MAX_TEMPERATURE)


def _check_top_p(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise bad_value(name, f"`{name}` must be above 0 and at most 1, got {value}.")


def _check_top_k(name: str, value: float) -> None:
    if value < -1:
        raise bad_value(name, f"`{name}` must be -1 or 0 (all), or positive, got {value}.")


def _check_min_p(name: str, value: float) -> None:
    check_range(name, value, 0, 1)


def _check_repetition_penalty(name: str, value: float) -> None:
    check_range(name, value, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)


_SAMPLING_CHECKS: Mapping[str, Callable[[str, float], None]] = {
    "temperature": _check_temperature,
    "top_p": _check_top_p,
    "top_k": _check_top_k,
    "min_p": _check_min_p,
    "repetition_penalty": _check_repetition_penalty,
}


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


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


def _stop_token_ids(token_ids: Sequence[int], card: ModelCard) -> tuple[int, ...]:
    if len(token_ids) > MAX_STOP_TOKEN_IDS:
        raise bad_value("stop_token_ids", f"`stop_token_ids` takes at most {MAX_STOP_TOKEN_IDS} ids.")
    for token_id in token_ids:
        if not 0 <= token_id < card.vocab_size:
            raise bad_value("stop_token_ids", f"Token id {token_id} is outside the vocabulary.")
    return tuple(dict.fromkeys(token_ids))
