# SPDX-License-Identifier: Apache-2.0
"""The transcription route, which replaces vLLM's own.

    form -> waveform -> transcribe() requests, the engine decodes, clip by clip -> json, srt, events

``form.py`` reads the form, ``transcription.py`` decides what to request and combines the outputs,
``responses.py`` formats the transcript. This module connects them with the engine.
"""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from collections.abc import (
    AsyncIterator,
    Callable,
    Mapping,
)
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import entry_points
from itertools import count
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import Response, StreamingResponse
from vllm import envs
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.generate.base.serving import PRIORITY_HEADER
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, with_cancellation
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LOGITSPROCS_GROUP

from ..alignment import AlignmentOutput, AlignmentRequest
from ..audio import (
    decodable_formats,
    decoders,
)
from ..beam_requests import BeamSearcher
from ..decoding import Decoding
from ..engine import engine_prompt, language_token_ids, sampling_params
from ..generation import describe, generation_defaults
from ..options import TranscribeOptions
from ..prompt import ASR_TEXT, TextProtocol
from ..rounds import Steps, with_warnings
from ..speakers import DiarizationOutput, DiarizationRequest
from ..transcript import Transcript
from ..transcription import EngineRequest, transcribe, transcribe_channels
from . import diarization, page
from .admission import RETRY_AFTER_S
from .aligner_client import remote_aligner
from .diarizer_client import remote_diarizer
from .errors import ApiError, engine_dead_as_503
from .form import SPEAKERS, Form, read_form
from .metrics import count_transcript, observe_decoding
from .responses import events, respond
from .run import Run
from .serving import AudioServing, set_stream_interval
from .settings import setting
from .state import server_state
from .uploads import load_posted

if TYPE_CHECKING:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.outputs import RequestOutput

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints

RECORDINGS_PER_TOKEN = 16  # recordings in the server that add one token to every SSE event
MAX_EVENT_TOKENS = 16  # upper bound of tokens per SSE event
HEADER_TOKENS = 3  # "language", its name, "<asr_text>": the next token is text
# vLLM's own entries of vllm_xargs; ignored if a client sends them
ENGINE_XARGS = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")
SEARCHED_WHOLE = "beam search has no final text before its end, so all text came at the end."
CLIP_SHARE = 8  # one recording has at most max_num_seqs / 8 clips in the engine


# the engine ---------------------------------------------------------------------------------


