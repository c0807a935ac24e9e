# SPDX-License-Identifier: Apache-2.0
"""Uploads: read a recording from a request within limits, and decode it.

    query string, body -> decompress, count -> body reader -> Fields -> a form

Reading stops as soon as a limit is exceeded; memory and TMPDIR hold at most what ``Admission``
allows for all uploads together.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect
from vllm.logger import init_logger

from ..media.containers import raw_audio, raw_audio_of_name
from ..printable import header_list
from .admission import RETRY_AFTER_S, Admission, Reservation
from .bodies import WAYS, body_of
from .errors import CLIENT_CLOSED, ApiError, resolver, shown
from .fields import MAX_FIELD_BYTES, Fields
from .settings import setting

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints

MAX_FILE_NAME = 1000  # bytes of a path or URL sent instead of a recording
MAX_SHOWN_FIELDS = 10  # field names in an error message
INFLATED_BYTES = 1 << 18  # bytes decompressed at a time
_NOT_IN_HEADERS = re.compile(r"[^\w.\[\]-]", re.ASCII)


class RecordingForm(BaseModel):
    """Fields of every form that holds a recording."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    file: UploadFile = Field(exclude=True)
    model: str | None = None
    language: str | None = Field(
        None, max_length=100
    )  # the model's own name of it; None: detect it
    audio_track: int | None = Field(None, ge=1)  # track number of a video; None: its default track

    _ignored: list[str] = []  # names of the fields that were ignored
    _reservation: Reservation

    @field_validator("language")
    @classmethod
    def _resolve(cls, language: str | None, info: ValidationInfo) -> str | None:
        return resolver(info)(language)

    @property
    def headers(self) -> dict[str, str]:
        """Return the response headers: X-Ignored-Params, if fields were ignored."""
        names = [_NOT_IN_HEADERS.sub("?", name) for name in self._ignored]
        return {"X-Ignored-Params": header_list(names, separator=", ")} if names else {}


@asynccontextmanager
async def posted(
    raw_request: Request,
    admission: Admission,
    *,
    recording: str = "file",
    max_field_bytes: int = MAX_FIELD_BYTES,
) -> AsyncIterator[tuple[FormData, Reservation]]:
    """Yield the fields of a request, those of its query string first; files are closed at the end.

    The reservation is held from before the first byte is read until the response has been sent.
    ``recording`` is the field that must be a file. Raises ApiError or Busy.
    """
    length = raw_request.headers.get("content-length", "")
    num_bytes = int(length) if length.isdecimal() else 0
    _check_size(num_bytes, admission.max_bytes)
    fields = Fields(max_field_bytes)
    try:
        with admission.reserve(num_bytes) as reservation:
            await _read(raw_request, fields, reservation, admission.max_bytes)
            _check_recording(fields.form, recording)
            yield fields.form, reservation
    finally:
        await fields.form.close()


def load_posted(
    file: UploadFile,
    reservation: Reservation,
    *,
    longest_s: float,
    load: Callable[..., Any],
    options: Sequence[Any] = (),
    audio_track: int | None = None,
    on_warning: Callable[[str], object],
) -> Any:
    """Decode an uploaded file with ``load`` and close it; returns what the loader returns.

    The limit is the lower of ``longest_s`` and vLLM's own. The content type or the name of the
    file describes audio without a header. ``on_warning`` receives warnings about damaged parts.
    Raises ApiError if the file cannot be decoded.
    """
    limits = {
        "VLLM_MAX_AUDIO_DECODE_DURATION_S": setting("VLLM_MAX_AUDIO_DECODE_DURATION_S"),
        "QWEN3_ASR_MAX_AUDIO_S": longest_s,
    }
    lower = min(limits, key=limits.__getitem__)
    try:
        loaded = load(
            file.file,
            *options,
            max_duration_s=limits[lower],
            on_progress=reservation.hold,
            on_warning=on_warning,
            audio_track=audio_track,
            raw=raw_audio(file.content_type) or raw_audio_of_name(file.filename or ""),
        )
    except ImportError as error:
        raise ApiError(501, f"the server cannot decode this audio: {error}") from error
    except ValueError as error:
        message = str(error).replace("max_duration_s", f"{lower} on the server")
        raise ApiError(400, message, param="file") from error
    file.file.close()
    reservation.hold_bytes(0)
    return loaded


