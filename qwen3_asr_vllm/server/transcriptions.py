# SPDX-License-Identifier: Apache-2.0
"""HTTP routes that vLLM's API server takes from this plugin, in the place of its own.

    form -> waveform -> transcribe() asks, the engine answers, clip by clip -> json, srt, events

``form.py`` reads the form; ``transcription.py`` decides what to ask the engine and what to make of
its answers. Here are only the engine, and what is sent back.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from argparse import Namespace
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from fastapi import Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from vllm import envs
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, with_cancellation
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams

from ..alignment import AlignmentOutput, AlignmentRequest
from ..audio import (
    MAX_DURATION_S,
    ChannelError,
    decodable_formats,
    decoders,
    load_audio,
    load_channels,
)
from ..decoding import place_tokens
from ..engine import Answer, engine_prompt, sampling_params, slot_ids
from ..formats import FORMATS, diarized_json, logprobs
from ..languages import language_code, separator
from ..pauses import SILENT_PEAK
from ..transcript import Token, Transcript
from ..transcription import (
    CUT_OFF,
    EngineOutput,
    EngineRequest,
    LiveText,
    Steps,
    transcribe,
    transcribe_channels,
)
from . import page
from .admission import RETRY_AFTER_S
from .alignments import remote_aligner
from .errors import ApiError, engine_dead_as_503
from .form import Form, read_form
from .metrics import count_transcript, observe_decoding
from .serving import MEDIA_TYPES, AudioServing
from .settings import MAX_UPLOAD_MB, limit
from .uploads import load_posted

if TYPE_CHECKING:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.outputs import CompletionOutput, RequestOutput

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints

MAX_HEADER = 2000  # characters of warnings: no proxy takes headers of any length
RECORDINGS_PER_TOKEN = 16  # in the server, for each token more that an event of a stream has
MOST_TOKENS = 16  # of an event
CLIP_SHARE = 8  # one recording takes at most this part of the engine's seats: 1/8 of max_num_seqs


# the engine ---------------------------------------------------------------------------------


class Transcriber(AudioServing):
    """The state of the route."""

    def __init__(
        self, engine_client: Any, models: OpenAIServingModels, *, max_clip_s: float
    ) -> None:
        super().__init__(engine_client, models)
        self.max_clip_s = max_clip_s
        self.sampling_defaults = self.model_config.get_diff_sampling_param()
        max_num_seqs = engine_client.vllm_config.scheduler_config.max_num_seqs
        self.max_parallel_clips = max(1, max_num_seqs // CLIP_SHARE)
        self.slot_ids = slot_ids(self.renderer.get_tokenizer())
        self.aligner = remote_aligner()

    def about(self, args: Namespace) -> page.About:
        """What this server takes; ``args`` are vLLM's."""
        return page.About(
            models=tuple(model.name for model in self.models.base_model_paths),
            decodes=decodable_formats(),
            decoders=decoders(),
            max_upload_mb=limit("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", MAX_UPLOAD_MB),
            max_duration_s=limit("VLLM_MAX_AUDIO_DECODE_DURATION_S", MAX_DURATION_S),
            max_clip_s=self.max_clip_s,
            needs_key=any(args.api_key or [envs.VLLM_API_KEY]),
            words=self.aligner is not None,
        )

    async def start(self, form: Form, raw_request: Request) -> Recording:
        """Raises what there is to refuse (the model, a value, the audio) before the answer."""
        await self.check(form)
        times_words = await self._times_words(form)
        request_id = f"transcribe-{self._base_request_id(raw_request)}"
        raw_request.state.request_metadata = RequestResponseMetadata(request_id=request_id)
        trace_headers = await self._get_trace_headers(raw_request.headers)
        params = form.sampling_params(self.sampling_defaults)
        params.stream_interval = self._tokens_per_event()
        generate = partial(
            self._generate,
            params=params,
            lora_request=self._maybe_get_adapters(form),
            trace_headers=trace_headers,
            priority=self._get_priority(form, raw_request),
            data_parallel_rank=self._get_data_parallel_rank(raw_request),
        )
        started = time.perf_counter()
        steps = await self.in_pool(self._steps, form, times_words)
        observe_decoding(time.perf_counter() - started, model := self.models.model_name())
        return Recording(
            request_id=request_id,
            model=form.model or model,
            steps=steps,
            generate=generate,
            align=partial(self._align, is_needed=form.needs_words, headers=trace_headers),
            slot_ids=self.slot_ids,
            in_pool=self.in_pool,
            seats=asyncio.Semaphore(self.max_parallel_clips),
            on_end=partial(count_transcript, model=model, started=started, request_id=request_id),
            is_live=form.stream,
        )

    def _tokens_per_event(self) -> int:
        """How many an event of a new stream holds: more in a full server, for an event costs this
        process the same whatever it holds. Its first text waits for as many."""
        return min(1 + self.admission.num_recordings // RECORDINGS_PER_TOKEN, MOST_TOKENS)

    async def _generate(
        self, request: EngineRequest, *, request_id: str, params: SamplingParams, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        params = sampling_params(request.decoding, self.slot_ids, params)
        with engine_dead_as_503():
            prompt = await self.render(engine_prompt(request))
            outputs = self.engine_client.generate(prompt, params, request_id, **options)
            async for output in outputs:
                reason = output.outputs[0].finish_reason
                self._raise_if_error(reason, request_id)
                if reason == "abort":  # not by its client, who is gone then: the server stops
                    message = "the server is stopping; ask again in a few seconds, or another one."
                    raise ApiError(503, message, code="stopping", retry_after_s=RETRY_AFTER_S)
                yield output

    async def _times_words(self, form: Form) -> bool:
        """Whether an aligner shall say when words are said. Raises ApiError where it must, but
        there is none, or it is down."""
        if self.aligner is None:
            if form.needs_words:
                raise ApiError(400, NO_ALIGNER, param="timestamp_granularities")
            return False
        if not form.has_times:
            return False
        is_up = await self.aligner.is_up()
        if form.needs_words and not is_up:
            raise _no_words(f"the aligner at {self.aligner.url} does not answer")
        return is_up

    async def _align(
        self, request: AlignmentRequest, *, is_needed: bool, headers: Mapping[str, str] | None
    ) -> AlignmentOutput:
        assert self.aligner is not None  # _times_words saw to it
        output = await self.aligner.answer(request, headers)
        if not output.error or not is_needed:
            return output
        if output.is_permanent:
            message = f"words cannot be timed: {output.error}. Segments have times without."
            raise ApiError(502, message, code="aligner_refuses", is_final=True)
        raise _no_words(output.error)

    def _steps(self, form: Form, times_words: bool) -> Steps[Transcript]:
        """Decode and cut the recording. Runs in the pool."""
        wishes = form.wishes | {"max_clip_s": self.max_clip_s, "word_timestamps": times_words}
        if form.speakers:
            channels = self._load(form, load_channels, len(form.speakers))
            _check_channels(channels)
            return Steps(transcribe_channels(channels, form.speakers, **wishes))
        return Steps(transcribe(self._load(form, load_audio), **wishes))

    def _load(self, form: Form, load: Callable[..., Any], *options: Any) -> Any:
        """What a loader makes of the file; raises ApiError for what it cannot."""
        longest_s = self.admission.max_audio_s
        try:
            return load_posted(
                form.file, form._place, longest_s=longest_s, load=load, options=options
            )
        except ApiError as error:
            if isinstance(error.__cause__, ChannelError):
                raise ApiError(400, f"{error} {_BY_CHANNEL}", param="response_format") from error
            raise


NO_ALIGNER = (
    "timestamp_granularities=word: words are timed by a forced aligner, and this server has none. "
    "Start it with: qwen3-asr serve MODEL --aligner Qwen/Qwen3-ForcedAligner-0.6B; or set "
    "QWEN3_ASR_ALIGNER_URL to a server of one. Segments have times without."
)


def _no_words(reason: str) -> ApiError:
    return ApiError(
        503,
        f"words cannot be timed now: {reason}. Ask again in a while, or without "
        "timestamp_granularities=word.",
        param="timestamp_granularities",
        code="aligner_unavailable",
        retry_after_s=RETRY_AFTER_S,
    )


_BY_CHANNEL = (
    "diarized_json tells speakers apart by channel, one each; verbose_json has timed segments of "
    "any recording."
)


def _check_channels(channels: list[np.ndarray]) -> None:
    """Raises ApiError for a recording whose channels are the same: speakers are mixed in it."""
    left, right = channels
    if np.abs(left - right).max() < SILENT_PEAK:
        message = f"both channels hold the same. {_BY_CHANNEL}"
        raise ApiError(400, message, param="response_format")


class Delta(NamedTuple):
    """The next piece of text, and the tokens that wrote it, where they are wanted."""

    text: str
    tokens: Sequence[Token]


class Clip:
    """The answer to one request, as the engine writes it."""

    def __init__(self, request: EngineRequest, ids: Mapping[str, int]) -> None:
        self.inbox: asyncio.Queue[RequestOutput | Exception | None] = asyncio.Queue()
        self._request = request
        self._answer = Answer(request.decoding, ids)
        self._live = LiveText(request)
        self._num_told = 0  # tokens

    async def deltas(self, left: str) -> AsyncIterator[Delta]:
        """Its text, as far as it stays, joined to what is on the left of it."""
        async for piece in self._pieces():
            yield Delta(separator(left, piece) + piece, self._new_tokens())
            left = ""  # no seam inside the clip

    async def wait(self) -> None:
        """For the end of an answer of which nothing is shown."""
        async for _ in self._messages():
            pass

    @property
    def output(self) -> EngineOutput:
        return self._answer.output(shown=self._live.shown)

    @property
    def is_settled(self) -> bool:
        """Whether ``deltas`` were all of the text that will be."""
        return self._live.is_settled

    async def _pieces(self) -> AsyncIterator[str]:
        finish_reason = None
        async for completion in self._messages():
            finish_reason = completion.finish_reason
            if piece := self._live.push(completion.text):
                yield piece
        if piece := self._live.finish(finish_reason):
            yield piece

    def _new_tokens(self) -> list[Token]:
        """Those that wrote what was shown since the last call, where they are wanted."""
        if not self._answer.tokens:
            return []
        language = self._request.language
        placed = place_tokens(self._answer.tokens, self._live.shown, language=language)
        new = [token for _, token in placed[self._num_told :]]
        self._num_told = len(placed)
        return new

    async def _messages(self) -> AsyncIterator[CompletionOutput]:
        while (message := await self.inbox.get()) is not None:
            if isinstance(message, Exception):
                raise message
            self._answer.push(message.outputs[0])
            yield message.outputs[0]


@dataclass
class Recording:
    """One recording on its way through the engine, some clips at a time."""

    request_id: str
    model: str
    steps: Steps[Transcript]
    generate: Callable[..., AsyncIterator[RequestOutput]]
    align: Callable[[AlignmentRequest], Awaitable[AlignmentOutput]]
    slot_ids: Mapping[str, int]
    in_pool: Callable[..., Awaitable[Any]]  # runs a function beside the event loop
    seats: asyncio.Semaphore  # held by a clip while the engine decodes it
    on_end: Callable[..., None]  # is told the transcript, and of how many clips it was made
    numbers: Iterator[int] = field(default_factory=count)  # of the engine's requests
    is_live: bool = False  # somebody reads along
    prompt_tokens: int = 0
    output_tokens: int = 0

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The text, in the order of the clips; when it ends there is ``steps.result``.

        After a clip that must be asked for again, and where nobody reads along, the rest comes at
        once when all is done. Closing this, or cancelling who waits for it, aborts what the engine
        still decodes.
        """
        text = ""
        num_clips = num_tokens = 0
        is_live = self.is_live
        is_one_clip = len(self.steps.requests) == 1
        while requests := self.steps.requests:
            to_align = [r for r in requests if isinstance(r, AlignmentRequest)]
            to_hear = [r for r in requests if not isinstance(r, AlignmentRequest)]
            clips = [Clip(request, self.slot_ids) for request in to_hear]
            tasks = list(map(asyncio.create_task, map(self._decode, to_hear, clips)))
            timing = list(map(asyncio.create_task, map(self._align, to_align)))
            try:
                for clip in clips:
                    if not is_live:
                        await clip.wait()
                        continue
                    async for delta in clip.deltas(text):
                        text += delta.text
                        num_tokens += len(delta.tokens)
                        yield delta
                    is_live = clip.is_settled
                timed = iter(await asyncio.gather(*timing))
            finally:
                for task in tasks + timing:
                    task.cancel()
            heard = (clip.output for clip in clips)
            outputs = [next(timed if isinstance(r, AlignmentRequest) else heard) for r in requests]
            if is_one_clip:  # which takes less than the way to a thread and back
                self.steps.send(outputs)
            else:
                await self.in_pool(self.steps.send, outputs)
            is_live = False
            num_clips += len(to_hear)
        self.on_end(self.steps.result, num_clips=num_clips)
        if rest := self.steps.result.text[len(text) :]:
            yield Delta(rest, _tokens(self.steps.result)[num_tokens:])

    async def _align(self, request: AlignmentRequest) -> AlignmentOutput:
        async with self.seats:
            return await self.align(request)

    async def _decode(self, request: EngineRequest, clip: Clip) -> None:
        end: Exception | None = None
        prompt_tokens = 0
        try:
            async with self.seats:
                request_id = f"{self.request_id}-{next(self.numbers)}"
                async for output in self.generate(request, request_id=request_id):
                    prompt_tokens = len(output.prompt_token_ids or ()) or prompt_tokens
                    self.output_tokens += len(output.outputs[0].token_ids)
                    clip.inbox.put_nowait(output)
        except Exception as error:  # whatever it is, the reader of the clip raises it
            end = error
        self.prompt_tokens += prompt_tokens
        clip.inbox.put_nowait(end)

    @property
    def finish_reason(self) -> str:
        """At the end: whether some clip reached its token limit."""
        is_cut_off = any(warning.endswith(CUT_OFF) for warning in self.steps.result.warnings)
        return "length" if is_cut_off else "stop"

    @property
    def usage(self) -> dict[str, int | str]:
        """Tokens so far, under the names that OpenAI and vLLM give them."""
        return {
            "type": "tokens",
            "input_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
        }


# the answer ---------------------------------------------------------------------------------


@with_cancellation
@load_aware_call
async def create_transcription(
    raw_request: Request, form: Annotated[Form, Depends(read_form)]
) -> Response:
    """Transcribe a recording."""
    transcriber: Transcriber = raw_request.app.state.qwen3_asr
    with engine_dead_as_503():  # before the first request reaches it, too
        recording = await transcriber.start(form, raw_request)
    if form.stream:
        return StreamingResponse(
            _events(recording, form, raw_request),
            media_type="text/event-stream",
            headers=form.headers,
        )
    async for _ in recording.deltas():
        pass
    transcript = recording.steps.result
    if transcript.duration <= transcriber.max_clip_s:
        return _response(transcript, form)
    # The subtitles of four hours take half a second, in which nobody else would be heard.
    response: Response = await recording.in_pool(_response, transcript, form)
    return response


def _response(transcript: Transcript, form: Form) -> Response:
    media_type = MEDIA_TYPES[form.response_format]
    if media_type == "application/json":
        return JSONResponse(_document(transcript, form), headers=form.headers)
    name = "txt" if form.response_format == "text" else form.response_format
    headers = form.headers | _warning_headers(transcript.warnings)
    return Response(FORMATS[name](transcript), media_type=media_type, headers=headers)


def _warning_headers(warnings: Sequence[str]) -> dict[str, str]:
    """Where the body has no room for them; in ASCII, as headers are."""
    if not warnings:
        return {}
    text = re.sub(r"[^ -~]", "?", " ".join(warnings))
    if len(text) > MAX_HEADER:
        text = f"{text[:MAX_HEADER]}... ({len(warnings)} in all)"
    return {"X-Warnings": text}


def _document(transcript: Transcript, form: Form) -> dict[str, Any]:
    """The text and its languages; warnings where there are any; what else was asked for."""
    document: dict[str, Any] = {
        "text": transcript.text,
        "language": transcript.language,
        "languages": [{"code": language_code(name) or name} for name in transcript.languages],
        "usage": {"type": "duration", "seconds": round(transcript.duration, 3)},
    }
    if transcript.warnings:
        document["warnings"] = transcript.warnings
    if form.response_format == "verbose_json":
        verbose = FORMATS["verbose_json"](transcript, temperature=form.temperature)
        document |= json.loads(verbose)
        words = document.pop("words", [])
        if form.needs_words:
            document["words"] = words
    if form.response_format == "diarized_json":
        document |= json.loads(diarized_json(transcript))
    if form.wants_logprobs:
        document["logprobs"] = logprobs(_tokens(transcript))
    subtitles = (name for name in form.include if name in FORMATS)
    return document | {name: FORMATS[name](transcript) for name in subtitles}


def _tokens(transcript: Transcript) -> list[Token]:
    return [token for segment in transcript.segments for token in segment.tokens or ()]


async def _events(recording: Recording, form: Form, raw_request: Request) -> AsyncIterator[str]:
    """Server-sent events; each is OpenAI's transcript.text event and vLLM's chunk at once."""
    chunk = {
        "id": recording.request_id,
        "object": "transcription.chunk",
        "created": int(time.time()),
        "model": recording.model,
    }

    def delta_event(delta: Delta, finish_reason: str | None = None) -> str:
        choice = {"delta": {"content": delta.text}, "finish_reason": finish_reason}
        event: dict[str, Any] = {"type": "transcript.text.delta", "delta": delta.text}
        event["choices"] = [choice]
        if form.wants_logprobs:
            event["logprobs"] = logprobs(delta.tokens)
        if form.stream_continuous_usage_stats:
            event["usage"] = recording.usage
        return _event(event | chunk)

    try:
        async with aclosing(recording.deltas()) as deltas:
            async for delta in deltas:
                yield delta_event(delta)
        yield delta_event(Delta("", ()), recording.finish_reason)
        done = {"type": "transcript.text.done", "choices": [], "usage": recording.usage}
        document = await recording.in_pool(_document, recording.steps.result, form)
        yield _event(document | done | chunk)
    except Exception as error:  # the status has been sent, so the client is told in the stream
        if isinstance(error, ApiError):
            logger.warning("Transcription %s failed: %s", recording.request_id, error)
            raw_request.state.failed_with = error.status
            yield _event(error.body)
        else:
            logger.exception("Transcription %s failed.", recording.request_id)
            answer = create_error_response(error)
            raw_request.state.failed_with = answer.error.code
            yield _event(answer.model_dump())
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
