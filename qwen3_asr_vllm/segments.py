# SPDX-License-Identifier: Apache-2.0
"""From text and times to segments: sentences, their estimated times, the words inside.

text -> sentences -> one segment each        pauses of a clip -> when each sentence is spoken
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, groupby, pairwise

import numpy as np

from .geometry import HOP_LENGTH, SAMPLE_RATE
from .languages import display_width, nearest_middle
from .pauses import quiet_frames
from .transcript import Segment, Word

_LONG_SENTENCE = 120  # columns, about 8 s of speech: longer ones are cut at commas
_ABBREVIATIONS = "Mr|Mrs|Ms|Dr|St|Prof|No|vs"
_CLOSERS = "[\"'”’»)\\]）」』】》〉]*"
_SENTENCE_END = re.compile(f"[.!?…؟۔।]+{_CLOSERS}(?=\\s)|[。！？｡]+{_CLOSERS}")
_CLAUSE_END = re.compile(
    "[,;:،؛](?=\\s)|[，、；：]"
    "|(?<=[\u0e00-\u0e7f])(?=\\s+[\u0e00-\u0e7f])"  # a space is the comma of Thai
)


# A period that ends no sentence: of an initial, an ordinal (German "3. Oktober") or a title.
_ABBREVIATED = re.compile(rf"\b(?:[A-Za-zÀ-ɏА-я]|\d\d?|{_ABBREVIATIONS})\.$")


def split_sentences(text: str) -> list[str]:
    """The sentences of a stripped text, which put together are the text; none if it is empty.

    Each begins with the white space before it. One wider than 120 columns is cut at commas too.
    Marks tell sentences apart, not grammar: "approx. Six" makes two.
    """
    ends = (match.end() for match in _SENTENCE_END.finditer(text) if _ends_sentence(match))
    sentences = [text[start:end] for start, end in pairwise([0, *ends, len(text)])]
    return [clause for sentence in sentences if sentence for clause in _clauses(sentence)]


def _ends_sentence(mark: re.Match[str]) -> bool:
    before, after = mark.string[max(0, mark.end() - 8) : mark.end()], mark.string[mark.end() :]
    next_char = after.lstrip()[:1]
    return bool(next_char) and not next_char.islower() and not _ABBREVIATED.search(before)


def _clauses(sentence: str) -> list[str]:
    """A sentence, cut at the comma nearest to its middle for as long as it is too wide."""
    matches = _CLAUSE_END.finditer(sentence)
    ends = [match.end() for match in matches if match.end() < len(sentence)]
    if display_width(sentence) <= _LONG_SENTENCE or not ends:
        return [sentence]
    end = nearest_middle(sentence, ends)
    return [*_clauses(sentence[:end]), *_clauses(sentence[end:])]


_PAUSE_SHARE = 0.2  # of the text that belongs to a frame of speech, what a quiet one is given
_NEAR_S = 1.0  # a pause that is this far from where it is expected counts half
_MARGIN_FRAMES = 10  # of quiet on either side of speech that count as speech: it fades


def with_leading_space(segment: Segment, seam: str) -> Segment:
    """A segment with ``seam``, for what stands before it, and its first word likewise."""
    words = segment.words
    if words:
        words = (replace(words[0], word=seam + words[0].word.lstrip()), *words[1:])
    return replace(segment, text=seam + segment.text.lstrip(), words=words)


def sentence_spans(clip: np.ndarray, widths: list[int]) -> list[tuple[float, float]]:
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
