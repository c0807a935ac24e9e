# SPDX-License-Identifier: Apache-2.0
"""Words of an utterance whose text grows: each has its time once, and joined they are the text."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_asr_vllm.alignment import AlignmentOutput
from qwen3_asr_vllm.geometry import SAMPLE_RATE
from qwen3_asr_vllm.live_words import LiveWords
from qwen3_asr_vllm.rounds import Steps

START = 7 * SAMPLE_RATE  # sample of the session at which the utterance starts
TEXT = "one two, three. Four five six seven eight"  # a word each second


def aligned(words, *, meanwhile=lambda: None):
    """The words of the text so far; the aligner spreads the units evenly over the audio."""
    steps = Steps(words.align())
    while steps.requests:
        meanwhile()
        outputs = []
        for request in steps.requests:
            edges = np.linspace(0, len(request.waveform) / 16, len(request.units) + 1).tolist()
            outputs.append(AlignmentOutput([time for pair in pairwise(edges) for time in pair]))
        steps.send(outputs)
    return steps.result


def silence(seconds):
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.booleans()), max_size=9))
def test_words_join_to_the_final_text(steps):
    """Whatever becomes final when, and whenever the aligner is asked."""
    spoken = TEXT.split(" ")
    words, found, num_spoken, num_final = LiveWords(START), [], 0, 0
    for more, behind, asks in [*steps, (len(spoken), 0, True)]:
        more = min(more, len(spoken) - num_spoken)
        words.push(silence(more))
        num_spoken += more
        until = max(num_final, num_spoken - behind)
        delta = "".join((" " if i else "") + spoken[i] for i in range(num_final, until))
        tentative = "".join((" " if i else "") + spoken[i] for i in range(until, num_spoken))
        num_final = until
        end = START + num_spoken * SAMPLE_RATE
        words.extend(delta, tentative, end=end, language="English")
        found += aligned(words) if asks else []
    assert "".join(word.word for word in found) == TEXT
    for number, word in enumerate(found):
        assert word.start == pytest.approx(7 + number, abs=0.01)
        assert word.end == pytest.approx(8 + number, abs=0.01)


def test_text_that_comes_meanwhile_is_kept():
    words = LiveWords(0)
    words.push(silence(2))
    words.extend("one two", "", end=2 * SAMPLE_RATE, language=None)

    def meanwhile():
        words.push(silence(1))
        words.extend(" three", "", end=3 * SAMPLE_RATE, language=None)

    first, second = aligned(words, meanwhile=meanwhile), aligned(words)
    assert [word.word for word in first + second] == ["one", " two", " three"]
    assert second[0].start == pytest.approx(2, abs=0.01)


def test_words_may_outlast_the_new_audio():
    """The last word becomes final at the end, when its audio is all before the word it follows."""
    words = LiveWords(0)
    words.push(silence(2))
    words.extend("one two", "", end=2 * SAMPLE_RATE, language=None)
    found = aligned(words)
    words.extend(" three", "", end=2 * SAMPLE_RATE, language=None)
    found += aligned(words)
    assert [word.word for word in found] == ["one", " two", " three"]
    assert all(a.start < a.end <= b.start < b.end for a, b in pairwise(found))


def test_unknown_languages_have_no_words():
    words = LiveWords(0)
    words.push(silence(1))
    words.extend("สวัสดี", "", end=SAMPLE_RATE, language="Thai")
    with pytest.raises(ValueError, match="does not know Thai"):
        aligned(words)
