# SPDX-License-Identifier: Apache-2.0
"""How many words get the wrong speaker, and what does that cost?

    python benchmarks/diarization.py --diarizer support.voices:diarize --minutes 10

Two to four voices of the synthesizer talk in turns that are known: sentences, single words, and
sentences that overlap. espeak-ng must be installed. For each dialogue the table shows

* wrong, timed: percent of the words with another speaker than the synthesizer's, with word times;
* wrong, cut: the same without an aligner;
* exact turns: the same with word times and the synthesizer's own turns, which the package adds;
* DER: the diarization error rate of the library's turns, and of the turns that the transcript has
  in its words, where pyannote.metrics is installed. No collar; overlaps count.

A word of the transcript is compared with the voice that speaks in its middle. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "checkpoints")]

RATE = 16_000
VOICES = ("en-us+anika", "en-us+Andy", "en-us+linda", "en-us+zac")  # not in training, but anika
WORDS = ("Yes.", "No.", "Thank you.", "Good morning.")
PAUSE_S = 0.35  # between turns


@dataclass(frozen=True)
class Dialogue:
    """A recording, and its turns: (start, end, voice)."""

    name: str
    waveform: np.ndarray
    turns: list[tuple[float, float, str]]


def dialogue(
    name: str, num_voices: int, seconds: float, *, words: float, overlap: float
) -> Dialogue:
    """Speak sentences in turn; ``words`` and ``overlap`` are shares of the turns."""
    import grammar
    import speech

    rng = random.Random(name)
    voices = VOICES[:num_voices]
    samples = np.zeros(round((seconds + 20) * RATE), np.float32)
    turns: list[tuple[float, float, str]] = []
    at, voice = 0.2, voices[-1]
    while at < seconds:
        voice = rng.choice([other for other in voices if other != voice])
        is_word = rng.random() < words
        text = rng.choice(WORDS) if is_word else grammar.sentence("English", rng)
        spoken = speech.espeak()(text, voice, rate=165, pitch=50)[0].astype(np.float32) / 32_768
        loud = np.flatnonzero(np.abs(spoken) > 0.01)
        spoken = spoken[loud[0] : loud[-1] + 1]
        if turns and not is_word and rng.random() < overlap:
            at = max(turns[-1][1] - 0.8, 0.0)
        start = round(at * RATE)
        samples[start : start + len(spoken)] += spoken
        end = at + len(spoken) / RATE
        turns.append((at, end, voice))
        at = max(end, turns[-1][1]) + PAUSE_S
    length = round((max(end for _, end, _ in turns) + 0.3) * RATE)
    return Dialogue(name, np.clip(samples[:length], -1, 1), turns)


def voice_at(turns: Sequence[tuple[float, float, str]], time_s: float) -> set[str]:
    """The voices that speak at a time, or the nearest one in a pause."""
    speaking = {voice for start, end, voice in turns if start <= time_s <= end}
    nearest = min(turns, key=lambda t: max(t[0] - time_s, time_s - t[1], 0.0))
    return speaking or {nearest[2]}


def share_wrong(transcript: Any, turns: Sequence[tuple[float, float, str]]) -> float:
    """Percent of words that have another speaker than the best matching of names allows."""
    found = [(speaker, voice_at(turns, middle)) for speaker, middle in words_of(transcript)]
    names = sorted({name for name, _ in found if name is not None})
    voices = sorted({voice for _, _, voice in turns})
    padded = voices + [""] * max(0, len(names) - len(voices))
    right = max(
        sum(dict(zip(names, order, strict=True)).get(name) in spoken for name, spoken in found)
        for order in permutations(padded, len(names))
    )
    return 100 * (1 - right / max(1, len(found)))


def words_of(transcript: Any) -> list[tuple[str | None, float]]:
    """Each word's speaker, and the time of its middle; estimated where words have no times."""
    found = []
    for segment in transcript.segments:
        if segment.words:
            found += [(w.speaker, (w.start + w.end) / 2) for w in segment.words]
            continue
        count = len(segment.text.split())
        step = (segment.end - segment.start) / max(1, count)
        found += [(segment.speaker, segment.start + (i + 0.5) * step) for i in range(count)]
    return found


