# SPDX-License-Identifier: Apache-2.0
"""Content types of audio without a header."""

import pytest

from qwen3_asr_vllm.media.containers import RawAudio, raw_audio, raw_audio_of_name


@pytest.mark.parametrize(
    ("media_type", "expected"),
    [
        ("audio/basic", RawAudio("pcm_mulaw", 8_000, 1)),
        ("audio/PCMU; rate=16000", RawAudio("pcm_mulaw", 16_000, 1)),
        ("audio/pcma", RawAudio("pcm_alaw", 8_000, 1)),
        ("audio/x-mulaw", RawAudio("pcm_mulaw", 8_000, 1)),
        ("audio/L16;rate=44100;channels=2", RawAudio("pcm_s16be", 44_100, 2)),
        ("audio/pcm; rate=24000", RawAudio("pcm_s16le", 24_000, 1)),
        ("audio/G729", RawAudio("g729", 8_000, 1)),
        ("audio/mpeg", None),
        ("application/octet-stream", None),
        ("", None),
        (None, None),
    ],
)
def test_content_types_describe_raw_audio(media_type, expected):
    assert raw_audio(media_type) == expected


@pytest.mark.parametrize(
    ("media_type", "message"),
    [
        ("audio/L16", "states no rate; send audio/l16;rate=16000"),
        ("audio/L16;rate=fast", "audio/L16;rate=fast: rate and channels are whole numbers"),
        ("audio/L16;rate=7", "7 Hz; allowed are 1000 to 768000 Hz"),
        ("audio/L16;rate=16000;channels=0", "0 channels; allowed are 1 to 64"),
    ],
)
def test_wrong_raw_types_name_the_missing_part(media_type, message):
    with pytest.raises(ValueError, match=message):
        raw_audio(media_type)


def test_suffixes_of_g711_and_g729_are_known():
    assert raw_audio_of_name("call.ulaw") == RawAudio("pcm_mulaw", 8_000, 1)
    assert raw_audio_of_name("call.AL") == RawAudio("pcm_alaw", 8_000, 1)
    assert raw_audio_of_name("call.wav") is None


@pytest.mark.parametrize(
    "name",
    "a.mts a.m2ts a.weba a.mxf a.m4r a.opus a.qta a.awb a.gsm a.voc a.w64 a.sph a.ul".split(),
)
def test_folders_are_searched_for_decodable_files(tmp_path, name):
    from qwen3_asr_vllm.corpus.sources import find_recordings

    (tmp_path / name).touch()
    (recording,) = find_recordings([str(tmp_path)])
    assert recording.name == "a"
