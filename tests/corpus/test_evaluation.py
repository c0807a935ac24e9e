# SPDX-License-Identifier: Apache-2.0
"""Error rates: which texts count as equal, and how errors are counted."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.audio import DATA, heldout
from support.checks import MOST_ERRORS

from qwen3_asr_vllm.cli import entry as cli
from qwen3_asr_vllm.corpus.evaluation import Pair, evaluate, normalizer


def score(reference, hypothesis, language):
    (found,) = evaluate([Pair(reference, hypothesis, language, 1.0)])
    return found


SAME = [
    ("English", "Mr. Smith's colour won't change.", "mister smith's color will not change"),
    ("English", "twenty-one pounds", "21 pounds"),
    ("German", "Ja, gewiß: «Ämter»!", "ja gewiß ämter"),
    ("Chinese", "广州今天，天气很好。", "广州 今天天气很好"),
    ("Thai", "สวัสดีครับ", "สวัสดี ครับ"),
]


@pytest.mark.parametrize(("language", "one", "other"), SAME)
def test_writing_is_not_an_error(language, one, other):
    assert score(one, other, language).cer == 0
    assert score(one, other, language).wer in (0, None)


def test_vowels_of_thai_and_hindi_are_kept():
    assert score("น้ำ", "นา", "Thai").cer > 0
    assert normalizer("Hindi")("नमस्ते, दुनिया।") == "नमस्ते दुनिया"


def test_rates_pool_all_words_of_a_language():
    pairs = [
        Pair(
            "the train to London leaves today", "The train to London leaves today.", "English", 2.0
        ),
        Pair("red green", "red blue blue", "English", 1.0),
        Pair("你好", "你号", "Chinese", 1.0),
        Pair("", "thank you", "English", 5.0),
        Pair("", "", "English", 5.0),
    ]
    chinese, english = evaluate(pairs)
    assert (english.words, english.wer, english.hallucinated) == (8, 2 / 8, 1)
    assert (english.recordings, english.seconds) == (4, 13.0)
    assert (chinese.wer, chinese.cer) == (None, 0.5)


def edits(one, other):
    """Levenshtein's distance, by the book."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


words = st.lists(st.sampled_from("ab cd ef gh".split()), min_size=1, max_size=6)


@given(words, words)
def test_wer_is_the_fewest_edits_per_word(reference, hypothesis):
    expected = edits(reference, hypothesis) / len(reference)
    wer = score(" ".join(reference), " ".join(hypothesis), "German").wer
    assert wer == pytest.approx(expected)


def test_pred_text_is_scored_without_a_model(tmp_path, capsys):
    rows = [
        {"audio_filepath": "a.wav", "text": "red green", "pred_text": "red blue", "lang": "en"},
        {"audio_filepath": "b.wav", "text": "你好", "pred_text": "你号", "lang": "zh-CN"},
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["eval", str(path), "--pred_text", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rates = [(s["language"], s["wer"], s["cer"]) for s in document["scores"]]
    assert rates[0] == ("Chinese", None, 0.5) and rates[1][:2] == ("English", 0.5)
    assert cli.main(["eval", str(path), "--pred-text"]) == 0
    assert "English" in (table := capsys.readouterr().out) and "50.00" in table
    path.write_text(json.dumps({"audio_filepath": "a.wav", "text": "red"}) + "\n")
    assert cli.main(["eval", str(path), "--pred-text"]) == 2
    assert "a.wav: its manifest has no pred_text" in capsys.readouterr().err
    path.write_text(json.dumps({"audio_filepath": "a.wav"}) + "\n")
    assert cli.main(["eval", str(path)]) == 2
    assert "has no reference text" in capsys.readouterr().err


@pytest.mark.vllm
def test_a_model_is_scored_on_recordings(server, capsys):
    manifest = str(DATA / "heldout" / "manifest.jsonl")
    assert cli.main(["eval", manifest, "--server", server.url, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    scores = {score["language"]: score for score in document["scores"]}
    assert scores.keys() == {*MOST_ERRORS, "unknown"}  # of recordings without speech
    for language, most in MOST_ERRORS.items():
        rate = "cer" if language == "Chinese" else "wer"
        assert scores[language][rate] < most
    assert sum(score["recordings"] for score in scores.values()) == len(heldout())
    assert document["failed"] == 0 and document["audio_s_per_s"] > 0
