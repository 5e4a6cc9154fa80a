"""What is said of a field that cannot be taken, in the same words wherever it is found."""

from __future__ import annotations

from ..runtime.errors import RequestError
from ..runtime.http_urls import url_fault
from .generation import ModelCard


def unsupported(param: str, detail: str = "") -> RequestError:
    return RequestError(
        f"`{param}` is not supported{': ' + detail if detail else ''}.",
        param=param,
        code="unsupported_parameter",
    )


def bad_value(param: str, message: str) -> RequestError:
    return RequestError(message, param=param, code="invalid_value")


def bad_type(param: str, message: str) -> RequestError:
    return RequestError(message, param=param, code="invalid_type")


def check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise bad_value(name, f"`{name}` must be between {low:g} and {high:g}, got {value}.")


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
