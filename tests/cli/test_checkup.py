# SPDX-License-Identifier: Apache-2.0
"""``qwen3-asr doctor --model``: what it finds in a good model, and in one with random weights."""

from __future__ import annotations

import numpy as np
import pytest
from support.checkpoints import CHECKPOINT
from support.engines import engine

from qwen3_asr_vllm import cli
from qwen3_asr_vllm.cli import checkup
from qwen3_asr_vllm.cli.checkup import CHECKS, error_rate, sentences


def test_half_a_minute_of_speech_ships():
    spoken = sentences()
    assert {s.language for s in spoken} == {"English", "German", "Chinese"}
    assert 28 < sum(len(s.waveform) for s in spoken) / 16_000 < 35
    for sentence in spoken:
        duration = len(sentence.waveform) / 16_000
        times = [time for _, *span in sentence.words for time in span]
        assert times == sorted(times) and 0 < times[0] and times[-1] < duration
        assert all(sentence.text[start].isalpha() for start, *_ in sentence.words)


@pytest.mark.parametrize(
    ("reference", "text", "rate"),
    [
        ("Where is Köln?", "where is köln", 0),
        ("Where is it?", "Where was it?", 2 / 9),
        ("你好。", "你", 1 / 2),
        ("", "", 0),
        ("ab", "", 1),
    ],
)
def test_rates_are_edits_per_character(reference, text, rate):
    assert error_rate(reference, text) == pytest.approx(rate)


def test_a_model_that_does_not_load_ends_it(monkeypatch, capsys):
    def load(checkpoint, options):
        raise ValueError(f"{checkpoint} has no config.json")

    monkeypatch.setattr(checkup, "load_model", load)
    assert cli.main(["doctor", "--model", "some/model"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "PROBLEM  model: some/model does not load: some/model has no config.json"


def test_one_failed_check_is_an_exit_code(monkeypatch, capsys):
    def fails(model):
        raise RuntimeError("3 s of silence give the text 'Hm.'")

    monkeypatch.setattr(checkup, "CHECKS", {"silence": fails, "texts": lambda model: "fine"})
    monkeypatch.setattr(checkup, "load_model", lambda *_: Loaded)
    assert cli.main(["doctor", "--model", "some/model", "--dtype", "float32"]) == 1
    _, silence, texts = capsys.readouterr().out.splitlines()
    assert silence == "PROBLEM  silence: 3 s of silence give the text 'Hm.'"
    assert texts == "ok       texts: fine"


class Loaded:
    class llm:
        class model_config:
            dtype = "float32"


@pytest.mark.vllm
@pytest.mark.parametrize("name", CHECKS)
def test_the_tiny_checkpoint_passes(model, name):
    found = CHECKS[name](model)
    assert "not compared" not in found and found[-1] != ":"


@pytest.mark.vllm
def test_random_weights_fail_the_checks():
    with engine(CHECKPOINT, start=checkup.Qwen3ASR, in_process=True, load_format="dummy") as made:
        for name, problem in {
            "texts": "of the characters in English are wrong",
            "languages": "12 of 12 are wrong",
            "transformers": "log-probabilities differ by .*bound 0.01",
        }.items():
            with pytest.raises(RuntimeError, match=problem):
                CHECKS[name](made)


def test_wrong_word_times_are_a_problem():
    class Aligner:
        def align(self, waveform, text, *, language):
            from qwen3_asr_vllm import Segment, Transcript, Word

            late = [Word(word, 9.0, 9.5) for word in text.split(" ")]
            return Transcript(text, 10.0, (Segment(0.0, 10.0, text, words=tuple(late)),))

    class Model:
        aligner = Aligner()

    with pytest.raises(RuntimeError, match=r"ms off in the mean of \d+ words \(bound 100 ms\)"):
        CHECKS["word times"](Model())


def test_text_from_silence_is_a_problem():
    class Model:
        def transcribe(self, waveform):
            class Found:
                text = "" if not np.any(waveform) else "Thank you."

            return Found()

    with pytest.raises(RuntimeError, match="3 s of noise give the text 'Thank you.'"):
        CHECKS["silence"](Model())
