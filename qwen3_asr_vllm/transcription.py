# SPDX-License-Identifier: Apache-2.0
"""Transcription of one recording, from waveform to transcript, without an engine.

    transcribe(waveform)  -- yields -->  [EngineRequest, ...]
                          <-- is sent --  [EngineOutput, ...]  in the same order
                          -- returns -->  Transcript

A generator decides what to request and how to use the outputs; its caller owns the engine.
Offline and HTTP drive the same generator, so they decide alike. Most recordings take one round. A
clip whose output loops, or is in no candidate language, is decoded again in the next round.

The times of sentences are estimated from their share of the text and the pauses of the clip. For
word times, a last round consists of the requests and outputs of ``alignment.py``, for the
aligner's engine. For speakers, the first round has a request of ``speakers.py`` with the whole
recording, so a diarizer runs while the engine decodes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np

from .alignment import align_words, shifted
from .decoding import (
    LOOP_PENALTY,
    Decoding,
    is_leak,
    is_loop,
    language_probability,
    likeliest_language,
    max_new_tokens,
    mean_logprob,
    place_tokens,
    settled_length,
    word_probabilities,
)
from .geometry import DEFAULT_CLIP_S, SAMPLE_RATE
from .languages import ALIGNER_LANGUAGES, Languages, display_width, separator
from .options import Beams, TranscribeOptions
from .pauses import (
    halve_at_silence,
    is_silent,
    split_at_pauses,
    split_at_silence,
)
from .prompt import (
    MAX_CONTEXT,
    NO_CONTEXT,
    PUBLISHED,
    ParsedOutput,
    TextProtocol,
    build_prompt,
    cap_context,
    parse_output,
)
from .rounds import Rounds, Transcription, run_rounds
from .segments import sentence_spans, split_sentences, timed_segments, with_leading_space
from .speakers import DiarizationRequest, Speakers, cut_at_speakers
from .transcript import Segment, Token, Transcript, Word
from .units import AlignmentError, cut_warnings

_DEFAULTS = TranscribeOptions()
_SHORTEST_CUT_S = 2.0  # seconds; a shorter clip is not split in halves

# Faults of an output, as warnings name them.
OTHER_LANGUAGE = "the language is none of the candidates."
NO_SPEECH = "the audio is not silent, but the model found no speech in it."
LEAK = "the output only repeated the context and was discarded."
LOOP = "a repetition loop was stopped; the repeated text is given three times."
NO_SPEAKERS = "speakers are unknown: {}."
CUT_OFF = "decoding stopped at the token limit; the text of this clip may be cut off or repeated."


@dataclass(frozen=True, eq=False)
class EngineRequest:
    """One clip for the engine to decode."""

    waveform: np.ndarray  # the clip: shape (samples,), float32, 16 kHz
    clip_index: int  # index of the clip, from 0; silent clips count, and halves share an index
    start: float  # seconds into the recording
    decoding: Decoding
    context: str = ""
    language: str | None = None  # forced language; "None" after an output without speech
    candidates: tuple[str, ...] = ()  # languages that the model may name
    text: str = ""  # start of the output: text that a stream has sent
    protocol: TextProtocol = PUBLISHED

    @property
    def prompt(self) -> str:
        return build_prompt(
            context=self.context,
            language=self.language,
            text=self.text,
            protocol=self.protocol,
        )


@dataclass(frozen=True)
class EngineOutput:
    """The engine's output for one request.

    ``tokens`` and ``language_logprobs`` exist where the request's ``decoding`` asks for them: all
    tokens, and the log-probabilities of languages, by the first token of their names, at the token
    that names the language.
    """

    text: str
    finish_reason: str | None = None  # vLLM's: "stop", "length" for the budget, "repetition"
    shown: str = ""  # the start of the text, which a stream has sent
    tokens: tuple[Token, ...] | None = None
    language_logprobs: Mapping[str, float] = field(default_factory=dict)


def transcribe(
    waveform: np.ndarray,
    options: TranscribeOptions = _DEFAULTS,
    protocol: TextProtocol = PUBLISHED,
) -> Transcription:
    """Transcribe one recording: yields requests, is sent their outputs, returns a Transcript.

    A silent clip is not decoded and, like any clip without speech, has no segments; a recording
    of silence yields nothing. The words of a segment, joined, are its text. ``audio_track`` has no
    effect: the waveform is decoded already.

    Raises ValueError on the first step for an unknown language.
    """
    resolve = protocol.languages.resolve
    language = resolve(options.language)
    candidates = tuple(dict.fromkeys(filter(None, map(resolve, options.languages))))
    context = options.full_context
    kept = cap_context(context) if protocol.with_context else ""
    ask = _Ask(
        waveform=waveform,
        language=language or (candidates[0] if len(candidates) == 1 else None),
        candidates=candidates if len(candidates) > 1 and not language else (),
        context=kept,
        wants_logprobs=options.confidences,
        beams=options.beams,
        protocol=replace(protocol, keeps_special_tokens=not options.skip_special_tokens),
    )
    rounds: list[Rounds[Any]] = [_diarize(waveform, options)]
    rounds += [_decode_clip(ask, *clip) for clip in enumerate(_clips(waveform, options))]
    (speakers, faults), *decoded = yield from run_rounds(rounds)
    cut = [_cut_context(context, kept) if kept else NO_CONTEXT] if kept != context else []
    parts = [part for parts in decoded for part in parts]
    if options.word_timestamps:
        parts = yield from run_rounds(list(map(_time_words, parts)))
    return _join(parts, waveform, [*cut, *faults], protocol.languages, speakers)


def _diarize(
    waveform: np.ndarray, options: TranscribeOptions
) -> Rounds[tuple[Speakers, Sequence[str]]]:
    """Ask the diarizer for the speakers of a recording; returns them, and warnings."""
    if not options.diarize or is_silent(waveform):
        return Speakers(), ()
    request = DiarizationRequest(
        waveform=waveform,
        num_speakers=options.num_speakers,
        min_speakers=options.min_speakers,
        max_speakers=options.max_speakers,
        known_speakers=options.known_speakers,
    )
    (output,) = yield [request]
    fault = output.error or ("" if output.turns else "the diarizer found no speech")
    return Speakers(output.turns), (NO_SPEAKERS.format(fault),) if fault else ()


def _clips(waveform: np.ndarray, options: TranscribeOptions) -> list[tuple[int, int]]:
    """Return the clips of a recording: start and end of each, in samples."""
    max_clip_s = DEFAULT_CLIP_S if options.max_clip_s is None else options.max_clip_s
    if options.pauses:
        return split_at_pauses(waveform, options.pauses, max_clip_s=max_clip_s)
    return split_at_silence(waveform, max_clip_s=max_clip_s)


def transcribe_channels(
    channels: Sequence[np.ndarray],
    speakers: Sequence[str],
    options: TranscribeOptions,
    protocol: TextProtocol = PUBLISHED,
) -> Transcription:
    """Transcribe a recording with one channel per speaker.

    Segments and text are in order of the segments' starts.
    """
    transcripts = yield from run_rounds(
        [transcribe(channel, options, protocol) for channel in channels]
    )
    spoken = [
        replace(segment, speaker=speaker)
        for speaker, transcript in zip(speakers, transcripts, strict=True)
        for segment in transcript.segments
    ]
    text = ""
    segments: list[Segment] = []
    for segment in sorted(spoken, key=lambda segment: segment.start):
        opened = with_leading_space(segment, seam=separator(text, segment.text.strip()))
        segments.append(opened)
        text += opened.text
    return Transcript(
        text=text,
        duration=max(transcript.duration for transcript in transcripts),
        segments=tuple(segments),
        warnings=tuple(
            f"{speaker}: {warning}"
            for speaker, transcript in zip(speakers, transcripts, strict=True)
            for warning in transcript.warnings
            if warning != NO_SPEECH or not text
        ),
        loops=sum(transcript.loops for transcript in transcripts),
        known=protocol.languages,
    )


# requests and retries -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Part:
    """The result of a clip, or of a half: the accepted text, and the model's confidence."""

    request: EngineRequest
    parsed: ParsedOutput
    tokens: Sequence[tuple[int, Token]] | None  # each with the index of its first character
    language_probability: float | None
    no_speech_prob: float | None
    warnings: tuple[str, ...]
    loops: int = 0
    words: tuple[Word, ...] = ()  # times in seconds into the recording


