# SPDX-License-Identifier: Apache-2.0
"""Transcribe recordings in this process, through ``vllm.LLM``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from .alignment import AlignmentOutput, AlignmentRequest, align
from .audio import AudioSource, load_audio
from .batch_engine import BatchEngine
from .batching import Batcher
from .chat_template import load_protocol
from .checks import check_number, check_string
from .diarizers import Diarizer, check_diarizer, load_diarizer
from .engine import (
    ALIGNER_KV_CACHE_BYTES,
    UTILIZATION,
    class_ms,
    engine_prompt,
    gpu_bytes,
    load_engine,
    raising_engine_died,
    read_times,
    split_memory,
    stream_parts,
)
from .generation import generation_defaults
from .geometry import MAX_CLIP_S, SAMPLE_RATE
from .languages import Languages, checkpoint_languages
from .options import SPEAKER_COUNTS, TranscribeOptions, merge_options
from .prompt import sanitize_context
from .recordings import Loader, Progress, Recording, Result, is_one, only
from .rounds import Steps, Transcription, run_together, with_warnings
from .streaming import CLIP_S, MIN_STEP_S, STEP_S, Stream, Update
from .transcript import Transcript
from .transcription import transcribe

if TYPE_CHECKING:
    pass

SHARED = ("dtype", "enforce_eager", "seed")  # engine options that the aligner inherits


class Qwen3ASR:
    """A Qwen3-ASR checkpoint, loaded into a vLLM engine of this process.

        from qwen3_asr_vllm import Qwen3ASR

        if __name__ == "__main__":  # vLLM starts processes, which import this file again
            model = Qwen3ASR("Qwen/Qwen3-ASR-1.7B", gpu_memory_utilization=0.5)
            print(model.transcribe("talk.mp3").text)
            for result in model.transcribe(["a.wav", "b.m4a"], language="de"):
                print(result.source, result.error or result.transcript.text)

    ``engine_options`` are those of ``vllm.LLM``. By default, ``max_model_len`` is the longest
    that fits into memory, a CPU engine compiles nothing, and the host caches no audio, since no
    clip is sent twice. ``llm`` is the engine, for all other features of vLLM.

    ``aligner`` times words: a ``ForcedAligner``, or the name of a checkpoint such as
    Qwen/Qwen3-ForcedAligner-0.6B, which then shares the GPU's memory with the model.

    ``diarizer`` finds speakers, in a thread beside the engine: a function, or what
    ``load_diarizer`` loads, such as pyannote/speaker-diarization-community-1.

    ``languages`` declares those that a fine-tune knows beyond the published 30 and beyond its
    config: ``{"he": "Hebrew"}``, or "he=Hebrew,ur=Urdu" as in QWEN3_ASR_LANGUAGES. The attribute
    ``languages`` has all.

    Raises ImportError if vLLM or the diarizer's library is not installed, OSError for a diarizer
    that cannot be loaded, ValueError for invalid languages.
    """

    def __init__(
        self,
        model: str,
        *,
        aligner: str | ForcedAligner | None = None,
        diarizer: str | Diarizer | None = None,
        languages: str | Mapping[str, str] = "",
        **engine_options: Any,
    ) -> None:
        checkpoint_languages(declared=languages)  # raises before an engine is loaded
        self.diarizer = load_diarizer(diarizer) if isinstance(diarizer, str) else diarizer
        if isinstance(
            aligner, str
        ):  # before the model: each engine allocates its memory when it starts
            aligner_options = {n: engine_options[n] for n in SHARED if n in engine_options}
            if total := gpu_bytes():
                both = engine_options.get("gpu_memory_utilization", UTILIZATION)
                its_share, rest = split_memory(total, both)
                aligner_options["gpu_memory_utilization"] = its_share
                engine_options["gpu_memory_utilization"] = rest
            aligner = ForcedAligner(aligner, **aligner_options)
        self.aligner = aligner
        self.llm = load_engine(model, engine_options)
        self._defaults = generation_defaults(self.llm.model_config)
        self._protocol = load_protocol(
            self.llm.model_config, self.llm.get_tokenizer(), self.llm.chat_template, languages
        )
        self._engine = BatchEngine(self.llm, aligner, self.languages, self.diarizer)

    @property
    def languages(self) -> Languages:
        """The languages of the checkpoint: names by code."""
        return self._protocol.languages

    @overload
    def transcribe(  # type: ignore[overload-overlap]  # a path and bytes are iterables too
        self,
        audio: AudioSource | Recording,
        options: TranscribeOptions | None = None,
        *,
        in_order: bool = True,
        progress: Callable[[Progress], None] | None = None,
        **fields: Any,
    ) -> Transcript: ...

    @overload
    def transcribe(
        self,
        audio: Iterable[AudioSource | Recording],
        options: TranscribeOptions | None = None,
        *,
        in_order: bool = True,
        progress: Callable[[Progress], None] | None = None,
        **fields: Any,
    ) -> Iterator[Result]: ...

    def transcribe(
        self,
        audio: Any,
        options: TranscribeOptions | None = None,
        *,
        in_order: bool = True,
        progress: Callable[[Progress], None] | None = None,
        **fields: Any,
    ) -> Transcript | Iterator[Result]:
        """Transcribe one recording, or any number of them together, which is much faster.

        A recording is a path, an http(s) URL, bytes, a binary file, a waveform, or a pair of an
        array and its sampling rate. One gives its transcript:

        >>> transcript = model.transcribe("tests/data/hello.flac", language="en")
        >>> transcript.language, transcript.duration > 5
        ('English', True)

        Many, in a list or from an endless generator, give an iterator of results, each with a
        transcript or an error. Results are in the order of the recordings or, with
        ``in_order=False``, as they finish; ``index`` says which is which. Threads decode a few
        hours of audio ahead of the engine, which takes the longest recordings first.

        >>> for result in model.transcribe(["tests/data/hello.flac", "README.md"]):
        ...     print(result.source, result.error or result.transcript.language)
        tests/data/hello.flac English
        README.md README.md: not audio, or cut off: neither libsndfile nor FFmpeg can read it.

        ``options`` are ``TranscribeOptions``; its fields are keywords too, which override them.
        ``progress`` is called after every clip. The ``warnings`` of a transcript name each part
        of a file that could not be read.

        Raises at once TypeError for an unknown option and ValueError for an unknown language, a
        ``max_clip_s`` out of range, word times without an aligner, or speakers without a diarizer.
        For one recording, raises its ValueError or OSError, which names the file.
        """
        options = merge_options(options, fields).with_defaults(self._defaults)
        options = options.sanitized(self._protocol.control_tokens)
        if options.word_timestamps:
            self._require_aligner()
        if options.diarize:
            self._check_diarizer(options)
        begin = partial(transcribe, options=options, protocol=self._protocol)
        Steps(begin(np.zeros(SAMPLE_RATE, np.float32)))  # silence: raises for bad options only
        results = Batcher(
            [audio] if is_one(audio) else audio,
            self._engine,
            load=Loader(audio_track=options.audio_track),
            begin=begin,
            in_order=in_order,
            progress=progress,
        ).results()
        return only(results) if is_one(audio) else results

    def stream(
        self,
        samples: Iterable[np.ndarray],
        *,
        language: str | None = None,
        languages: Sequence[str] = (),
        context: str = "",
        skip_special_tokens: bool = True,
        step_s: float = STEP_S,
        clip_s: float = CLIP_S,
    ) -> Iterator[Update]:
        """Transcribe live speech: takes pieces of a waveform, yields text as it becomes final.

            for update in model.stream(microphone()):  # float32 at 16 kHz, arrays of any length
                print(update.delta, end="")

        The deltas, joined, are the text; ``tentative`` is text that may still change. Each
        ``step_s`` of new audio gives an update, and so does the end. After ``clip_s`` seconds the
        next pause begins a new clip, so that a stream may last for hours. Without ``language`` the
        model detects one, of ``languages`` if any are given. Without ``skip_special_tokens`` the
        text has the checkpoint's special tokens.

        Raises ValueError for an unknown language and for samples that are NaN or infinite.
        """
        check_number("clip_s", clip_s, MIN_STEP_S, MAX_CLIP_S)
        check_number("step_s", step_s, MIN_STEP_S, clip_s)
        check_string("context", context)
        context = sanitize_context(context, self._protocol.control_tokens)
        stream = self._stream(
            language=language,
            languages=languages,
            context=context,
            skip_special_tokens=skip_special_tokens,
            step_s=step_s,
            clip_s=clip_s,
        )
        for piece in samples:
            stream.push(np.asarray(piece, dtype=np.float32))
            yield from self._steps(stream)
        stream.finish()
        yield from self._steps(stream)
        yield stream.update()

    def _stream(self, **options: Any) -> Stream:
        thinker = self.llm.llm_engine.model_config.hf_config.thinker_config
        parts = stream_parts(thinker, self.llm.get_tokenizer(), self._protocol)
        return Stream(**parts, **options)

    def _steps(self, stream: Stream) -> Iterator[Update]:
        while request := stream.request():
            output = self._engine.answer(request)
            stream.accept(
                output.text, output.finish_reason, language_logprobs=output.language_logprobs
            )
            yield stream.update()

    @overload
    def align(self, audio: AudioSource, text: str, **options: Any) -> Transcript: ...

    @overload
    def align(
        self, audio: list[AudioSource], text: list[str], **options: Any
    ) -> list[Transcript]: ...

    def align(self, audio: Any, text: Any, **options: Any) -> Any:
        """Time the words of a text, with the arguments and result of ``ForcedAligner.align``."""
        return self._require_aligner().align(audio, text, **options)

    def _check_diarizer(self, options: TranscribeOptions) -> None:
        if self.diarizer is None:
            raise ValueError(
                "speakers need a diarizer, and this model has none; create it with "
                "diarizer='pyannote/speaker-diarization-community-1', or with a function."
            )
        counts = {name: getattr(options, name) for name in SPEAKER_COUNTS}
        check_diarizer(self.diarizer, counts, has_known=bool(options.known_speakers))

    def _require_aligner(self) -> ForcedAligner:
        if self.aligner is None:
            raise ValueError(
                "word times need a forced aligner, and this model has none; create it with "
                "aligner='Qwen/Qwen3-ForcedAligner-0.6B'."
            )
        return self.aligner


class ForcedAligner:
    """A Qwen3-ForcedAligner checkpoint, loaded into a vLLM engine of this process.

        from qwen3_asr_vllm import ForcedAligner

        if __name__ == "__main__":  # vLLM starts processes, which import this file again
            aligner = ForcedAligner("Qwen/Qwen3-ForcedAligner-0.6B")
            transcript = aligner.align("talk.mp3", "The spoken text.", language="English")
            for word in transcript.words:
                print(word.start, word.end, word.word)

    ``engine_options`` are those of ``vllm.LLM``; ``llm`` is the engine.

    Raises ImportError if vLLM is not installed, ValueError for a model that is no aligner.
    """

    def __init__(self, model: str, **engine_options: Any) -> None:
        options = {"limit_mm_per_prompt": {"audio": 1}} | engine_options
        self.llm = load_engine(model, options, cpu_kv_cache_bytes=ALIGNER_KV_CACHE_BYTES)
        self.class_ms = class_ms(self.llm.model_config)

    @overload
    def align(
        self,
        audio: AudioSource,
        text: str,
        *,
        language: str | None = None,
        audio_track: int | None = None,
        keep_lines: bool = False,
    ) -> Transcript: ...

    @overload
    def align(
        self,
        audio: list[AudioSource],
        text: list[str],
        *,
        language: str | None = None,
        audio_track: int | None = None,
        keep_lines: bool = False,
    ) -> list[Transcript]: ...

    def align(
        self,
        audio: AudioSource | list[AudioSource],
        text: str | list[str],
        *,
        language: str | None = None,
        audio_track: int | None = None,
        keep_lines: bool = False,
    ) -> Transcript | list[Transcript]:
        """Time the words of one text, or of many together, which is much faster.

        A recording is any source of ``load_audio``. ``language`` is a name or code; None detects
        Japanese and Korean by their script, and splits all other languages alike. The words,
        joined, are the text without surrounding white space. Segments are sentences or, with
        ``keep_lines``, the lines of the text, which subtitles then keep. The segments of an SRT,
        VTT or LRC text are its cues, with new times.

        Raises ValueError, before the engine runs, for a language that the aligner does not know
        and, naming the file, for a recording that cannot be read; OSError for a file that cannot
        be opened and for an engine that died; ImportError, which names the package to install,
        for Japanese without nagisa.
        """
        if isinstance(audio, list) != isinstance(text, list):
            raise TypeError("align() takes one recording and its text, or a list of each.")
        sources = audio if isinstance(audio, list) else [audio]
        texts = text if isinstance(text, list) else [text]
        if len(sources) != len(texts):
            raise ValueError(f"{len(sources)} recordings and {len(texts)} texts; give one for each")
        alignments = [
            _begin(source, spoken, audio_track, language=language, keep_lines=keep_lines)
            for source, spoken in zip(sources, texts, strict=True)
        ]
        transcripts = run_together(alignments, self.time_units)
        return transcripts if isinstance(audio, list) else transcripts[0]

    def time_units(self, requests: Sequence[AlignmentRequest]) -> list[AlignmentOutput]:
        """Return the outputs of the engine, in the order of the requests.

        The output of a rejected request, such as a prompt longer than the context, has an
        ``error``.
        """
        from vllm.exceptions import VLLMValidationError

        prompts = list(map(engine_prompt, requests))
        try:
            with raising_engine_died("aligner"):
                outputs = self.llm.encode(prompts, pooling_task="token_classify", use_tqdm=False)
        except (ValueError, VLLMValidationError) as error:
            if len(requests) == 1:
                return [AlignmentOutput((), error=str(error))]
            return [output for request in requests for output in self.time_units([request])]
        return [read_times(output, self.class_ms) for output in outputs]


def _begin(
    source: AudioSource, text: str, audio_track: int | None, **options: Any
) -> Transcription:
    """Start the alignment of one recording; unreadable parts of it become warnings."""
    warnings: list[str] = []
    waveform = load_audio(source, on_warning=warnings.append, audio_track=audio_track)
    return with_warnings(align(waveform, text, **options), warnings)
