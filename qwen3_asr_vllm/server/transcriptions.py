# SPDX-License-Identifier: Apache-2.0
"""HTTP routes that vLLM's API server takes from this plugin, in the place of its own.

    form -> waveform -> transcribe() asks, the engine answers, clip by clip -> json, srt, events

``form.py`` reads the form; ``transcription.py`` decides what to ask the engine and what to make of
its answers. Here are only the engine, and what is sent back.
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
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
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
from ..engine import engine_prompt, language_token_ids, sampling_params
from ..media.blocks import ChannelError
from ..pauses import SILENT_PEAK
from ..prompt import control_tokens
from ..rounds import Steps, with_warnings
from ..transcript import Transcript
from ..transcription import EngineRequest, transcribe, transcribe_channels
from . import page
from .admission import RETRY_AFTER_S
from .aligner_client import remote_aligner
from .errors import ApiError, engine_dead_as_503
from .form import Form, read_form
from .metrics import count_transcript, observe_decoding
from .responses import events, respond
from .run import Run
from .serving import AudioServing
from .settings import setting
from .state import server_state
from .uploads import load_posted

if TYPE_CHECKING:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.outputs import RequestOutput

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints

RECORDINGS_PER_TOKEN = 16  # in the server, for each token more that an event of a stream has
MOST_TOKENS = 16  # of an event
OF_THE_ENGINE = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")  # not clients'
CLIP_SHARE = 8  # one recording has at most max_num_seqs / 8 clips in the engine


# the engine ---------------------------------------------------------------------------------


class Transcriber(AudioServing):
    """The state of the route."""

    def __init__(
        self, engine_client: Any, models: OpenAIServingModels, *, max_clip_s: float
    ) -> None:
        super().__init__(engine_client, models)
        self.max_clip_s = max_clip_s
        self.sampling_defaults = self.model_config.get_diff_sampling_param()
        scheduler = engine_client.vllm_config.scheduler_config
        self.max_parallel_clips = max(1, scheduler.max_num_seqs // CLIP_SHARE)
        tokenizer = self.renderer.get_tokenizer()
        self.language_token_ids = language_token_ids(tokenizer)
        self.control_tokens = control_tokens(tokenizer)
        self.aligner = remote_aligner()
        self.has_priorities = scheduler.policy == "priority"
        # Only logits processors that an operator installed read what is in vllm_xargs.
        self.reads_xargs = bool(
            self.model_config.logits_processors or entry_points(group=LOGITSPROCS_GROUP)
        )

    def about(self, args: Namespace) -> page.About:
        """What this server takes; ``args`` are vLLM's."""
        return page.About(
            models=tuple(model.name for model in self.models.base_model_paths),
            decodes=decodable_formats(),
            decoders=decoders(),
            max_upload_mb=setting("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB"),
            max_duration_s=setting("VLLM_MAX_AUDIO_DECODE_DURATION_S"),
            max_clip_s=self.max_clip_s,
            needs_key=any(args.api_key or [envs.VLLM_API_KEY]),
            words=self.aligner is not None,
        )

    async def start(self, form: Form, raw_request: Request) -> Run:
        """Raises what there is to refuse (the model, a value, the audio) before the answer."""
        await self.check(form)
        self._leave_out(form, raw_request)
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
        return Run(
            request_id=request_id,
            model=form.model or model,
            steps=steps,
            generate=generate,
            align=partial(self._align, is_needed=form.needs_words, headers=trace_headers),
            language_token_ids=self.language_token_ids,
            in_pool=self.in_pool,
            parallel_clips=asyncio.Semaphore(self.max_parallel_clips),
            on_end=partial(count_transcript, model=model, started=started, request_id=request_id),
            is_live=form.stream,
        )

    def _leave_out(self, form: Form, raw_request: Request) -> None:
        """Leave out, and name, what this server's engine does not read."""
        asked = {
            "priority": "priority" in form.model_fields_set,
            PRIORITY_HEADER: PRIORITY_HEADER in raw_request.headers,
        }
        if not self.has_priorities:
            form._ignored += [name for name, is_given in asked.items() if is_given]
        xargs = form.vllm_xargs or {}
        read = {x: xargs[x] for x in xargs if self.reads_xargs and x not in OF_THE_ENGINE}
        form._ignored += [f"vllm_xargs.{name}" for name in xargs if name not in read]
        form.vllm_xargs = read or None

    def _tokens_per_event(self) -> int:
        """How many an event of a new stream holds: more in a full server, for an event costs this
        process the same whatever it holds. Its first text waits for as many."""
        return min(1 + self.admission.num_recordings // RECORDINGS_PER_TOKEN, MOST_TOKENS)

    async def _generate(
        self, request: EngineRequest, *, request_id: str, params: SamplingParams, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        params = sampling_params(request.decoding, self.language_token_ids, params)
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
        options = replace(
            form.options, max_clip_s=self.max_clip_s, word_timestamps=times_words
        ).sanitized(self.control_tokens)
        warnings: list[str] = []
        if form.speakers:
            channels = self._load(form, warnings, self.decoders.load_channels, len(form.speakers))
            _check_channels(channels)
            transcription = transcribe_channels(channels, form.speakers, options)
        else:
            waveform = self._load(form, warnings, self.decoders.load_audio)
            transcription = transcribe(waveform, options)
        return Steps(with_warnings(transcription, warnings))

    def _load(
        self, form: Form, warnings: list[str], load: Callable[..., Any], *options: Any
    ) -> Any:
        """What a loader makes of the file; raises ApiError for what it cannot."""
        longest_s = self.admission.max_audio_s
        try:
            return load_posted(
                form.file,
                form._reservation,
                longest_s=longest_s,
                load=load,
                options=options,
                audio_track=form.audio_track,
                on_warning=warnings.append,
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


# the answer ---------------------------------------------------------------------------------


@with_cancellation
@load_aware_call
async def create_transcription(
    raw_request: Request, form: Annotated[Form, Depends(read_form)]
) -> Response:
    """Transcribe a recording."""
    transcriber = server_state(raw_request.app).transcriber
    assert transcriber is not None  # checked by read_form
    with engine_dead_as_503():  # before the first request reaches it, too
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
    # The subtitles of four hours take half a second, in which nobody else would be heard.
    response: Response = await run.in_pool(respond, transcript, form)
    return response