class Transcriber(AudioServing):
    """State of the transcription route."""

    def __init__(
        self,
        engine_client: Any,
        models: OpenAIServingModels,
        *,
        max_clip_s: float,
        protocol: TextProtocol,
        num_servers: int = 1,
    ) -> None:
        super().__init__(engine_client, models, num_servers=num_servers)
        self.max_clip_s = max_clip_s
        self.protocol = protocol
        self.defaults = generation_defaults(self.model_config)
        scheduler = engine_client.vllm_config.scheduler_config
        self.max_parallel_clips = max(1, scheduler.max_num_seqs // CLIP_SHARE)
        self.language_token_ids = language_token_ids(
            self.renderer.get_tokenizer(), protocol.languages
        )
        self.aligner = remote_aligner()
        self.diarizer = remote_diarizer()
        self.has_priorities = scheduler.policy == "priority"
        # Only logits processors that an operator installed read vllm_xargs.
        self.reads_xargs = bool(
            self.model_config.logits_processors or entry_points(group=LOGITSPROCS_GROUP)
        )

    @cached_property
    def searcher(self) -> BeamSearcher:
        tokenizer = self.renderer.get_tokenizer()
        return BeamSearcher.of(self.model_config, tokenizer, self.language_token_ids)

    def about(self, args: Namespace) -> page.About:
        """Describe this server; ``args`` are those of vLLM's command line."""
        return page.About(
            models=tuple(model.name for model in self.models.base_model_paths),
            languages=dict(self.protocol.languages),
            decodes=decodable_formats(),
            decoders=decoders(),
            max_upload_mb=setting("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB"),
            max_duration_s=setting("VLLM_MAX_AUDIO_DECODE_DURATION_S"),
            max_clip_s=self.max_clip_s,
            needs_key=any(args.api_key or [envs.VLLM_API_KEY]),
            words=self.aligner is not None,
            speakers=self.diarizer is not None,
            decoding=describe(self.defaults),
        )

    async def start(self, form: Form, raw_request: Request) -> Run:
        """Start a request. Raises ApiError for a wrong model, field or audio."""
        await self.check(form)
        self._drop_unread(form, raw_request)
        options = self._options(form)
        times_words = await self._times_words(form)
        if form.wants_speakers and self.diarizer is not None:
            await diarization.check_is_up(self.diarizer)
        request_id = f"transcribe-{self._base_request_id(raw_request)}"
        raw_request.state.request_metadata = RequestResponseMetadata(request_id=request_id)
        trace_headers = await self._get_trace_headers(raw_request.headers)
        params = form.sampling_params(self.defaults)
        form._temperature = params.temperature
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
        options = replace(options, word_timestamps=times_words)
        steps, is_in_order = await self.in_pool(self._steps, form, options)
        observe_decoding(time.perf_counter() - started, model := self.models.model_name())
        return Run(
            request_id=request_id,
            model=form.model or model,
            steps=steps,
            generate=generate,
            align=partial(self._align, is_needed=form.needs_words, headers=trace_headers),
            diarize=self._diarize,
            language_token_ids=self.language_token_ids,
            in_pool=self.in_pool,
            parallel_clips=asyncio.Semaphore(self.max_parallel_clips),
            on_end=partial(count_transcript, model=model, started=started, request_id=request_id),
            is_live=form.stream and not options.beams and is_in_order,
        )

    def _drop_unread(self, form: Form, raw_request: Request) -> None:
        """Drop the fields that this server's engine does not read, and name them as ignored."""
        asked = {
            "priority": "priority" in form.model_fields_set,
            PRIORITY_HEADER: PRIORITY_HEADER in raw_request.headers,
        }
        if not self.has_priorities:
            form._ignored += [name for name, is_given in asked.items() if is_given]
        xargs = form.vllm_xargs or {}
        read = {x: xargs[x] for x in xargs if self.reads_xargs and x not in ENGINE_XARGS}
        form._ignored += [f"vllm_xargs.{name}" for name in xargs if name not in read]
        form.vllm_xargs = read or None

    def _tokens_per_event(self) -> int:
        """Return the tokens per event of a new stream, after the first.

        An event costs this process the same whatever it holds, so a full server sends fewer.
        """
        return min(1 + self.admission.num_recordings // RECORDINGS_PER_TOKEN, MAX_EVENT_TOKENS)

    async def _generate(
        self, request: EngineRequest, *, request_id: str, params: SamplingParams, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        per_event = params.stream_interval or 1
        params = sampling_params(request.decoding, self.language_token_ids, params)
        if request.clip_index == 0 and request.language is None:  # the first text comes early
            params.stream_interval = min(per_event, HEADER_TOKENS)
        text = ""
        with engine_dead_as_503():
            prompt = await self.render(engine_prompt(request))
            if request.decoding.beams:
                decoding = replace(request.decoding, max_tokens=params.max_tokens)
                yield await self._search(prompt, decoding, request_id, **options)
                return
            async for output in self._outputs(prompt, params, request_id, **options):
                text += output.outputs[0].text
                if params.stream_interval != per_event and text.partition(ASR_TEXT)[2]:
                    params.stream_interval = per_event
                    set_stream_interval(self.engine_client, request_id, per_event)
                yield output

    async def _outputs(
        self, prompt: Any, params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        outputs = self.engine_client.generate(prompt, params, request_id, **options)
        async for output in outputs:
            reason = output.outputs[0].finish_reason
            self._raise_if_error(reason, request_id)
            if reason == "abort":  # the server stops; a client's abort ends this task
                message = "the server is stopping; retry, or use another server."
                raise ApiError(503, message, code="stopping", retry_after_s=RETRY_AFTER_S)
            yield output

    async def _search(
        self, prompt: Any, decoding: Decoding, request_id: str, **options: Any
    ) -> RequestOutput:
        """Return the best output of a beam search, whose requests run side by side."""
        numbers = count()

        async def last_output(continued: Any, params: SamplingParams) -> RequestOutput:
            beam_id = f"{request_id}-beam-{next(numbers)}"
            outputs = self._outputs(continued, params, beam_id, **options)
            return [output async for output in outputs][-1]

        steps = Steps(self.searcher.search(prompt, decoding))
        while steps.requests:
            steps.send(await asyncio.gather(*(last_output(*r) for r in steps.requests)))
        return steps.result

    async def _times_words(self, form: Form) -> bool:
        """Return whether the aligner times the words.

        Raises ApiError if the form needs that and there is no aligner, or it is down.
        """
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
        assert self.aligner is not None  # checked by _times_words
        output = await self.aligner.answer(request, headers)
        if not output.error or not is_needed:
            return output
        if output.is_permanent:
            message = f"words cannot be timed: {output.error}. {_SEGMENT_TIMES}"
            raise ApiError(502, message, code="aligner_refuses", is_final=True)
        raise _no_words(output.error)

    def _options(self, form: Form) -> TranscribeOptions:
        """Return the options of the form, with this server's defaults.

        Raises ApiError for options of a beam search without one.
        """
        options = replace(form.options, max_clip_s=self.max_clip_s)
        try:
            options = options.with_defaults(self.defaults)
        except ValueError as error:
            param, _, _ = str(error).partition(" ")
            raise ApiError(400, str(error), param=param) from error
        return options.sanitized(self.protocol.control_tokens)

    async def _diarize(self, request: DiarizationRequest) -> DiarizationOutput:
        assert self.diarizer is not None  # checked by load_speakers
        return await diarization.ask(self.diarizer, request)

    def _steps(self, form: Form, options: TranscribeOptions) -> tuple[Steps[Transcript], bool]:
        """Decode the recording and split it into clips. Runs in the pool.

        Also returns whether the clips are in the order of the text.
        """
        warnings = [SEARCHED_WHOLE] if form.stream and options.beams else []
        load = partial(self._load, form, warnings)
        if not form.wants_speakers:
            loaded = load(self.decoders.load_audio)
        else:
            has_diarizer = self.diarizer is not None
            loaded = diarization.load_speakers(form, load, self.decoders, has_diarizer=has_diarizer)
        if is_call := isinstance(loaded, list):
            names = form.known_speaker_names or SPEAKERS
            transcription = transcribe_channels(loaded, names, options, self.protocol)
        else:
            options = self._with_speakers(form, options)
            transcription = transcribe(loaded, options, self.protocol)
        return Steps(with_warnings(transcription, warnings)), not is_call

    def _with_speakers(self, form: Form, options: TranscribeOptions) -> TranscribeOptions:
        """Return the options with the form's speakers, whose voices are decoded."""
        known = diarization.known_speakers(form, self.decoders)
        counts: dict[str, Any] = form.speaker_counts
        return replace(options, diarize=form.wants_speakers, known_speakers=known, **counts)

    def _load(
        self, form: Form, warnings: list[str], load: Callable[..., Any], *options: Any
    ) -> Any:
        """Decode the file with ``load``. Raises ApiError if that fails."""
        return load_posted(
            form.file,
            form._reservation,
            longest_s=self.admission.max_audio_s,
            load=load,
            options=options,
            audio_track=form.audio_track,
            on_warning=warnings.append,
        )


_SEGMENT_TIMES = "Timestamps of segments need no aligner."
NO_ALIGNER = (
    "timestamp_granularities=word: words are timed by a forced aligner, and this server has none. "
    "Start it with: qwen3-asr serve MODEL --aligner Qwen/Qwen3-ForcedAligner-0.6B; or set "
    f"QWEN3_ASR_ALIGNER_URL to the address of one. {_SEGMENT_TIMES}"
)


def _no_words(reason: str) -> ApiError:
    return ApiError(
        503,
        f"words cannot be timed now: {reason}. Retry later, or leave out "
        "timestamp_granularities=word.",
        param="timestamp_granularities",
        code="aligner_unavailable",
        retry_after_s=RETRY_AFTER_S,
    )


# the response -------------------------------------------------------------------------------


@with_cancellation
@load_aware_call
async def create_transcription(
    raw_request: Request, form: Annotated[Form, Depends(read_form)]
) -> Response:
    """Transcribe a recording."""
    transcriber = server_state(raw_request.app).transcriber
    assert transcriber is not None  # checked by read_form
    with engine_dead_as_503():  # the engine may be dead before the first request
        run = await transcriber.start(form, raw_request)
    if form.stream:
        return StreamingResponse(
            events(run, form, raw_request),
            media_type="text/event-stream",
            headers=form.headers,
        )
    async for _ in run.deltas():
        pass
    transcript = run.steps.result
    if transcript.duration <= transcriber.max_clip_s:
        return respond(transcript, form)
    # Four hours of subtitles take half a second, which would block the event loop.
    response: Response = await run.in_pool(respond, transcript, form)
    return response