@dataclass(frozen=True, eq=False)
class _Ask:
    """Options that all requests of a recording share, and those of this attempt."""

    waveform: np.ndarray
    language: str | None
    candidates: tuple[str, ...]
    context: str
    wants_logprobs: bool
    protocol: TextProtocol
    beams: Beams | None = None
    is_half: bool = False
    is_last: bool = False
    # kept from the attempt before: text that was sent, and the model's view of the clip
    text: str = ""
    tokens: tuple[Token, ...] = ()
    language_probability: float | None = None
    language_logprobs: Mapping[str, float] = field(default_factory=dict)

    def request(self, index: int, span: tuple[int, int]) -> EngineRequest:
        start, end = span
        names = ("None", *self.candidates) if self.language is None else ()
        return EngineRequest(
            waveform=self.waveform[start:end],
            clip_index=index,
            start=start / SAMPLE_RATE,
            decoding=Decoding(
                max_tokens=max_new_tokens((end - start) / SAMPLE_RATE),
                repetition_penalty=LOOP_PENALTY if self.is_last else 1.0,
                wants_logprobs=self.wants_logprobs,
                scored_languages=names if self.wants_logprobs or self.candidates else (),
                beams=None if self.is_last else self.beams,  # a search knows no such penalty
                special_tokens=self.protocol.special_tokens,
            ),
            context=self.context,
            language=self.language,
            candidates=self.candidates,
            text=self.text,
            protocol=self.protocol,
        )

    def read(self, output: EngineOutput) -> ParsedOutput:
        raw = self.text + output.text
        parsed = parse_output(raw, language=self.language, protocol=self.protocol)
        text = parsed.text if parsed.text.startswith(self.text) else self.text
        language = None if parsed.language == "None" else parsed.language
        return replace(parsed, language=language, text=text)

    def place(self, tokens: Sequence[Token], text: str) -> list[tuple[int, Token]]:
        return place_tokens(tokens, text, language=self.language, protocol=self.protocol)

    def part(
        self, request: EngineRequest, parsed: ParsedOutput, output: EngineOutput, warning: str = ""
    ) -> _Part:
        """Accept an output: ``parsed``, with the confidences of its tokens."""
        tokens = None if output.tokens is None else self.tokens + output.tokens
        named = language_probability(output.tokens or (), self.protocol)
        no_speech = (self.language_logprobs or output.language_logprobs).get("None")
        return _Part(
            request=request,
            parsed=parsed,
            tokens=None if tokens is None else self.place(tokens, parsed.text),
            language_probability=self.language_probability if named is None else named,
            no_speech_prob=None if no_speech is None else math.exp(no_speech),
            warnings=(_warn(request, warning),) if warning else (),
        )


