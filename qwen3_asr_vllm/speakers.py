# SPDX-License-Identifier: Apache-2.0
"""Speakers: who spoke each word and each segment, from the turns that a diarizer found.

    turns [(start, end, speaker)] + sentences, with or without words -> segments with speakers

A word belongs to the speaker whose turns cover most of it, and a sentence to the speaker of most of
its words. A sentence is cut only where another speaker speaks for a second or more, so a stray
word tears none. Speech outside of all turns has no speaker. ``other_speakers`` are those who speak
at the same time. Where words have no times, these are estimated from the widths of the words.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, count, groupby, pairwise
from string import ascii_uppercase
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .languages import display_width
from .transcript import Segment, Word

MIN_TURN_S = 1.0  # seconds that another speaker speaks at least where a sentence is cut
OVERLAP_SHARE = 0.5  # of a word that each of two speakers covers where speech overlaps
MAX_SPEAKER_NAME = 200  # characters; every segment repeats a name
_IDEOGRAPH = "[\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff]"
_WORD = re.compile(rf"\s*(?:{_IDEOGRAPH}[^\w\s]*|(?:(?!{_IDEOGRAPH})\S)+)")

Label: TypeAlias = str | int  # a name, or the number of a voice without one


@dataclass(frozen=True, eq=False)
class DiarizationRequest:
    """A whole recording for the diarizer, and what is known of its speakers."""

    waveform: np.ndarray  # shape (samples,), float32, 16 kHz
    num_speakers: int | None = None
    min_speakers: int | None = None
    max_speakers: int | None = None
    known_speakers: Mapping[str, np.ndarray] = field(default_factory=dict)  # waveforms by name

    @property
    def bounds(self) -> dict[str, int]:
        """Return the bounds on the number of speakers that are set."""
        bounds = {"min_speakers": self.min_speakers, "max_speakers": self.max_speakers}
        return {name: bound for name, bound in bounds.items() if bound is not None}


class SpeakerTurn(NamedTuple):
    """A stretch of one speaker, in seconds."""

    start: float
    end: float
    speaker: Label


@dataclass(frozen=True)
class DiarizationOutput:
    """The turns of a recording; ``error`` says why there are none."""

    turns: Sequence[SpeakerTurn] = ()
    error: str = ""


def read_turns(turns: Iterable[Any], duration: float) -> list[SpeakerTurn]:
    """Return the turns of a diarizer, in order and inside a recording of ``duration`` seconds.

    Raises ValueError for a turn that is not (start, end, speaker): finite seconds, and a name of
    up to 200 characters or a whole number.
    """
    inside = (
        SpeakerTurn(max(0.0, start), min(duration, end), speaker)
        for start, end, speaker in map(_read_turn, turns)
    )
    return sorted((turn for turn in inside if turn.start < turn.end), key=lambda turn: turn[:2])


def _read_turn(turn: Any) -> SpeakerTurn:
    try:
        start, end, speaker = turn
        is_name = isinstance(speaker, str)
        read = SpeakerTurn(
            float(start), float(end), str(speaker) if is_name else speaker.__index__()
        )
    except (TypeError, ValueError, AttributeError):
        read = SpeakerTurn(math.nan, 0.0, "")
        is_name = True
    is_named = not is_name or 0 < len(str(read.speaker).strip()) <= MAX_SPEAKER_NAME
    if not (is_named and math.isfinite(read.start) and math.isfinite(read.end)):
        raise ValueError(
            f"the diarizer returned {repr(turn)[:200]} as a turn; a turn is (start, end, speaker), "
            f"of finite seconds and a name of 1 to {MAX_SPEAKER_NAME} characters or a whole number."
        )
    return read


class Speakers:
    """The speakers of one recording and when each speaks.

    Voices without a name are named A, B, C in the order of their first words.
    """

    def __init__(self, turns: Sequence[SpeakerTurn] = ()) -> None:
        labels = dict.fromkeys(turn.speaker for turn in turns)
        self._spans = {
            label: _merged(turn[:2] for turn in turns if turn.speaker == label) for label in labels
        }
        self._names: dict[Label, str] = {label: label for label in labels if isinstance(label, str)}

    def __bool__(self) -> bool:
        return bool(self._spans)

    def seconds(self, start: float, end: float) -> dict[Label, float]:
        """Return how long each speaker speaks between two times, if at all."""
        seconds = {label: _covered(spans, start, end) for label, spans in self._spans.items()}
        return {label: time for label, time in seconds.items() if time > 0}

    def nearest_edges(
        self, left: Label | None, right: Label | None, at: float
    ) -> tuple[float, float]:
        """Return when one speaker ends and the next starts, near an estimated time."""
        starts = (start for start, _ in self._spans.get(right, ()))  # type: ignore[arg-type]
        ends = (end for _, end in self._spans.get(left, ()))  # type: ignore[arg-type]
        start = _nearest(starts, at)
        return min(_nearest(ends, at), start), start

    def name(self, label: Label | None) -> str | None:
        """Return the name of a speaker; a voice without one gets the next letter."""
        if label is not None and label not in self._names:
            used = set(self._names.values())
            self._names[label] = next(name for name in _letters() if name not in used)
        return None if label is None else self._names[label]


def _nearest(times: Iterable[float], at: float) -> float:
    """Return the time that is nearest to ``at``, or ``at`` where all are far from it."""
    near = (time for time in times if abs(time - at) < MIN_TURN_S)
    return min(near, key=lambda time: abs(time - at), default=at)


def _letters() -> Iterator[str]:
    """Yield A to Z, then A1 to Z1, and so on."""
    return (f"{letter}{number or ''}" for number in count() for letter in ascii_uppercase)


def _merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Merge spans that overlap; they come and are returned in order of their starts."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            start, end = merged[-1][0], max(end, merged.pop()[1])
        merged.append((start, end))
    return merged


def _covered(spans: Sequence[tuple[float, float]], start: float, end: float) -> float:
    """Return how many seconds between two times lie in the spans."""
    first = max(bisect_right(spans, (start, math.inf)) - 1, 0)
    last = bisect_right(spans, (end, math.inf))
    return sum(max(0.0, min(end, high) - max(start, low)) for low, high in spans[first:last])


# words -> runs of one speaker -----------------------------------------------------------------


class _Run(NamedTuple):
    """Words in a row that one speaker speaks, by their indices; None: no known speaker."""

    label: Label | None
    first: int
    end: int
    seconds: float  # from the start of the first word to the end of the last


def cut_at_speakers(segment: Segment, speakers: Speakers) -> Iterator[Segment]:
    """Cut a sentence where its speaker changes; the texts of the segments, joined, are its text."""
    words = segment.words or _estimated_words(segment)
    if not (speakers and words):
        yield segment
        return
    seconds = [speakers.seconds(word.start, word.end) for word in words]
    runs = _runs(words, seconds)
    spans = _spans(segment, [words[run.first : run.end] for run in runs])
    if not segment.words:
        spans = _at_turns(spans, runs, speakers)
    for run, (start, end) in zip(runs, spans, strict=True):
        spoken = tuple(
            _attributed(words[i], seconds[i], run.label, speakers)
            for i in range(run.first, run.end)
        )
        yield replace(
            segment,
            start=start,
            end=end,
            text="".join(word.word for word in spoken),
            words=spoken if segment.words else None,
            speaker=spoken[0].speaker,
            other_speakers=_union(word.other_speakers or () for word in spoken),
        )


def _attributed(
    word: Word, seconds: dict[Label, float], label: Label | None, speakers: Speakers
) -> Word:
    name = speakers.name(label)
    others = tuple(filter(None, map(speakers.name, _overlapping(word, seconds, label))))
    return replace(word, speaker=name, other_speakers=others or None)


def _spans(segment: Segment, runs: Sequence[Sequence[Word]]) -> list[tuple[float, float]]:
    """Return the time of each run; all together last as long as the segment."""
    starts = [segment.start, *(run[0].start for run in runs[1:])]
    ends = [*(run[-1].end for run in runs[:-1]), segment.end]
    return list(zip(starts, ends, strict=True))


def _at_turns(
    spans: Sequence[tuple[float, float]], runs: Sequence[_Run], speakers: Speakers
) -> list[tuple[float, float]]:
    """Move estimated cuts to the turns near them, in order."""
    times = [spans[0][0]]
    for (left, right), (start, _) in zip(pairwise(runs), spans[1:], strict=True):
        times += speakers.nearest_edges(left.label, right.label, start)
    times = [min(time, spans[-1][1]) for time in accumulate([*times, spans[-1][1]], max)]
    return list(zip(times[::2], times[1::2], strict=True))


def _estimated_words(segment: Segment) -> list[Word]:
    """Split the text of a segment, and divide its time by the widths of the words."""
    texts = _WORD.findall(segment.text)
    if texts:
        texts[-1] += segment.text[sum(map(len, texts)) :]
    edges = list(accumulate((max(1, display_width(text)) for text in texts), initial=0))
    length = (segment.end - segment.start) / max(1, edges[-1])
    times = pairwise(segment.start + length * edge for edge in edges)
    return [Word(text, *span) for text, span in zip(texts, times, strict=True)]


def _overlapping(word: Word, seconds: dict[Label, float], label: Label | None) -> list[Label]:
    """Return the other speakers of a word where two or more speak at once."""
    least = OVERLAP_SHARE * (word.end - word.start)
    covering = [other for other, time in seconds.items() if time >= least]
    return [other for other in covering if other != label] if len(covering) > 1 else []


def _runs(words: Sequence[Word], seconds: Sequence[dict[Label, float]]) -> list[_Run]:
    """Return the runs of a sentence, none of which is a stray word.

    If no speaker speaks long enough in a row, the sentence belongs to the one of most of it.
    """
    labels = _labels(seconds)
    runs = [_run(words, label, indices) for label, indices in _grouped(labels)]
    if max(run.seconds for run in runs) < MIN_TURN_S:
        return [_run(words, _majority(runs), range(len(words)))]
    while (stray := _shortest_stray(runs)) is not None:
        runs = _absorbed(runs, stray, words)
    return runs


def _labels(seconds: Sequence[dict[Label, float]]) -> list[Label | None]:
    """Return the speaker of each word; of two who speak alike, the one of the word before."""
    labels: list[Label | None] = []
    for found in seconds:
        before = labels[-1] if labels else None
        labels.append(max(found, key=lambda x: (found[x], x == before)) if found else None)
    return labels


def _grouped(labels: Sequence[Label | None]) -> Iterator[tuple[Label | None, range]]:
    """Yield each label with the indices where it stands in a row."""
    for label, group in groupby(range(len(labels)), key=labels.__getitem__):
        indices = list(group)
        yield label, range(indices[0], indices[-1] + 1)


def _run(words: Sequence[Word], label: Label | None, indices: range) -> _Run:
    first, end = indices.start, indices.stop
    return _Run(label, first, end, words[end - 1].end - words[first].start)


def _majority(runs: Sequence[_Run]) -> Label | None:
    """Return the speaker who speaks longest; None only if all are unknown."""
    seconds: dict[Label | None, float] = {}
    for run in runs:
        seconds[run.label] = seconds.get(run.label, 0.0) + run.seconds
    return max(seconds, key=lambda label: (label is not None, seconds[label]))


def _shortest_stray(runs: Sequence[_Run]) -> int | None:
    """Return the index of the shortest run that is too short for a cut; None if all are long."""
    strays = [i for i, run in enumerate(runs) if run.seconds < MIN_TURN_S]
    return min(strays, key=lambda i: runs[i].seconds) if strays and len(runs) > 1 else None


def _absorbed(runs: Sequence[_Run], index: int, words: Sequence[Word]) -> list[_Run]:
    """Give a run to the longer of the runs beside it, a known speaker's first; merge them."""
    beside = [*runs[max(0, index - 1) : index], *runs[index + 1 : index + 2]]
    label = max(beside, key=lambda run: (run.label is not None, run.seconds)).label
    labels: list[Label | None] = []
    for i, run in enumerate(runs):
        labels += [label if i == index else run.label] * (run.end - run.first)
    return [_run(words, label, indices) for label, indices in _grouped(labels)]


def _union(groups: Iterable[Sequence[str]]) -> tuple[str, ...] | None:
    """Return all names once, in order; None if there are none."""
    return tuple(dict.fromkeys(name for group in groups for name in group)) or None