def error_rate(reference: Sequence[tuple[float, float, Any]], found: Sequence[Any]) -> float | None:
    """The diarization error rate in percent; None without pyannote.metrics."""
    try:
        from pyannote.core import Annotation, Segment
        from pyannote.metrics.diarization import DiarizationErrorRate
    except ImportError:
        return None

    def annotation(turns: Sequence[Any]) -> Any:
        made = Annotation()
        for number, (start, end, speaker) in enumerate(turns):
            made[Segment(start, end), number] = str(speaker)
        return made

    metric = DiarizationErrorRate(collar=0.0, skip_overlap=False)
    return 100 * metric(annotation(reference), annotation(found))


def spoken_turns(transcript: Any) -> list[tuple[float, float, str]]:
    """The turns that the words of a transcript show, gaps up to half a second closed."""
    turns: list[tuple[float, float, str]] = []
    for word in transcript.words:
        for speaker in filter(None, (word.speaker, *(word.other_speakers or ()))):
            last = next((i for i in range(len(turns))[::-1] if turns[i][2] == speaker), None)
            if last is not None and word.start - turns[last][1] < 0.5:
                turns[last] = (turns[last][0], word.end, speaker)
            else:
                turns.append((word.start, word.end, speaker))
    return turns


def measure(model: Any, diarizer: Any, spoken: Dialogue) -> dict[str, Any]:
    """Diarize and transcribe one dialogue in three ways."""
    seconds = len(spoken.waveform) / RATE
    number = len({voice for *_, voice in spoken.turns})
    started = time.perf_counter()
    turns = list(diarizer(spoken.waveform, number))
    diarized_s = time.perf_counter() - started

    def transcript(found: Sequence[Any], *, words: bool) -> Any:
        use(model, lambda waveform: found)
        return model.transcribe(spoken.waveform, diarize=True, word_timestamps=words, max_clip_s=12)

    started = time.perf_counter()
    timed = transcript(turns, words=True)
    decoded_s = time.perf_counter() - started
    return {
        "dialogue": spoken.name,
        "seconds": round(seconds),
        "turns": len(spoken.turns),
        "words": len(timed.words),
        "wrong, timed": share_wrong(timed, spoken.turns),
        "wrong, cut": share_wrong(transcript(turns, words=False), spoken.turns),
        "exact turns": share_wrong(transcript(spoken.turns, words=True), spoken.turns),
        "DER library": error_rate(spoken.turns, turns),
        "DER transcript": error_rate(spoken.turns, spoken_turns(timed)),
        "diarizer RTF": diarized_s / seconds,
        "decoding RTF": decoded_s / seconds,
    }


def use(model: Any, diarizer: Any) -> None:
    """Give a model another diarizer."""
    from qwen3_asr_vllm.diarizers import DiarizerThread

    model.diarizer, model._engine._diarizations = diarizer, DiarizerThread(diarizer)


def dialogues(minutes: float) -> list[Dialogue]:
    return [
        dialogue("two voices", 2, 60, words=0.0, overlap=0.0),
        dialogue("three voices", 3, 60, words=0.0, overlap=0.0),
        dialogue("four voices", 4, 60, words=0.0, overlap=0.0),
        dialogue("single words", 4, 60, words=0.4, overlap=0.0),
        dialogue("overlaps", 4, 60, words=0.0, overlap=0.3),
        dialogue(f"{minutes:g} min", 4, 60 * minutes, words=0.15, overlap=0.1),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "tests/checkpoints/asr"))
    parser.add_argument("--aligner", default=str(ROOT / "tests/checkpoints/aligner"))
    parser.add_argument("--diarizer", default="support.voices:diarize")
    parser.add_argument("--minutes", type=float, default=10)
    args = parser.parse_args()
    spoken = dialogues(args.minutes)
    from qwen3_asr_vllm import Qwen3ASR, load_diarizer

    diarizer = load_diarizer(args.diarizer)
    diarizer(spoken[0].waveform[: 4 * RATE], 1)  # warm
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 16}
    model = Qwen3ASR(args.model, aligner=args.aligner, diarizer=diarizer, **options)
    rows = [measure(model, diarizer, each) for each in spoken]
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    print(json.dumps({"diarizer": args.diarizer, "diarizer_mib": memory, "rows": rows}))


if __name__ == "__main__":
    main()
