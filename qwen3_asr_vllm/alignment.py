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

import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import TypeAlias, TypeVar
from unicodedata import category, normalize

import numpy as np

from .geometry import MIN_SAMPLES, SAMPLE_RATE
from .languages import ALIGNER_LANGUAGES, language_code, resolve_language
from .prompt import AUDIO_PLACEHOLDER
from .transcript import Segment, Transcript, Word, split_sentences

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


class AlignmentError(Exception):
    """The aligner gave no times that can be used, or it cannot be asked for any."""


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
    units = list(_units(sentences, language))
    spans = yield from _spans(waveform, [unit.spoken for unit in units])
    return _words(sentences, units, spans)


def check_language(language: str) -> None:
    """Raises ValueError, listing what is supported, for a name that the aligner does not know."""
    if language not in ALIGNER_LANGUAGES:
        known = ", ".join(sorted(f"{language_code(name)} {name}" for name in ALIGNER_LANGUAGES))
        raise ValueError(f"the forced aligner does not know {language}; it times words of: {known}")


def cut_warnings(text: str, language: str | None) -> tuple[str, ...]:
    """What who reads the words of a text should know of how it was cut."""
    is_korean = (language or _script_language(text)) == "Korean"
    return (NO_DICTIONARY,) if is_korean and not korean_dictionary() else ()


def timed_segments(
    sentences: Sequence[str], words: Sequence[Word], language: str | None
) -> Iterator[Segment]:
    """The sentences that words make, each from its first word to its last.

    Both tile the text. A sentence without a word of its own goes to the one before it.
    """
    ends = list(accumulate(map(len, sentences)))
    starts = accumulate((len(word.word) for word in words), initial=0)
    for _, group in groupby(
        zip(words, starts, strict=False), lambda pair: bisect_right(ends, pair[1])
    ):
        said = tuple(word for word, _ in group)
        yield Segment(
            start=said[0].start,
            end=said[-1].end,
            text="".join(word.word for word in said),
            language=language,
            words=said,
        )


# text -> units ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """What the aligner times: where it stands in the text, and what is said of it."""

    start: int
    end: int
    spoken: str  # letters, digits and apostrophes only


_CJK = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f\U0002b820-\U0002ceaf]"
)
_KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa]")  # without ・ and ー, which Chinese writes too
_HANGUL = re.compile("[\uac00-\ud7a3]")
NO_DICTIONARY = (
    "Korean is cut at its spaces only, not before endings: there is no dictionary. "
    "pip install --no-deps qwen-asr, or name one with QWEN3_ASR_KOREAN_DICT."
)
_NOT_SPACE = re.compile(r"\S+")
_PIECE = re.compile(f"{_CJK.pattern}|(?:(?!{_CJK.pattern}).)+", re.DOTALL)


def split_units(text: str, language: str | None = None) -> list[Unit]:
    """The units of a text, in order: those that the aligner was trained on.

    Between spaces lie words, and in these every Chinese character is its own. Japanese is cut by
    nagisa, Korean before the endings that follow a word of the dictionary.
    """
    language = language or _script_language(text)
    cut: Callable[[str], Iterator[tuple[int, int]]] = {
        "Japanese": _cut_japanese,
        "Korean": _cut_korean,
    }.get(language or "", _cut_at_spaces)
    normal = partial(normalize, "NFKC" if language == "Japanese" else "NFC")
    spoken = ((start, end, _spoken(normal(text[start:end]))) for start, end in cut(text))
    return [Unit(*unit) for unit in spoken if unit[2]]


def _script_language(text: str) -> str | None:
    """The language that a script tells, of those that are cut otherwise than at spaces."""
    return "Japanese" if _KANA.search(text) else "Korean" if _HANGUL.search(text) else None


def _units(sentences: Sequence[str], language: str | None) -> Iterator[Unit]:
    """The units of sentences that tile a text, none across two."""
    if language is None and _KANA.search("".join(sentences)):
        language = "Japanese"  # also where a sentence has no kana
    starts = accumulate(map(len, sentences), initial=0)
    for sentence, offset in zip(sentences, starts, strict=False):
        for unit in split_units(sentence, language):
            yield Unit(offset + unit.start, offset + unit.end, unit.spoken)


def _spoken(text: str) -> str:
    """Its letters, digits and apostrophes; nothing of a text of apostrophes alone."""
    spoken = "".join(char for char in text if char == "'" or category(char)[0] in "LN")
    return spoken if spoken.strip("'") else ""


def _cut_at_spaces(text: str) -> Iterator[tuple[int, int]]:
    for word in _NOT_SPACE.finditer(text):
        for piece in _PIECE.finditer(word[0]):
            yield word.start() + piece.start(), word.start() + piece.end()


_CLUSTER = re.compile(".[\u0300-\u036f\u3099\u309a\uff9e\uff9f]*", re.DOTALL)


def _cut_japanese(text: str) -> Iterator[tuple[int, int]]:
    """The words of nagisa, which reads the text in NFKC, so that lengths may differ."""
    try:
        nagisa = import_module("nagisa")
    except ImportError as error:
        raise ImportError(
            "nagisa is needed to cut Japanese into words: pip install 'qwen3-asr-vllm[ja]'"
        ) from error
    clusters = [match.span() for match in _CLUSTER.finditer(text)]
    read = list(accumulate(len(normalize("NFKC", text[s:e])) for s, e in clusters))
    ends = [
        clusters[min(bisect_left(read, end), len(clusters) - 1)][1]
        for end in accumulate(map(len, nagisa.wakati(text)))
    ]
    yield from pairwise([0, *ends])


def _cut_korean(text: str) -> Iterator[tuple[int, int]]:
    """Each word before its endings: after the longest beginning, from 2 letters, that is known.

    As soynlp's LTokenizer does with the dictionary of qwen-asr.
    """
    known = korean_dictionary()
    for word in _NOT_SPACE.finditer(text):
        lengths = range(len(word[0]), 1, -1)
        length = next((n for n in lengths if word[0][:n] in known), len(word[0]))
        middle = word.start() + length
        yield word.start(), middle
        if middle < word.end():
            yield middle, word.end()


@cache
def korean_dictionary() -> frozenset[str]:
    """Words of Korean, one to a line of the file that QWEN3_ASR_KOREAN_DICT names.

    Else of the file in the package qwen-asr, where it is installed (``pip install --no-deps
    qwen-asr`` will do). Without either it is empty, and Korean is cut at its spaces only.

    Raises AlignmentError for a file that cannot be read.
    """
    given = os.environ.get("QWEN3_ASR_KOREAN_DICT")
    spec = None if given else find_spec("qwen_asr")
    if spec and spec.origin:
        given = str(Path(spec.origin).parent / "inference/assets/korean_dict_jieba.dict")
    if not given:
        return frozenset()
    try:
        lines = Path(given).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise AlignmentError(
            f"Korean cannot be cut into words by the file {given} ({error}); set "
            "QWEN3_ASR_KOREAN_DICT to one in UTF-8 with a word to a line, or unset it"
        ) from error
    return frozenset(line.split()[0] for line in lines if line.strip())


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
