# SPDX-License-Identifier: Apache-2.0
"""Uploads are decoded within limits, and no file harms other requests."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import hostile
import numpy as np
import psutil
import pytest
import soundfile
from fuzzing.audio import FORMATS, recording

from qwen3_asr_vllm.audio import load_audio, load_channels
from qwen3_asr_vllm.media.blocks import ChannelError
from qwen3_asr_vllm.media.containers import RawAudio
from qwen3_asr_vllm.server.admission import Admission, Busy
from qwen3_asr_vllm.server.decode_worker import Limits
from qwen3_asr_vllm.server.decoders import _TEMPLATE, DecodeError, Decoders, is_plain_pcm

HELLO = Path(__file__).parents[1] / "data" / "hello.flac"
SLOW = "tags mkv"  # takes a minute without a limit


@pytest.fixture(scope="module")
def decoders():
    return Decoders(Limits(cpu_s=1))


@pytest.fixture(scope="module")
def slow():
    return hostile.hostile(SLOW)


def written(samples, sampling_rate=16_000, *, subtype="PCM_16", container="WAV"):
    file = io.BytesIO()
    soundfile.write(file, samples, sampling_rate, subtype, format=container)
    file.seek(0)
    return file


def children():
    """The decoders, those that wait too."""
    return psutil.Process(_TEMPLATE.start() and _TEMPLATE._process.pid).children()


@pytest.fixture
def none_waits():
    """No decoder waits for a file."""
    while _TEMPLATE.idle:
        _TEMPLATE.idle.pop().close()
    wait_for(lambda: not children())


@pytest.fixture
def waiting(none_waits, decoders):
    """A decoder that has decoded a file and waits for the next."""
    decoders.load_audio(io.BytesIO(HELLO.read_bytes()))
    return children()[0]


def wait_for(condition, *, timeout=20):
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


# what files may cost --------------------------------------------------------------------------


def test_hostile_files_cost_little():
    """Each kind is decoded or refused with 64 MiB and a second of CPU time, where nothing else
    limits it; without limits, some take gigabytes and minutes."""
    command = [sys.executable, hostile.__file__, "--cpu-s", "1"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = json.loads(output.splitlines()[-1])["rows"]
    assert {row["kind"] for row in rows} == set(hostile.KINDS)
    assert max(row["MiB"] for row in rows) <= 64
    assert max(row["CPU s"] for row in rows) < 1.5
    for row in rows:
        is_refused = row["error"].startswith(("ValueError", "MemoryError"))
        assert row["samples"] or is_refused or row["exit code"] == -signal.SIGPROF


def test_covers_are_never_decoded():
    """Not without limits either, as offline: eight of 128 MB each."""
    kinds = ["covers m4a", "covers aac", "covers mkv"]
    command = [sys.executable, hostile.__file__, "--unlimited", *kinds]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for row in json.loads(output.splitlines()[-1])["rows"]:
        assert row["samples"] > 9_000 and row["MiB"] < 32


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    ("kind", "limit"),
    [("fragments m4a", "60 MiB of memory"), ("tags caf", "1 s of CPU time")],
)
def test_refusals_name_the_limit(decoders, none_waits, kind, limit, is_first):
    """A decoder has the same limits for its first file and for later ones."""
    for _ in range(0 if is_first else 3):
        decoders.load_audio(io.BytesIO(HELLO.read_bytes()))
    before = children()
    with pytest.raises(DecodeError) as error:
        decoders.load_audio(io.BytesIO(hostile.hostile(kind)))
    assert str(error.value) == (
        f"decoding the file takes more than {limit}, the limit after 0 s of audio. "
        "Convert the file to wav or flac, without tags and covers, and send that."
    )
    assert len(before) == (not is_first)
    wait_for(lambda: not children())  # a waiting decoder took the file, and ended


def test_ordinary_uploads_pass_slow_ones(slow, none_waits):
    decoders, ended = Decoders(Limits(cpu_s=1)), []

    def load(name, data):
        try:
            return decoders.load_audio(io.BytesIO(data))
        except DecodeError:
            return None
        finally:
            ended.append(name)

    with ThreadPoolExecutor() as pool:
        for number in range(2):
            pool.submit(load, f"slow {number}", slow)
        wait_for(lambda: len(children()) == 2)
        waveform = pool.submit(load, "ordinary", HELLO.read_bytes()).result()
    assert len(waveform) > 160_000
    assert ended[0] == "ordinary" and len(ended) == 3


def test_limits_grow_with_the_recording():
    """20 minutes: a waveform larger than the memory that is granted at the start."""
    file = written(np.zeros(1_200 * 16_000, np.int16), container="FLAC")
    reports = []
    limits = Limits(memory_bytes=32 << 20, cpu_s=1)
    waveform = Decoders(limits).load_audio(file, on_progress=reports.append)
    assert len(waveform) == 1_200 * 16_000 and waveform.nbytes > limits.memory_bytes
    assert reports == sorted(reports) and reports[-1] == pytest.approx(1_200) and len(reports) > 20


# what crosses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_waveforms_equal_those_of_the_loader(decoders, name):
    data = recording(name)
    loaded = decoders.load_audio(io.BytesIO(data))
    np.testing.assert_array_equal(loaded, load_audio(data))
    loaded += 1  # as any array


def test_channels_equal_those_of_the_loader(decoders):
    file = written(np.arange(32_000).reshape(-1, 2) / 32_000, container="FLAC")
    for loaded, expected in zip(
        decoders.load_channels(file, 2), load_channels(file, 2), strict=True
    ):
        np.testing.assert_array_equal(loaded, expected)


def test_files_on_disk_are_passed_as_descriptors(decoders):
    with tempfile.SpooledTemporaryFile(max_size=1 << 20) as file:
        soundfile.write(
            file, np.random.default_rng(0).normal(0, 0.1, 900_000), 16_000, format="FLAC"
        )
        assert file.seek(0, io.SEEK_END) > 1 << 20
        assert len(decoders.load_audio(file)) == 900_000


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (b"no audio " * 99, {}),
        (b"", {}),
        (HELLO.read_bytes(), {"max_duration_s": 5.0}),
        (HELLO.read_bytes(), {"num_channels": 2}),
    ],
)
def test_errors_cross_with_type_and_message(decoders, data, options):
    name = "load_channels" if "num_channels" in options else "load_audio"
    load = {"load_audio": load_audio, "load_channels": load_channels}[name]
    with pytest.raises(ValueError) as expected:
        load(io.BytesIO(data), **options)
    with pytest.raises(ValueError) as error:
        getattr(decoders, name)(io.BytesIO(data), **options)
    assert type(error.value) is type(expected.value)
    assert str(error.value) == str(expected.value)
    assert ("num_channels" in options) == isinstance(error.value, ChannelError)


def test_warnings_cross(decoders):
    file = written(np.full(16_000, 1e4), subtype="FLOAT", container="CAF")
    warnings, expected = [], []
    decoders.load_audio(file, on_warning=warnings.append)
    load_audio(file, on_warning=expected.append)
    assert warnings == expected != []


def test_a_full_server_ends_the_decoding(decoders, none_waits):
    with Admission(max_recordings=1, max_audio_s=30).reserve() as reservation:
        file = written(np.zeros(3_600 * 16_000, np.int16), container="FLAC")
        with pytest.raises(Busy, match="the server is busy"):
            decoders.load_audio(file, on_progress=reservation.hold)
    wait_for(lambda: not children())


# what waits -----------------------------------------------------------------------------------


def test_a_decoder_decodes_file_after_file(decoders, waiting):
    for _ in range(3):
        assert len(decoders.load_audio(io.BytesIO(HELLO.read_bytes()))) > 160_000
        assert children() == [waiting]


def test_decoders_share_no_sockets(decoders, none_waits):
    """Two decoders at once, the second of which is forked while the first has its socket."""
    with ThreadPoolExecutor() as pool:
        loading = [pool.submit(decoders.load_audio, io.BytesIO(HELLO.read_bytes())) for _ in "ab"]
        assert all(len(waveform.result()) > 160_000 for waveform in loading)
    sockets = [
        {
            os.readlink(f)
            for f in Path(f"/proc/{child.pid}/fd").iterdir()
            if "socket" in os.readlink(f)
        }
        for child in children()
    ]
    assert all(len(of) == 1 for of in sockets) and len(set.union(*sockets)) == len(sockets)


def test_cpu_time_counts_for_each_file(none_waits):
    """Together, the files take more than the limit of one."""
    file, limits = io.BytesIO(recording("m4a")), Limits(cpu_s=1, cpu_s_per_s=0)
    Decoders(limits).load_audio(file)
    (waiting,) = children()
    while sum(waiting.cpu_times()[:2]) < 1.5:
        Decoders(limits).load_audio(file)
        assert children() == [waiting]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"no audio " * 99, id="refused"),
        pytest.param(hostile.hostile("fragments m4a"), id="over a limit"),
        pytest.param(
            written(np.full(16_000, 1e4), subtype="FLOAT", container="CAF").read(), id="warned"
        ),
    ],
)
def test_a_decoder_of_bad_files_ends(decoders, waiting, data):
    with suppress(ValueError):
        decoders.load_audio(io.BytesIO(data), on_warning=lambda _: None)
    wait_for(lambda: waiting not in children())
    assert len(decoders.load_audio(io.BytesIO(HELLO.read_bytes()))) > 160_000


def test_a_new_decoder_decides_after_a_crash(decoders, waiting, slow):
    """A file is not blamed for what the files before it may have done to its decoder."""
    with ThreadPoolExecutor() as pool:
        loading = pool.submit(decoders.load_audio, io.BytesIO(slow))
        wait_for(lambda: waiting.cpu_percent(0.1) > 1)
        waiting.kill()
        with pytest.raises(DecodeError, match="takes more than 1 s of CPU time"):
            loading.result()


def test_idle_killed_decoders_are_replaced(decoders, waiting):
    waiting.kill()
    assert len(decoders.load_audio(io.BytesIO(HELLO.read_bytes()))) > 160_000
    assert waiting not in children()


# what ends ------------------------------------------------------------------------------------


def test_a_killed_decoder_is_replaced(decoders, slow, none_waits):
    with ThreadPoolExecutor() as pool:
        loading = pool.submit(decoders.load_audio, io.BytesIO(slow))
        wait_for(children)
        children()[0].kill()
        with pytest.raises(
            DecodeError, match=r"the decoder crashed \(SIGKILL\) after 0 s of audio"
        ):
            loading.result()
    assert len(decoders.load_audio(io.BytesIO(HELLO.read_bytes()))) > 160_000


def test_a_killed_template_is_replaced(decoders, slow, none_waits):
    with ThreadPoolExecutor() as pool:
        loading = pool.submit(decoders.load_audio, io.BytesIO(slow))
        wait_for(children)
        child = children()[0]
        _TEMPLATE._process.kill()
        with pytest.raises(Busy, match="try again"):
            loading.result()
    wait_for(lambda: not child.is_running())
    assert len(decoders.load_audio(io.BytesIO(HELLO.read_bytes()))) > 160_000


def test_a_decoder_that_stalls_is_ended(slow):
    with ThreadPoolExecutor() as pool:
        loading = pool.submit(Decoders(Limits(cpu_s=60, stall_s=1)).load_audio, io.BytesIO(slow))
        with pytest.raises(DecodeError, match="takes more than 1 s, the limit"):
            loading.result()


SERVER = """
import io, sys
from qwen3_asr_vllm.server.decoders import Decoders, Limits
Decoders(Limits(cpu_s=60)).load_audio(open(sys.argv[1], "rb"))
"""


def test_decoders_end_with_their_server(tmp_path, slow):
    path = tmp_path / "slow.mkv"
    path.write_bytes(slow)
    server = psutil.Popen([sys.executable, "-c", SERVER, path])
    wait_for(lambda: len(server.children(recursive=True)) == 2)
    started = server.children(recursive=True)
    server.send_signal(signal.SIGKILL)
    server.wait()
    assert psutil.wait_procs(started, timeout=20)[1] == []


def test_the_template_imports_no_torch(decoders):
    decoders.load_audio(io.BytesIO(HELLO.read_bytes()))
    maps = Path(f"/proc/{_TEMPLATE._process.pid}/maps").read_text()
    assert "libsndfile" in maps and "libav" in maps and "libtorch" not in maps
    status = Path(f"/proc/{_TEMPLATE._process.pid}/status").read_text()
    assert "Threads:\t1\n" in status  # a fork of more would miss the others' locks


# what stays in the thread ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subtype", "is_plain"),
    [("PCM_16", True), ("PCM_U8", True), ("PCM_24", True), ("FLOAT", True), ("DOUBLE", True)]
    + [("ULAW", True), ("ALAW", True), ("IMA_ADPCM", False), ("GSM610", False)],
)
def test_plain_wav_stays_in_the_thread(subtype, is_plain):
    file = written(np.zeros(1_600), subtype=subtype)
    assert is_plain_pcm(file) is is_plain
    assert len(load_audio(file)) >= 1_600


OTHERS = {
    "nothing": b"",
    "a head": b"RIFF",
    "flac": HELLO.read_bytes(),
    "chunks": hostile.hostile("chunks wav", share=0.01),
    "cues": hostile.hostile("cues wav", share=0.01),
    "tags": hostile.hostile("tags wav"),
    "two data chunks": hostile.riff((b"data", b"")),
    "cut off": hostile.riff()[:-1_000],
    "big-endian": b"RIFX" + hostile.riff()[4:],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_leave_the_thread(name):
    assert is_plain_pcm(io.BytesIO(hostile.riff()))
    assert not is_plain_pcm(io.BytesIO(OTHERS[name]))


def test_a_description_of_raw_audio_crosses(decoders):
    raw = RawAudio("pcm_s16le", 16_000, 1)
    data = (np.arange(16_000) - 8_000).astype("<i2").tobytes()
    loaded = decoders.load_audio(io.BytesIO(data), raw=raw)
    np.testing.assert_array_equal(loaded, load_audio(data, raw=raw))
