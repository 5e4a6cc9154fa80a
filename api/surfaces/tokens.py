"""/tokenize, /detokenize and /tokenizer_info, in vLLM's shapes."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from ..generation import ModelCard
from ..http.answers import json_response
from ..http.bodies import BodyLimits, parse_request, read_object
from ..http.fields import TOKEN_RULES
from ..refusals import bad_value, check_model
from ..slices import SLICE_ENTRIES, SLICE_ITEMS, sliced
from ..text.prompts import check_ids, encode_prompt
from ..text.tokenization import Tokenizer
from .chat_messages import encode_chat
from .native_types import DetokenizeAnswer, DetokenizeRequest, TokenizeAnswer, TokenizeRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCalls:
    card: ModelCard
    tokenizer: Tokenizer
    limits: BodyLimits

    async def tokenize(self, http: Request) -> Response:
        raw = await read_object(http, self.limits)
        body = parse_request(raw, TokenizeRequest, TOKEN_RULES, strict=self.limits.strict_fields)
        check_model(body.model, self.card)
        if (body.prompt is None) == (body.messages is None):
            raise bad_value("prompt", "Give either `prompt` or `messages`.")
        if body.messages is not None:
            token_ids = await encode_chat(
                self.tokenizer,
                body.messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                add_special_tokens=bool(body.add_special_tokens),
                tools=body.tools,
                template_kwargs=body.chat_template_kwargs,
                card=self.card,
            )
        else:
            token_ids = await encode_prompt(
                body.prompt or "",
                "prompt",
                card=self.card,
                tokenizer=self.tokenizer,
                add_special_tokens=body.add_special_tokens is not False,
            )
        strings = None
        if body.return_token_strs:
            strings = []
            async for some_ids in sliced(token_ids, SLICE_ENTRIES):
                strings += [self.tokenizer.token_string(token_id) for token_id in some_ids]
        return json_response(
            TokenizeAnswer(
                count=len(token_ids),
                max_model_len=self.card.max_model_len,
                tokens=token_ids,
                token_strs=strings,
            )
        )

    async def tokenizer_info(self, _: Request) -> Response:
        """tokenizer_config.json, its special tokens as plain strings, and the chat template in use."""
        tokenizer = self.tokenizer
        return json_response(
            {**tokenizer.config, **tokenizer.special_tokens, "chat_template": tokenizer.chat_template}
        )

    async def detokenize(self, http: Request) -> Response:
        raw = await read_object(http, self.limits)
        body = parse_request(raw, DetokenizeRequest, TOKEN_RULES, strict=self.limits.strict_fields)
        check_model(body.model, self.card)
        async for token_ids in sliced(body.tokens, SLICE_ITEMS):
            check_ids(token_ids, self.card, "tokens")
        text = await self.tokenizer.decode_async(body.tokens, skip_special_tokens=body.skip_special_tokens)
        return json_response(DetokenizeAnswer(prompt=text))