def _decode_clip(ask: _Ask, index: int, span: tuple[int, int]) -> Rounds[list[_Part]]:
    """Decode one clip until an output is accepted. Silence is not decoded."""
    if is_silent(ask.waveform[slice(*span)]):
        return []
    request = ask.request(index, span)
    (output,) = yield [request]
    parsed = ask.read(output)
    fault = fault_of(request, parsed, output.finish_reason)
    if fault is None:
        warning = CUT_OFF if output.finish_reason == "length" else ""
        return [ask.part(request, parsed, output, warning)]
    if fault is LEAK:
        return [ask.part(request, replace(parsed, text=""), output, LEAK)]
    if fault is OTHER_LANGUAGE:
        return (yield from _decode_clip(_force_candidate(ask, output), index, span))
    if ask.is_last:
        length = max(settled_length(parsed.text), len(ask.text))
        part = ask.part(request, replace(parsed, text=parsed.text[:length]), output, LOOP)
        return [replace(part, loops=1)]
    parts = yield from _retry_clip(ask, index, span, parsed, output)
    return [replace(part, loops=part.loops + (part is parts[0])) for part in parts]


def _time_words(part: _Part) -> Rounds[_Part]:
    """Ask the aligner for the words of a part, if it knows the language."""
    language = part.parsed.language
    if not part.parsed.text:
        return part
    if language is not None and language not in ALIGNER_LANGUAGES:
        return _without_words(part, f"the forced aligner does not know {language}")
    sentences = split_sentences(part.parsed.text)
    try:
        words = yield from align_words(part.request.waveform, sentences, language)
    except (AlignmentError, ImportError) as error:
        return _without_words(part, str(error))
    cuts = (_warn(part.request, warning) for warning in cut_warnings(part.parsed.text, language))
    return replace(
        part,
        words=tuple(shifted(words, part.request.start)),
        warnings=(*part.warnings, *cuts),
    )


def _without_words(part: _Part, reason: str) -> _Part:
    warning = _warn(part.request, f"no words are timed: {reason}.")
    return replace(part, warnings=(*part.warnings, warning))


def _force_candidate(ask: _Ask, output: EngineOutput) -> _Ask:
    """Force the likeliest candidate, by the probability of the first token of its name."""
    name = likeliest_language(ask.candidates, output.language_logprobs)
    logprob = output.language_logprobs.get(name)
    probability = None if logprob is None else math.exp(logprob)
    return replace(
        ask,
        language=name,
        candidates=(),
        language_probability=probability,
        language_logprobs=output.language_logprobs,
    )


