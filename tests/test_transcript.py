# SPDX-License-Identifier: Apache-2.0
"""Joining texts loses and doubles nothing; the formats are what they say."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_asr_vllm.transcript import FORMATS, Segment, Transcript, Word, join_texts

MIXED = Transcript(
    text="Hello world. 你好。",
    duration=6.5,
    segments=(
        Segment(0.0, 2.5, "Hello world.", "English", avg_logprob=-0.25),
        Segment(2.5, 4.0, ""),
        Segment(4.0, 6.5, "你好。", "Chinese", words=(Word("你", 4.1, 4.4), Word("好", 4.4, 4.7))),
    ),
    warnings=("clip at 4.0 s reached its token limit",),
)
SILENT = Transcript(text="", duration=1.0, segments=(Segment(0.0, 1.0, ""),))


@pytest.mark.parametrize(
    ("texts", "joined"),
    [
        (["Hello.", "World."], "Hello. World."),
        (["Hello. ", " World."], "Hello. World."),
        (["Hello.", "", " \n", "World."], "Hello. World."),
        (["你好。", "世界。"], "你好。世界。"),
        (["今天有", "3", "个"], "今天有3个"),
        (["Hello.", "你好。", "안녕", "하세요"], "Hello. 你好。안녕 하세요"),
        (["", ""], ""),
        ([], ""),
    ],
)
def test_texts_join_by_their_script(texts, joined):
    assert join_texts(texts) == joined


texts = st.lists(st.text("ab .3,你好。ไทย한\n"))


@given(texts)
def test_joining_adds_and_drops_white_space_only(texts):
    assert "".join(join_texts(texts).split()) == "".join("".join(texts).split())


@given(st.lists(st.text("ab .3,한\n")))
def test_joining_keeps_every_word_of_a_spaced_script_apart(texts):
    assert join_texts(texts).split() == " ".join(texts).split()


@given(st.lists(st.text("你好。，ไทยかな\n ").map(str.strip)))
def test_joining_spaceless_scripts_adds_nothing(texts):
    assert join_texts(texts) == "".join(texts)


@given(texts, texts)
def test_joining_may_be_done_in_steps(first, second):
    assert join_texts([join_texts(first), *second]) == join_texts([*first, *second])


def test_languages_are_listed_in_order_of_first_use():
    languages = ["Chinese", None, "English", "Chinese"]
    segments = tuple(Segment(i, i + 1, "x", language) for i, language in enumerate(languages))
    transcript = Transcript("x x x x", 4.0, segments)
    assert transcript.languages == ("Chinese", "English")
    assert transcript.language == "Chinese"


def test_silence_has_no_language():
    assert SILENT.languages == ()
    assert SILENT.language is None


def test_txt_is_the_text_and_a_newline():
    assert FORMATS["txt"](MIXED) == "Hello world. 你好。\n"


def test_json_holds_what_was_measured_and_nothing_else():
    assert json.loads(FORMATS["json"](MIXED)) == {
        "text": "Hello world. 你好。",
        "language": "English",
        "languages": ["English", "Chinese"],
        "duration": 6.5,
        "segments": [
            {
                "start": 0.0,
                "end": 2.5,
                "text": "Hello world.",
                "language": "English",
                "avg_logprob": -0.25,
            },
            {"start": 2.5, "end": 4.0, "text": ""},
            {
                "start": 4.0,
                "end": 6.5,
                "text": "你好。",
                "language": "Chinese",
                "words": [
                    {"word": "你", "start": 4.1, "end": 4.4},
                    {"word": "好", "start": 4.4, "end": 4.7},
                ],
            },
        ],
        "warnings": ["clip at 4.0 s reached its token limit"],
    }


def test_json_has_the_same_keys_for_silence():
    silent, mixed = (json.loads(FORMATS["json"](t)) for t in (SILENT, MIXED))
    assert list(silent) == list(mixed)
    assert silent["language"] is None


def test_json_is_readable_text():
    assert "你好。" in FORMATS["json"](MIXED)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_ends_with_one_newline(name):
    assert FORMATS[name](MIXED).endswith("\n")
    assert not FORMATS[name](MIXED).endswith("\n\n")
