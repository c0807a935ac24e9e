# SPDX-License-Identifier: Apache-2.0
"""Forced alignment: what was said is known, and the aligner says when.

    text -> units      what is timed: a word, or one Chinese character, without punctuation
    units -> prompt    <|audio_start|><|audio_pad|><|audio_end|>Guten<timestamp><timestamp>Tag...
    engine             the likeliest time, one of a class every 80 ms, at each <timestamp>
    times -> words     put in order, pile-ups asked about again, punctuation and spaces put back

    align(waveform, text)  -- yields -->  [AlignmentRequest, ...]
                           <-- is sent --  [AlignmentOutput, ...]  in the same order
                           -- returns -->  Transcript

No engine here: whoever drives the generator owns one. The prompt is bare: inside a chat template
every time comes out one class late.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import TypeAlias, TypeVar
from unicodedata import category

import numpy as np

from .geometry import MIN_SAMPLES, SAMPLE_RATE
from .languages import resolve_language
from .prompt import AUDIO_PLACEHOLDER
from .segments import split_sentences, timed_segments
from .transcript import Transcript, Word
from .units import AlignmentError, Unit, check_language, cut_warnings, units_of

TIMESTAMP = "<timestamp>"
CLASS_MS = 80.0  # from one time class to the next, unless the checkpoint says otherwise
MAX_WINDOW_S = 180  # of audio in one request; trained on 300, reliable to about 270

_FILL = 0.8  # of its share of the words, what a window of a long recording is asked for
_MARGIN_S = 5.0  # words that end this close to the end of such a window are asked for again
_PILE_UP = 4  # words at one instant: nobody speaks so fast, so the model lost its place
_SHORTEST_S = CLASS_MS / 1000  # what a word of no length is given
_LEAST_S = 0.002  # that a word lasts: it still does when its times are rounded to milliseconds
_MAX_ROUNDS = 4  # of asking again for words that piled up

Span: TypeAlias = tuple[float, float]  # start and end in seconds


@dataclass(frozen=True, eq=False)
class AlignmentRequest:
    """A stretch of audio and the units that are said in it, for the aligner's engine."""

    units: Sequence[str]
    waveform: np.ndarray  # shape (samples,), float32, 16 kHz

    @property
    def prompt(self) -> str:
        marked = "".join(f"{unit}{TIMESTAMP}{TIMESTAMP}" for unit in self.units)
        return AUDIO_PLACEHOLDER + marked


@dataclass(frozen=True)
class AlignmentOutput:
    """Start and end of each unit in turn, as the model says them, in milliseconds.

    ``error`` says why there are none: a distant aligner may be down, or, where ``is_permanent``,
    refuses and would again.
    """

    times: Sequence[float]
    error: str = ""
    is_permanent: bool = False


_Result = TypeVar("_Result")
_Rounds: TypeAlias = Generator[list[AlignmentRequest], list[AlignmentOutput], _Result]
Alignment: TypeAlias = _Rounds[Transcript]


def align(waveform: np.ndarray, text: str, *, language: str | None = None) -> Alignment:
    """When each word of a recording's text is said: a transcript whose segments have words.

    ``language`` is a name or code; None tells Japanese and Korean by their script, and all others
    are cut alike. Any length: requests hold at most 180 s. A text of punctuation alone has no
    words.

    Raises ValueError on the first step for a language that the aligner does not know; there too
    ImportError, which says what to install, where Japanese cannot be cut into words, and
    AlignmentError where the dictionary of Korean cannot be read. AlignmentError where the aligner
    does not answer, or not with two times a word.
    """
    if (language := resolve_language(language)) is not None:
        check_language(language)
    sentences = split_sentences(text.strip())
    words = yield from align_words(waveform, sentences, language)
    return Transcript(
        text="".join(sentences),
        duration=len(waveform) / SAMPLE_RATE,
        segments=tuple(timed_segments(sentences, words, language)),
        warnings=cut_warnings(text, language),
    )


def align_words(
    waveform: np.ndarray, sentences: Sequence[str], language: str | None
) -> _Rounds[list[Word]]:
    """When the words of sentences are said, with the spaces and the punctuation around them.

    Put together, they are the text. Each lasts longer than nothing, rounded to milliseconds too,
    begins where the one before ends or later, and lies inside the audio.
    """
    units = list(units_of(sentences, language))
    spans = yield from _spans(waveform, [unit.spoken for unit in units])
    return _words(sentences, units, spans)


# text -> units ------------------------------------------------------------------------------


# units -> times -----------------------------------------------------------------------------


