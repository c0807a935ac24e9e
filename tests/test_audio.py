# SPDX-License-Identifier: Apache-2.0
"""Every format becomes the waveform that FFmpeg finds in it too; its clips add up to it."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.checks import lines_run

from qwen3_asr_vllm import audio
from qwen3_asr_vllm.audio import PcmStream, load_audio, load_channels
from qwen3_asr_vllm.media import blocks, sndfile
from qwen3_asr_vllm.media.containers import RawAudio
from qwen3_asr_vllm.pauses import (
    Pauses,
    halve_at_silence,
    is_silent,
    split_at_pauses,
    split_at_silence,
)
from qwen3_asr_vllm.peaks import check_waveform

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")

FORMATS = {  # file name: more options of ffmpeg
    "s16.wav": [],
    "s24.wav": ["-c:a", "pcm_s24le"],
    "float.wav": ["-c:a", "pcm_f32le"],
    "mulaw.wav": ["-c:a", "pcm_mulaw", "-ar", "8000"],
    "8khz.wav": ["-ar", "8000"],
    "mono.wav": ["-ac", "1", "-ar", "16000"],
    "six_channels.wav": ["-ac", "6"],
    "t.flac": [],
    "t.aiff": [],
    "t.ogg": [],
    "t.opus": [],
    "t.mp3": [],
    "44khz.mp3": ["-ar", "44100"],
    "t.m4a": [],
    "t.mp4": [],
    "t.aac": [],
    "t.webm": [],
    "t.mkv": [],
}


def voice(seconds: float, rate: int, *, channels: int = 1) -> np.ndarray:
    """A glide from 150 to 2000 Hz that swells and fades, (samples, channels) float32."""
    t = np.arange(round(seconds * rate)) / rate
    glide = np.sin(2 * np.pi * (150 * t + 925 * t**2 / seconds)) * np.sin(np.pi * 2 * t) ** 2
    return (0.3 * glide[:, None] * np.linspace(1, 0.4, channels)).astype(np.float32)


def encode(path: Path, *options: str, seconds: float = 3.0) -> Path:
    """A 48 kHz stereo recording in the format of the path's name."""
    wav = io.BytesIO()
    soundfile.write(wav, voice(seconds, 48_000, channels=2), 48_000, "FLOAT", format="WAV")
    command = ["ffmpeg", "-v", "error", "-y", "-i", "-", *options, str(path)]
    subprocess.run(command, input=wav.getvalue(), check=True)
    return path


def pipe(path: Path, *options: str, seconds: float = 3.0) -> Path:
    """The same through a pipe, so that the header cannot state a length."""
    encode(path.with_suffix(".wav"), seconds=seconds)
    command = ["ffmpeg", "-v", "error", "-i", str(path.with_suffix(".wav")), *options, "-"]
    path.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
    return path


def ffmpeg_decode(path: Path) -> np.ndarray:
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-ar", "16000", "-c:a", "pcm_f32le"]
    wav = subprocess.run([*command, "-f", "wav", "-"], check=True, capture_output=True).stdout
    return soundfile.read(io.BytesIO(wav), dtype="float32", always_2d=True)[0].mean(axis=1)


def wav_bytes(samples: np.ndarray, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, "FLOAT", format="WAV")
    return file.getvalue()


# ---- decoding ----


@needs_ffmpeg
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_decodes_like_ffmpeg(tmp_path, name):
    path = encode(tmp_path / name, *FORMATS[name])
    waveform, reference = load_audio(path), ffmpeg_decode(path)
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert abs(len(waveform) - len(reference)) <= 0.05 * 16_000
    length = min(len(waveform), len(reference))
    error = waveform[:length] - reference[:length]
    assert np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(reference**2))


@needs_ffmpeg
@pytest.mark.parametrize("name", ["t.wav", "t.m4a"])
def test_all_kinds_of_source_are_equal(tmp_path, name):
    class Pipe(io.BytesIO):
        def seek(self, *_):
            raise io.UnsupportedOperation("seek")

    path = encode(tmp_path / name)
    waveform, data = load_audio(path), path.read_bytes()
    file = io.BytesIO(data)
    file.seek(100)
    for source in (str(path), data, bytearray(data), file, Pipe(data)):
        np.testing.assert_array_equal(load_audio(source), waveform)
    assert not file.closed


