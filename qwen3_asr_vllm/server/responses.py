# SPDX-License-Identifier: Apache-2.0
"""Responses: a transcript as a document, as subtitles or as server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from vllm.entrypoints.serve import create_error_response
from vllm.logger import init_logger

from ..formats import FORMATS, RESPONSE_FORMATS, logprobs
from ..printable import header_list, printable
from ..transcript import Transcript
from .errors import ApiError
from .form import Form
from .run import Delta, Run, written_tokens

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints


def respond(transcript: Transcript, form: Form) -> Response:
    """Return the transcript in the requested format."""
    format = RESPONSE_FORMATS[form.response_format]
    if format.is_json:
        return JSONResponse(_document(transcript, form), headers=form.headers)
    headers = form.headers | warning_headers(transcript.warnings)
    return Response(format(transcript), media_type=format.media_type, headers=headers)


def warning_headers(warnings: Sequence[str]) -> dict[str, str]:
    """Return the header for formats without room for warnings, in ASCII."""
    return {"X-Warnings": header_list(warnings, separator=" ")} if warnings else {}


def _document(transcript: Transcript, form: Form) -> dict[str, Any]:
    """Return the JSON response: text, languages, warnings if any, and requested additions."""
    languages = [{"code": code} for code in transcript.codes]
    document: dict[str, Any] = {
        "text": transcript.text,
        "language": languages[0]["code"] if languages else None,
        "languages": languages,
        "usage": {"type": "duration", "seconds": round(transcript.duration, 3)},
    }
    if transcript.warnings:
        document["warnings"] = transcript.warnings
    format = RESPONSE_FORMATS[form.response_format]
    if format.is_json and format.name != "json":
        options = {"temperature": form._temperature} if format.is_verbose else {}
        document |= json.loads(format(transcript, **options))
    if format.is_verbose:
        words = document.pop("words", [])
        if form.needs_words:
            document["words"] = words
        else:
            for segment in document["segments"]:
                segment.pop("words", None)
    if form.wants_logprobs:
        document["logprobs"] = logprobs(written_tokens(transcript))
    subtitles = (name for name in form.include if name in FORMATS)
    return document | {name: FORMATS[name](transcript) for name in subtitles}


async def events(run: Run, form: Form, raw_request: Request) -> AsyncIterator[str]:
    """Yield server-sent events; each is OpenAI's transcript.text event and vLLM's chunk at once.

    The segments of diarized_json are events of their own, once all speakers are known.
    The last event has the usage, as in OpenAI's API, unless ``stream_include_usage`` is false. If
    it is true, ``choices`` of the last event is empty, as in vLLM; otherwise it holds one choice.
    """
    chunk = {
        "id": run.request_id,
        "object": "transcription.chunk",
        "created": int(time.time()),
        "model": run.model,
    }

    def choices(text: str, finish_reason: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]

    def delta_event(delta: Delta, finish_reason: str | None = None) -> str:
        event: dict[str, Any] = {"type": "transcript.text.delta", "delta": delta.text}
        event["choices"] = choices(delta.text, finish_reason)
        if form.wants_logprobs:
            event["logprobs"] = logprobs(delta.tokens)
        if form.stream_continuous_usage_stats:
            event["usage"] = run.usage
        return _event(event | chunk)

    try:
        async with aclosing(run.deltas()) as deltas:
            async for delta in deltas:
                yield delta_event(delta)
        yield delta_event(Delta("", ()), run.finish_reason)
        done = await run.in_pool(_document, run.steps.result, form)
        if form.response_format == "diarized_json":
            for segment in done["segments"]:
                yield _event(segment | chunk)
        done |= {"type": "transcript.text.done", "usage": run.usage}
        done["choices"] = [] if form.stream_include_usage else choices("")
        if form.stream_include_usage is False:
            del done["usage"]
        yield _event(done | chunk)
    except Exception as error:  # the status has been sent: the stream reports the error
        if isinstance(error, ApiError):
            logger.warning("Transcription %s failed: %s", run.request_id, printable(error))
            raw_request.state.failed_with = error.status
            yield _event(error.body)
        else:
            logger.exception("Transcription %s failed.", run.request_id)
            answer = create_error_response(error)
            raw_request.state.failed_with = answer.error.code
            yield _event(answer.model_dump())
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
