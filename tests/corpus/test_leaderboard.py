# SPDX-License-Identifier: Apache-2.0
"""Scores of the Open ASR Leaderboard; expected texts and numbers follow its rules by hand."""

from __future__ import annotations

import json

import pytest

from qwen3_asr_vllm.cli import entry as cli
from qwen3_asr_vllm.cli import evaluate
from qwen3_asr_vllm.corpus.leaderboard import is_scored, normalizer, score, write_manifest
from qwen3_asr_vllm.recordings import Result
from qwen3_asr_vllm.transcript import Transcript

NORMALISED = [
    # contractions: 's is "is" after a pronoun only
    ("I won't; she's been gonna", "i will not she has been going to"),
    ("The company's CEO, who's kinda late", "the company s ceo who is kinda late"),
    ("'Cause I dunno, y'all can't", "cause i dunno you all can not"),
    ("Mr. and Mrs. Smith, St. James", "mister and missus smith saint james"),
    # numbers and currency
    ("Twenty-one thousand five hundred and six dollars", "$21506"),
    ("three and a half million", "3500000"),
    ("3 and a half million", "3 and a half 1000000"),
    ("$3 and seven cents, £0.50, €5.", "$3.07 ¢50 €5"),
    ("9.5 percent of 1,000; 20 per cent", "9.5% of 1000 20%"),
    ("minus five, the 1960s, twenty first", "-5 the 1960s 21st"),
    ("one of the ones: one two one and double oh seven", "one of the ones 121 and 007"),
    # "oh" is a digit among digits only
    ("oh dear, nineteen oh five, ooooh my", "oh dear 1905 oh my"),
    ("oh seven nine eight is oh seven men, four oh", "0798 is oh 7 men 4 oh"),
    ("two hundred and oh, minus oh, two point oh", "200 oh -oh 2 oh"),
    # clock times
    ("half past two, quarter to one, ten minutes before 0", "2 30 12 45 23 50"),
    ("five o'clock, 10:05 and 7:00", "5 10 5 and 7"),
    ("half past 24, 12:60, 1.10:20", "half past 24 12 60 one.10 20"),
    # fillers and brackets
    ("Um, mhm, uhhh-huh... [laughter] (noise) <unk> yes, ah-ha!", "yes"),
    ("human ermine hummus ahead", "human ermine hummus ahead"),
    # British spelling and names
    (
        "Colour, archaeology and snowploughs in the flyer",
        "color archeology and snowplows in the flier",
    ),
    ("travelogue travelog cancellation cancelation", "travelog travelog cancelation cancelation"),
    ("Stephen, Kathryn and Muhammad MacDonald", "steven catherine and mohammed mcdonald"),
    # compounds and acronyms
    ("e-mail, Wi-Fi, all right, O.K., 3 p.m., et cetera", "email wifi alright okay 3 pm etc"),
    ("the B.B.C. and I, a man, or 5 G or A.I.D.S.", "the bbc and i a man or 5g or aids"),
    # accents, symbols, nothing
    ("Café naïve — straße & co. 5 %, %", "cafe naive strasse co 5"),
    ("...", ""),
    ("", ""),
]


@pytest.mark.parametrize(("text", "expected"), NORMALISED)
def test_english_is_normalised_as_documented(text, expected):
    assert normalizer()(text) == expected


ROWS = [  # text, output, seconds, and how many words, insertions, deletions, substitutions
    ("It's five o'clock, Mr. Smith.", "It is 5 o'clock, Mister Smith", 2.0, (5, 0, 0, 0)),
    ("The white paper cost twenty dollars", "the whitepaper cost $20", 3.5, (5, 0, 0, 0)),
    ("an airline", "an air line", 1.0, (2, 0, 0, 0)),
    ("Um, I don't know", "I do not no", 1.5, (4, 0, 0, 1)),
    ("", "thank you", 1.0, (0, 2, 0, 0)),
    ("[noise] hello there", "", 1.0, (2, 0, 2, 0)),
    ("Colour and flavour", "color or flavors", 2.0, (3, 0, 0, 2)),
]


def leaderboard_row(text, pred_text, duration, time=0.1, **more):
    return {"duration": duration, "time": time, "text": text, "pred_text": pred_text, **more}


