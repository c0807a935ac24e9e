# SPDX-License-Identifier: Apache-2.0
"""Every byte of a file is read, or a warning says how much is missing and where."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from collections.abc import Callable

import av
import numpy as np
import pytest
import soundfile
from support.audio import DATA

from qwen3_asr_vllm import audio
from qwen3_asr_vllm.audio import load_audio, load_channels
from qwen3_asr_vllm.media.containers import RawAudio
from qwen3_asr_vllm.media.parts import find_parts

FIELD = DATA / "field"
RATE = 16_000
CONTAINERS = {  # PyAV's container and encoder
    "aac": ("adts", "aac"),
    "mp3": ("mp3", "libmp3lame"),
    "m4a": ("ipod", "aac"),
    "mp4": ("mp4", "aac"),
    "mkv": ("matroska", "aac"),
    "webm": ("webm", "libopus"),
    "wma": ("asf", "wmav2"),
    "ts": ("mpegts", "aac"),
    "flv": ("flv", "aac"),
    "opus": ("ogg", "libopus"),
    "flac": ("flac", "flac"),
    "amr": ("amr", "libopencore_amrnb"),
}
LIBSNDFILE = {
    "wav": {"format": "WAV", "subtype": "PCM_16"},
    "rf64": {"format": "RF64", "subtype": "PCM_16"},
    "w64": {"format": "W64", "subtype": "PCM_16"},
    "aiff": {"format": "AIFF", "subtype": "PCM_16"},
    "caf": {"format": "CAF", "subtype": "PCM_16"},
    "au": {"format": "AU", "subtype": "PCM_16"},
    "ogg": {"format": "OGG", "subtype": "VORBIS"},
}
JOINED = sorted({*CONTAINERS, *LIBSNDFILE} - {"flv"})


def tone(seconds: float, hertz: float = 440, *, rate: int = RATE) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype("f4")


def encode(name: str, *tracks: np.ndarray, rate: int = RATE, default: int = 1) -> bytes:
    """Waveforms of shape (samples,) or (samples, 2) as the tracks of a file."""
    if name in LIBSNDFILE:
        file = io.BytesIO()
        soundfile.write(file, tracks[0], rate, **LIBSNDFILE[name])
        return file.getvalue()
    container, codec = CONTAINERS[name]
    rate_out = {"webm": 48_000, "opus": 48_000, "amr": 8_000}.get(name, rate)
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        layouts = ["stereo" if track.ndim == 2 else "mono" for track in tracks]
        streams = [output.add_stream(codec, rate=rate_out, layout=layout) for layout in layouts]
        for number, stream in enumerate(streams, 1):
            stream.bit_rate = 12_200 if name == "amr" else 48_000
            if len(streams) > 1:
                stream.disposition = av.stream.Disposition.default if number == default else 0
        for stream, track, layout in zip(streams, tracks, layouts, strict=True):
            frame = av.AudioFrame.from_ndarray(track.reshape(1, -1), "flt", layout)
            frame.sample_rate = rate
            size = stream.codec_context.frame_size or 1_024
            form = stream.codec_context.format.name
            resampler = av.AudioResampler(form, layout, rate_out, frame_size=size)
            for piece in [*resampler.resample(frame), *resampler.resample(None)]:
                output.mux(stream.encode(piece))
            output.mux(stream.encode(None))
    return file.getvalue()


def remux(data: bytes, container: str, shift: Callable[[float], float]) -> bytes:
    """The same packets, each so many seconds later."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=container) as output:
        stream = output.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                ticks = round(shift(float(packet.pts * packet.time_base)) / packet.time_base)
                packet.pts, packet.dts, packet.stream = (
                    packet.pts + ticks,
                    packet.dts + ticks,
                    stream,
                )
                output.mux(packet)
    return file.getvalue()


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.3, 0.3, round(seconds * RATE)).astype("f4")


def load(data: bytes, **options) -> tuple[np.ndarray, list[str]]:
    warnings: list[str] = []
    return load_audio(data, on_warning=warnings.append, **options), warnings


def seconds_of(data: bytes, **options) -> float:
    waveform, warnings = load(data, **options)
    assert warnings == []
    return len(waveform) / RATE


# ---- joined files ----


@pytest.mark.parametrize(
    ("name", "seconds"),
    [("joined.mp3", 4.05), ("chained_vorbis.ogg", 4.0), ("mono_then_stereo.mp3", 4.1)],
)
def test_field_files_are_read_to_the_end(name, seconds):
    assert seconds_of((FIELD / name).read_bytes()) == pytest.approx(seconds, abs=0.06)