@needs_ffmpeg
def test_wrong_names_are_ignored(tmp_path):
    path = encode(tmp_path / "t.m4a")
    waveform = load_audio(path)
    for name in ("t.wav", "t.raw", "t"):
        path = path.rename(tmp_path / name)
        np.testing.assert_array_equal(load_audio(path), waveform)


@needs_ffmpeg
@pytest.mark.parametrize("name", ["t.wav", "t.flac", "t.ogg", "t.opus", "t.mp3"])
def test_decoding_in_blocks_is_decoding_at_once(tmp_path, monkeypatch, name):
    path = encode(tmp_path / name)
    whole = load_audio(path)
    monkeypatch.setattr(sndfile, "BLOCK_VALUES", 5_000)
    np.testing.assert_array_equal(load_audio(path), whole)


@needs_ffmpeg
@pytest.mark.parametrize("name", ["t.flac", "t.webm", "t.mp3"])
def test_pipes_without_length_are_read(tmp_path, name):
    path = pipe(tmp_path / name, "-f", name.removeprefix("t."))
    assert len(load_audio(path)) == pytest.approx(3 * 16_000, abs=800)


# ---- downmix and resampling ----


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(2, 50), st.just(2)),
        elements=st.floats(-1, 1, width=32),
    )
)
def test_stereo_downmix_is_the_exact_mean(stereo):
    assume(np.square(stereo.sum(axis=1)).sum() > 0.2 * np.square(stereo).sum())  # none cancels
    np.testing.assert_array_equal(load_audio(stereo), stereo.mean(axis=1))


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_block_resampling_is_bit_identical(monkeypatch, rate):
    signal = voice(2.0, rate)[:, 0]
    reference = soxr.resample(signal, rate, 16_000, quality="HQ")
    np.testing.assert_array_equal(load_audio((signal, rate)), reference)
    monkeypatch.setattr(sndfile, "BLOCK_VALUES", 1_000)
    np.testing.assert_array_equal(load_audio(wav_bytes(signal, rate)), reference)


def test_resampling_keeps_pitch_without_aliasing():
    t48, t16 = np.arange(48_000) / 48_000, np.arange(16_000) / 16_000
    inner = slice(1_000, -1_000)  # a tone that starts at once rings at its ends
    kept = load_audio((np.sin(2 * np.pi * 1_000 * t48), 48_000))
    np.testing.assert_allclose(kept[inner], np.sin(2 * np.pi * 1_000 * t16)[inner], atol=1e-4)
    gone = load_audio((np.sin(2 * np.pi * 10_000 * t48), 48_000))
    assert np.abs(gone[inner]).max() < 1e-4


# ---- arrays ----


def test_waveform_arrays_are_not_copied():
    waveform = voice(1.0, 16_000)[:, 0]
    assert np.shares_memory(load_audio(waveform), waveform)


