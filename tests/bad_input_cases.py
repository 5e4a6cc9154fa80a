"""Bad input, once: what is sent, and what comes back. The tests and the table in docs/http_api.md are made of it.

Every answer is ``{"error": {"message", "type", "param", "code"}}``.
"""

# ruff: noqa: E501 (a table, one case a line)
from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
GENERATE = "/generate"
EMBEDDINGS = "/v1/embeddings"


@dataclass(frozen=True)
class BadInput:
    name: str
    path: str
    body: bytes
    status: int
    param: str | None
    code: str
    method: str = "POST"


def _case(
    name: str, path: str, fields: dict[str, Any], param: str | None, code: str, status: int = 400
) -> BadInput:
    """`fields` over the smallest good body of `path`; a field that is None here is left out."""
    good: dict[str, dict[str, Any]] = {
        COMPLETIONS: {"prompt": "def"},
        CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
        GENERATE: {"text": "def"},
        EMBEDDINGS: {"input": "def"},
    }
    body = {**good.get(path, {}), **fields}
    kept = {field: value for field, value in body.items() if value is not None}
    return BadInput(name, path, json.dumps(kept).encode(), status, param, code)


def bad_input_cases(*, max_model_len: int, vocab_size: int, max_body_bytes: int = 32 << 20) -> list[BadInput]:
    """The table for a server with these bounds. None of the cases may disturb a running stream."""
    unsupported, value, kind = "unsupported_parameter", "invalid_value", "invalid_type"
    too_long = [5] * max_model_len
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    return [
        _case("unknown model", COMPLETIONS, {"model": "no/such"}, "model", "model_not_found", 404),
        _case("unknown model, chat", CHAT, {"model": "no/such"}, "model", "model_not_found", 404),
        _case("prompt too long", COMPLETIONS, {"prompt": too_long}, "prompt", "context_length_exceeded"),
        _case("input_ids too long", GENERATE, {"text": None, "input_ids": too_long}, "input_ids", "context_length_exceeded"),
        _case("huge max_tokens", COMPLETIONS, {"max_tokens": 10**12}, "max_tokens", "context_length_exceeded"),
        _case("huge max_completion_tokens", CHAT, {"max_completion_tokens": 10**12}, "max_completion_tokens", "context_length_exceeded"),
        _case("negative max_tokens", COMPLETIONS, {"max_tokens": -1}, "max_tokens", value),
        _case("max_tokens 0 without echo", COMPLETIONS, {"max_tokens": 0}, "max_tokens", value),
        _case("max_tokens 0 with n", COMPLETIONS, {"max_tokens": 0, "echo": True, "n": 2}, "n", value),
        _case("max_tokens is a text", COMPLETIONS, {"max_tokens": "16"}, "max_tokens", kind),
        _case("max_tokens is a fraction", COMPLETIONS, {"max_tokens": 1.5}, "max_tokens", kind),
        _case("stream is a number", COMPLETIONS, {"stream": 1}, "stream", kind),
        _case("no prompt", COMPLETIONS, {"prompt": None}, "prompt", "missing_parameter"),
        _case("empty prompt", COMPLETIONS, {"prompt": ""}, "prompt", value),
        _case("empty list of prompts", COMPLETIONS, {"prompt": []}, "prompt", value),
        _case("empty prompt in a batch", COMPLETIONS, {"prompt": [[5], []]}, "prompt", value),
        _case("prompt is a number", COMPLETIONS, {"prompt": 5}, "prompt", kind),
        _case("prompt mixes texts and ids", COMPLETIONS, {"prompt": ["def", 5]}, "prompt", kind),
        _case("token id outside the vocabulary", COMPLETIONS, {"prompt": [vocab_size]}, "prompt", value),
        _case("negative token id", COMPLETIONS, {"prompt": [-1]}, "prompt", value),
        _case("temperature below 0", COMPLETIONS, {"temperature": -0.1}, "temperature", value),
        _case("temperature too high", COMPLETIONS, {"temperature": 1e300}, "temperature", value),
        _case("temperature is a text", COMPLETIONS, {"temperature": "hot"}, "temperature", kind),
        _case("top_p 0", COMPLETIONS, {"top_p": 0}, "top_p", value),
        _case("top_p above 1", COMPLETIONS, {"top_p": 1.1}, "top_p", value),
        _case("top_k below -1", COMPLETIONS, {"top_k": -2}, "top_k", value),
        _case("min_p above 1", COMPLETIONS, {"min_p": 1.5}, "min_p", value),
        _case("repetition_penalty 0", COMPLETIONS, {"repetition_penalty": 0}, "repetition_penalty", value),
        _case("repetition_penalty too high", COMPLETIONS, {"repetition_penalty": 1e300}, "repetition_penalty", value),
        _case("frequency_penalty out of range", COMPLETIONS, {"frequency_penalty": 2.1}, "frequency_penalty", value),
        _case("presence_penalty out of range", COMPLETIONS, {"presence_penalty": -2.1}, "presence_penalty", value),
        _case("logit_bias of no token", COMPLETIONS, {"logit_bias": {"def": 1}}, "logit_bias", value),
        _case("logit_bias of an unknown token", COMPLETIONS, {"logit_bias": {str(vocab_size): 1}}, "logit_bias", value),
        _case("logit_bias too strong", COMPLETIONS, {"logit_bias": {"5": 101}}, "logit_bias", value),
        _case("priority of more than 64 bits", COMPLETIONS, {"priority": 10**30}, "priority", value),
        _case("priority out of range, chat", CHAT, {"priority": 2**63}, "priority", value),
        _case("priority out of range, native", GENERATE, {"priority": -(2**63)}, "priority", value),
        _case("n 0", COMPLETIONS, {"n": 0}, "n", value),
        _case("n too large", COMPLETIONS, {"n": 129}, "n", value),
        _case("best_of other than n", COMPLETIONS, {"best_of": 3}, "best_of", unsupported),
        _case("min_tokens above max_tokens", COMPLETIONS, {"min_tokens": 17}, "min_tokens", value),
        _case("empty stop string", COMPLETIONS, {"stop": ["\n", ""]}, "stop", value),
        _case("too many stop strings", COMPLETIONS, {"stop": [str(i) for i in range(17)]}, "stop", value),
        _case("stop is a number", COMPLETIONS, {"stop": 5}, "stop", kind),
        _case("stop token outside the vocabulary", COMPLETIONS, {"stop_token_ids": [-1]}, "stop_token_ids", value),
        _case("logprobs out of range", COMPLETIONS, {"logprobs": 21}, "logprobs", value),
        _case("logprobs is a flag", COMPLETIONS, {"logprobs": True}, "logprobs", kind),
        _case("prompt_logprobs out of range", COMPLETIONS, {"prompt_logprobs": -1}, "prompt_logprobs", value),
        _case("top_logprobs out of range", CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", value),
        _case("top_logprobs without logprobs", CHAT, {"top_logprobs": 2}, "top_logprobs", value),
        _case("a named token outside the vocabulary", COMPLETIONS, {"logprobs": 0, "logprob_token_ids": [vocab_size]}, "logprob_token_ids", value),
        _case("too many named tokens", COMPLETIONS, {"logprobs": 0, "logprob_token_ids": [*range(129)]}, "logprob_token_ids", value),
        _case("logprob_token_ids without logprobs", CHAT, {"logprob_token_ids": [5]}, "logprob_token_ids", value),
        _case("rid with spaces", COMPLETIONS, {"rid": "a b"}, "rid", value),
        _case("suffix", COMPLETIONS, {"suffix": "end"}, "suffix", unsupported),
        _case("response_format", COMPLETIONS, {"response_format": {"type": "json_object"}}, "response_format", unsupported),
        _case("response_format, chat", CHAT, {"response_format": {"type": "json_schema"}}, "response_format", unsupported),
        _case("tools", CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", unsupported),
        _case("tokens that alone are allowed", COMPLETIONS, {"allowed_token_ids": [5]}, "allowed_token_ids", unsupported),
        _case("guided output", CHAT, {"guided_json": {"type": "object"}}, "guided_json", unsupported),
        _case("a name of /generate", COMPLETIONS, {"max_new_tokens": 5}, "max_new_tokens", unsupported),
        _case("an empty salt", COMPLETIONS, {"cache_salt": ""}, "cache_salt", value),
        _case("an unknown stream option", COMPLETIONS, {"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage", kind),
        _case("no messages", CHAT, {"messages": None}, "messages", "missing_parameter"),
        _case("empty messages", CHAT, {"messages": []}, "messages", value),
        _case("a message that is a text", CHAT, {"messages": ["Hi"]}, "messages[0]", kind),
        _case("an unknown role", CHAT, {"messages": [{"role": "king", "content": "Hi"}]}, "messages[0].role", value),
        _case("content is a number", CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", kind),
        _case("an image", CHAT, {"messages": [{"role": "user", "content": [part]}]}, "messages[0].content[0].type", unsupported),
        _case("neither text nor input_ids", GENERATE, {"text": None}, "text", value),
        _case("both text and input_ids", GENERATE, {"input_ids": [5]}, "text", value),
        _case("code for sampling", GENERATE, {"sampling_params": {"custom_params": {"top_z": 1}}}, "custom_params", unsupported),
        _case("regex", GENERATE, {"sampling_params": {"regex": "a+"}}, "regex", unsupported),
        _case("huge max_new_tokens", GENERATE, {"sampling_params": {"max_new_tokens": 10**12}}, "max_new_tokens", "context_length_exceeded"),
        _case("logprob_start_len behind the prompt", GENERATE, {"return_logprob": True, "logprob_start_len": 10**6}, "logprob_start_len", value),
        _case("token_ids_logprob without return_logprob", GENERATE, {"token_ids_logprob": [5]}, "token_ids_logprob", value),
        _case("sampling_params of another length", GENERATE, {"sampling_params": [{}, {}]}, "sampling_params", value),
        _case("input_embeds", GENERATE, {"input_embeds": [[0.5]]}, "input_embeds", unsupported),
        _case("session_params without id", GENERATE, {"session_params": {"rid": "a"}}, "id", "missing_parameter"),
        _case("no such session", GENERATE, {"session_params": {"id": "none"}}, "session_params.id", "session_not_found"),
        _case("a streaming session", "/open_session", {"streaming": True}, "streaming", unsupported),
        _case("a session that is never idle", "/open_session", {"timeout": 0}, "timeout", value),
        _case("close without a session", "/close_session", {}, "session_id", "missing_parameter"),
        _case("an embedding of nothing", EMBEDDINGS, {"input": []}, "input", value),
        _case("dimensions of an embedding", EMBEDDINGS, {"dimensions": 8}, "dimensions", value),
        _case("encode without a prompt", "/encode", {}, "text", value),
        _case("tokenize without text", "/tokenize", {}, "prompt", value),
        _case("detokenize what is no token", "/detokenize", {"tokens": [vocab_size]}, "tokens", value),
        _case("abort without rid", "/abort_request", {}, "rid", "missing_parameter"),
        _case("pause in an unknown mode", "/pause_generation", {"mode": "freeze"}, "mode", "invalid_type"),
        _case("an unknown log level", "/configure_logging", {"log_level": "loud"}, "log_level", "invalid_type"),
        _case("an unknown request log level", "/configure_logging", {"log_requests_level": 4}, "log_requests_level", value),
        _case("a sleep that is too long", "/slow_down", {"forward_sleep_time": 61}, "forward_sleep_time", value),
        _case("no setting", "/set_internal_state", {"server_args": {}}, "server_args", value),
        _case("a profile of no step", "/start_profile", {"num_steps": 0}, "num_steps", value),
        _case("a profile of too many steps", "/start_profile", {"num_steps": 257}, "num_steps", value),
        _case("a profile named like a path", "/start_profile", {"profile_id": "../x"}, "profile_id", value),
        _case("update without a path", "/update_weights_from_disk", {}, "model_path", "missing_parameter"),
        BadInput("invalid JSON", COMPLETIONS, b'{"prompt": "def"', 400, None, "invalid_json"),
        BadInput("not a number in JSON", COMPLETIONS, b'{"prompt": "def", "temperature": NaN}', 400, None, "invalid_json"),
        BadInput("invalid UTF-8", COMPLETIONS, b'{"prompt": "\xff"}', 400, None, "invalid_json"),
        BadInput("half of a surrogate pair", COMPLETIONS, b'{"prompt": "\\ud83d"}', 400, None, "invalid_json"),
        BadInput("deeply nested JSON", COMPLETIONS, b'{"prompt":' + b"[" * 5000, 400, None, "invalid_json"),
        BadInput("a list as body", COMPLETIONS, b"[]", 400, None, "invalid_json"),
        BadInput("empty body", COMPLETIONS, b"", 400, None, "invalid_json"),
        BadInput("body too large", COMPLETIONS, b" " * (max_body_bytes + 1), 413, None, "body_too_large"),
        BadInput("no such path", "/v1/nothing", b"{}", 404, None, "not_found"),
        BadInput("wrong method", "/v1/models", b"{}", 405, None, "method_not_allowed"),
        BadInput("no such model", "/v1/models/no/such", b"", 404, "model", "model_not_found", "GET"),
        BadInput("no such request", "/requests/nothing", b"", 404, None, "request_not_found", "GET"),
        BadInput("bad timeout", "/flush_cache?timeout=soon", b"", 400, "timeout", value),
    ]  # fmt: skip


def markdown_table() -> str:
    """For docs/http_api.md, which a test keeps equal."""
    cases = bad_input_cases(max_model_len=2048, vocab_size=4096)
    rows = [
        f"| {case.name} | `{case.method} {case.path}` | {case.status} | "
        f"{f'`{case.param}`' if case.param else ''} | `{case.code}` |"
        for case in cases
    ]
    head = "| bad input | request | status | `error.param` | `error.code` |\n|---|---|---|---|---|"
    return "\n".join([head, *rows])