def _retry_clip(
    ask: _Ask, index: int, span: tuple[int, int], parsed: ParsedOutput, output: EngineOutput
) -> Rounds[list[_Part]]:
    """Decode a clip that looped again: in halves, or with a repetition penalty.

    Text that a stream has sent is kept: decoding continues after it.
    """
    start, end = span
    if output.shown:
        placed = ask.place(output.tokens or (), output.shown)
        ask = replace(
            ask,
            language=parsed.language or "None",
            candidates=(),
            text=output.shown,
            tokens=tuple(token for _, token in placed),
            language_probability=language_probability(output.tokens or (), ask.protocol),
            language_logprobs=output.language_logprobs,
        )
    elif not ask.is_half and end - start >= _SHORTEST_CUT_S * SAMPLE_RATE:
        middle = start + halve_at_silence(ask.waveform[start:end])
        halves = [(start, middle), (middle, end)]
        ask = replace(ask, is_half=True)
        decoded = yield from run_rounds([_decode_clip(ask, index, half) for half in halves])
        return [part for parts in decoded for part in parts]
    return (yield from _decode_clip(replace(ask, is_last=True), index, span))


def fault_of(request: EngineRequest, parsed: ParsedOutput, finish_reason: str | None) -> str | None:
    """Return the fault of an output; None if it is accepted."""
    if parsed.text and not are_candidates(parsed.languages, request.candidates):
        return OTHER_LANGUAGE
    if not request.text and is_leak(parsed.text, request.context):
        return LEAK
    return LOOP if is_loop(parsed.text, finish_reason) else None


def are_candidates(languages: tuple[str, ...], candidates: tuple[str, ...]) -> bool:
    return not candidates or set(languages) <= set(candidates)


def _warn(request: EngineRequest, message: str) -> str:
    end = request.start + len(request.waveform) / SAMPLE_RATE
    return f"{request.start:.1f}-{end:.1f} s: {message}"


def _cut_context(context: str, kept: str) -> str:
    return (
        f"context: the last {len(context) - len(kept)} of {len(context)} characters were left "
        f"out, from {context[len(kept) :].strip()[:20]!r}; give at most {MAX_CONTEXT}."
    )


# the transcript -----------------------------------------------------------------------------


def _join(
    parts: Sequence[_Part],
    waveform: np.ndarray,
    warnings: Sequence[str],
    known: Languages,
    speakers: Speakers,
) -> Transcript:
    text = ""
    segments: list[Segment] = []
    for part in parts:
        seam = separator(text, part.parsed.text)
        segments += _segments(part, seam, speakers)
        text += seam + part.parsed.text
    warnings = (*warnings, *(warning for part in parts for warning in part.warnings))
    if not (text or warnings or is_silent(waveform)):
        warnings = (NO_SPEECH,)
    return Transcript(
        text=text,
        duration=len(waveform) / SAMPLE_RATE,
        segments=tuple(segments),
        warnings=warnings,
        loops=sum(part.loops for part in parts),
        known=known,
    )


def _segments(part: _Part, seam: str, speakers: Speakers) -> Iterator[Segment]:
    """Yield the sentences of a clip, cut where the speaker changes; ``seam`` comes before it."""
    at = 0
    sentences = (cut_at_speakers(sentence, speakers) for sentence in _timed_segments(part))
    for segment in chain.from_iterable(sentences):
        place = range(at, end := at + len(segment.text))
        tokens = tuple(token for begin, token in part.tokens or () if begin in place)
        yield replace(
            segment if at else with_leading_space(segment, seam),
            language_probability=part.language_probability,
            no_speech_prob=part.no_speech_prob,
            avg_logprob=mean_logprob(tokens),
            tokens=None if part.tokens is None else tokens,
            other_languages=part.parsed.other_languages or None,
        )
        at = end


def _timed_segments(part: _Part) -> Iterator[Segment]:
    """Yield the sentences of a clip with their times: those of their words, or estimates."""
    sentences = split_sentences(part.parsed.text)
    if part.words:
        yield from timed_segments(sentences, _scored_words(part), part.parsed.language)
        return
    widths = [max(1, display_width(sentence)) for sentence in sentences]
    spans = sentence_spans(part.request.waveform, widths)
    offset = round(part.request.start * SAMPLE_RATE)
    for sentence, (start, end) in zip(sentences, spans, strict=True):
        yield Segment(
            start=(offset + start) / SAMPLE_RATE,
            end=(offset + end) / SAMPLE_RATE,
            text=sentence,
            language=part.parsed.language,
        )


def _scored_words(part: _Part) -> Sequence[Word]:
    """Return the words of a clip, with their probabilities if they were requested."""
    if part.tokens is None:
        return part.words
    texts = [word.word for word in part.words]
    probabilities = word_probabilities(texts, part.tokens)
    return [
        replace(word, probability=probability)
        for word, probability in zip(part.words, probabilities, strict=True)
    ]
