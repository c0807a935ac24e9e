# SPDX-License-Identifier: Apache-2.0
"""Uploads: how they are read from a request, bounded, and decoded."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from ..audio import load_audio
from ..containers import raw_audio, raw_audio_of_name
from ..languages import resolve_language
from .admission import RETRY_AFTER_S, Admission, Place
from .errors import ApiError
from .settings import setting

_NOT_IN_HEADERS = re.compile(r"[^\w.\[\]-]", re.ASCII)
_Fields = TypeVar("_Fields", bound=BaseModel)


class RecordingForm(BaseModel):
    """What every form has in which a recording is posted."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    file: UploadFile = Field(exclude=True)
    model: str | None = None
    language: str | None = None  # the model's name for it; None where nobody says
    audio_track: int | None = Field(None, ge=1)  # of a video with several; None: the default one

    _ignored: list[str] = []  # the names of fields that change nothing
    _place: Place

    @field_validator("language")
    @classmethod
    def _resolve(cls, language: str | None) -> str | None:
        return resolve_language(language)

    @property
    def headers(self) -> dict[str, str]:
        """Of its answer."""
        names = (_NOT_IN_HEADERS.sub("?", name) for name in self._ignored)
        return {"X-Ignored-Params": ", ".join(names)} if self._ignored else {}


def validate(cls: type[_Fields], values: Mapping[str, Any]) -> _Fields:
    """Raises ApiError that names the field for a value that is wrong."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{where}: {message}", param=str(first["loc"][0])) from error


@asynccontextmanager
async def posted(
    raw_request: Request, admission: Admission
) -> AsyncIterator[tuple[FormData, Place]]:
    """The fields that were posted, which end as soon as they are too large.

    They have a place from before the first byte is read until the answer has been sent.
    """
    max_bytes = setting("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB") << 20
    _check_size(int(raw_request.headers.get("content-length", 0)), max_bytes)
    request = Request(raw_request.scope, _counted(raw_request.receive, max_bytes))
    with admission.place() as place:
        async with _multipart(request) as fields:
            yield fields, place


def load_posted(
    file: UploadFile,
    place: Place,
    *,
    longest_s: float,
    load: Callable[..., Any] = load_audio,
    options: Sequence[Any] = (),
    audio_track: int | None = None,
    on_warning: Callable[[str], object],
) -> Any:
    """What a loader makes of an uploaded file; raises ApiError for what it cannot.

    ``longest_s`` is the most that the server holds; vLLM's own limit may be less. The
    file's content type describes audio without a header. ``on_warning`` takes what could not be
    read.
    """
    limits = {
        "QWEN3_ASR_MAX_AUDIO_S": longest_s,
        "VLLM_MAX_AUDIO_DECODE_DURATION_S": setting("VLLM_MAX_AUDIO_DECODE_DURATION_S"),
    }
    lower = min(limits, key=limits.__getitem__)
    try:
        return load(
            file.file,
            *options,
            max_duration_s=limits[lower],
            on_progress=place.hold,
            on_warning=on_warning,
            audio_track=audio_track,
            raw=raw_audio(file.content_type) or raw_audio_of_name(file.filename or ""),
        )
    except ImportError as error:
        raise ApiError(501, f"the server cannot decode this audio: {error}") from error
    except ValueError as error:
        message = str(error).replace("max_duration_s", f"{lower} on the server")
        raise ApiError(400, message, param="file") from error


@asynccontextmanager
async def _multipart(request: Request) -> AsyncIterator[FormData]:
    try:
        fields = await request.form()
    except HTTPException as error:
        raise ApiError(error.status_code, f"the form cannot be read: {error.detail}") from error
    except OSError as error:
        message = f"the upload cannot be kept ({error.strerror}); try again in {RETRY_AFTER_S} s."
        raise ApiError(503, message, code="busy", retry_after_s=RETRY_AFTER_S) from error
    try:
        yield fields
    finally:
        await fields.close()


def _counted(receive: Callable[[], Awaitable[Any]], max_bytes: int) -> Callable[[], Awaitable[Any]]:
    num_bytes = 0

    async def counted() -> Any:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        _check_size(num_bytes, max_bytes)
        return message

    return counted


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise ApiError(
            413,
            f"the upload is {num_bytes / 2**20:.1f} MiB or larger; the limit is "
            f"{max_bytes >> 20} MiB. Send a compressed format, such as opus or mp3, or set "
            "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB on the server.",
            param="file",
        )
