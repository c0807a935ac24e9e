# SPDX-License-Identifier: Apache-2.0
"""Texts to align: lines stay lines, and subtitles are timed anew and not read aloud."""

from __future__ import annotations

import numpy as np
import pytest
import srt
import webvtt
from hypothesis import given
from hypothesis import strategies as st

from qwen3_asr_vllm.alignment import AlignmentOutput, align
from qwen3_asr_vllm.formats import FORMATS
from qwen3_asr_vllm.rounds import Steps
from qwen3_asr_vllm.texts import split_text, timed_texts

LYRICS = "Row, row, row your boat\n\n  Gently down the stream. Merrily!  \r\nLife is but a dream"
SRT = """\ufeff1
00:00:01,000 --> 00:00:02,500
<i>Where are you</i>
going?

2
00:00:03,000 --> 00:00:04,000 X1:40
{\\an8}1984

3
00:00:05,000 --> 00:00:06,000

4
00:00:07,000 --> 00:00:08,000
- Home.
- No.
"""
VTT = """WEBVTT Kind: captions

STYLE
::cue { color: red }

intro
00:01.000 --> 00:02.500 align:start
<v Anna>Where are <00:01.500>you</v>
going?

NOTE never said

00:03.000 --> 00:04.000
1984

00:00:07.000 --> 00:00:08.000
- Home &amp; away.
- No.
"""
CUES = ["Where are you\ngoing?", "1984", "- Home.\n- No."]


def aligned(text, *, each_s=1.0, **options):
    """A transcript by an aligner for which each word takes as long."""
    steps = Steps(align(np.zeros(16_000 * 170, np.float32), text, **options))
    while steps.requests:
        times = (range(2 * len(request.units)) for request in steps.requests)
        steps.send([AlignmentOutput([500 * each_s * (n + n % 2) for n in t]) for t in times])
    return steps.result


def test_lines_of_lyrics_stay_lines():
    transcript = aligned(LYRICS, keep_lines=True, each_s=4.0)
    lines = ["Row, row, row your boat", "Gently down the stream. Merrily!", "Life is but a dream"]
    assert [segment.lines for segment in transcript.segments] == [(line,) for line in lines]
    assert "".join(word.word for word in transcript.words) == transcript.text
    lrc = FORMATS["lrc"](transcript).splitlines()
    assert [line.partition("]")[2] for line in lrc] == lines
    assert [cue.content for cue in srt.parse(FORMATS["srt"](transcript))] == lines


def test_a_long_line_is_one_cue():
    line = " ".join(["word"] * 40)
    (cue,) = srt.parse(FORMATS["srt"](aligned(f"{line}\n", keep_lines=True)))
    assert cue.content == line
    assert cue.end.total_seconds() - cue.start.total_seconds() > 30


def test_without_keep_lines_sentences_are_segments():
    assert split_text("One\ntwo. Three.") == (["One\ntwo.", " Three."], False)


@pytest.mark.parametrize("crlf", [False, True])
def test_cues_of_subtitles_stay_cues(crlf):
    for text in (SRT, VTT.replace(" &amp; away", "")):
        text = text.replace("\n", "\r\n") if crlf else text
        transcript = aligned(text)
        assert [segment.text.strip() for segment in transcript.segments] == CUES
        cues = list(srt.parse(FORMATS["srt"](transcript)))
        assert [cue.content for cue in cues] == CUES
        assert cues[0].start.total_seconds() == 0 and cues[0].end.total_seconds() == 4
    assert "Home & away" in split_text(VTT)[0][-1]


def test_written_subtitles_are_read_back():
    written = aligned(LYRICS, keep_lines=True)
    for name in ("srt", "vtt", "lrc"):
        again = aligned(FORMATS[name](written))
        assert [(s.start, s.end, s.lines) for s in again.segments] == [
            (s.start, s.end, s.lines) for s in written.segments
        ]
    karaoke = FORMATS["lrc"](written, highlight_words=True)
    assert [s.lines for s in aligned(karaoke).segments] == [s.lines for s in written.segments]
    captions = webvtt.from_string(FORMATS["vtt"](written))
    assert [caption.text for caption in captions] == [s.lines[0] for s in written.segments]


def test_repeated_lyrics_keep_all_times():
    text = "[ar:Artist]\n[00:12.00][00:30.5]Chorus\n[00:20.00]Verse\n"
    assert timed_texts(text) == ["Chorus", "Verse", "Chorus"]


@pytest.mark.parametrize(
    "text",
    [
        "He said 00:01 --> 00:02.",
        "[laughs] Well.",
        "1\n2\n3",
        "[00:12] Row\nyour boat",
        "",
        "[ar:x]",
    ],
)
def test_other_texts_are_not_taken_for_subtitles(text):
    assert timed_texts(text) is None


@pytest.mark.parametrize("mark", ["\ufeff", ""])
def test_a_byte_order_mark_reaches_no_cue(mark):
    for options in {}, {"keep_lines": True}:
        assert "\ufeff" not in FORMATS["srt"](aligned(f"{mark}Hello\n{mark}there.", **options))


@given(st.text(alphabet="ab .\n\t-♪", max_size=40))
def test_parts_joined_are_the_text(text):
    parts, _ = split_text(text, keep_lines=True)
    assert "".join(parts) == text.strip()
    assert all("\n" not in part.strip() for part in parts)
