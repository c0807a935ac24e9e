# SPDX-License-Identifier: Apache-2.0
"""API errors: OpenAI's error object with an HTTP status."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails
from starlette.datastructures import UploadFile
from vllm.v1.engine.exceptions import EngineDeadError

from ..languages import Languages, resolve_language
from .admission import RETRY_AFTER_S, Busy

CLIENT_CLOSED = 499  # nginx's status for a client that disconnected before the response ended
MAX_SHOWN = 80  # characters of a value in a message
IS_ALIGNER = "this server's model is a forced aligner; use /v1/audio/alignments."

_Model = TypeVar("_Model", bound=BaseModel)

# Descriptions of valid values by pydantic's error type; its context fills the braces.
_MUST_BE = {
    "literal_error": "{expected}",
    "string_type": "text",
    "string_too_long": "at most {max_length} characters",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of fewer digits",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "greater than or equal to {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "less than or equal to {le}",
    "list_type": "a list",
    "dict_type": "a JSON object",
    "model_type": "an object",
    "json_type": "JSON",
    "json_invalid": "JSON",
    "is_instance_of": "a file",
}


class ApiError(Exception):
    """An error response in OpenAI's format."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        is_final: bool = False,
    ) -> None:
        """Set ``is_final`` to stop OpenAI's clients from retrying, as they do from 500 on."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {"Retry-After": str(retry_after_s)} if retry_after_s else {}
        if is_final:
            self.headers["x-should-retry"] = "false"

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


def busy(error: Busy) -> ApiError:
    """Return the 503 response of a full server."""
    return ApiError(503, str(error), code="busy", retry_after_s=RETRY_AFTER_S)


@contextmanager
def engine_dead_as_503() -> Iterator[None]:
    """Raise a 503 if the engine dies: another replica can take the request."""
    try:
        yield
    except EngineDeadError as error:
        message = "the engine is dead and this server stops; retry, or use another server."
        raise ApiError(503, message, code="engine_dead", retry_after_s=RETRY_AFTER_S) from error


def validate(
    cls: type[_Model], values: Mapping[str, Any], known: Languages | None = None
) -> _Model:
    """Create a form from its fields; ``known`` are the languages that it may name.

    Raises ApiError that names the first wrong field.
    """
    try:
        return cls.model_validate(values, context=known)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where, *inside = first["loc"]
        name = str(where) + "".join(f"[{part}]" for part in inside)
        raise ApiError(400, _described(first, name), param=str(where)) from error


def resolver(info: ValidationInfo) -> Callable[[str | None], str | None]:
    """Return the function that resolves a language in a form: to a known one, or to any."""
    return resolve_language if info.context is None else info.context.resolve


def _described(error: ErrorDetails, name: str) -> str:
    kind, given = error["type"], error["input"]
    if kind == "value_error":  # raised by our validators
        return f"{name}: {error['ctx']['error']}"
    if kind == "missing":
        return f"{name} is required."
    if kind == "extra_forbidden":
        return f"{name} is unknown; leave it out."
    if kind not in _MUST_BE:
        return f"{name} is {shown(given)}, which is not valid."
    must_be = _MUST_BE[kind].format(**error.get("ctx", {}))
    return f"{name} is {shown(given)}; it must be {must_be}."


def shown(value: object) -> str:
    """Quote a value for a message: short, without control characters."""
    if isinstance(value, UploadFile):
        return "a file"
    text = repr(value[: MAX_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