def _spans(waveform: np.ndarray, units: list[str]) -> _Rounds[list[Span]]:
    """The time of each unit, in order, none empty; long audio goes by windows.

    Of a window that is not the last it is not known which words belong to it. So it is asked for
    fewer than its share, and the next begins where the last sure one ends.
    """
    spans: list[Span] = []
    start = 0  # of the window, in samples
    size = MAX_WINDOW_S * SAMPLE_RATE
    while len(waveform) - start > size and len(spans) < len(units):
        share = size / (len(waveform) - start)
        asked = units[len(spans) :][: max(1, int(share * _FILL * (len(units) - len(spans))))]
        request = AlignmentRequest(asked, waveform[start : start + size])
        (output,) = yield [request]
        if sure := _sure(_read(output, request)):
            sure = yield from _set_apart(sure, request)
            spans += _shifted(sure, start / SAMPLE_RATE)
            start = round(spans[-1][1] * SAMPLE_RATE)
        else:  # nothing of it is said here
            start += size // 2
    if rest := units[len(spans) :]:
        start = max(0, min(start, len(waveform) - MIN_SAMPLES))  # words may outlast the audio
        request = AlignmentRequest(rest, waveform[start:])
        (output,) = yield [request]
        last = yield from _set_apart(_read(output, request), request)
        told = spans[-1][1] if spans else 0.0
        spans += [
            (max(told, begin), max(told, end)) for begin, end in _shifted(last, start / SAMPLE_RATE)
        ]
    duration = len(waveform) / SAMPLE_RATE
    return _lasting(_spread(spans, duration), duration)


def _set_apart(spans: list[Span], request: AlignmentRequest) -> _Rounds[list[Span]]:
    """The times of the first units of a request, asked about again where they pile up."""
    duration = len(request.waveform) / SAMPLE_RATE
    tried: set[tuple[int, int]] = set()
    for _ in range(_MAX_ROUNDS):
        piles = [pile for pile in _piles(spans, duration) if pile[:2] not in tried]
        if not piles:
            break
        tried |= {pile[:2] for pile in piles}
        requests = [_part(request, *pile) for pile in piles]
        outputs = yield requests
        for (first, end, low, _), part, output in zip(piles, requests, outputs, strict=True):
            again = _read(output, part)
            if sum(map(_is_empty, again)) < end - first:
                spans[first:end] = _shifted(again, low)
    return spans


def _part(
    request: AlignmentRequest, first: int, end: int, low: float, high: float
) -> AlignmentRequest:
    """Some of the units, in the audio between two times."""
    samples = slice(round(low * SAMPLE_RATE), round(high * SAMPLE_RATE))
    return AlignmentRequest(request.units[first:end], request.waveform[samples])


def _read(output: AlignmentOutput, request: AlignmentRequest) -> list[Span]:
    """Times in order and inside the audio."""
    if output.error:
        raise AlignmentError(output.error)
    if len(output.times) != 2 * len(request.units):
        raise AlignmentError(
            f"the aligner gave {len(output.times)} times for {len(request.units)} words, not two "
            f"each; use the tokenizer that came with the checkpoint: {TIMESTAMP} is one token"
        )
    duration = len(request.waveform) / SAMPLE_RATE
    times = [min(time / 1000, duration) for time in repair(output.times)]
    return list(zip(times[::2], times[1::2], strict=True))


def repair(times: Sequence[float]) -> list[int]:
    """Times made to never fall, by moving as few as possible; in whole milliseconds.

    Kept is the longest subsequence that does not fall, of several the one that qwen-asr keeps. One
    or two others between kept times go to the nearer, the left of equals; more are interpolated.
    """
    kept = _longest_rising(times)
    repaired = list(times)
    for left, right in pairwise([-1, *kept, len(times)]):
        low = times[left] if left >= 0 else times[right] if right < len(times) else 0
        high = times[right] if right < len(times) else low
        count = right - left - 1
        step = (high - low) / (count + 1)
        for i in range(1, count + 1):
            if count > 2:
                repaired[left + i] = low + step * i
            else:
                repaired[left + i] = low if i <= count + 1 - i else high
    return [int(time) for time in repaired]


def _longest_rising(values: Sequence[float]) -> list[int]:
    """Indices of the longest subsequence that does not fall: O(n log n).

    Of several, that whose last element comes first, then the one before it, and so on.
    """
    tails: list[float] = []  # the least value at which a subsequence of each length ends
    ends: list[list[int]] = []  # all indices at which the longest one there has that length
    negated: list[list[float]] = []  # their values, which fall, negated
    parents: list[int] = []
    for index, value in enumerate(values):
        level = bisect_right(tails, value)
        if level == len(tails):
            tails.append(value)
            ends.append([])
            negated.append([])
        tails[level] = value
        first = ends[level - 1][bisect_left(negated[level - 1], -value)] if level else -1
        parents.append(first)
        ends[level].append(index)
        negated[level].append(-value)
    chain: list[int] = []
    index = ends[-1][0] if ends else -1
    while index >= 0:
        chain.append(index)
        index = parents[index]
    return chain[::-1]


def _is_empty(span: Span) -> bool:
    return span[0] == span[1]


def _runs(spans: Sequence[Span]) -> Iterator[tuple[int, int, float, float]]:
    """Each run of words without length at one time: (first, end), and the room around it."""
    index = 0
    for span, group in groupby(spans):
        first, index = index, index + len(list(group))
        if _is_empty(span):
            low = spans[first - 1][1] if first else 0.0
            high = spans[index][0] if index < len(spans) else float("inf")
            yield first, index, low, high


