# SPDX-License-Identifier: Apache-2.0
"""Errors as clients get them: OpenAI's error object, with a status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi.responses import JSONResponse
from vllm.v1.engine.exceptions import EngineDeadError

from .admission import RETRY_AFTER_S, Busy


class ApiError(Exception):
    """A refusal or a failure, as OpenAI's error object."""

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
        """``is_final``: OpenAI's clients must not retry, as they do from status 500 on."""
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
    """The 503 response of a full server."""
    return ApiError(503, str(error), code="busy", retry_after_s=RETRY_AFTER_S)


@contextmanager
def engine_dead_as_503() -> Iterator[None]:
    """Turn the death of the engine into a 503: another replica can take the recording over."""
    try:
        yield
    except EngineDeadError as error:
        message = "the engine ended, and this server with it; another can be asked at once."
        raise ApiError(503, message, code="engine_dead", retry_after_s=RETRY_AFTER_S) from error
