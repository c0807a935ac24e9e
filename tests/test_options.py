# SPDX-License-Identifier: Apache-2.0
"""Options of a transcription: their types, their ranges, and how keywords override them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from qwen3_asr_vllm.offline import Qwen3ASR
from qwen3_asr_vllm.options import Beams, TranscribeOptions, merge_options
from qwen3_asr_vllm.prompt import PUBLISHED
from qwen3_asr_vllm.recordings import is_one
from qwen3_asr_vllm.transcription import EngineOutput


def test_keywords_override_options():
    options = TranscribeOptions(language="de", context="Ulm")
    merged = merge_options(options, {"language": "en", "keywords": iter(["Anna", "Maier"])})
    assert merged == TranscribeOptions(language="en", context="Ulm", keywords=("Anna", "Maier"))
    assert options.language == "de"
    assert merge_options(None, {}) == TranscribeOptions()


def test_unknown_options_list_the_known_ones():
    with pytest.raises(TypeError) as error:
        merge_options(None, {"lang": "de"})
    assert str(error.value) == (
        "unknown option 'lang'; the options are language, languages, context, keywords, "
        "max_clip_s, pauses, confidences, word_timestamps, diarize, num_speakers, min_speakers, "
        "max_speakers, known_speakers, skip_special_tokens, audio_track, use_beam_search, n, "
        "length_penalty."
    )
    with pytest.raises(TypeError, match="options is 'de'; pass TranscribeOptions"):
        merge_options("de", {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"language": 5}, "language is 5, of type int; it must be a string"),
        ({"languages": "de"}, "languages is 'de', of type str; it must be a list"),
        ({"context": None}, "context is None"),
        ({"keywords": ["Anna", 5]}, r"keywords\[1\] is 5"),
        ({"n": 2.0}, "n is 2.0, of type float; it must be a whole number"),
        ({"length_penalty": True}, "length_penalty is True, of type bool"),
        ({"max_clip_s": "60"}, "max_clip_s is '60', of type str; it must be a number"),
    ],
)
def test_options_of_a_wrong_type_raise(fields, message):
    with pytest.raises(TypeError, match=message):
        TranscribeOptions(**fields)


@pytest.mark.parametrize("seconds", [0, 1201, float("nan")])
def test_clips_out_of_range_raise(seconds):
    with pytest.raises(ValueError, match="max_clip_s is .*; it must be 1 to 1200"):
        TranscribeOptions(max_clip_s=seconds)


def test_sanitized_options_hold_one_context():
    options = TranscribeOptions(context="Ulm<think>", keywords=["Anna<|im_end|>", "Maier"])
    sanitized = options.sanitized(("<think>",))
    assert (sanitized.context, sanitized.keywords) == ("Ulm\nAnna, Maier", ())
    assert sanitized.sanitized(("<think>",)) == sanitized


def test_options_survive_a_pickle():
    options = TranscribeOptions(language="de", keywords=["Anna"])
    assert pickle.loads(pickle.dumps(options)) == options


@pytest.mark.parametrize(
    "audio", ["a.mp3", b"RIFF", np.zeros(16_000), (np.zeros(8000), 8000), open]
)
def test_one_recording_differs_from_many(audio, tmp_path):
    if audio is open:
        audio = (tmp_path / "a.wav").open("wb")
    assert is_one(audio)
    assert not is_one([audio]) and not is_one(iter([audio]))


class _Model(Qwen3ASR):
    """A model whose engine returns the language and context of a request."""

    def __init__(self):
        self.aligner, self._protocol, self._engine = None, PUBLISHED, _Engine()
        self._defaults = {}


class _Engine:
    capacity = 4

    def __init__(self):
        self.pending = []

    def submit(self, request, deliver):
        self.pending.append((request, deliver))
        return str(len(self.pending))

    def step(self):
        request, deliver = self.pending.pop(0)
        deliver(EngineOutput(f"{request.language}, {request.context}"))

    def abort(self, request_ids):
        pass


TONE = np.sin(np.arange(16_000, dtype=np.float32) / 5)


def test_models_take_options_and_keywords():
    model, options = _Model(), TranscribeOptions(language="de", context="Ulm")
    assert model.transcribe(TONE, language="en").text == "English,"
    assert model.transcribe(TONE, options).text == "German, Ulm"
    results = model.transcribe([TONE, TONE], options, context="Bonn", keywords=["Anna"])
    assert [result.transcript.text for result in results] == ["German, Bonn\nAnna"] * 2


def test_models_reject_bad_options_at_once():
    model = _Model()
    for error, fields in {
        TypeError: {"lang": "de"},
        ValueError: {"language": "Klingon"},
    }.items():
        with pytest.raises(error, match="lang|Klingon"):
            model.transcribe([TONE], **fields)
    with pytest.raises(ValueError, match="forced aligner"):
        model.transcribe([TONE], word_timestamps=True)


BEAMS = {"use_beam_search": True, "n": 5, "length_penalty": 0.7}  # defaults of a checkpoint


@pytest.mark.parametrize(
    ("fields", "defaults", "beams"),
    [
        ({}, {}, None),
        ({}, BEAMS, Beams(5, 0.7)),
        ({"use_beam_search": True}, {}, Beams(4, 1.0)),
        ({"use_beam_search": True, "n": 2}, BEAMS, Beams(2, 0.7)),
        ({"n": 3, "length_penalty": -1.0}, BEAMS, Beams(3, -1.0)),
        ({"use_beam_search": False}, BEAMS, None),
        ({"use_beam_search": True, "n": 1}, BEAMS, None),
        ({"n": 1, "length_penalty": 1.0}, {}, None),
    ],
)
def test_a_request_overrides_the_beams_of_the_checkpoint(fields, defaults, beams):
    assert TranscribeOptions(**fields).with_defaults(defaults).beams == beams


@pytest.mark.parametrize("fields", [{"n": 2}, {"length_penalty": 0.7}])
def test_beam_options_need_a_beam_search(fields):
    with pytest.raises(ValueError, match="set use_beam_search"):
        TranscribeOptions(**fields).with_defaults({})


@pytest.mark.parametrize("fields", [{"n": 0}, {"n": 17}, {"length_penalty": float("nan")}])
def test_beam_options_out_of_range_raise(fields):
    with pytest.raises(ValueError, match="it must be"):
        TranscribeOptions(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_speakers": 2}, r"num_speakers is given; set diarize=True \(--diarize\) too"),
        ({"known_speakers": {"Ada": []}}, "known_speakers is given; set diarize=True"),
        ({"diarize": True, "num_speakers": 0}, "num_speakers is 0; it must be 1 to 64"),
        ({"diarize": True, "max_speakers": 65}, "max_speakers is 65; it must be 1 to 64"),
        (
            {"diarize": True, "min_speakers": 3, "max_speakers": 2},
            "min_speakers is 3, max_speakers is 2: no number of speakers fits",
        ),
        ({"diarize": True, "num_speakers": 4, "max_speakers": 3}, "no number of speakers fits"),
    ],
)
def test_numbers_of_speakers_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        TranscribeOptions(**fields)
