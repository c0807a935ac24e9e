# SPDX-License-Identifier: Apache-2.0
"""Forced alignment: find when each word of a known text is spoken.

    text -> units      what is timed: a word, or one Chinese character, without punctuation
    units -> prompt    <|audio_start|><|audio_pad|><|audio_end|>Guten<timestamp><timestamp>Tag...
    engine             the likeliest time, one of a class every 80 ms, at each <timestamp>
    times -> words     ordered; words at one instant aligned again; punctuation and spaces restored

    align(waveform, text)  -- yields -->  [AlignmentRequest, ...]
                           <-- is sent --  [AlignmentOutput, ...]  in the same order
                           -- returns -->  Transcript

No engine here: the caller of the generator owns one. The prompt is bare: inside a chat template
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
from .segments import timed_segments, with_lines
from .texts import split_text
from .transcript import Transcript, Word
from .units import AlignmentError, Unit, check_language, cut_warnings, units_of

TIMESTAMP = "<timestamp>"
CLASS_MS = 80.0  # milliseconds between time classes, unless the checkpoint says otherwise
MAX_WINDOW_S = 180  # seconds of audio in one request; trained on 300, reliable to about 270

_FILL = 0.8  # share of a window's expected words that are put into its request
_MARGIN_S = 5.0  # words that end this close to the end of a window are aligned again
_PILE_UP = 4  # words at one instant that mean that the model lost its position
_SHORTEST_S = CLASS_MS / 1000  # seconds that a word of zero length gets
_LEAST_S = 0.002  # minimum duration in seconds; stays above 0 when rounded to milliseconds
_MAX_ROUNDS = 4  # attempts to align words again that piled up

Span: TypeAlias = tuple[float, float]  # start and end in seconds


@dataclass(frozen=True, eq=False)
class AlignmentRequest:
    """A stretch of audio and the units spoken in it, for the aligner's engine."""

    units: Sequence[str]
    waveform: np.ndarray  # shape (samples,), float32, 16 kHz

    @property
    def prompt(self) -> str:
        marked = "".join(f"{unit}{TIMESTAMP}{TIMESTAMP}" for unit in self.units)
        return AUDIO_PLACEHOLDER + marked


@dataclass(frozen=True)
class AlignmentOutput:
    """Start and end of each unit in turn, as the model predicts them, in milliseconds.

    ``error`` says why there are none: a remote aligner may be down or, if ``is_permanent``,
    refuses the request.
    """

    times: Sequence[float]
    error: str = ""
    is_permanent: bool = False


_Result = TypeVar("_Result")
_Rounds: TypeAlias = Generator[list[AlignmentRequest], list[AlignmentOutput], _Result]
Alignment: TypeAlias = _Rounds[Transcript]


def align(
    waveform: np.ndarray, text: str, *, language: str | None = None, keep_lines: bool = False
) -> Alignment:
    """Time each word of a recording whose text is known; returns a Transcript with words.

    ``language`` is a name or code; None detects Japanese and Korean by their script, and all
    other languages are split alike. Recordings of any length: a request holds at most 180 s. A
    text of punctuation alone has no words. Segments are sentences or, with ``keep_lines``, the
    lines of the text; those of SRT, VTT and LRC are its cues, without their times and markup.

    Raises, on the first step, ValueError for a language that the aligner does not know,
    ImportError, with what to install, where Japanese cannot be split into words, and
    AlignmentError where the Korean dictionary cannot be read. Later, AlignmentError where the
    aligner fails or does not return two times per word.
    """
    if (language := resolve_language(language)) is not None:
        check_language(language)
    parts, are_lines = split_text(text, keep_lines=keep_lines)
    words = yield from align_words(waveform, parts, language)
    segments = timed_segments(parts, words, language)
    return Transcript(
        text="".join(parts),
        duration=len(waveform) / SAMPLE_RATE,
        segments=tuple(map(with_lines, segments) if are_lines else segments),
        warnings=cut_warnings(text, language),
    )


def align_words(
    waveform: np.ndarray, sentences: Sequence[str], language: str | None
) -> _Rounds[list[Word]]:
    """Time the words of sentences; words include the spaces and punctuation around them.

    The words joined are the text. Each has a positive duration, also when rounded to
    milliseconds, starts no earlier than the word before it ends, and lies inside the audio.
    """
    units = list(units_of(sentences, language))
    spans = yield from _spans(waveform, [unit.spoken for unit in units])
    return _words(sentences, units, spans)


# units -> times -----------------------------------------------------------------------------


