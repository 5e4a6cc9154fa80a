"""Fields of requests that are none of ours: which are ignored, and which would change the answer.

Clients and gateways of vLLM, SGLang and OpenAI send fields of many versions. One that is known to change what
is answered, and is not done here, is refused by name unless its value asks for nothing; any other is ignored,
and the log says so once, or with --strict-fields is refused.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

from msgspec import Meta

from ...messages.bounds import CacheSalt
from ...runtime.errors import RequestError

_log = logging.getLogger(__name__)

_NOTHING: tuple[object, ...] = ("", [], {}, False)


GivenSalt: TypeAlias = Annotated[CacheSalt, Meta(min_length=1)]  # an empty one would share with everybody


def chosen_salt(cache_salt: str | None, extra_key: str | None) -> str:
    """From vLLM's and SGLang's name of it; empty: none was given."""
    if cache_salt is not None and extra_key is not None:
        message = "Give either `cache_salt` or `extra_key`."
        raise RequestError(message, param="extra_key", code="invalid_value")
    return cache_salt or extra_key or ""


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A field that would change the answer, but with one of the values ``inert``."""

    reason: str
    inert: tuple[object, ...] = _NOTHING


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldRules:
    """Fields beyond a request's own: ``harmless`` whatever they hold, others ``unsupported``.

    ``refuse_unknown``: what is in neither is refused, whatever the server's flags say.
    """

    harmless: frozenset[str] = frozenset()
    hidden: frozenset[str] = frozenset()  # of its own, what is set from other fields: not taken as they are
    unsupported: Mapping[str, Unsupported] = field(default_factory=dict)
    refuse_unknown: bool = True


@functools.lru_cache(maxsize=1024)
def tell_ignored(name: str) -> None:
    """Once a name, of the latest 1,024."""
    _log.info("the unknown field %r is ignored; --strict-fields refuses such requests", name[:100])


# Written by routers in front of us, bookkeeping of the caller's, or how to do what is not done at all.
_HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "session_id",
        "conversation_id",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
        "include_reasoning",
        "reasoning_effort",
        "verbosity",
        "parallel_tool_calls",
        "separate_reasoning",
        "stream_reasoning",
        "spaces_between_special_tokens",
        "stream_interval",
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "data_parallel_rank",
        "routed_dp_rank",
        "kv_transfer_params",
        "log_metrics",
        "background",
        "no_logs",
        "custom_labels",
        "length_penalty",  # of beam search
        "guided_decoding_backend",
        "guided_whitespace_pattern",
        "mm_processor_kwargs",
        "media_io_kwargs",
    }
)

_GRAMMAR = "output is not held to a grammar"
_MEDIA = "prompts are text or token ids"
_ADAPTER = "there are no adapters"
_PROCESSOR = "no code of a request's runs here"
_UNSUPPORTED: Mapping[str, Unsupported] = {
    "response_format": Unsupported(_GRAMMAR, ({"type": "text"},)),
    **dict.fromkeys(
        (
            "structured_outputs",
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "json_schema",
            "regex",
            "ebnf",
            "structural_tag",
        ),
        Unsupported(_GRAMMAR),
    ),
    **dict.fromkeys(
        ("image_data", "audio_data", "video_data", "input_embeds", "prompt_embeds"), Unsupported(_MEDIA)
    ),
    "modalities": Unsupported("answers are text", ([], ["text"])),
    "audio": Unsupported("answers are text"),
    **dict.fromkeys(("lora_path", "lora_id", "lora_name"), Unsupported(_ADAPTER)),
    **dict.fromkeys(
        ("logits_processors", "custom_logit_processor", "custom_params", "vllm_xargs"),
        Unsupported(_PROCESSOR),
    ),
    "use_beam_search": Unsupported("tokens are sampled, one at a time"),
    "best_of": Unsupported("only 1 is", (1,)),
    "suffix": Unsupported("prompts are continued, not filled in"),
    "echo": Unsupported("only /v1/completions does it"),
    "allowed_token_ids": Unsupported("`logit_bias` moves single tokens"),
    "bad_words": Unsupported("`logit_bias` moves single tokens"),
    "stop_regex": Unsupported("`stop` takes texts"),
    "thinking_token_budget": Unsupported("reasoning is not told from the rest of an answer"),
    "repetition_detection": Unsupported("`repetition_penalty` is what there is"),
    "truncate_prompt_tokens": Unsupported("a prompt that is too long is refused", (-1,)),
    "documents": Unsupported("they are not shown to the chat template"),
    "chat_template": Unsupported("it is the server's"),
    "web_search_options": Unsupported("answers come from the model alone"),
    "tools": Unsupported("only /v1/chat/completions takes them"),
    "tool_choice": Unsupported("only /v1/chat/completions takes it", ("none", "auto")),
    "functions": Unsupported("answers are not searched for calls"),
    "function_call": Unsupported("answers are not searched for calls", ("none", "auto")),
    "session_params": Unsupported("only /generate takes turns of sessions"),
    "return_hidden_states": Unsupported("only /generate returns them"),
    "return_routed_experts": Unsupported("there are no experts"),
    "return_entropy": Unsupported("logprobs are what is told of a token"),
    "return_bytes": Unsupported("logprobs of chats have the bytes of tokens"),
}
GENERATING_RULES = FieldRules(harmless=_HARMLESS, unsupported=_UNSUPPORTED, refuse_unknown=False)
# Names of /generate, which would be sent here for nothing.
OPENAI_RULES = FieldRules(
    harmless=_HARMLESS,
    unsupported={**_UNSUPPORTED, "max_new_tokens": Unsupported("`max_tokens` is its name here", ())},
    refuse_unknown=False,
)
EMBEDDING_RULES = FieldRules(
    harmless=_HARMLESS,
    unsupported={
        **_UNSUPPORTED,
        **dict.fromkeys(("normalize", "use_activation"), Unsupported("vectors have a length of 1", (True,))),
        "embed_dtype": Unsupported("vectors are of float32", ("float32",)),
        "endianness": Unsupported("base64 is of little-endian numbers", ("native", "little")),
    },
    refuse_unknown=False,
)
TOKEN_RULES = FieldRules(harmless=_HARMLESS, refuse_unknown=False)