async def _read(request: Request, fields: Fields, reservation: Reservation, max_bytes: int) -> None:
    num_bytes = 0
    try:
        fields.add_query(request.scope["query_string"])
        body = body_of(request.headers.get("content-type", ""), fields)
        async for piece in _decompressed(request):
            num_bytes += len(piece)
            _check_size(num_bytes, max_bytes / body.held_per_byte)
            reservation.hold_bytes(num_bytes * body.held_per_byte)
            await body.write(piece)
        await body.finish()
    except ClientDisconnect as error:
        path = request.scope["path"]
        logger.info("A client disconnected during its upload: route=%s bytes=%d", path, num_bytes)
        raise ApiError(CLIENT_CLOSED, "the client disconnected.") from error
    except OSError as error:
        message = f"the upload cannot be stored ({error.strerror}); try again in {RETRY_AFTER_S} s."
        raise ApiError(503, message, code="busy", retry_after_s=RETRY_AFTER_S) from error


async def _decompressed(request: Request) -> AsyncIterator[bytes]:
    """Yield the body without its Content-Encoding, in pieces of bounded size."""
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        async for piece in request.stream():
            yield piece
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise ApiError(400, f"the Content-Encoding is {shown(encoding)}; use gzip or none.")
    inflator = zlib.decompressobj(wbits=47)  # detects gzip and deflate
    try:
        async for piece in request.stream():
            while piece and not inflator.eof:
                yield inflator.decompress(piece, INFLATED_BYTES)
                await asyncio.sleep(0)  # let other requests run: a bomb inflates a thousand times
                piece = inflator.unconsumed_tail
            if piece or inflator.unused_data:
                raise ApiError(400, f"the {encoding} body continues after its end.")
    except zlib.error as error:
        raise ApiError(400, f"the body is no {encoding}, as its Content-Encoding says.") from error
    yield inflator.flush()
    if not inflator.eof:
        raise ApiError(400, f"the {encoding} body is cut off.")


def _check_size(num_bytes: int, max_bytes: float) -> None:
    """Raise ApiError beyond ``max_bytes``, shared by all uploads, or the limit of one."""
    limits = {
        "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB": setting("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB"),
        "QWEN3_ASR_MAX_UPLOADS_MB": max_bytes / 2**20,
    }
    lower = min(limits, key=limits.__getitem__)
    if num_bytes > limits[lower] * 2**20:
        raise ApiError(
            413,
            f"the upload is {num_bytes / 2**20:.1f} MiB or larger; the limit is "
            f"{limits[lower]:g} MiB. Send a compressed format, such as opus or mp3, or set "
            f"{lower} on the server.",
            param="file",
        )


def _check_recording(form: FormData, name: str) -> None:
    """Raise ApiError if a field is no file, or its text only names a file."""
    file = form.get(name)
    if not isinstance(file, UploadFile):
        sent = ", ".join(list(form)[:MAX_SHOWN_FIELDS]) or "none"
        message = f"{name} is required: no recording was sent. The fields sent: {sent}. {WAYS}"
        raise ApiError(400, message, param=name)
    if file.filename is None and 0 < (file.size or 0) <= MAX_FILE_NAME:
        text = file.file.read()
        file.file.seek(0)
        if (given := text.decode(errors="replace").strip()).isprintable() and "\ufffd" not in given:
            message = f"{name} holds the text {shown(given)} and no recording. {WAYS}"
            raise ApiError(400, message, param=name)