def _spans(waveform: np.ndarray, units: list[str]) -> _Rounds[list[Span]]:
    """Time all units, in order, each with a positive duration; long audio is split into windows.

    Which words belong to a window is unknown, except for the last window. So a window gets fewer
    units than its share, and the next window starts where the last reliable unit ends.
    """
    spans: list[Span] = []
    start = 0  # start of the window in samples
    size = MAX_WINDOW_S * SAMPLE_RATE
    while len(waveform) - start > size and len(spans) < len(units):
        share = size / (len(waveform) - start)
        batch = units[len(spans) :][: max(1, int(share * _FILL * (len(units) - len(spans))))]
        request = AlignmentRequest(batch, waveform[start : start + size])
        (output,) = yield [request]
        if sure := _sure(_read(output, request)):
            sure = yield from _set_apart(sure, request)
            spans += _shifted(sure, start / SAMPLE_RATE)
            start = round(spans[-1][1] * SAMPLE_RATE)
        else:  # none of the units is spoken here
            start += size // 2
    if rest := units[len(spans) :]:
        start = max(0, min(start, len(waveform) - MIN_SAMPLES))  # words may outlast the audio
        request = AlignmentRequest(rest, waveform[start:])
        (output,) = yield [request]
        last = yield from _set_apart(_read(output, request), request)
        floor = spans[-1][1] if spans else 0.0
        spans += [
            (max(floor, begin), max(floor, end))
            for begin, end in _shifted(last, start / SAMPLE_RATE)
        ]
    duration = len(waveform) / SAMPLE_RATE
    return _lasting(_spread(spans, duration), duration)


def _set_apart(spans: list[Span], request: AlignmentRequest) -> _Rounds[list[Span]]:
    """Align the first units of a request again where their times pile up."""
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
    """Build a request for some of the units, in the audio between two times."""
    samples = slice(round(low * SAMPLE_RATE), round(high * SAMPLE_RATE))
    return AlignmentRequest(request.units[first:end], request.waveform[samples])


def _read(output: AlignmentOutput, request: AlignmentRequest) -> list[Span]:
    """Return the times of an output, repaired to be in order and inside the audio."""
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
    """Make times non-decreasing by moving as few as possible; in whole milliseconds.

    The longest non-decreasing subsequence is kept; of several, the one that qwen-asr keeps. One
    or two other times between kept ones move to the nearer one (the left if equal); more are
    interpolated.
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
    """Return the indices of the longest non-decreasing subsequence, in O(n log n).

    Of several, the one whose last element comes first, then the one before it, and so on.
    """
    tails: list[float] = []  # by length: the least value that ends a subsequence
    ends: list[list[int]] = []  # by length: all indices that end one
    negated: list[list[float]] = []  # the values at these indices, which decrease, negated
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
    """Yield runs of zero-length words at one time: (first, end), and the free time around them."""
    index = 0
    for span, group in groupby(spans):
        first, index = index, index + len(list(group))
        if _is_empty(span):
            low = spans[first - 1][1] if first else 0.0
            high = spans[index][0] if index < len(spans) else float("inf")
            yield first, index, low, high


def _piles(spans: Sequence[Span], duration: float) -> Iterator[tuple[int, int, float, float]]:
    """Yield the runs of too many words at one time that have free time around them."""
    for first, end, low, high in _runs(spans):
        high = min(high, duration)
        if end - first >= _PILE_UP and high - low >= _PILE_UP * _SHORTEST_S:
            yield first, end, low, high


def _sure(spans: list[Span]) -> list[Span]:
    """Return the reliable first words of a window.

    They end near the end of the window, or where the model lost its position: from there on all
    words pile up. After a pile in the middle it found its position again.
    """
    late = (i for i, (_, end) in enumerate(spans) if end > MAX_WINDOW_S - _MARGIN_S)
    spans = spans[: next(late, len(spans))]
    lasting = max((i for i, span in enumerate(spans) if not _is_empty(span)), default=-1)
    piles = (first for first, end, *_ in _runs(spans) if end - first >= _PILE_UP)
    return spans[: next((first for first in piles if first > lasting), len(spans))]


def _shifted(spans: Sequence[Span], offset: float) -> list[Span]:
    return [(start + offset, end + offset) for start, end in spans]


def _spread(spans: list[Span], duration: float) -> list[Span]:
    """Give words of zero length 80 ms each, or less if the audio is too short.

    The time comes from the gap after them, then from the gap before, then from the longer
    neighbour, up to half of it.
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
    """Give every word at least 2 ms, or less if the audio is too short; move its neighbours."""
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
    """Extend units by the spaces and punctuation around them, so that joined they are the text."""
    text = "".join(sentences)
    borders = list(accumulate(map(len, sentences)))
    cuts = [_cut(text, left.end, right.start, borders) for left, right in pairwise(units)]
    stretches = pairwise([0, *cuts, len(text)]) if units else iter(())
    words = (Word(text[a:b], *span) for (a, b), span in zip(stretches, spans, strict=True))
    return list(shifted(words, 0.0))


def shifted(words: Iterable[Word], seconds: float) -> Iterator[Word]:
    """Shift words by ``seconds``, rounded to 0.1 us, of which a sample is a whole number."""
    for word in words:
        start, end = (round(time + seconds, 7) for time in (word.start, word.end))
        yield Word(word.word, start, end)


def _cut(text: str, start: int, end: int, borders: Sequence[int]) -> int:
    """Return where the first of two units ends in the text between them.

    That is the end of a sentence, else before an opening mark, else before the last white space.
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
    """Return whether a mark opens a quotation or bracket; » may open or close."""
    if category(mark) not in ("Ps", "Pi"):
        return False
    is_after_space = index > 0 and gap[index - 1].isspace()
    return is_after_space or not gap[index + 1 : index + 2].isspace()