def manifest(path, rows):
    rows = [{"audio_filepath": f"sample_{n}", **row} for n, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("row", ROWS)
def test_errors_of_a_row_are_exact(row):
    *fields, (words, inserted, deleted, replaced) = row
    found = score(
        "m", [leaderboard_row(*fields), leaderboard_row("ten words " * 5, "ten words " * 5, 1)]
    )
    assert (found.insertions, found.deletions, found.substitutions) == (inserted, deleted, replaced)
    assert found.wer == round(100 * (inserted + deleted + replaced) / (words + 10), 2)


def test_manifests_are_scored_to_the_digit(tmp_path, capsys):
    timed = manifest(tmp_path / "a.jsonl", [leaderboard_row(*row[:3]) for row in ROWS])
    untimed = manifest(tmp_path / "b.jsonl", [leaderboard_row("red green blue", "red", 1.0, None)])
    assert cli.main(["eval", timed, untimed, "--open-asr", "--pred-text", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    first, second = document["scores"]
    assert first == {
        "manifest": timed,
        "recordings": 7,
        "wer": 33.33,  # 7 of 21
        "insertions": 2,
        "deletions": 2,
        "substitutions": 3,
        "audio_s": 12.0,
        "inference_s": pytest.approx(0.7),
        "rtfx": 17.1429,
    }
    assert (second["wer"], second["rtfx"]) == (66.67, None)
    assert (document["mean_wer"], document["rtfx"]) == (50.0, None)
    assert cli.main(["eval", timed, untimed, "--open-asr", "--pred-text"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["33.33", "2", "2", "3", "17.14", "7", timed]
    assert table[3].split()[:2] == ["50.00", "-"]  # the mean


def test_only_words_where_none_belong(tmp_path, capsys):
    path = manifest(tmp_path / "a.jsonl", [leaderboard_row("", "thank you", 1.0)])
    assert cli.main(["eval", path, "--open-asr", "--pred-text", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"][0]["wer"] is None
    assert score("m", [leaderboard_row("", "thank you", 1.0)]).wer == float("inf")
    assert score("m", [leaderboard_row("um", "", 1.0)]).wer == 0


def test_parts_are_scored_as_one_recording():
    parts = [
        leaderboard_row("white paper now", "paper", 2.0, parent_id="x", chunk_index=1),
        leaderboard_row("white paper now", "white", 3.0, parent_id="x", chunk_index=0),
        leaderboard_row("white paper now", "", 1.0, parent_id="x", chunk_index=2),
    ]
    found = score("m", parts)
    assert (found.recordings, found.wer, found.deletions) == (1, 33.33, 1)
    assert found.rtfx == 20.0  # 6 s in 0.3 s
    with pytest.raises(ValueError, match=r"x: its parts have chunk_index \[0, 2\]"):
        score("m", parts[1:])


def test_other_languages_are_rejected(tmp_path, capsys):
    path = manifest(tmp_path / "a.jsonl", [leaderboard_row("ja", "ja", 1.0, language="de")])
    assert cli.main(["eval", path, "--open-asr", "--pred-text"]) == 2
    assert "is in German; --open-asr scores English only" in capsys.readouterr().err


def test_a_null_output_has_no_words(tmp_path, capsys):
    path = manifest(tmp_path / "a.jsonl", [leaderboard_row("yes", None, 1.0)])
    assert cli.main(["eval", path, "--open-asr", "--pred-text", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["scores"]
    assert (found["deletions"], found["insertions"]) == (1, 0)


def test_a_model_is_scored_per_manifest(tmp_path, capsys, monkeypatch):
    def transcribe(recordings, *, in_order):
        texts = ["yes", "no"]
        for index in (1, 0):  # as they complete
            transcript = Transcript(texts[index], 30.0)
            yield Result(index, recordings[index], transcript=transcript)

    monkeypatch.setattr(evaluate, "transcriber", lambda args, rest: transcribe)
    paths = [
        manifest(tmp_path / f"{text}.jsonl", [{"text": text, "duration": 1, "time": 1}])
        for text in ("yes", "maybe")
    ]
    assert cli.main(["eval", *paths, "--open-asr", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(each["wer"], each["audio_s"]) for each in document["scores"]] == [(0, 30), (100, 30)]
    assert document["rtfx"] > 1  # of the time measured here, not that of the rows


def test_empty_and_ignored_references_are_left_out():
    assert is_scored("Um, yes")
    assert not is_scored("Um...")
    assert not is_scored("Ignore time segment in scoring!")


def test_manifests_are_named_as_the_leaderboards(tmp_path):
    row = leaderboard_row("Ja ß", "ja", 1.5) | {"audio_filepath": "a.wav", "other": 1}
    where = {"model": "Qwen/Qwen3-ASR-0.6B", "dataset": "hf-audio/open-asr-leaderboard"}
    path = write_manifest(tmp_path / "results", [row], **where, name="ami", split="test")
    assert path.name == (
        "MODEL_Qwen-Qwen3-ASR-0.6B_DATASET_hf-audio-open-asr-leaderboard_ami_test.jsonl"
    )
    assert path.read_text("utf-8") == (
        '{"audio_filepath": "a.wav", "duration": 1.5, "time": 0.1, '
        '"text": "Ja ß", "pred_text": "ja"}\n'
    )
