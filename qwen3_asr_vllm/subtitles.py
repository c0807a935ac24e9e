# SPDX-License-Identifier: Apache-2.0
"""Lays segments out as cues, the subtitles of SRT and WebVTT.

Width is measured in columns: a full-width character, such as a Chinese one, takes two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TypeAlias

from .languages import columns, display_width, nearest_middle
from .transcript import Segment, Transcript

MAX_LINE_WIDTH = 42  # columns of a subtitle line: 42 Latin letters or 21 Chinese characters
MAX_LINE_COUNT = 2
MIN_CUE_S, MAX_CUE_S = 1.0, 7.0  # seconds that a cue is shown
_CLAUSE_MARKS = ",;:.!?…،؛؟۔।，、；：。！？"
_NO_LINE_START = "、。，．！？：；）」』】》〉”’…・ー々ぁぃぅぇぉっゃゅょァィゥェォッャュョ),.!?:;%"
_NO_LINE_END = "（「『【《〈“‘("
_NO_WRAP = 1 << 30  # columns
_Span: TypeAlias = tuple[float, float]  # start and end in seconds


@dataclass(frozen=True)
class _Mark:
    """A word of a cue: its first and last visible character, and its time."""

    first: int
    end: int
    span: _Span


@dataclass(frozen=True)
class _Block:
    """The content of one cue: atoms, the time of each, and the positions of the words."""

    atoms: list[str]
    spans: list[_Span]
    marks: list[_Mark]
    lines: list[str] | None = None  # of the user's text; None: laid out to fit
    speaker: str | None = None


@dataclass(frozen=True)
class Cue:
    """A subtitle: its time in milliseconds and its lines."""

    start_ms: int
    end_ms: int
    lines: list[str]
    mark: _Mark | None = None  # the underlined word
    speaker: str | None = None
    label: str = ""  # of the speaker, shown before the first line


def cues(
    transcript: Transcript,
    *,
    max_line_width: int = MAX_LINE_WIDTH,
    max_line_count: int = MAX_LINE_COUNT,
    highlight_words: bool = False,
    label: Callable[[str], str] | None = None,
) -> Iterator[Cue]:
    """Lay the segments out as cues: in order, never overlapping, each of at least 1 ms.

    A segment that does not fit into one cue, or lasts longer than 7 s, is split in halves, at a
    comma if one is near. A half lasts from its first word to its last; without word times, the
    time is shared by width. A cue is shown for a second if the next cue allows it, and for 7 s at
    most. A segment with ``lines`` is one cue of these. With ``highlight_words``, each word of a
    cue gets a cue of its own with the word underlined, and gaps between words get the plain cue.
    ``label`` returns the text before a cue of a speaker, for which each line is that much shorter.

    Raises ValueError for a width under two columns, or no lines.
    """
    if max_line_width < 2 or max_line_count < 1:
        raise ValueError(f"no text fits {max_line_count} line(s) of {max_line_width} column(s).")
    labels = [
        label(one_line(s.speaker)) if label and s.speaker else "" for s in transcript.segments
    ]
    blocks = [
        (block, text)
        for segment, text in zip(transcript.segments, labels, strict=True)
        for block in _segment_blocks(segment, _beside(text, max_line_width), max_line_count)
    ]
    limits = [*(block.spans[0][0] for block, _ in blocks[1:]), transcript.duration]
    shown_until = 0
    for (block, text), limit in zip(blocks, limits, strict=False):
        start, end = block.spans[0][0], block.spans[-1][1]
        longest = math.inf if block.lines else MAX_CUE_S
        end = min(max(end, min(start + MIN_CUE_S, limit)), start + longest)
        start_ms = max(round(1000 * start), shown_until)
        shown_until = max(round(1000 * end), start_ms + 1)
        lines = block.lines or _balanced_lines(block.atoms, _beside(text, max_line_width))
        cue = Cue(start_ms, shown_until, lines, speaker=block.speaker, label=text)
        yield from _highlighted(cue, block.marks) if highlight_words else [cue]


def _beside(label: str, width: int) -> int:
    """Return the columns that a label leaves of a line, of which half are for the text."""
    return max(width - display_width(label), width // 2, 2)


def _segment_blocks(segment: Segment, width: int, count: int) -> Iterator[_Block]:
    if segment.lines:
        block = _block(_atoms(segment.text, _NO_WRAP), segment)
        yield replace(block, lines=list(segment.lines))
    elif atoms := _atoms(segment.text, width):
        yield from _blocks(_block(atoms, segment), width, count)


def _highlighted(cue: Cue, marks: Iterable[_Mark]) -> Iterator[Cue]:
    """Split a cue where its words start and end."""
    shown_until = cue.start_ms
    for mark in marks:
        start, end = (min(max(round(1000 * t), shown_until), cue.end_ms) for t in mark.span)
        if shown_until < start:
            yield replace(cue, start_ms=shown_until, end_ms=start)
        if start < end:
            yield replace(cue, start_ms=start, end_ms=end, mark=mark)
        shown_until = end
    if shown_until < cue.end_ms:
        yield replace(cue, start_ms=shown_until)


def _atoms(text: str, width: int) -> list[str]:
    """Split a text into atoms that stay on one line: words, and ideographs with punctuation.

    White space becomes one space. A word that is wider than a line becomes several atoms.
    """
    atoms: list[str] = []
    for char in one_line(text):
        last = atoms[-1] if atoms else ""
        fits = not columns(char) or display_width(last.lstrip() + char) <= width
        if last and fits and not _may_break(last[-1], char):
            atoms[-1] += char
        else:
            atoms.append(char)
    return atoms


def _may_break(left: str, right: str) -> bool:
    """Return whether a line may end between two characters."""
    if left == " " or right == " ":
        return right == " "
    may = left not in _NO_LINE_END and right not in _NO_LINE_START and columns(right) > 0
    return may and (_is_ideograph(left) or _is_ideograph(right))


def _is_ideograph(char: str) -> bool:
    """Return whether a character is full-width and written without spaces, unlike Korean."""
    return columns(char) == 2 and not "\uac00" <= char <= "\ud7a3"


def _visible(text: str) -> int:
    """Count the characters that are not white space; layout does not change their number."""
    return sum(not char.isspace() for char in text)


def _block(atoms: list[str], segment: Segment) -> _Block:
    """Build the block of a segment; atoms get the times of their words, or shares by width."""
    edges = list(accumulate(map(_visible, atoms), initial=0))
    words = [word for word in segment.words or () if _visible(word.word)]
    word_edges = list(accumulate((_visible(word.word) for word in words), initial=0))
    if not words or word_edges[-1] != edges[-1]:
        widths = [0, *accumulate(max(1, display_width(atom)) for atom in atoms)]
        length = (segment.end - segment.start) / widths[-1]
        times = [segment.start + length * width for width in widths]
        return _Block(atoms, list(pairwise(times)), [], speaker=segment.speaker)
    marks = [
        _Mark(first, end, (word.start, word.end))
        for word, (first, end) in zip(words, pairwise(word_edges), strict=True)
    ]
    chars = [span for mark in marks for span in _shares(mark)]
    spans = [(chars[first][0], chars[end - 1][1]) for first, end in pairwise(edges)]
    return _Block(atoms, spans, marks, speaker=segment.speaker)


def _shares(mark: _Mark) -> Iterator[_Span]:
    """Divide the time of a word between its characters."""
    (start, end), count = mark.span, mark.end - mark.first
    edges = [start + (end - start) * i / count for i in range(count + 1)]
    return pairwise(edges)


def _blocks(block: _Block, width: int, count: int) -> Iterator[_Block]:
    """Split a block until each part fits into one cue."""
    atoms, spans = block.atoms, block.spans
    fits = len(_wrap(atoms, width)) <= count and spans[-1][1] - spans[0][0] <= MAX_CUE_S
    if fits or len(atoms) == 1:
        yield block
        return
    margin = len(atoms) // 4
    near = range(margin + 1, len(atoms) - margin)
    clause_ends = [cut for cut in near if atoms[cut - 1][-1] in _CLAUSE_MARKS]
    cut = nearest_middle(atoms, clause_ends or range(1, len(atoms)))
    for half in _halves(block, cut):
        yield from _blocks(half, width, count)


def _halves(block: _Block, cut: int) -> tuple[_Block, _Block]:
    """Split a block before atom ``cut``; a word that spans the cut is in both halves."""
    middle = sum(map(_visible, block.atoms[:cut]))
    left = [replace(m, end=min(m.end, middle)) for m in block.marks if m.first < middle]
    right = [
        replace(m, first=max(m.first - middle, 0), end=m.end - middle)
        for m in block.marks
        if m.end > middle
    ]
    return (
        _Block(block.atoms[:cut], block.spans[:cut], left, speaker=block.speaker),
        _Block(block.atoms[cut:], block.spans[cut:], right, speaker=block.speaker),
    )


def _wrap(atoms: list[str], width: int) -> list[str]:
    """Fill lines with atoms, greedily."""
    lines = [""]
    for atom in atoms:
        if lines[-1] and display_width(lines[-1] + atom) > width:
            lines.append("")
        lines[-1] += atom if lines[-1] else atom.lstrip(" ")
    return lines


def _balanced_lines(atoms: list[str], width: int) -> list[str]:
    """Wrap into as few lines as ``_wrap`` does, as narrow as possible."""
    count = len(_wrap(atoms, width))
    fair = min(width, -(-display_width("".join(atoms)) // count))
    wraps = (_wrap(atoms, narrower) for narrower in range(fair, width + 1))
    return next(lines for lines in wraps if len(lines) <= count)


def one_line(text: str) -> str:
    """Replace all runs of white space by one space."""
    return " ".join(text.split())
