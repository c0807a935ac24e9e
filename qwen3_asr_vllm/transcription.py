# SPDX-License-Identifier: Apache-2.0
"""One recording from waveform to transcript, without an engine.

    transcribe(waveform)  -- yields -->  [EngineRequest, ...]
                          <-- is sent --  [EngineOutput, ...]  in the same order
                          -- returns -->  Transcript

A generator decides what to ask and what to make of the answers; whoever drives it owns the
engine. Offline, HTTP and WebSocket drive the same one, so they decide alike.

When a sentence is said is estimated from its share of the text and the pauses of its clip.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

import numpy as np

from .audio import is_silent, quiet_frames, split_at_silence
from .decoding import DEFAULT_CLIP_S, max_new_tokens
from .geometry import HOP_LENGTH, SAMPLE_RATE
from .languages import resolve_language, separator
from .prompt import ParsedOutput, build_prompt, parse_output
from .transcript import Segment, Transcript, display_width, split_sentences

_PAUSE_SHARE = 0.2  # of the text that belongs to a frame of speech, what a quiet one is given
_NEAR_S = 1.0  # a pause that is this far from where it is expected counts half
_MARGIN_FRAMES = 10  # of quiet on either side of speech that count as speech: it fades


@dataclass(frozen=True, eq=False)
class EngineRequest:
    """One clip for the engine to decode, greedily."""

    prompt: str
    waveform: np.ndarray  # the clip: shape (samples,), float32, 16 kHz
    max_tokens: int
    clip_index: int  # in the recording, from 0; silent clips count
    start: float  # seconds into the recording


@dataclass(frozen=True)
class EngineOutput:
    """What the engine wrote for one request."""

    text: str
    finish_reason: str | None = None  # vLLM's: "stop", or "length" where the budget ran out


Transcription: TypeAlias = Generator[list[EngineRequest], list[EngineOutput], Transcript]


def transcribe(
    waveform: np.ndarray,
    *,
    language: str | None = None,
    context: str = "",
    max_clip_s: float = DEFAULT_CLIP_S,
) -> Transcription:
    """Transcribe one recording: yields requests, is sent their outputs, returns a Transcript.

    ``language`` is a name or code, None to let the model tell each clip's own. ``context`` biases
    every clip. A silent clip is not sent, and has no segments, as any in which nobody speaks. A
    recording of silence yields nothing.

    Raises ValueError on the first step for an unknown language or a bad ``max_clip_s``.
    """
    language = resolve_language(language)
    clips = split_at_silence(waveform, max_clip_s=max_clip_s)
    requests = _requests(waveform, clips, build_prompt(context=context, language=language))
    outputs = (yield requests) if requests else []
    text = ""
    segments: list[Segment] = []
    for request, output in zip(requests, outputs, strict=True):
        parsed = parse_output(output.text, language=language)
        seam = separator(text, parsed.text)
        segments += _segments(request, seam, parsed)
        text += seam + parsed.text
    return Transcript(
        text=text,
        duration=len(waveform) / SAMPLE_RATE,
        segments=tuple(segments),
        warnings=tuple(_warnings(requests, outputs)),
    )


class Steps:
    """A transcription as what it asks now: ``requests``, until there is a ``transcript``."""

    def __init__(self, transcription: Transcription) -> None:
        self._transcription = transcription
        self.send(None)

    def send(self, outputs: list[EngineOutput] | None) -> None:
        try:
            # A generator that has not begun takes None, whatever its send type says.
            self.requests = self._transcription.send(outputs)  # type: ignore[arg-type]
        except StopIteration as stop:
            self.requests = []
            self.transcript: Transcript = stop.value


def run_together(
    transcriptions: Sequence[Transcription],
    generate: Callable[[list[EngineRequest]], list[EngineOutput]],
) -> list[Transcript]:
    """Drive many recordings at once; each round is one call with all their pending requests."""
    recordings = list(map(Steps, transcriptions))
    while pending := [steps for steps in recordings if steps.requests]:
        answers = iter(generate([request for steps in pending for request in steps.requests]))
        for steps in pending:
            steps.send(list(islice(answers, len(steps.requests))))
    return [steps.transcript for steps in recordings]


def _requests(
    waveform: np.ndarray, clips: list[tuple[int, int]], prompt: str
) -> list[EngineRequest]:
    """One request for each clip in which there is anything to hear."""
    return [
        EngineRequest(
            prompt=prompt,
            waveform=waveform[start:end],
            max_tokens=max_new_tokens((end - start) / SAMPLE_RATE),
            clip_index=index,
            start=start / SAMPLE_RATE,
        )
        for index, (start, end) in enumerate(clips)
        if not is_silent(waveform[start:end])
    ]


def _segments(request: EngineRequest, seam: str, parsed: ParsedOutput) -> Iterator[Segment]:
    """The sentences of a clip; ``seam`` is what stands between it and the text before."""
    sentences = split_sentences(parsed.text)
    spans = _spans(request.waveform, [max(1, display_width(sentence)) for sentence in sentences])
    offset = round(request.start * SAMPLE_RATE)
    for sentence, (start, end) in zip(sentences, spans, strict=True):
        yield Segment(
            start=(offset + start) / SAMPLE_RATE,
            end=(offset + end) / SAMPLE_RATE,
            text=seam + sentence,
            language=parsed.language,
        )
        seam = ""


def _spans(clip: np.ndarray, widths: list[int]) -> list[tuple[float, float]]:
    """When each part of a clip's text is said: (start, end) in samples, in order, none empty.

    A part takes the share of the speech that its width, above 0, has in all widths; then each cut
    moves to a pause, where there is one before the middles of the parts on its sides. Estimates:
    nothing here knows the words.
    """
    if not widths:
        return []
    quiet, edges = _speech(clip)
    said = np.cumsum([0, *np.where(quiet, _PAUSE_SHARE, 1)])
    shares = np.cumsum([0, *widths]) / sum(widths)
    cuts = np.interp(shares * said[-1], said, edges).tolist()
    middles = np.interp((shares[1:] + shares[:-1]) / 2 * said[-1], said, edges).tolist()
    pauses = edges[np.flatnonzero(np.diff(quiet, prepend=False, append=False))].reshape(-1, 2)
    snapped = [
        _snap(cut, pauses.clip(low, high))
        for cut, low, high in zip(cuts[1:-1], middles[:-1], middles[1:], strict=True)
    ]
    starts = [cuts[0], *(end for _, end in snapped)]
    ends = [*(start for start, _ in snapped), cuts[-1]]
    return list(zip(starts, ends, strict=True))


def _speech(clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frames from the first to the last that is not quiet: (is quiet, edges in samples)."""
    if len(clip) < HOP_LENGTH:
        return np.ones(1, bool), np.array([0, len(clip)])
    quiet = quiet_frames(clip)
    edges = HOP_LENGTH * np.arange(len(quiet) + 1)
    edges[-1] = len(clip)
    heard = np.flatnonzero(~quiet)
    if heard.size:
        frames = slice(max(heard[0] - _MARGIN_FRAMES, 0), heard[-1] + 1 + _MARGIN_FRAMES)
        quiet, edges = quiet[frames], edges[frames.start : frames.stop + 1]
    return quiet, edges


def _snap(cut: float, pauses: np.ndarray) -> tuple[float, float]:
    """Where speech ends and where it goes on: around a wide pause near the cut, or at the cut.

    ``pauses``, (number, 2) in samples, reach no farther than the cut may move.
    """
    pauses = np.vstack([(cut, cut), pauses])
    starts, ends = pauses.T
    distances = np.maximum(np.maximum(starts - cut, cut - ends), 0)
    start, end = pauses[np.argmax((ends - starts) / (_NEAR_S * SAMPLE_RATE + distances))].tolist()
    margin, middle = _MARGIN_FRAMES * HOP_LENGTH, (start + end) / 2
    return min(start + margin, middle), max(end - margin, middle)


def _warnings(requests: Sequence[EngineRequest], outputs: Sequence[EngineOutput]) -> Iterator[str]:
    for request, output in zip(requests, outputs, strict=True):
        if output.finish_reason == "length":
            end = request.start + len(request.waveform) / SAMPLE_RATE
            yield (
                f"{request.start:.1f}-{end:.1f} s: decoding stopped at the token limit; "
                "the text of this clip may be cut off or repeated."
            )