def _piles(spans: Sequence[Span], duration: float) -> Iterator[tuple[int, int, float, float]]:
    """The runs that are too many words at one time, where there is room to set them apart."""
    for first, end, low, high in _runs(spans):
        high = min(high, duration)
        if end - first >= _PILE_UP and high - low >= _PILE_UP * _SHORTEST_S:
            yield first, end, low, high


def _sure(spans: list[Span]) -> list[Span]:
    """The first words of a window: up to where it is about to end, or the model lost its place.

    Then all words to the last pile up; after a pile in between it found its place again.
    """
    late = (i for i, (_, end) in enumerate(spans) if end > MAX_WINDOW_S - _MARGIN_S)
    spans = spans[: next(late, len(spans))]
    lasting = max((i for i, span in enumerate(spans) if not _is_empty(span)), default=-1)
    piles = (first for first, end, *_ in _runs(spans) if end - first >= _PILE_UP)
    return spans[: next((first for first in piles if first > lasting), len(spans))]


def _shifted(spans: Sequence[Span], offset: float) -> list[Span]:
    return [(start + offset, end + offset) for start, end in spans]


def _spread(spans: list[Span], duration: float) -> list[Span]:
    """The same times, with words of no length given 80 ms, or what there is.

    They take it from the room around them, first after, then before, then from the longer of
    their neighbours up to half its length.
    """
    for first, end, _, high in list(_runs(spans)):
        time, need = spans[first][0], (end - first) * _SHORTEST_S
        low, high = (spans[first - 1][1] if first else 0.0), min(high, duration)
        stop = min(high, time + need)
        start = max(low, min(time, stop - need))
        before = low - spans[first - 1][0] if first else 0.0
        after = spans[end][1] - high if end < len(spans) else 0.0
        short = need - (stop - start)
        if short > 0 and first and before >= after:
            start -= min(short, before / 2)
            spans[first - 1] = (spans[first - 1][0], start)
        elif short > 0 and end < len(spans):
            stop += min(short, after / 2)
            spans[end] = (stop, spans[end][1])
        edges = np.linspace(start, stop, end - first + 1).tolist()
        spans[first:end] = list(pairwise(edges))
    return spans


def _lasting(spans: list[Span], duration: float) -> list[Span]:
    """The same times, with the shortest words given 2 ms, or what there is, by moving others."""
    least = min(_LEAST_S, duration / max(1, len(spans)))
    low, high = 0.0, duration
    for i, (start, end) in enumerate(spans):
        start = max(start, low)
        low = max(end, start + least)
        spans[i] = start, low
    for i, (start, end) in reversed(list(enumerate(spans))):
        end = min(end, high)
        high = max(0.0, min(start, end - least))
        spans[i] = high, end
    return spans


# units and times -> words -------------------------------------------------------------------


def _words(sentences: Sequence[str], units: Sequence[Unit], spans: Sequence[Span]) -> list[Word]:
    """Units with the spaces and the punctuation around them, which tile the text."""
    text = "".join(sentences)
    borders = list(accumulate(map(len, sentences)))
    cuts = [_cut(text, left.end, right.start, borders) for left, right in pairwise(units)]
    stretches = pairwise([0, *cuts, len(text)]) if units else iter(())
    words = (Word(text[a:b], *span) for (a, b), span in zip(stretches, spans, strict=True))
    return list(shifted(words, 0.0))


def shifted(words: Iterable[Word], seconds: float) -> Iterator[Word]:
    """The same words later, to 0.1 us: a sample's time is a whole number of these."""
    for word in words:
        start, end = (round(time + seconds, 7) for time in (word.start, word.end))
        yield Word(word.word, start, end)


def _cut(text: str, start: int, end: int, borders: Sequence[int]) -> int:
    """Where, in what stands between two units, the one ends and the other begins.

    At the end of a sentence; else before an opening mark; else before the last white space.
    """
    border = borders[bisect_right(borders, end) - 1] if borders[0] <= end else -1
    if border >= start:
        return border
    gap = text[start:end]
    marks = (i for i, mark in enumerate(gap) if _opens(gap, i, mark))
    cut = next(marks, None)
    before = gap.rstrip() if cut is None else gap[:cut]
    if cut is None and gap and not gap[-1].isspace():
        space = max((i for i, char in enumerate(gap) if char.isspace()), default=len(gap) - 1)
        before = gap[: space + 1]
    return start + len(before.rstrip())


def _opens(gap: str, index: int, mark: str) -> bool:
    """Whether a mark opens a quotation or bracket: »this« opens where »that« closes."""
    if category(mark) not in ("Ps", "Pi"):
        return False
    is_after_space = index > 0 and gap[index - 1].isspace()
    return is_after_space or not gap[index + 1 : index + 2].isspace()
