# SPDX-License-Identifier: Apache-2.0
"""How many words get the wrong speaker, and what does that cost?

    python benchmarks/diarization.py --diarizer support.voices:diarize --minutes 10

Two to four voices of the synthesizer talk in turns that are known: sentences, single words, and
sentences that overlap. espeak-ng must be installed. For each dialogue the table shows

* wrong: percent of the synthesizer's words that get another speaker than their own. Their texts
  and times are exact, so these are the errors of the library and of this package;
* exact turns: the same with the synthesizer's own turns: the errors of this package alone;
* DER: the diarization error rate of the library's turns, and of those that the words then have,
  where pyannote.metrics is installed. No collar; overlaps count;
* RTF: seconds of the diarizer per second of audio.

With ``--model``, the engine transcribes each dialogue. A word of the transcript is compared with
the voice that speaks in its middle: with word times (timed), and without an aligner (cut).
The last line is one JSON object.
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
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_asr_vllm.speakers import Speakers, cut_at_speakers, read_turns
from qwen3_asr_vllm.transcript import Segment, Transcript, Word

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "checkpoints")]

RATE = 16_000
VOICES = ("en-us+anika", "en-us+Andy", "en-us+linda", "en-us+zac")  # not in training, but anika
WORDS = ("Yes.", "No.", "Thank you.", "Good morning.")
PAUSE_S = 0.35  # between turns


@dataclass(frozen=True)
class Dialogue:
    """A recording, its turns (start, end, voice), and the sentences of the turns, with words."""

    name: str
    waveform: np.ndarray
    turns: list[tuple[float, float, str]]
    sentences: list[Segment]


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
    sentences: list[Segment] = []
    at, voice = 0.2, voices[-1]
    while at < seconds:
        voice = rng.choice([other for other in voices if other != voice])
        is_word = rng.random() < words
        text = rng.choice(WORDS) if is_word else grammar.sentence("English", rng)
        samples16, _, words_at = speech.espeak()(text, voice, rate=165, pitch=50)
        spoken = samples16.astype(np.float32) / 32_768
        loud = np.flatnonzero(np.abs(spoken) > 0.01)
        spoken = spoken[loud[0] : loud[-1] + 1]
        if turns and not is_word and rng.random() < overlap:
            at = max(turns[-1][1] - 0.8, 0.0)
        start = round(at * RATE)
        samples[start : start + len(spoken)] += spoken
        end = at + len(spoken) / RATE
        turns.append((at, end, voice))
        sentences.append(sentence(text, words_at, at - loud[0] / RATE, end))
        at = max(end, turns[-1][1]) + PAUSE_S
    length = round((max(end for _, end, _ in turns) + 0.3) * RATE)
    return Dialogue(name, np.clip(samples[:length], -1, 1), turns, sentences)


def sentence(
    text: str, words_at: Sequence[tuple[int, float]], offset_s: float, end: float
) -> Segment:
    """A segment of the synthesizer's words: the first character and start of each."""
    firsts = [first for first, _ in words_at[1:]]
    texts = [text[a:b] for a, b in pairwise([0, *firsts, len(text)])]
    times = [min(start + offset_s, end) for _, start in words_at] + [end]
    words = tuple(Word(t, *span) for t, span in zip(texts, pairwise(times), strict=True))
    return Segment(words[0].start, end, text, words=words)


def attributed(spoken: Dialogue, turns: Sequence[Any]) -> Transcript:
    """The synthesizer's words with the speakers of these turns, as a transcript has them."""
    speakers = Speakers(read_turns(turns, len(spoken.waveform) / RATE))
    cut = [part for each in spoken.sentences for part in cut_at_speakers(each, speakers)]
    return Transcript("", len(spoken.waveform) / RATE, tuple(cut))


def own_voices(spoken: Dialogue) -> list[set[str]]:
    """The voice of each word of the synthesizer."""
    pairs = zip(spoken.sentences, spoken.turns, strict=True)
    return [{voice} for each, (_, _, voice) in pairs for _ in each.words or ()]


def voice_at(turns: Sequence[tuple[float, float, str]], time_s: float) -> set[str]:
    """The voices that speak at a time, or the nearest one in a pause."""
    speaking = {voice for start, end, voice in turns if start <= time_s <= end}
    nearest = min(turns, key=lambda t: max(t[0] - time_s, time_s - t[1], 0.0))
    return speaking or {nearest[2]}


def share_wrong(speakers: Sequence[str | None], voices: Sequence[set[str]]) -> float:
    """Percent of words whose speaker is not their voice, with the best matching of names."""
    names = sorted({name for name in speakers if name is not None})
    known = sorted(set().union(*voices))
    padded = known + [""] * max(0, len(names) - len(known))
    right = max(
        sum(
            dict(zip(names, order, strict=True)).get(name) in spoken
            for name, spoken in zip(speakers, voices, strict=True)
        )
        for order in permutations(padded, len(names))
    )
    return 100 * (1 - right / max(1, len(voices)))


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


def measure(diarizer: Any, spoken: Dialogue) -> tuple[dict[str, Any], list[Any]]:
    """Diarize a dialogue; returns its row, and the turns."""
    seconds = len(spoken.waveform) / RATE
    number = len({voice for *_, voice in spoken.turns})
    started = time.perf_counter()
    turns = list(diarizer(spoken.waveform, number))
    took_s = time.perf_counter() - started
    voices = own_voices(spoken)

    def wrong(found: Sequence[Any]) -> float:
        return share_wrong([word.speaker for word in attributed(spoken, found).words], voices)

    row = {
        "dialogue": spoken.name,
        "seconds": round(seconds),
        "turns": len(spoken.turns),
        "words": len(voices),
        "wrong": wrong(turns),
        "exact turns": wrong(spoken.turns),
        "DER library": error_rate(spoken.turns, turns),
        "DER words": error_rate(spoken.turns, spoken_turns(attributed(spoken, turns))),
        "RTF": took_s / seconds,
    }
    return row, turns


def transcribed(model: Any, spoken: Dialogue, turns: Sequence[Any]) -> dict[str, float]:
    """Percent of the transcript's words with a wrong speaker, with and without word times."""
    use(model, lambda waveform: turns)
    wrong = {}
    for name, words in (("timed", True), ("cut", False)):
        options = {"diarize": True, "word_timestamps": words, "max_clip_s": 12}
        found = words_of(model.transcribe(spoken.waveform, **options))
        voices = [voice_at(spoken.turns, middle) for _, middle in found]
        wrong[name] = share_wrong([speaker for speaker, _ in found], voices)
    return wrong


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
    parser.add_argument("--model", help="checkpoint that transcribes; default: none")
    parser.add_argument("--aligner", default=str(ROOT / "tests/checkpoints/aligner"))
    parser.add_argument("--diarizer", default="support.voices:diarize")
    parser.add_argument("--minutes", type=float, default=10, help="of the longest dialogue")
    args = parser.parse_args()
    spoken = dialogues(args.minutes)
    from qwen3_asr_vllm import Qwen3ASR, load_diarizer

    diarizer = load_diarizer(args.diarizer)
    diarizer(spoken[0].waveform[: 4 * RATE], 1)  # warm
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    results = [measure(diarizer, each) for each in spoken]
    if args.model:
        options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048}
        model = Qwen3ASR(args.model, aligner=args.aligner, diarizer=diarizer, **options)
        for (row, turns), each in zip(results, spoken, strict=True):
            row |= transcribed(model, each, turns)
    rows = [row for row, _ in results]
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    print(json.dumps({"diarizer": args.diarizer, "diarizer_mib": memory, "rows": rows}))


if __name__ == "__main__":
    main()
