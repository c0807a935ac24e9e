# SPDX-License-Identifier: Apache-2.0
"""Speakers of words and segments, from turns."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_asr_vllm.speakers import MIN_TURN_S, Speakers, SpeakerTurn, cut_at_speakers, read_turns
from qwen3_asr_vllm.transcript import Segment, Word

TIMES = st.integers(0, 200).map(lambda tenths: tenths / 10)
TURNS = st.lists(
    st.tuples(TIMES, TIMES, st.sampled_from([0, 1, 2, "Ada"])).filter(lambda t: t[0] < t[1]),
    max_size=12,
)
LENGTHS = st.lists(st.integers(1, 15), min_size=1, max_size=20)  # of words, in tenths of a second


def sentence(lengths, *, start=0.0, texts=None):
    """A sentence of words of these lengths in seconds, one after the other."""
    texts = texts or [f" w{i}" for i in range(len(lengths))]
    times = list(accumulate(lengths, initial=start))
    words = tuple(Word(text, *span) for text, span in zip(texts, pairwise(times), strict=True))
    return Segment(words[0].start, words[-1].end, "".join(texts), words=words)


def cut(segment, *turns):
    return list(cut_at_speakers(segment, Speakers(read_turns(turns, 100.0))))


def spoken(segments):
    return [(segment.speaker, segment.text) for segment in segments]


# ---- words ----


def test_words_go_to_the_larger_overlap():
    found = cut(sentence([2, 2, 2]), (0, 2.9, "Ada"), (2.9, 6, "Bea"))
    assert spoken(found) == [("Ada", " w0"), ("Bea", " w1 w2")]
    assert [(s.start, s.end) for s in found] == [(0, 2), (2, 6)]
    assert [word.speaker for s in found for word in s.words] == ["Ada", "Bea", "Bea"]


def test_a_stray_word_tears_no_sentence():
    found = cut(sentence([0.5] * 6), (0, 1, "Ada"), (1, 1.5, "Bea"), (1.5, 3, "Ada"))
    assert spoken(found) == [("Ada", " w0 w1 w2 w3 w4 w5")]
    assert {word.speaker for word in found[0].words} == {"Ada"}


@pytest.mark.parametrize(("seconds", "speakers"), [(0.9, ["Ada"]), (1.0, ["Ada", "Bea", "Ada"])])
def test_a_long_turn_cuts_a_sentence(seconds, speakers):
    segment = sentence([1.5, seconds, 1.5])
    found = cut(segment, (0, 1.5, "Ada"), (1.5, 1.5 + seconds, "Bea"), (1.5 + seconds, 9, "Ada"))
    assert [s.speaker for s in found] == speakers


def test_short_turns_leave_the_majority():
    found = cut(sentence([0.3] * 5), (0, 0.3, 1), (0.3, 0.9, 2), (0.9, 1.2, 1), (1.2, 1.5, 2))
    assert spoken(found) == [("A", " w0 w1 w2 w3 w4")]


def test_interruptions_do_not_outweigh_their_sentence():
    turns = (0, 0.6, "Ada"), (0.6, 0.9, "Bea"), (0.9, 1.5, "Ada"), (1.5, 3.5, "Bea")
    found = cut(sentence([0.6, 0.3, 0.6, 1.0, 1.0]), *turns)
    assert spoken(found) == [("Ada", " w0 w1 w2"), ("Bea", " w3 w4")]


def test_a_sentence_of_one_word_has_its_speaker():
    assert spoken(cut(sentence([0.3], texts=["Yes."]), (0, 0.3, "Bea"))) == [("Bea", "Yes.")]


def test_speech_outside_of_turns_stays_unknown():
    assert spoken(cut(sentence([1.0] * 2), (5, 6, "Ada"))) == [(None, " w0 w1")]
    found = cut(sentence([1.0] * 4), (0, 2, "Ada"))
    assert spoken(found) == [("Ada", " w0 w1"), (None, " w2 w3")]


def test_short_gaps_between_turns_are_no_speaker():
    found = cut(sentence([0.5] * 5), (0, 1, "Ada"), (1.5, 2.5, "Ada"))
    assert spoken(found) == [("Ada", " w0 w1 w2 w3 w4")]


def test_a_stray_known_word_tears_no_sentence():
    assert spoken(cut(sentence([0.5, 0.5, 1.0, 1.0]), (0, 0.5, "Ada"))) == [
        (None, " w0 w1 w2 w3"),
    ]
    assert spoken(cut(sentence([0.3, 0.3]), (0, 0.3, "Ada"))) == [("Ada", " w0 w1")]


def test_overlapping_speech_is_marked():
    found = cut(sentence([1.0] * 3), (0, 3, "Ada"), (1, 2, "Bea"))
    assert spoken(found) == [("Ada", " w0 w1 w2")]
    assert [word.other_speakers for word in found[0].words] == [None, ("Bea",), None]
    assert found[0].other_speakers == ("Bea",)


def test_touching_turns_do_not_overlap():
    found = cut(sentence([1.0, 1.0]), (0, 1.1, "Ada"), (0.9, 2, "Bea"))
    assert [word.other_speakers for s in found for word in s.words] == [None, None]


def test_a_turn_without_words_vanishes():
    found = cut(sentence([1.0], start=5.0), (0, 4, 7), (5, 6, 3))
    assert spoken(found) == [("A", " w0")]


def test_voices_are_named_by_first_words():
    speakers = Speakers(read_turns([(0, 1, 5), (1, 2, 0), (2, 3, "B"), (3, 4, 9)], 9.0))
    labels = [
        s.speaker for i in range(4) for s in cut_at_speakers(sentence([1.0], start=i), speakers)
    ]
    assert labels == ["A", "C", "B", "D"]


def test_letters_go_on_after_z():
    speakers = Speakers([SpeakerTurn(i, i + 1, i) for i in range(28)])
    assert [speakers.name(i) for i in range(28)][-3:] == ["Z", "A1", "B1"]


# ---- without word times ----


def test_segments_without_words_are_cut_at_turns():
    segment = Segment(10.0, 14.0, "one two six ten")
    found = cut(segment, (10, 12, "Ada"), (12, 14, "Bea"))
    assert spoken(found) == [("Ada", "one two"), ("Bea", " six ten")]
    assert [(s.start, s.end, s.words) for s in found] == [(10, 12, None), (12, 14, None)]


def test_sentences_without_spaces_are_cut_too():
    found = cut(Segment(0.0, 4.0, "你好吗？我很好。"), (0, 2, "Ada"), (2, 4, "Bea"))
    assert spoken(found) == [("Ada", "你好吗？"), ("Bea", "我很好。")]


def test_a_segment_without_text_stays():
    assert cut(Segment(0.0, 1.0, " "), (0, 1, "Ada")) == [Segment(0.0, 1.0, " ")]


# ---- laws ----


@given(LENGTHS, TURNS, st.booleans())
def test_cut_texts_join_to_the_sentence(lengths, turns, is_timed):
    segment = sentence([length / 10 for length in lengths])
    if not is_timed:
        segment = Segment(segment.start, segment.end, segment.text + "\n")
    found = cut(segment, *turns)
    assert "".join(s.text for s in found) == segment.text
    assert (found[0].start, found[-1].end) == (segment.start, segment.end)
    assert all(a.end <= b.start + 1e-9 for a, b in pairwise(found))
    if is_timed:
        assert sum((s.words for s in found), ()) != ()
        assert ["".join(w.word for w in s.words) for s in found] == [s.text for s in found]


@given(LENGTHS, TURNS)
def test_neighbours_differ_and_words_agree(lengths, turns):
    found = cut(sentence([length / 10 for length in lengths]), *turns)
    assert all(a.speaker != b.speaker for a, b in pairwise(found))
    assert all(word.speaker == s.speaker for s in found for word in s.words)
    if len(found) > 1:
        assert all(s.words[-1].end - s.words[0].start >= MIN_TURN_S - 1e-9 for s in found)


@given(LENGTHS, TURNS)
def test_speakers_come_from_turns(lengths, turns):
    segment = sentence([length / 10 for length in lengths])
    names = {"A", "B", "C", "Ada"} if turns else set()
    for s in cut(segment, *turns):
        assert s.speaker is None or s.speaker in names
        assert s.speaker not in (s.other_speakers or ())
    if not any(start < segment.end and end > segment.start for start, end, _ in turns):
        assert [s.speaker for s in cut(segment, *turns)] == [None]


@given(LENGTHS, TURNS)
def test_the_order_of_turns_does_not_matter(lengths, turns):
    segment = sentence([length / 10 for length in lengths])
    assert cut(segment, *turns) == cut(segment, *reversed(turns))


# ---- turns ----


def test_turns_are_read_in_order_and_inside():
    turns = [(np.float32(2), 99, np.int64(1)), [-1, 1, "Ada"], (5, 5, 0), (12, 13, 0)]
    assert read_turns(turns, 10.0) == [SpeakerTurn(0.0, 1.0, "Ada"), SpeakerTurn(2.0, 10.0, 1)]


@pytest.mark.parametrize(
    "turn",
    [
        (0, 1),
        (0, 1, 2, 3),
        ("a", 1, 0),
        (0, math.nan, 0),
        (0, math.inf, 0),
        (0, 1, None),
        (0, 1, 0.5),
        (0, 1, ""),
        (0, 1, "a" * 201),
        None,
    ],
)
def test_a_wrong_turn_is_named(turn):
    with pytest.raises(ValueError, match=r"turn is \(start, end, speaker\)") as raised:
        read_turns([turn], 10.0)
    assert repr(turn)[:20] in str(raised.value)
