# SPDX-License-Identifier: Apache-2.0
"""Builds segments from text and times: sentences, their estimated times, their words.

    text -> sentences -> one segment each        pauses of a clip -> estimated times of sentences

Without an aligner, times are estimates from the width of the text and the pauses of the clip.
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

_LONG_SENTENCE = 120  # columns, about 8 s of speech; longer sentences are split at commas
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
    """Split a stripped text into sentences, which joined are the text.

    Each sentence starts with the white space before it. A sentence wider than 120 columns is also
    split at commas. Only punctuation counts, not grammar: "approx. Six" makes two sentences.
    """
    ends = (match.end() for match in _SENTENCE_END.finditer(text) if _ends_sentence(match))
    sentences = [text[start:end] for start, end in pairwise([0, *ends, len(text)])]
    return [clause for sentence in sentences if sentence for clause in _clauses(sentence)]


def _ends_sentence(mark: re.Match[str]) -> bool:
    before, after = mark.string[max(0, mark.end() - 8) : mark.end()], mark.string[mark.end() :]
    next_char = after.lstrip()[:1]
    return bool(next_char) and not next_char.islower() and not _ABBREVIATED.search(before)


def _clauses(sentence: str) -> list[str]:
    """Split a sentence at the comma nearest to its middle until no part is too wide."""
    matches = _CLAUSE_END.finditer(sentence)
    ends = [match.end() for match in matches if match.end() < len(sentence)]
    if display_width(sentence) <= _LONG_SENTENCE or not ends:
        return [sentence]
    end = nearest_middle(sentence, ends)
    return [*_clauses(sentence[:end]), *_clauses(sentence[end:])]


_PAUSE_SHARE = 0.2  # text per quiet frame, relative to a frame of speech
_NEAR_S = 1.0  # distance in seconds at which a pause counts half
_MARGIN_FRAMES = 10  # quiet frames around speech that count as speech, because speech fades


def with_leading_space(segment: Segment, seam: str) -> Segment:
    """Return a segment whose text, and first word, start with ``seam`` instead of white space."""
    words = segment.words
    if words:
        words = (replace(words[0], word=seam + words[0].word.lstrip()), *words[1:])
    return replace(segment, text=seam + segment.text.lstrip(), words=words)


def with_lines(segment: Segment) -> Segment:
    """Return a segment that a subtitle shows in the lines of its text."""
    lines = (line.strip() for line in segment.text.split("\n"))
    return replace(segment, lines=tuple(filter(None, lines)))


def sentence_spans(clip: np.ndarray, widths: list[int]) -> list[tuple[float, float]]:
    """Estimate when each part of a clip's text is spoken: (start, end) in samples, none empty.

    A part takes a share of the speech in proportion to its width (above 0). Each cut then moves
    to a pause, if there is one between the middles of the parts on both sides.
    """
    if not widths:
        return []
    quiet, edges = _speech(clip)
    spoken = np.cumsum([0, *np.where(quiet, _PAUSE_SHARE, 1)])
    shares = np.cumsum([0, *widths]) / sum(widths)
    cuts = np.interp(shares * spoken[-1], spoken, edges).tolist()
    middles = np.interp((shares[1:] + shares[:-1]) / 2 * spoken[-1], spoken, edges).tolist()
    pauses = edges[np.flatnonzero(np.diff(quiet, prepend=False, append=False))].reshape(-1, 2)
    snapped = [
        _snap(cut, pauses.clip(low, high))
        for cut, low, high in zip(cuts[1:-1], middles[:-1], middles[1:], strict=True)
    ]
    starts = [cuts[0], *(end for _, end in snapped)]
    ends = [*(start for start, _ in snapped), cuts[-1]]
    return list(zip(starts, ends, strict=True))


def _speech(clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the frames from the first to the last loud one: (is quiet, edges in samples)."""
    if len(clip) < HOP_LENGTH:
        return np.ones(1, bool), np.array([0, len(clip)])
    quiet = quiet_frames(clip)
    edges = HOP_LENGTH * np.arange(len(quiet) + 1)
    edges[-1] = len(clip)
    loud = np.flatnonzero(~quiet)
    if loud.size:
        frames = slice(max(loud[0] - _MARGIN_FRAMES, 0), loud[-1] + 1 + _MARGIN_FRAMES)
        quiet, edges = quiet[frames], edges[frames.start : frames.stop + 1]
    return quiet, edges


def _snap(cut: float, pauses: np.ndarray) -> tuple[float, float]:
    """Return where speech ends and resumes: around a wide pause near the cut, or at the cut.

    ``pauses``, shape (number, 2) in samples, are clipped to where the cut may move.
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
    """Yield one segment per sentence, from its first word to its last.

    The words joined are the text, and so are the sentences. A sentence without a word is merged
    into the one before it.
    """
    ends = list(accumulate(map(len, sentences)))
    starts = accumulate((len(word.word) for word in words), initial=0)
    for _, group in groupby(
        zip(words, starts, strict=False), lambda pair: bisect_right(ends, pair[1])
    ):
        spoken = tuple(word for word, _ in group)
        yield Segment(
            start=spoken[0].start,
            end=spoken[-1].end,
            text="".join(word.word for word in spoken),
            language=language,
            words=spoken,
        )