@pytest.mark.parametrize("between", [b"", bytes(5_000)], ids=["joined", "zeros between"])
@pytest.mark.parametrize("name", JOINED)
def test_joined_files_are_all_read(name, between):
    first, second = encode(name, tone(2.0)), encode(name, tone(3.0, 880))
    waveform, warnings = load(first + between + second)
    assert len(waveform) / RATE == pytest.approx(5.0, abs=0.2)
    assert warnings == []
    half = np.abs(np.fft.rfft(waveform[-2 * RATE : -RATE]))
    assert half.argmax() == 880


@pytest.mark.parametrize("name", sorted({*JOINED} - {"amr", "webm", "opus", "ts"}))
def test_rate_and_channels_may_change_inside(name):
    stereo = np.stack([tone(3.0, 880, rate=44_100)] * 2, axis=1)
    waveform, warnings = load(encode(name, tone(2.0)) + encode(name, stereo, rate=44_100))
    assert len(waveform) / RATE == pytest.approx(5.0, abs=0.2)
    assert warnings == []
    assert np.abs(np.fft.rfft(waveform[-2 * RATE : -RATE])).argmax() == 880


def test_tags_between_joined_mp3_are_no_damage():
    mp3 = encode("mp3", tone(2.0))
    tag = b"TAG" + bytes(125)
    assert seconds_of(mp3 + tag + mp3 + tag) == pytest.approx(4.0, abs=0.2)


@pytest.mark.parametrize("stated", [1, 10, 100_000])
def test_a_wrong_xing_count_cuts_nothing(stated):
    mp3 = encode("mp3", tone(4.0))
    place = max(mp3.find(b"Xing"), mp3.find(b"Info")) + 8
    waveform, warnings = load(mp3[:place] + stated.to_bytes(4, "big") + mp3[place + 4 :])
    assert len(waveform) / RATE == pytest.approx(4.0, abs=0.2)
    assert len(warnings) == (stated == 100_000)


def test_mp3_with_variable_rate_needs_no_header():
    noisy = np.concatenate([tone(2.0), np.random.default_rng(0).uniform(-0.5, 0.5, 2 * RATE)])
    file = io.BytesIO()
    soundfile.write(file, noisy, RATE, format="MP3", bitrate_mode="VARIABLE", compression_level=0.2)
    mp3 = file.getvalue()
    place = max(mp3.find(b"Xing"), mp3.find(b"Info"))
    assert place > 0
    assert seconds_of(mp3[:place] + bytes(4) + mp3[place + 4 :]) == pytest.approx(4.1, abs=0.1)


# ---- damage ----


def test_random_bytes_between_frames_are_a_warning():
    waveform, warnings = load((FIELD / "garbage_in_the_middle.mp3").read_bytes())
    assert len(waveform) / RATE == pytest.approx(4.07, abs=0.02)
    assert warnings == ["2 damaged packets at 0:01, about 0.1 s, could not be read."]


@pytest.mark.parametrize("name", ["aac", "m4a", "ts", "flac", "opus", "ogg", "mp3", "wma"])
def test_damage_in_the_middle_costs_its_packets(name):
    data = bytearray(encode(name, noise(6.0)))
    middle = len(data) // 2
    data[middle : middle + 400] = np.random.default_rng(1).bytes(400)
    waveform, warnings = load(bytes(data))
    assert 4.5 < len(waveform) / RATE < 6.3
    if name != "wma":  # whose decoder reads any bytes
        assert any(f" 0:0{second}" in warnings[-1] for second in (1, 2, 3))
        assert "could not be read" in warnings[-1]


@pytest.mark.parametrize("name", ["aac", "ts", "flac", "opus", "ogg", "mp3", "wma", "wav", "aiff"])
def test_lost_bytes_are_a_warning(name):
    data = encode(name, noise(6.0))
    middle = len(data) // 2
    waveform, warnings = load(data[:middle] + data[middle + 1_501 :])
    assert 4.5 < len(waveform) / RATE < 6.3
    assert warnings


def test_a_lost_cluster_is_silence_with_warning():
    picture = io.BytesIO()
    with av.open(picture, "w", format="matroska", options={"cluster_time_limit": "1000"}) as output:
        stream = output.add_stream("libopus", rate=48_000, layout="mono")
        for piece in range(300):
            frame = av.AudioFrame.from_ndarray(tone(0.02, rate=48_000)[None], "flt", "mono")
            frame.sample_rate, frame.pts = 48_000, piece * 960
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    data = picture.getvalue()
    middle = len(data) // 2
    waveform, warnings = load(data[:middle] + bytes(600) + data[middle + 600 :])
    assert len(waveform) / RATE == pytest.approx(6.0, abs=0.1)
    assert any("at 0:0" in warning for warning in warnings)


