# SPDX-License-Identifier: Apache-2.0
"""One recording from waveform to transcript, without an engine.

    transcribe(waveform)  -- yields -->  [EngineRequest, ...]
                          <-- is sent --  [EngineOutput, ...]  in the same order
                          -- returns -->  Transcript

A generator decides what to ask and what to make of the answers; whoever drives it owns the
engine. Offline, HTTP and WebSocket drive the same one, so they decide alike.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeAlias

import numpy as np

from .audio import is_silent, split_at_silence
from .decoding import DEFAULT_CLIP_S, max_new_tokens
from .geometry import SAMPLE_RATE
from .languages import resolve_language
from .prompt import build_prompt, parse_output
from .transcript import Segment, Transcript, join_texts


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
    every clip. A silent clip is not sent: its segment is empty and has no language. A recording
    of silence yields nothing.

    Raises ValueError on the first step for an unknown language or a bad ``max_clip_s``.
    """
    language = resolve_language(language)
    clips = split_at_silence(waveform, max_clip_s=max_clip_s)
    requests = _requests(waveform, clips, build_prompt(context=context, language=language))
    outputs = (yield requests) if requests else []
    output_by_clip = dict(zip((r.clip_index for r in requests), outputs, strict=True))
    segments = tuple(
        _segment(start, end, output_by_clip.get(index), language)
        for index, (start, end) in enumerate(clips)
    )
    return Transcript(
        text=join_texts(segment.text for segment in segments),
        duration=len(waveform) / SAMPLE_RATE,
        segments=segments,
        warnings=tuple(_warnings(segments, output_by_clip)),
    )


def run_together(
    transcriptions: Sequence[Transcription],
    generate: Callable[[list[EngineRequest]], list[EngineOutput]],
) -> list[Transcript]:
    """Drive many recordings at once; each round is one call with all their pending requests."""
    transcripts: dict[int, Transcript] = {}
    inbox: dict[int, list[EngineOutput] | None] = dict.fromkeys(range(len(transcriptions)))
    while inbox:
        pending: dict[int, list[EngineRequest]] = {}
        for index, outputs in inbox.items():
            try:
                # A generator that has not begun takes None, whatever its send type says.
                pending[index] = transcriptions[index].send(outputs)  # type: ignore[arg-type]
            except StopIteration as stop:
                transcripts[index] = stop.value
        batch = list(chain.from_iterable(pending.values()))
        answers = iter(generate(batch) if batch else [])
        inbox = {index: list(islice(answers, len(asked))) for index, asked in pending.items()}
    return [transcripts[index] for index in range(len(transcriptions))]


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


def _segment(start: int, end: int, output: EngineOutput | None, language: str | None) -> Segment:
    """The segment of the clip between two samples; ``output`` is None where it is silent."""
    if output is None:
        return Segment(start=start / SAMPLE_RATE, end=end / SAMPLE_RATE, text="")
    parsed = parse_output(output.text, language=language)
    return Segment(
        start=start / SAMPLE_RATE,
        end=end / SAMPLE_RATE,
        text=parsed.text,
        language=parsed.language,
    )


def _warnings(
    segments: Sequence[Segment], output_by_clip: dict[int, EngineOutput]
) -> Generator[str, None, None]:
    for index, output in output_by_clip.items():
        if output.finish_reason == "length":
            segment = segments[index]
            yield (
                f"{segment.start:.1f}-{segment.end:.1f} s: decoding stopped at the token limit; "
                "the text of this clip may be cut off or repeated."
            )
