# SPDX-License-Identifier: Apache-2.0
"""Forced alignment over HTTP: the routes of an aligner's server.

    POST /v1/audio/alignments         file, text, language -> words, segments, duration; srt, vtt
    POST /v1/audio/alignments/times   samples, units -> times: one request of ``alignment.py``

Users call the first. A transcription server calls the second, once per clip, at the address in
QWEN3_ASR_ALIGNER_URL: it sends the units of a text and receives the model's raw times.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, Json
from starlette.datastructures import UploadFile
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, with_cancellation
from vllm.pooling_params import PoolingParams

from ..alignment import AlignmentOutput, AlignmentRequest, align
from ..engine import class_ms, engine_prompt, read_times
from ..formats import FORMATS, KARAOKE, rounded, word_row
from ..geometry import SAMPLE_RATE
from ..peaks import check_waveform
from ..rounds import Steps, with_warnings
from ..transcript import Transcript
from ..units import AlignmentError
from .admission import Reservation
from .aligner_client import ALIGNMENTS, TIMES
from .errors import ApiError, engine_dead_as_503
from .fields import MAX_TEXT_BYTES
from .form import gather, read
from .metrics import add_counted_route
from .responses import warning_headers
from .serving import AudioServing
from .state import server_state
from .uploads import RecordingForm, load_posted, posted

if TYPE_CHECKING:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

ALIGNED_FORMATS = ("json", "verbose_json", *KARAOKE)

# the forms ----------------------------------------------------------------------------------


class AlignmentForm(RecordingForm):
    """A recording and its text. Without a language, the script decides how to split the text."""

    text: str
    response_format: Literal[ALIGNED_FORMATS] = "json"  # type: ignore[valid-type]
    highlight_words: bool = False
    keep_lines: bool = False


class TimesForm(BaseModel):
    """One request of ``alignment.py``: samples as float32, little-endian, at 16 kHz."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    samples: UploadFile = Field(exclude=True)
    units: Json[list[str]]
    model: str | None = None

    _reservation: Reservation


async def read_alignment_form(raw_request: Request) -> AsyncIterator[AlignmentForm]:
    admission = _serving(raw_request).admission
    options: Any = {"max_field_bytes": MAX_TEXT_BYTES}
    async with posted(raw_request, admission, **options) as (fields, reservation):
        given = gather(fields)
        form = read(AlignmentForm, given)
        form._ignored = [name for name in given if name not in AlignmentForm.model_fields]
        form._reservation = reservation
        if form.highlight_words and form.response_format not in KARAOKE:
            advice = f"{form.response_format} has the times of all words; use srt, vtt or lrc."
            raise ApiError(400, f"highlight_words: {advice}", param="highlight_words")
        yield form


async def read_times_form(raw_request: Request) -> AsyncIterator[TimesForm]:
    admission = _serving(raw_request).admission
    options: Any = {"recording": "samples", "max_field_bytes": MAX_TEXT_BYTES}
    async with posted(raw_request, admission, **options) as (fields, reservation):
        form = read(TimesForm, gather(fields))
        form._reservation = reservation
        yield form


# the server ---------------------------------------------------------------------------------


def attach(app: FastAPI) -> None:
    add_counted_route(app, ALIGNMENTS, create_alignment)
    add_counted_route(app, TIMES, create_times)