def test_the_longer_array_axis_is_time():
    stereo = voice(1.0, 16_000, channels=2)
    np.testing.assert_array_equal(load_audio(stereo.T), load_audio(stereo))


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_integers_scale_to_one(dtype):
    lowest = np.iinfo(dtype).min
    waveform = load_audio(np.array([lowest, lowest // 2, 0, -(lowest // 2)], dtype))
    np.testing.assert_array_equal(waveform, np.float32([-1, -0.5, 0, 0.5]))


def test_array_rates_are_pairs_or_keywords():
    signal = voice(1.0, 8_000)[:, 0]
    by_keyword = load_audio(signal, sampling_rate=8_000)
    np.testing.assert_array_equal(load_audio((signal, 8_000)), by_keyword)
    assert len(by_keyword) == 16_000


# ---- what is refused, and how ----

BAD = {
    "no bytes": (b"", "empty: the file has 0 bytes"),
    "no samples": (wav_bytes(np.zeros(0)), "empty: it holds no samples"),
    "text": (b"Dear Sir or Madam, I have no sound", "not audio"),
    "half a header": (wav_bytes(np.zeros(99))[:20], "not audio"),
    "NaN": (wav_bytes(np.array([0.0, np.nan, 0.0])), "NaN or infinity"),
    "infinity": (wav_bytes(np.array([0.0, np.inf, -np.inf])), "NaN or infinity"),
    "NaN in the second second": (np.array([0.0] * 24_000 + [np.nan]), r"\(nan at 1\.500 s\)"),
    "one loud sample": (
        wav_bytes(np.array([0.0] * 8_000 + [1e30])),
        r"of 1e\+30 at 0\.500 s.*clean",
    ),
    "overflow": (np.array([[1e300, -1e300]] * 9), "NaN or infinity"),
    "overflow of the mean": (np.full((9, 2), 3e38, np.float32), r"of 3e\+38 at 0\.000 s"),
    "infinity in a channel at another rate": (
        (np.array([[0.0, 0.0]] * 12_000 + [[0.0, -np.inf]] + [[0.0, 0.0]] * 9), 8_000),
        r"\(-inf at 1\.500 s\)",
    ),
    "more than integers": (np.array([0.0, -(2.0**32)]), "of -4.29497e\\+09 at 0.000 s"),
    "empty array": (np.zeros(0, np.float32), "empty: it holds no samples"),
    "NaN array": (np.array([np.nan] * 9), "NaN or infinity"),
    "three axes": (np.zeros((2, 2, 2)), r"shape \(2, 2, 2\); pass \(samples,\)"),
    "bytes array": (np.zeros(9, np.uint8), "array of uint8; pass float"),
    "no rate": ((np.zeros(9), -1), "rate of -1 Hz; allowed are 1000 to 768000"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_audio_raises_value_errors_with_reasons(case):
    source, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        load_audio(source)


@pytest.mark.parametrize("full_scale", [128, 32_768, 2**23, 2**31])
def test_integers_stored_as_float_are_scaled(full_scale):
    signal, warnings = voice(1.0, 16_000)[:, 0], []
    scaled = load_audio(wav_bytes(full_scale * signal), on_warning=warnings.append)
    np.testing.assert_allclose(scaled, signal / np.abs(signal).max(), atol=1e-6)
    peak = full_scale * signal[np.abs(signal).argmax()]
    assert len(warnings) == 1 and f"audio peaks at {peak:g} at 0." in warnings[0]


@pytest.mark.parametrize(("value", "rate"), [(9, 16_000), (-1e4, 48_000), (2e9, 16_000)])
def test_broken_samples_keep_the_loudness(value, rate):
    signal, warnings = voice(1.0, rate)[:, 0], []
    expected = load_audio((signal, rate))
    signal = signal.copy()
    signal[rate // 2] = value
    waveform = load_audio(wav_bytes(signal, rate), on_warning=warnings.append)
    assert np.abs(waveform).max() == 1
    np.testing.assert_allclose(waveform[:7_000], expected[:7_000], atol=1e-3)
    assert len(warnings) == 1 and "broken samples, such as" in warnings[0]


def test_each_channel_is_scaled_with_a_warning():
    channels, warnings = voice(1.0, 16_000, channels=2) * [1, 32_768], []
    plain, scaled = load_channels(wav_bytes(channels), 2, on_warning=warnings.append)
    np.testing.assert_allclose(plain, channels[:, 0], atol=1e-6)
    assert np.abs(scaled).max() == 1
    assert len(warnings) == 1 and warnings[0].startswith("audio peaks at ")


@needs_ffmpeg
@pytest.mark.parametrize("options", [("t.m4a", "-b:a", "24k"), ("t.mp3", "-b:a", "32k")])
def test_lossy_decoders_may_overshoot(tmp_path, options):
    name, *options = options
    signs = np.sign(np.random.default_rng(0).standard_normal(44_100)).astype(np.float32)
    command = ["ffmpeg", "-v", "error", "-i", "-", *options, str(tmp_path / name)]
    subprocess.run(command, input=wav_bytes(0.999 * signs, 44_100), check=True)
    warnings = []
    assert 1.5 < np.abs(load_audio(tmp_path / name, on_warning=warnings.append)).max() < 4
    assert not warnings


def test_the_error_names_the_file(tmp_path):
    path = tmp_path / "letter.wav"
    path.write_text("Dear Sir or Madam")
    with pytest.raises(ValueError, match=r"letter\.wav: not audio"):
        load_audio(path)
    with pytest.raises(ValueError, match=r"letter\.wav: not audio"), path.open("rb") as file:
        load_audio(file)
    with pytest.raises(FileNotFoundError, match=r"none\.wav"):
        load_audio(tmp_path / "none.wav")


def test_other_types_raise_type_errors():
    with pytest.raises(TypeError, match="from dict; pass a path"):
        load_audio({"path": "a.wav"})


def test_sampling_rates_beside_files_are_refused():
    with pytest.raises(ValueError, match="sampling_rate is for arrays"):
        load_audio(wav_bytes(np.zeros(9)), sampling_rate=8_000)


def test_too_long_is_known_from_the_header():
    with pytest.raises(ValueError, match="3.0 s or longer; the limit is 2 s.*raise max_duration_s"):
        load_audio(wav_bytes(np.zeros(48_000)), max_duration_s=2)
    assert len(load_audio(wav_bytes(np.zeros(48_000)), max_duration_s=3)) == 48_000


@needs_ffmpeg
@pytest.mark.parametrize("name", ["bomb.flac", "bomb.webm"])
def test_too_long_is_noticed_while_decoding(tmp_path, name):
    path = pipe(tmp_path / name, "-f", name.removeprefix("bomb."), seconds=60)
    with pytest.raises(ValueError, match=r"audio is [56]\.\d s or longer; the limit is 5 s"):
        load_audio(path, max_duration_s=5)


def test_too_many_samples_are_refused():
    """Silence in eight channels of 192 kHz: 4 kB of flac for each second of it."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros((192_000 * 4, 8), np.int16), 192_000, format="FLAC")
    assert len(file.getvalue()) < 20_000
    with pytest.raises(ValueError, match="8 channels of 192000 Hz: more than 3.84e.06 samples"):
        load_audio(file.getvalue(), max_duration_s=10)
    assert len(load_audio(file.getvalue(), max_duration_s=60)) == 4 * 16_000


@needs_ffmpeg
def test_silent_videos_have_no_audio_track(tmp_path):
    path = tmp_path / "silent.mp4"
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "color=d=1:s=32x32", str(path)]
    subprocess.run(command, check=True)
    with pytest.raises(ValueError, match="no audio track"):
        load_audio(path)


@needs_ffmpeg
def test_playlists_open_no_local_file(tmp_path, monkeypatch):
    encode(tmp_path / "private.mp3")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="not audio"):
        load_audio(b"ffconcat version 1.0\nfile 'private.mp3'\n")


@needs_ffmpeg
@pytest.mark.parametrize("name", ["t.wav", "t.flac", "t.ogg", "t.mp3", "t.m4a", "t.webm"])
def test_damage_gives_waveforms_or_value_errors(tmp_path, name):
    data = encode(tmp_path / name, seconds=1.0).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(20):
        damaged = bytearray(data[: rng.integers(1, len(data))])
        for place in rng.integers(0, len(damaged), 20):
            damaged[place] = rng.integers(256)
        try:
            check_waveform(load_audio(bytes(damaged)))
        except ValueError as error:
            assert str(error)


# ---- missing packages are named, not blamed on the audio ----


@needs_ffmpeg
def test_without_av_the_error_names_it(tmp_path, monkeypatch):
    path = encode(tmp_path / "t.m4a")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av"):
        load_audio(path)


def test_without_soxr_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "soxr", None)
    assert len(load_audio(wav_bytes(np.zeros(160)))) == 160
    with pytest.raises(ImportError, match="resample 8000 Hz.*pip install soxr"):
        load_audio(wav_bytes(np.zeros(160), 8_000))


@needs_ffmpeg
@pytest.mark.parametrize("name", ["t.wav", "t.flac"])
def test_without_soundfile_av_reads_the_same(tmp_path, monkeypatch, name):
    path = encode(tmp_path / name)
    waveform = load_audio(path)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    np.testing.assert_allclose(load_audio(path), waveform, atol=1e-6)


# ---- silence ----


def test_only_inaudible_sound_is_silence():
    dither = np.random.default_rng(0).integers(-2, 3, 16_000).astype(np.int16)
    assert is_silent(np.zeros(16_000, np.float32))
    assert is_silent(load_audio(dither))
    assert not is_silent(0.005 * voice(1.0, 16_000)[:, 0])
    assert not is_silent(-0.001 * np.eye(1, 16_000, 99, dtype=np.float32)[0])


# ---- splitting ----


def bursts(seconds: float, *, seed: int, pause_level: float) -> tuple[np.ndarray, np.ndarray]:
    """Noise of 0.5 to 2 s between pauses of 0.3 to 0.6 s, and which samples are pause."""
    rng = np.random.default_rng(seed)
    is_pause = np.zeros(round(seconds * 16_000), bool)
    start = 0
    while start < len(is_pause):
        start += round(rng.uniform(0.5, 2.0) * 16_000)
        length = round(rng.uniform(0.3, 0.6) * 16_000)
        is_pause[start : start + length] = True
        start += length
    level = np.where(is_pause, pause_level, 0.1)
    return (level * rng.standard_normal(len(level))).astype(np.float32), is_pause


@given(
    seconds=st.floats(0.01, 40),
    max_clip_s=st.floats(1, 12),
    search_s=st.none() | st.floats(0.01, 20),
    seed=st.integers(0, 9),
    pause_level=st.sampled_from([0.0, 1e-4, 0.1]),
)
def test_clips_concatenate_to_the_recording(seconds, max_clip_s, search_s, seed, pause_level):
    waveform, _ = bursts(seconds, seed=seed, pause_level=pause_level)
    clips = split_at_silence(waveform, max_clip_s=max_clip_s, search_s=search_s)
    assert clips[0][0] == 0 and clips[-1][1] == len(waveform)
    assert all(end == start for (_, end), (start, _) in zip(clips, clips[1:], strict=False))
    assert all(0 < end - start <= max_clip_s * 16_000 for start, end in clips)


@given(seed=st.integers(0, 1000), pause_level=st.sampled_from([0.0, 1e-5, 1e-3, 1e-2]))
@settings(max_examples=50)
def test_cuts_lie_in_pauses(seed, pause_level):
    """Pauses down to 20 dB below the speech, at least one in each stretch that is searched."""
    waveform, is_pause = bursts(60, seed=seed, pause_level=pause_level)
    clips = split_at_silence(waveform, max_clip_s=10)
    assert len(clips) >= 6
    assert all(is_pause[start] for start, _ in clips[1:])


def test_cuts_are_in_the_widest_pause():
    """V9: in-tree cuts at the edge of speech, within the last second of 30."""
    waveform, _ = bursts(12, seed=0, pause_level=0.1)
    for start, end in ((6.0, 6.3), (7.0, 7.8), (9.0, 9.2)):
        waveform[round(start * 16_000) : round(end * 16_000)] *= 1e-3
    (_, cut), _ = split_at_silence(waveform, max_clip_s=10)
    assert cut / 16_000 == pytest.approx(7.4, abs=0.02)


def test_a_dropout_does_not_hide_the_pauses():
    waveform, _ = bursts(12, seed=0, pause_level=0.1)
    waveform[round(6.0 * 16_000) : round(6.1 * 16_000)] = 0
    waveform[round(8.0 * 16_000) : round(8.6 * 16_000)] *= 0.01
    (_, cut), _ = split_at_silence(waveform, max_clip_s=10)
    assert cut / 16_000 == pytest.approx(8.3, abs=0.02)


def test_a_short_recording_is_one_clip():
    assert split_at_silence(np.zeros(1, np.float32), max_clip_s=60) == [(0, 1)]
    assert split_at_silence(np.zeros(16_000, np.float32), max_clip_s=1) == [(0, 16_000)]


@pytest.mark.parametrize("max_clip_s", [0.5, 1201, float("nan")])
def test_clip_lengths_beyond_the_model_are_refused(max_clip_s):
    with pytest.raises(ValueError, match="the model takes 1 to 1200 s"):
        split_at_silence(np.zeros(16_000, np.float32), max_clip_s=max_clip_s)


def test_splitting_costs_grow_with_clips():
    """Three clips, of 360,000 frames: an hour is cut in a fraction of a second."""
    minute, _ = bursts(60, seed=0, pause_level=1e-3)
    hour = np.tile(minute, 60)
    assert lines_run(lambda: split_at_silence(hour, max_clip_s=1200)) < 36_000


@needs_ffmpeg
def test_formats_that_are_said_to_decode_do(tmp_path):
    with_ffmpeg = set(audio.decodable_formats())
    assert with_ffmpeg >= {"wav", "flac", "mp3", "ogg", "opus", "m4a", "mp4", "webm"}
    unwritten = {"amr", "g729", "ape", "dts", "gsm", "mxf", "rm", "sph"}  # by Debian's ffmpeg
    for name in with_ffmpeg - unwritten:
        assert len(load_audio(encode(tmp_path / f"t.{name}")))


def test_formats_without_decoders_are_not_listed(monkeypatch):
    def only(package):
        def import_module(name):
            if name != package:
                raise ImportError(name)
            return sys.modules[name]

        monkeypatch.setattr(blocks, "import_module", import_module)
        return audio.decodable_formats()

    assert only("soundfile") == tuple("wav flac mp3 ogg opus aiff au caf voc sph".split())
    assert only("none") == ()


# ---- raw audio in pieces ----


@pytest.mark.parametrize(
    ("encoding", "subtype"), [("pcm", "PCM_16"), ("pcmu", "ULAW"), ("pcma", "ALAW")]
)
def test_raw_samples_equal_those_of_libsndfile(encoding, subtype):
    data = np.arange(65_536, dtype="<u2").tobytes() if encoding == "pcm" else bytes(range(256))
    options = {"samplerate": 8_000, "channels": 1, "format": "RAW", "subtype": subtype}
    expected, _ = soundfile.read(io.BytesIO(data), dtype="float32", **options)
    np.testing.assert_array_equal(PcmStream(encoding, 16_000).push(data), expected)


@given(
    sizes=st.lists(st.integers(1, 3_000), min_size=1, max_size=9),
    source=st.sampled_from([("pcm", 24_000), ("pcm", 16_000), ("pcmu", 8_000), ("pcma", 8_000)]),
)
@settings(max_examples=40)
def test_raw_audio_is_independent_of_block_sizes(sizes, source):
    data = np.random.default_rng(0).integers(0, 255, 6_000, np.uint8).tobytes()
    whole, pieces = PcmStream(*source), PcmStream(*source)
    expected = np.concatenate([whole.push(data), whole.finish()])
    parts, start = [], 0
    while start < len(data):
        size = sizes[len(parts) % len(sizes)]
        parts.append(pieces.push(data[start : start + size]))
        start += size
    np.testing.assert_array_equal(np.concatenate([*parts, pieces.finish()]), expected)
    again = np.concatenate([pieces.push(data), pieces.finish()])
    np.testing.assert_array_equal(again, expected)  # nothing is left of what was finished


def test_invalid_raw_audio_is_refused():
    with pytest.raises(ValueError, match="opus"):
        PcmStream("opus", 48_000)
    with pytest.raises(ValueError, match="7 Hz"):
        PcmStream("pcm", 7)


# ---- pauses and channels ----


def stretches(*seconds):
    """Noise for each positive number of seconds, silence for each negative one."""
    rng = np.random.default_rng(0)
    parts = [rng.uniform(-0.3, 0.3, round(abs(s) * 16_000)) * (s > 0) for s in seconds]
    return np.concatenate(parts).astype(np.float32)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([-2, -0.4, -0.1, 0.05, 0.5, 3]), min_size=1),
    st.floats(0, 1),
    st.floats(0.01, 3),
    st.floats(0, 3),
)
def test_clips_cut_at_pauses_concatenate(seconds, threshold, silence, pad):
    waveform = stretches(*seconds)
    clips = split_at_pauses(waveform, Pauses(threshold, silence, pad), max_clip_s=4)
    assert [start for start, _ in clips] == [0, *(end for _, end in clips[:-1])]
    assert clips[-1][1] == len(waveform)
    assert all(0 < end - start <= 4 * 16_000 for start, end in clips)


@pytest.fixture
def by_loudness(monkeypatch):
    """Without Silero VAD, which finds no speech in noise."""
    monkeypatch.setattr("qwen3_asr_vllm.pauses.speech_frames", lambda *_, **__: None)


def test_long_pauses_end_a_clip(by_loudness):
    waveform = stretches(-0.5, 2, -0.3, 2, -0.8, 2, -0.5)
    for silence_s, cuts in ((0.2, [2.6, 5.4]), (0.5, [5.4]), (1.0, [])):
        clips = split_at_pauses(waveform, Pauses(0.5, silence_s, 0.2), max_clip_s=60)
        starts = [start / 16_000 for start, _ in clips[1:]]
        assert starts == pytest.approx(cuts, abs=0.04)


def test_higher_thresholds_accept_louder_pauses(by_loudness):
    waveform = stretches(2, -0.5, 2, 0.5, 2)
    waveform[round(4.5 * 16_000) : round(5 * 16_000)] *= 0.05  # 26 dB down; silence is 60
    number = [
        len(split_at_pauses(waveform, Pauses(threshold, 0.3, 0.1), max_clip_s=60))
        for threshold in (0.1, 0.5, 0.9)
    ]
    assert number == [2, 2, 3]


def test_clips_are_halved_in_pauses():
    waveform = stretches(0.5, -1, 2.5, -0.3, 2, -0.6, 3)
    assert halve_at_silence(waveform) / 16_000 == pytest.approx(6.6, abs=0.03)
    assert 0 < halve_at_silence(stretches(2)) < 2 * 16_000


@pytest.mark.parametrize("sampling_rate", [16_000, 44_100])
def test_channels_are_those_of_the_file(sampling_rate):
    left, right = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 3 * sampling_rate))
    file = io.BytesIO()
    soundfile.write(file, np.stack([left, right], 1), sampling_rate, format="WAV", subtype="FLOAT")
    for channel, waveform in zip((left, right), load_channels(file, 2), strict=True):
        alone = load_audio((channel.astype(np.float32), sampling_rate))
        np.testing.assert_allclose(waveform, alone, atol=1e-6)
    with pytest.raises(ValueError, match=r"2 channel\(s\), not 3"):
        load_channels(file, 3)


@pytest.mark.parametrize(
    ("encoding", "subtype", "endian"),
    [
        ("pcm_s16le", "PCM_16", "LITTLE"),
        ("pcm_s16be", "PCM_16", "BIG"),
        ("pcm_mulaw", "ULAW", "FILE"),
        ("pcm_alaw", "ALAW", "FILE"),
    ],
)
def test_headerless_files_are_read_as_described(encoding, subtype, endian):
    file = io.BytesIO()
    stereo = voice(1.0, 16_000, channels=2)
    soundfile.write(file, stereo, 16_000, subtype, endian, "RAW")
    waveform = load_audio(file, raw=RawAudio(encoding, 16_000, 2))
    np.testing.assert_allclose(waveform, stereo.mean(axis=1), atol=0.02)


def test_a_header_counts_more_than_a_description():
    wav = wav_bytes(voice(1.0, 16_000))
    waveform = load_audio(wav, raw=RawAudio("pcm_mulaw"))
    np.testing.assert_array_equal(waveform, load_audio(wav))
