# SPDX-License-Identifier: Apache-2.0
"""Splits a text that is to be aligned into the parts that become segments.

    plain text -> sentences, or its own lines
    SRT, VTT, LRC -> their cues, without numbers, times and markup

The parts joined are the text.
"""

from __future__ import annotations

import html
import re
from itertools import takewhile

from .checks import check_string
from .segments import split_sentences

_TIME = r"(?:\d+:)?\d{1,2}:\d{2}[.,]\d{1,3}"
_TIMING = re.compile(rf"^[ \t]*{_TIME}[ \t]*-->[ \t]*{_TIME}.*$", re.MULTILINE)
_MARKUP = re.compile(r"</?[A-Za-z][^<>]*>|<[\d:.]+>|\{\\[^{}]*\}")  # <i>, <00:01.500>, {\an8}
_LINE = re.compile(r"\s*\S[^\n]*")
_LRC_TAG = re.compile(r"\[(?:(\d+):(\d{2}(?:[.:]\d+)?)|[a-z]+:[^\]]*)\]")  # a time, or "ar:..."


def split_text(text: str, *, keep_lines: bool = False) -> tuple[list[str], bool]:
    """Return the parts of a text, and whether their lines are to be shown as they are.

    They are with ``keep_lines``, where each line is a part, and in subtitles and lyrics, where
    each cue is one.
    """
    text = check_string("text", text).replace("\ufeff", "").strip()
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    if (cues := timed_texts(lines)) is not None:
        return [f"\n{cue}" if number else cue for number, cue in enumerate(cues)], True
    return (_LINE.findall(lines), True) if keep_lines else (split_sentences(text), False)


def timed_texts(text: str) -> list[str] | None:
    """Return the text of each cue of SRT, VTT or LRC; None for any other text."""
    return _subtitles(text) if _TIMING.search(text) else _lyrics(text)


def _subtitles(text: str) -> list[str] | None:
    timings = list(_TIMING.finditer(text))
    head = text[: timings[0].start()].strip()
    is_vtt, is_numbered = head.startswith("WEBVTT"), head.isdecimal()
    if not (is_vtt or is_numbered or not head):
        return None
    ends = [*(timing.start() for timing in timings[1:]), len(text)]
    cues = []
    for timing, end in zip(timings, ends, strict=True):
        lines = text[timing.end() + 1 : end].rstrip().split("\n")
        if is_vtt:
            lines = list(takewhile(str.strip, lines))  # a note or style may follow
        elif is_numbered and end < len(text) and lines[-1].strip().isdecimal():
            lines.pop()  # of the next cue
        plain = _MARKUP.sub("", "\n".join(filter(str.strip, lines)))
        cues.append((html.unescape(plain) if is_vtt else plain).strip())
    return list(filter(None, cues))


def _lyrics(text: str) -> list[str] | None:
    """Return the lines of LRC in the order of their times; a repeated line has several times."""
    lines: list[tuple[float, str]] = []
    for line in filter(str.strip, text.split("\n")):
        tags = []
        while tag := _LRC_TAG.match(line := line.lstrip()):
            tags.append(tag)
            line = line[tag.end() :]
        if not tags:
            return None
        times = [60 * int(tag[1]) + float(tag[2].replace(":", ".")) for tag in tags if tag[1]]
        lines += [(time, _MARKUP.sub("", line)) for time in times]
    sung = [" ".join(line.split()) for _, line in sorted(lines, key=lambda item: item[0])]
    return list(filter(None, sung)) or None
