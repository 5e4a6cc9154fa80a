"""Every error answer: ``{"error": {"message", "type", "param", "code"}}``, whatever went wrong."""

from __future__ import annotations

import math
from http import HTTPStatus

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ...links.node_calls import NodeUnavailableError
from ...runtime.errors import RequestError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_DEFAULT_RETRY_AFTER_S = 1.0
CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody is there to read it, but logs and metrics do


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    error: ErrorInfo


def encode_error(error: RequestError) -> bytes:
    info = ErrorInfo(message=error.message, type=error.error_type, param=error.param, code=error.code)
    return msgspec.json.encode(ErrorBody(error=info))


def error_response(error: RequestError) -> Response:
    headers = {}
    if error.status in (429, 503) or error.retry_after_s is not None:
        retry_after_s = _DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(encode_error(error), error.status, headers, "application/json")


def install_error_handlers(app: FastAPI) -> None:
    async def on_request_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return error_response(error)

    async def on_http_exception(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase
        answer = error_response(
            RequestError(
                error.detail,
                status=error.status_code,
                code=phrase.lower().replace(" ", "_"),
                error_type=_TYPES.get(error.status_code, "invalid_request_error"),
            )
        )
        answer.headers.update(error.headers or {})
        return answer

    async def on_validation_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return error_response(RequestError(first["msg"], param=str(first["loc"][-1]), code="invalid_value"))

    async def on_node_unavailable(_: Request, error: Exception) -> Response:
        return error_response(
            RequestError(str(error), status=503, code="node_unavailable", error_type="service_unavailable")
        )

    async def on_client_gone(_: Request, error: Exception) -> Response:
        """It left before its body was here."""
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def on_bug(request: Request, error: Exception) -> Response:
        answer = error_response(
            RequestError(
                f"Internal error: {type(error).__name__}.",
                status=500,
                code="internal_error",
                error_type="server_error",
            )
        )
        # Starlette answers bugs from outside all middleware, the gateway included.
        answer.headers["x-request-id"] = request.state.request_id
        return answer

    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(NodeUnavailableError, on_node_unavailable)
    app.add_exception_handler(ClientDisconnect, on_client_gone)
    app.add_exception_handler(Exception, on_bug)