@pytest.mark.parametrize("name", sorted({*JOINED, "flv"} - {"m4a", "mp4", "au"}))
def test_cut_tails_are_read_with_a_warning(name):
    data = encode(name, noise(6.0))
    waveform, warnings = load(data[: len(data) * 6 // 10 + 7])
    assert 2.5 < len(waveform) / RATE < 4.2
    if name not in ("amr", "flv"):
        assert any("cut off" in w or "damaged packet" in w for w in warnings)


def test_cut_mp3_and_aac_share_a_warning():
    warnings = []
    for name in ("mp3", "aac"):
        data = encode(name, tone(4.0))
        frames = find_parts(io.BytesIO(data))[0]
        load_audio(data[: frames.end - 20], on_warning=warnings.append)
    kind = "the file is cut off at 0:0"
    assert sum(warning.startswith(kind) for warning in warnings) == 2


def test_an_unreadable_file_is_refused():
    m4a = encode("m4a", tone(4.0))  # its index is at the end
    with pytest.raises(ValueError, match="not audio, or cut off"):
        load_audio(m4a[: len(m4a) // 2])


def test_m4a_index_is_found_after_lost_bytes():
    data = encode("m4a", noise(6.0))
    middle = len(data) // 2
    waveform, warnings = load(data[:middle] + data[middle + 300 :])
    assert len(waveform) / RATE > 2.5
    assert any("damaged packets at 0:0" in warning for warning in warnings)


# ---- unfinished headers ----


def with_size(data: bytes, mark: bytes, skip: int, size: int, num_bytes: int, order: str) -> bytes:
    place = data.index(mark) + skip
    return (
        data[:place]
        + (size % (1 << 8 * num_bytes)).to_bytes(num_bytes, order)
        + data[place + num_bytes :]
    )


W64 = b"data\xf3\xac\xd3\x11"
UNFINISHED = {  # container, the mark of its size, where that is, its bytes and their order
    "wav": (b"data", 4, 4, "little"),
    "rf64": (b"ds64", 16, 8, "little"),
    "aiff": (b"SSND", 4, 4, "big"),
    "caf": (b"data", 4, 8, "big"),
    "au": (b".snd", 8, 4, "big"),
    "w64": (W64, 16, 8, "little"),
}


@pytest.mark.parametrize("stated", [0, 8, 31_337, 10_000_000, -1])
@pytest.mark.parametrize("name", UNFINISHED)
def test_a_wrong_sound_size_is_ignored(name, stated):
    mark, skip, num_bytes, order = UNFINISHED[name]
    data = with_size(encode(name, tone(2.0)), mark, skip, stated, num_bytes, order)
    waveform, warnings = load(data)
    assert len(waveform) / RATE == pytest.approx(2.0, abs=0.001)
    is_unknown = stated == -1  # what is written into a pipe
    assert len(warnings) == (not is_unknown)
    assert is_unknown or "the header states" in warnings[0]


def test_chunks_after_the_sound_are_not_sound():
    wav = encode("wav", tone(2.0)) + b"LIST" + (4).to_bytes(4, "little") + b"INFO"
    assert seconds_of(wav) == 2.0
    assert seconds_of(wav + bytes(999)) == 2.0


# ---- the timeline of the container ----


@pytest.mark.parametrize("container", ["matroska", "mp4", "mov", "mpegts", "flv", "webm"])
def test_gaps_become_silence(container):
    data = encode("webm" if container == "webm" else "m4a", tone(6.0))
    gapped = remux(data, container, lambda t: 1.5 * (t >= 2) + 0.5 * (t >= 4))
    waveform, warnings = load(gapped)
    assert len(waveform) / RATE == pytest.approx(8.0, abs=0.1)
    assert not waveform[round(2.2 * RATE) : round(3.3 * RATE)].any()
    assert waveform[round(4.0 * RATE) : round(5.3 * RATE)].std() > 0.1
    assert warnings == []


@pytest.mark.parametrize("container", ["matroska", "mpegts", "webm"])
def test_late_starts_of_all_tracks_are_ignored(container):
    data = encode("webm" if container == "webm" else "m4a", tone(2.0))
    assert seconds_of(remux(data, container, lambda t: 3.0)) == pytest.approx(2.0, abs=0.15)


def video(audio_start_s: float, container: str, samples: np.ndarray) -> bytes:
    """A picture from 0 s on, with sound from ``audio_start_s`` on."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        picture = output.add_stream("mpeg4" if container != "flv" else "flv1", rate=5)
        picture.width = picture.height = 32
        picture.pix_fmt = "yuv420p"
        sound = output.add_stream("aac", rate=RATE, layout="mono")
        packets = []
        for number in range(40):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")
            frame.pts = number
            packets += picture.encode(frame)
        for start in range(0, len(samples) - 1_023, 1_024):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1_024], "fltp", "mono")
            frame.sample_rate, frame.pts = RATE, start + round(audio_start_s * RATE)
            packets += sound.encode(frame)
        packets += [*picture.encode(None), *sound.encode(None)]
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            output.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize("container", ["matroska", "mp4", "mpegts", "flv"])
def test_late_sound_keeps_its_offset_to_picture(container):
    waveform, warnings = load(video(3.94, container, tone(2.0)))
    first = np.abs(waveform).argmax() if len(waveform) else 0
    loud = np.flatnonzero(np.abs(waveform) > 0.05)
    assert loud[0] / RATE == pytest.approx(3.94, abs=0.1)
    assert first and warnings == []


def test_a_wrong_timestamp_adds_no_silence():
    data = remux(encode("m4a", tone(4.0)), "matroska", lambda t: 5_000 * (t >= 2))
    waveform, warnings = load(data)
    assert len(waveform) / RATE == pytest.approx(4.0, abs=0.2)
    assert warnings == ["a timestamp at 0:02 is too far ahead; its gap was left out."]


def test_jitter_of_timestamps_is_no_gap():
    rng = np.random.default_rng(0)
    data = remux(encode("m4a", tone(4.0)), "matroska", lambda t: rng.uniform(0, 0.05))
    assert seconds_of(data) == pytest.approx(4.0, abs=0.15)


@pytest.mark.parametrize("name", ["m4a", "webm", "opus", "mkv"])
def test_priming_is_no_silence(name):
    waveform, _ = load(encode(name, tone(2.0)))
    assert np.flatnonzero(np.abs(waveform) > 0.1)[0] < 0.08 * RATE


# ---- silent though loud ----


@pytest.mark.parametrize("num_channels", [2, 4, 6])
@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_cancelling_channels_keep_the_louder(num_channels, rate):
    channels = np.zeros((3 * rate, num_channels), np.float32)
    channels[:, 0] = tone(3.0, rate=rate)
    channels[:, 1] = -0.9 * channels[:, 0]
    waveform = load_audio((channels, rate))
    assert np.abs(waveform).max() == pytest.approx(0.3, abs=0.01)


def test_channels_may_cancel_for_a_while():
    """The second of three seconds is out of phase."""
    left = tone(3.0)
    right = left * np.repeat(np.float32([1, -1, 1]), RATE)
    waveform = load_audio(np.stack([left, right], axis=1))
    np.testing.assert_allclose(waveform, left, atol=1e-6)


def test_channels_that_differ_are_mixed():
    left, right = tone(2.0), tone(2.0, 700)
    mixed = load_audio(np.stack([left, right], axis=1))
    np.testing.assert_allclose(mixed, (left + right) / 2, atol=1e-6)


def test_a_silent_first_track_gives_way():
    file = encode("mkv", np.zeros(2 * RATE, np.float32), np.zeros(2 * RATE, np.float32), tone(2.0))
    waveform, warnings = load(file)
    assert np.abs(waveform).max() > 0.2
    assert warnings == [
        "audio track 1 of 3 is silent, so track 3 was read; choose one with audio_track."
    ]


def test_a_broken_first_track_gives_way():
    file = encode("mkv", tone(2.0), tone(2.0, 880))
    data = bytearray(file)
    with av.open(io.BytesIO(file)) as source:
        for packet in source.demux(audio=0):
            if packet.size:
                start = file.index(bytes(packet))
                data[start : start + packet.size] = bytes([255]) * packet.size
    waveform, warnings = load(bytes(data))
    assert np.abs(np.fft.rfft(waveform[RATE // 2 : RATE // 2 + RATE])).argmax() == 880
    assert warnings == [
        "audio track 1 of 2 cannot be read, so track 2 was read; choose one with audio_track."
    ]


def test_channels_are_those_of_a_sounding_track():
    call = np.stack([tone(2.0), tone(2.0, 880)], axis=1)
    file = encode("mkv", np.zeros_like(call), call)
    warnings: list[str] = []
    left, right = load_channels(io.BytesIO(file), 2, on_warning=warnings.append)
    assert np.abs(np.fft.rfft(left[RATE // 2 : RATE // 2 + RATE])).argmax() == 440
    assert np.abs(np.fft.rfft(right[RATE // 2 : RATE // 2 + RATE])).argmax() == 880
    assert warnings == [
        "audio track 1 of 2 is silent, so track 2 was read; choose one with audio_track."
    ]


def test_the_limit_of_joined_files_is_one():
    joined = 3 * encode("flac", tone(4.0))
    with pytest.raises(ValueError, match=r"audio is 12\.0 s or longer; the limit is 10 s"):
        load_audio(joined, max_duration_s=10)


def test_the_default_track_is_read():
    file = encode("mkv", tone(2.0), tone(2.0, 880), default=2)
    waveform, warnings = load(file)
    assert np.abs(np.fft.rfft(waveform[RATE // 2 : RATE // 2 + RATE])).argmax() == 880
    assert warnings == []


def test_a_track_can_be_chosen():
    file = encode("mkv", tone(2.0), np.zeros(2 * RATE, np.float32))
    waveform, warnings = load(file, audio_track=2)
    assert np.abs(waveform).max() < 0.01 and warnings == []
    with pytest.raises(ValueError, match="audio_track is 3; the file has 2, counted from 1"):
        load_audio(file, audio_track=3)
    with pytest.raises(ValueError, match="audio_track is 2; the file has 1"):
        load_audio(encode("wav", tone(1.0)), audio_track=2)


# ---- warnings, AMR and G.729 ----


def test_without_a_callback_warnings_are_logged(monkeypatch):
    data = (FIELD / "garbage_in_the_middle.mp3").read_bytes()
    lines: list[str] = []  # whatever has configured logging before
    monkeypatch.setattr(audio.logger, "warning", lambda line, *values: lines.append(line % values))
    for _ in range(2):
        load_audio(data)
    assert audio.logger.name == "qwen3_asr_vllm.audio"
    assert len(lines) == 2 and all("2 damaged packets at 0:01" in line for line in lines)


def test_channels_warn_once():
    stereo = np.stack([tone(2.0), tone(2.0, 700)], axis=1)
    wav = with_size(encode("wav", stereo), b"data", 4, 0, 4, "little")
    warnings: list[str] = []
    left, right = load_channels(wav, 2, on_warning=warnings.append)
    assert len(left) == len(right) == 2 * RATE
    assert len(warnings) == 1


def test_g729_is_read_as_described():
    frames = np.random.default_rng(0).bytes(10 * 300)  # each of 10 ms
    assert seconds_of(frames, raw=RawAudio("g729")) == pytest.approx(3.0, abs=0.02)


def test_raw_audio_needs_a_description():
    with pytest.raises(
        ValueError, match="send it as wav, or with a content type such as audio/L16"
    ):
        load_audio(bytes(range(1, 256)) * 9)


def ogg_page(data: bytes, number: int) -> tuple[int, int]:
    """Where the page of this number begins and ends."""
    starts = [match.start() for match in re.finditer(b"OggS", data)]
    return starts[number], starts[number + 1]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
@pytest.mark.parametrize("codec", ["libvorbis", "flac", "libopus"])
@pytest.mark.parametrize("damage", ["lost", "flipped"])
def test_a_lost_ogg_page_is_a_warning(codec, damage):
    """FFmpeg writes pages of a second; those of libsndfile are small."""
    command = f"ffmpeg -v error -i pipe:0 -c:a {codec} -f ogg pipe:1"
    wav = encode("wav", tone(4))
    data = bytearray(subprocess.run(command.split(), input=wav, stdout=-1, check=True).stdout)
    start, end = ogg_page(data, 3)
    data[start + 100 : start + 140] = b"" if damage == "lost" else bytes(40)
    warnings: list[str] = []
    waveform = load_audio(bytes(data), on_warning=warnings.append)
    assert 2.5 * RATE < len(waveform) <= 4.1 * RATE
    assert any("could not be read" in warning for warning in warnings), warnings


def test_a_cut_avi_is_read_completely():
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as output:
        stream = output.add_stream("pcm_s16le", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            (32_767 * tone(3)).astype("i2").reshape(1, -1), "s16", "mono"
        )
        frame.sample_rate = RATE
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    data = file.getvalue()
    waveform = load_audio(data[: len(data) * 3 // 4], on_warning=lambda _: None)
    assert len(waveform) > 1.5 * RATE


def test_a_wrong_header_duration_is_ignored():
    """Two packets, the second of which states that it begins after fourteen hours."""
    data = remux(encode("webm", tone(3)), "webm", lambda s: 50_000 * (s > 1.5))
    warnings: list[str] = []
    waveform = load_audio(data, on_warning=warnings.append)
    assert len(waveform) == pytest.approx(3 * RATE, abs=0.3 * RATE)
    assert any("too far ahead" in warning for warning in warnings), warnings