class AlignerServing(AudioServing):
    """State of the alignment routes."""

    def __init__(
        self, engine_client: Any, models: OpenAIServingModels, *, num_servers: int = 1
    ) -> None:
        super().__init__(engine_client, models, num_servers=num_servers)
        self.class_ms = class_ms(self.model_config)

    async def answer(
        self, request: AlignmentRequest, request_id: str, headers: Mapping[str, str]
    ) -> AlignmentOutput:
        params = PoolingParams(task="token_classify")
        trace = await self._get_trace_headers(headers)
        with engine_dead_as_503():
            prompt = await self.render(engine_prompt(request))
            outputs = self.engine_client.encode(prompt, params, request_id, trace_headers=trace)
            async for output in outputs:
                answer = read_times(output, self.class_ms)
        return answer

    async def align(
        self, form: AlignmentForm, request_id: str, headers: Mapping[str, str]
    ) -> Transcript:
        steps = await self.in_pool(self._steps, form)
        while requests := steps.requests:
            answers = (
                self.answer(request, f"{request_id}-{number}", headers)
                for number, request in enumerate(requests)
            )
            await self.in_pool(steps.send, await asyncio.gather(*answers))
        return steps.result

    def _steps(self, form: AlignmentForm) -> Steps[Transcript]:
        """Decode the recording and split the text into units. Runs in the pool."""
        warnings: list[str] = []
        waveform = load_posted(
            form.file,
            form._reservation,
            longest_s=self.admission.max_audio_s,
            audio_track=form.audio_track,
            on_warning=warnings.append,
            load=self.decoders.load_audio,
        )
        try:
            rounds = align(waveform, form.text, language=form.language, keep_lines=form.keep_lines)
            return Steps(with_warnings(rounds, warnings))
        except (AlignmentError, ImportError) as error:
            raise ApiError(501, f"the server cannot split this text into words: {error}") from error
        except ValueError as error:
            raise ApiError(400, f"language: {error}", param="language") from error


@with_cancellation
@load_aware_call
async def create_alignment(
    raw_request: Request, form: Annotated[AlignmentForm, Depends(read_alignment_form)]
) -> Response:
    """Return the start and end of each word of a text."""
    serving = _serving(raw_request)
    await serving.check(form)
    request_id = f"align-{serving._base_request_id(raw_request)}"
    transcript = await serving.align(form, request_id, raw_request.headers)
    if (name := form.response_format) in KARAOKE:
        text = FORMATS[name](transcript, highlight_words=form.highlight_words)
        headers = form.headers | warning_headers(transcript.warnings)
        return Response(text, media_type=FORMATS[name].media_type, headers=headers)
    return JSONResponse(summary(transcript), headers=form.headers)


@with_cancellation
@load_aware_call
async def create_times(
    raw_request: Request, form: Annotated[TimesForm, Depends(read_times_form)]
) -> Response:
    """Return the start and end of each unit in milliseconds, as the model predicts them."""
    serving = _serving(raw_request)
    await serving.check(form)
    samples = await form.samples.read()
    if len(samples) % 4:
        message = f"samples has {len(samples)} bytes; float32 takes 4 for each sample."
        raise ApiError(400, message, param="samples")
    waveform = np.frombuffer(samples, "<f4")
    form._reservation.hold(len(waveform) / SAMPLE_RATE)
    try:
        check_waveform(waveform)
    except ValueError as error:
        raise ApiError(400, str(error), param="samples") from error
    request_id = f"time-{serving._base_request_id(raw_request)}"
    request = AlignmentRequest(form.units, waveform)
    output = await serving.answer(request, request_id, raw_request.headers)
    return JSONResponse({"times": output.times})


def summary(transcript: Transcript) -> dict[str, Any]:
    """Return the JSON response of /v1/audio/alignments; times in seconds, to the millisecond.

    It has ``warnings`` only if there are any.
    """
    transcript = rounded(transcript)
    return {
        "task": "align",
        "language": transcript.language,
        "duration": transcript.duration,
        "text": transcript.text,
        "words": list(map(word_row, transcript.words)),
        "segments": [
            {"id": i, "start": s.start, "end": s.end, "text": s.text}
            for i, s in enumerate(transcript.segments)
        ],
        "usage": {"type": "duration", "seconds": transcript.duration},
        **({"warnings": transcript.warnings} if transcript.warnings else {}),
    }


def _serving(raw_request: Request) -> AlignerServing:
    """Return the state. Raises ApiError if the server's model is no aligner."""
    if (serving := server_state(raw_request.app).aligner) is None:
        raise ApiError(
            404,
            "this server's model is no forced aligner; use a server of one, such as "
            "Qwen/Qwen3-ForcedAligner-0.6B.",
        )
    return serving
