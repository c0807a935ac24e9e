# SPDX-License-Identifier: Apache-2.0
"""Does bad input ever get more than a refusal?

    python benchmarks/robustness/fuzz.py                    5,000 recordings, 2,000 forms, and so on
    python benchmarks/robustness/fuzz.py --only form --count 500 --url http://localhost:8000
    python benchmarks/robustness/fuzz.py --case audio:1234  what that case is, and what comes of it

Every case is made from its number alone, so a failure can be run again. Each recording is decoded
as a server does it, in a process of its own within the limits of ``decode_worker.py``, whose end,
memory and CPU time are seen from outside. The law: a checked waveform, or ValueError with a
message, or a limit that was reached; never a crash. Forms go to a server: no status of 500 or
above, and every refusal is OpenAI's error object. So do an aligner's forms, and realtime sessions:
each goes on, whatever it was sent. Meanwhile the server stays small and answers others. Manifests
are read, or refused by name, and nothing would be written outside of the output folder.
What breaks the law is listed; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import base64
import gc
import gzip
import http.client
import io
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.append(str(Path(__file__).resolve().parents[1]))  # common
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))  # support

import hostile
import numpy as np

from qwen3_asr_vllm.audio import load_audio
from qwen3_asr_vllm.peaks import MAX_PEAK
from qwen3_asr_vllm.server.decode_worker import Limits

MAX_DURATION_S = 60.0  # what a case may decode to: 4 MB
MAX_DECODER_GROWTH = (64 + 12) << 20  # bytes that a case may add to its decoder: see ``Limits``
MAX_GROWTH = 192 << 20  # bytes that a manifest may add to the process
MAX_CPU_S = Limits().cpu(MAX_DURATION_S) + 1
HANG_S = 60.0  # no case takes one second on an idle machine
AT_ONCE = 8  # cases, at a server
TRANSCRIPTIONS = "/v1/audio/transcriptions"
ALIGNMENTS = "/v1/audio/alignments"

# name: container and codec of FFmpeg, and its channels. Ogg Vorbis is written by libsndfile.
CODECS = {
    "flac": ("flac", "flac", "stereo"),
    "mp3": ("mp3", "libmp3lame", "stereo"),
    "m4a": ("ipod", "aac", "stereo"),
    "alac.m4a": ("ipod", "alac", "mono"),
    "aac": ("adts", "aac", "mono"),
    "opus": ("ogg", "libopus", "mono"),
    "webm": ("webm", "libopus", "stereo"),
    "mkv": ("matroska", "aac", "mono"),
    "mp4": ("mp4", "aac", "5.1"),
    "wav": ("wav", "pcm_s16le", "stereo"),
    "adpcm.wav": ("wav", "adpcm_ima_wav", "mono"),
    "64bit.wav": ("wav", "pcm_f64le", "mono"),
    "w64": ("w64", "pcm_s24le", "mono"),
    "aiff": ("aiff", "pcm_s16be", "stereo"),
    "au": ("au", "pcm_mulaw", "mono"),
    "caf": ("caf", "pcm_s16le", "mono"),
    "ac3": ("ac3", "ac3", "stereo"),
    "wma": ("asf", "wmav2", "stereo"),
}
FORMATS = (*CODECS, "ogg")


def tone(seconds: float, rate: int) -> np.ndarray:
    """A sine of 220 Hz, (samples,) float32."""
    return np.sin(2 * np.pi * 220 * np.arange(round(seconds * rate), dtype=np.float32) / rate) / 4


@cache
def recording(name: str) -> bytes:
    """A good recording of 0.6 s, 48 kHz, in the format of that name."""
    if name == "ogg":
        return _written("OGG", "VORBIS", tone(0.6, 48_000), 48_000)
    import av

    container, codec, layout = CODECS[name]
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=48_000, layout=layout)
        stream.bit_rate = 128_000
        channels = stream.layout.nb_channels
        planes = np.tile(tone(0.6, 48_000), (channels, 1))
        frame = av.AudioFrame.from_ndarray(planes, "fltp", layout)
        frame.sample_rate = 48_000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def _written(container: str, subtype: str, samples: np.ndarray, rate: int) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype, format=container)
    return file.getvalue()


# damage ---------------------------------------------------------------------------------------

EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 63, -1)


def truncated(rng: np.random.Generator, data: bytes) -> bytes:
    return data[: int(rng.integers(1, len(data)))]


def flipped(rng: np.random.Generator, data: bytes) -> bytes:
    """A few bytes or bits changed, anywhere."""
    damaged = bytearray(data)
    for place in rng.integers(0, len(data), int(rng.integers(1, 64))):
        damaged[place] = int(rng.integers(256))
    return bytes(damaged)


def header_flipped(rng: np.random.Generator, data: bytes) -> bytes:
    size = min(len(data), 256)
    return flipped(rng, data[:size]) + data[size:]


def lying(rng: np.random.Generator, data: bytes) -> bytes:
    """Numbers of the header, of two, four or eight bytes, become extreme ones."""
    damaged = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        width = int(rng.choice([2, 4, 8]))
        value = int(rng.choice(np.array(EXTREMES, object))) % (1 << 8 * width)
        place = int(rng.integers(0, max(1, min(len(data) - 8, 512))))
        damaged[place : place + width] = value.to_bytes(width, str(rng.choice(["big", "little"])))
    return bytes(damaged)


def shuffled(rng: np.random.Generator, data: bytes) -> bytes:
    """Cut in pieces that are dropped, repeated, and put in another order."""
    cuts = sorted(int(cut) for cut in rng.integers(0, len(data), 4))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return b"".join(pieces[i] for i in rng.integers(0, len(pieces), int(rng.integers(1, 12))))


def spliced(rng: np.random.Generator, data: bytes) -> bytes:
    """The head of one format before the body of another."""
    other = recording(str(rng.choice(FORMATS)))
    return data[: int(rng.integers(4, 400))] + other[int(rng.integers(0, 400)) :]


def with_junk(rng: np.random.Generator, data: bytes) -> bytes:
    """Bytes before or behind it; an ID3 tag that states a size it does not have."""
    junk = rng.bytes(int(rng.integers(1, 5000)))
    id3 = b"ID3\x04\x00\x00" + rng.bytes(4)
    return [junk + data, data + junk, id3 + data, id3 + junk][int(rng.integers(4))]


def repeated(rng: np.random.Generator, data: bytes) -> bytes:
    return data * int(rng.integers(2, 40))


DAMAGE = (truncated, flipped, header_flipped, lying, lying, shuffled, spliced, with_junk, repeated)


def lying_wav(rng: np.random.Generator) -> bytes:
    """A wav file whose header says anything: tag, channels, rate, bits, sizes, chunks."""

    def any_of(*values: int) -> int:
        return values[int(rng.integers(len(values)))]

    tag = any_of(1, 1, 1, 3, 3, 6, 7, 2, 0x11, 0x31, 0x50, 0x55, 0xFFFE, 0, 0xFFFF)
    channels = any_of(1, 2, 3, 6, 8, 32, int(rng.integers(1, 33)), 0, 255, 1024, 65535)
    rate = any_of(8000, 16000, 44100, 1000, 768_000, int(rng.integers(1000, 768_001)))
    rate = any_of(rate, rate, rate, 0, 1, 999, 768_001, 2**31, 2**32 - 1)
    bits = any_of(8, 16, 24, 32, 64, 0, 1, 4, 12, 20, 255, 65535)
    align = any_of(channels * bits // 8 % 65536, 0, 1, 65535)
    body = rng.bytes(int(rng.integers(0, 20_000)))
    format_size = any_of(16, 18, 40, 0, 14, 2**32 - 1, 2**31)
    header = struct.pack("<HHIIHH", tag, channels, rate, rate * align % 2**32, align, bits)
    header += rng.bytes(min(format_size, 40) - 16) if format_size > 16 else b""
    chunks = [b"fmt " + struct.pack("<I", format_size) + header]
    if rng.random() < 0.3:
        extra = rng.bytes(int(rng.integers(0, 64)))
        name = [b"LIST", b"fact", b"cue ", b"ds64", b"bext", b"data"][int(rng.integers(6))]
        chunks.append(name + struct.pack("<I", any_of(len(extra), 0, 2**32 - 1)) + extra)
    size = any_of(len(body), len(body), 0, 2**32 - 1, 2**31 - 1, len(body) * 1000, 1)
    chunks.append(b"data" + struct.pack("<I", size) + body)
    if rng.random() < 0.1:
        chunks.reverse()
    form = [b"RIFF", b"RIFF", b"RF64", b"RIFX"][int(rng.integers(4))]
    return (
        form + struct.pack("<I", any_of(36 + len(body), 0, 2**32 - 1)) + b"WAVE" + b"".join(chunks)
    )


def hostile_case(rng: np.random.Generator) -> tuple[str, bytes]:
    """A file whose tables, tags, covers or chunks expand; often of a size that still passes."""
    kind = str(rng.choice(list(hostile.KINDS)))
    data = hostile.hostile(kind, share=10 ** rng.uniform(-3, 0))
    if rng.random() < 0.3:
        return f"hostile, damaged {kind}", DAMAGE[int(rng.integers(len(DAMAGE)))](rng, data)
    return f"hostile {kind}", data


PEAKS = (1.0, 8.0, 9.0, 1e4, 1e10, 1e17, 1e30, 3e38, np.inf, np.nan, 1e-40)
FLOATS = ("WAV", "AIFF", "CAF", "W64", "AU", "RF64", "MAT5")


def loud_case(rng: np.random.Generator) -> tuple[str, bytes]:
    """A float recording some of whose samples are too loud, or no numbers."""
    samples = tone(0.6, 48_000)
    peak = PEAKS[int(rng.integers(len(PEAKS)))]
    count = int(rng.choice([1, 2, 100, len(samples)]))
    samples[rng.integers(0, len(samples), count)] = rng.choice([-1, 1], count) * np.float32(peak)
    container, subtype = str(rng.choice(FLOATS)), str(rng.choice(["FLOAT", "DOUBLE"]))
    return f"loud {peak:g} {container} {subtype}", _written(container, subtype, samples, 48_000)


def audio_case(number: int) -> tuple[str, bytes]:
    """The damage and its format, and the damaged bytes."""
    rng = np.random.default_rng([1, number])
    share = np.random.default_rng([6, number]).random()  # does not renumber the cases below
    if share < 0.01:
        return hostile_case(rng)
    if share < 0.03:
        return loud_case(rng)
    if rng.random() < 0.2:
        return "wav header", lying_wav(rng)
    name = str(rng.choice(FORMATS))
    damages = [DAMAGE[i] for i in rng.integers(0, len(DAMAGE), int(rng.integers(1, 3)))]
    data = recording(name)
    for damage in damages:
        data = damage(rng, data) or b"\0"
    return f"{name} {' '.join(damage.__name__ for damage in damages)}", data


# recordings, in a process of their own ----------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case; ``broken`` names the law that it broke, or is empty."""

    number: int
    name: str
    answer: str
    broken: str = ""
    seconds: float = 0.0
    growth: int = 0  # bytes


def load(number: int) -> Outcome:
    """One recording, decoded as a server does it, with what it costs."""
    name, data = audio_case(number)
    start = time.perf_counter()
    cost = hostile.decode(data, max_duration_s=MAX_DURATION_S)
    answer, broken = _judged(cost)
    growth = cost.peak_bytes - _idle_bytes()
    if growth > MAX_DECODER_GROWTH:
        broken = broken or f"{growth >> 20} MiB of memory"
    if cost.cpu_s > MAX_CPU_S:
        broken = broken or f"{cost.cpu_s:.1f} s of CPU time"
    return Outcome(number, name, answer, broken, time.perf_counter() - start, growth)


@cache
def _idle_bytes() -> int:
    """The peak of a decoder's memory for a good recording."""
    return hostile.decode(recording("m4a")).peak_bytes


def _judged(cost: hostile.Cost) -> tuple[str, str]:
    """The answer, and what is wrong with it."""
    if cost.exit_code == -signal.SIGPROF or cost.error.startswith("MemoryError"):
        return "limited: by CPU time or memory", ""
    if cost.exit_code:
        return "none", f"crash: the decoder ended with {cost.exit_code}"
    if cost.error:
        kind, _, text = cost.error.partition(": ")
        if kind != "ValueError":
            return cost.error, "another exception than ValueError"
        return f"refused: {text}", "" if re.search(r"[a-z]{2,} [a-z]", text) else "no message"
    waveform = cost.waveform
    is_good = (
        0 < len(waveform) <= MAX_DURATION_S * 16_000 + 16_000
        and np.isfinite(waveform).all()
        and np.abs(waveform).max() <= MAX_PEAK
    )
    return f"decoded: {len(waveform)} samples", "" if is_good else "not a waveform"


def measure(number: int, name: str, run: Callable[[], tuple[str, str]]) -> Outcome:
    """Runs it, and adds the seconds and the bytes by which the process grew at most."""
    Path("/proc/self/clear_refs").write_text("5")  # from here on, VmHWM is the peak
    before, start = _memory("VmRSS"), time.perf_counter()
    answer, broken = run()
    growth = _memory("VmHWM") - before
    if growth > MAX_GROWTH:
        broken = broken or f"{growth >> 20} MiB of memory"
    return Outcome(number, name, answer, broken, time.perf_counter() - start, growth)


def _memory(field: str, pid: int | str = "self") -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) << 10


class Worker:
    """A process that loads recordings, one after the other."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "--worker"]
        # What decoders complain of on stderr is not of interest here.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def load(self, number: int) -> Outcome:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin and stdout
        stdin.write(f"{number}\n".encode())
        stdin.flush()
        if not select.select([stdout], [], [], HANG_S)[0]:
            return self._lost(number, f"hangs for more than {HANG_S:g} s")
        if not (line := stdout.readline()):
            return self._lost(number, f"crash: the process ended with {self.process.wait()}")
        return Outcome(**json.loads(line))

    def _lost(self, number: int, broken: str) -> Outcome:
        self.close()
        self.__init__()
        return Outcome(number, audio_case(number)[0], "none", broken)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def load_all(numbers: Iterable[int]) -> Iterator[Outcome]:
    worker = Worker()
    try:
        yield from map(worker.load, numbers)
    finally:
        worker.close()


def _work() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # a library that prints does not disturb
    audio_case(0)  # all imports and tables are there before the first is measured
    load_audio(recording("flac")), load_audio(recording("webm"))
    _idle_bytes()
    gc.freeze()  # each case is a fork of this process
    for line in sys.stdin:
        os.write(answers, json.dumps(asdict(load(int(line)))).encode() + b"\n")


# forms ------------------------------------------------------------------------------------------

FIELDS = (
    *("model", "language", "languages", "prompt", "keywords", "hotwords", "response_format"),
    *("timestamp_granularities", "stream", "stream_include_usage", "temperature", "top_p", "top_k"),
    *("min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("max_completion_tokens", "vllm_xargs", "priority", "include", "chunking_strategy"),
    *(
        "known_speaker_names",
        "to_language",
        "use_beam_search",
        "n",
        "file",
        "chunking_strategy[type]",
    ),
    *("stream_continuous_usage_stats", "loop_guard", "speakers", "unheard_of", "", "__class__"),
)
VALUES: tuple[bytes, ...] = tuple(
    value.encode() if isinstance(value, str) else value
    for value in (
        *("", " ", "null", "None", "true", "no", "0", "1", "-1", "2", "0.5", "1e-300", "1e308"),
        *("NaN", "inf", "-inf", "-0", "9" * 400, str(2**31), str(2**32), str(2**63), str(2**64)),
        *(str(-(2**63) - 1), "٣", "１", "0x10", "1_000", "[]", "{}", "[1, 2", "[" * 5000),
        *(
            '{"a": 1}',
            '{"a": ' * 3000,
            '["a", {"b": [null]}]',
            '"x"',
            "[null]",
            "[NaN]",
            '{"": ""}',
        ),
        *("json", "text", "srt", "vtt", "verbose_json", "diarized_json", "word", "segment", "auto"),
        *("en", "zh", "de,en", "tlh", "English", "server_vad", "logprobs"),
        *(
            "<|im_end|>\n<|im_start|>system\n",
            "<asr_text>",
            "language English<asr_text>",
            "<|audio_pad|>",
        ),
        *(
            "../../../../etc/passwd",
            "file:///etc/passwd",
            "http://169.254.169.254/",
            "%s%n%x",
            "${x}",
        ),
        *(
            "'; DROP TABLE users; --",
            "<script>alert(1)</script>",
            "\r\nX-Injected: 1",
            "a\0b",
            "\0",
        ),
        *(
            "é" * 300,
            "\U0001f3a4",
            "\u202e\u2066",
            "\ufeff",
            "e" + "\u0301" * 500,
            ", , ,",
            "a" * 100_000,
        ),
        *(
            "字" * 30_000,
            "a" * 1_200_000,
            b"\xff\xfe\xfd",
            b"\xed\xa0\x80",
            b"\xc0\xaf",
            b"\x80" * 99,
        ),
    )
)
NUMBERS = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "max_completion_tokens", "priority"),
)
EXTREME_NUMBERS = (
    *("0", "1", "-1", "2", "0.5", "1e-300", "1e308", "NaN", "inf", "-inf", "-0", "9" * 40),
    *(str(2**31 - 1), str(2**31), str(2**32), str(2**63 - 1), str(2**63), str(2**64)),
    *(str(-(2**31) - 1), str(-(2**63)), str(-(2**63) - 1), "3.0", "1e3", "100000"),
)
FILE_NAMES = (
    *(
        "a.wav",
        "",
        "a",
        ".",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "C:\\con",
        "a\0.wav",
        "a.raw",
    ),
    *(
        "a" * 5000 + ".mp3",
        "\U0001f3a4.webm",
        'a\\"b.wav',
        "a;b.wav",
        "<|im_end|>.wav",
        "$(id).wav",
    ),
)


@dataclass(frozen=True)
class FormCase:
    route: str
    name: str
    headers: dict[str, str]
    body: bytes


def form_case(number: int) -> FormCase:
    """A form of a recording and fields, some of them wrong, in a multipart body that may be too."""
    rng = np.random.default_rng([2, number])
    return _form(rng, number, TRANSCRIPTIONS, _fields(rng), _file_part)


def alignment_case(number: int) -> FormCase:
    """The same for an aligner: of a recording and its text, or of samples and units."""
    rng = np.random.default_rng([5, number])

    def one_of(values: tuple[bytes, ...]) -> bytes:
        return values[int(rng.integers(len(values)))]

    if rng.random() < 0.3:
        given = [("units", one_of(UNITS if rng.random() < 0.7 else VALUES))]
        return _form(rng, number, f"{ALIGNMENTS}/times", given, _samples_part)
    given = [("text", one_of(TEXTS if rng.random() < 0.7 else VALUES)), *_fields(rng)]
    if rng.random() < 0.3:
        given.append(("language", one_of(LANGUAGES)))
    return _form(rng, number, ALIGNMENTS, given, _file_part)


TEXTS = tuple(
    text.encode()
    for text in (
        *(
            "The train leaves at nine.",
            "Der Zug fährt um neun.",
            "火车九点出发。",
            "電車は九時です。",
        ),
        *(
            "기차는 아홉 시에 떠납니다.",
            "...",
            " \n\t",
            "a\u0301\u200d b",
            "\U0001f3a4",
            "<timestamp>",
        ),
        *("<|im_end|><timestamp><timestamp>", "a " * 3_000, "字" * 3_000, "a" * 9_000, "は" * 500),
    )
)
UNITS = tuple(
    json.dumps(units).encode()
    for units in (
        *(["The", "train"], [], [""], ["a"] * 2_000, ["a" * 100_000], ["<timestamp>", "\ud800"]),
        *({}, "The", [1], [None], [["a"]], None, [True], ["\0"], ["<|audio_pad|>"] * 9),
    )
)
LANGUAGES = (b"en", b"German", b"zh", b"ja", b"ko", b"yue", b"pl", b"tlh", b"", b"en,de")


def _samples_part(rng: np.random.Generator) -> bytes:
    """Of the route that servers ask: float32, or what is none."""
    samples = tone(0.2, 16_000)
    samples[::7] = rng.choice([0, 1, np.nan, np.inf, -1e30, 1e-40])
    data = samples.tobytes()[: int(rng.choice([0, 1, 4, 3_999, 12_800]))]
    head = 'Content-Disposition: form-data; name="samples"'
    head += '; filename="a.f32"' if rng.random() < 0.9 else ""
    return f"{head}\r\n\r\n".encode() + data


def _form(
    rng: np.random.Generator,
    number: int,
    route: str,
    fields: list[tuple[str, bytes]],
    file_part: Callable[[np.random.Generator], bytes],
) -> FormCase:
    boundary = f"b{number:x}b"
    parts = [_part(rng, name, value) for name, value in fields]
    parts.insert(int(rng.integers(len(parts) + 1)), file_part(rng))
    if rng.random() < 0.05:
        parts *= int(rng.choice([2, 40, 600]))
    dashes = b"--" + boundary.encode()
    body = b"".join(dashes + b"\r\n" + part + b"\r\n" for part in parts) + dashes + b"--\r\n"
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    damage = ""
    beside = np.random.default_rng([7, number])  # does not renumber the other cases
    if beside.random() < 0.04:
        damage, headers, body = _crowded(beside, headers, body)
    elif rng.random() < 0.15:
        damage, headers, body = _broken_body(rng, headers, body)
    shown = [f"{name[:20]}={value[:20]!r}" for name, value in fields]
    return FormCase(route, " ".join([*shown, damage]).strip(), headers, body)


def _fields(rng: np.random.Generator) -> list[tuple[str, bytes]]:
    if rng.random() < 0.4:  # a number that is one, and still wrong
        return [
            (NUMBERS[i], EXTREME_NUMBERS[int(rng.integers(len(EXTREME_NUMBERS)))].encode())
            for i in rng.integers(0, len(NUMBERS), int(rng.integers(1, 3)))
        ]
    names = [FIELDS[i] for i in rng.integers(0, len(FIELDS), int(rng.integers(0, 5)))]
    suffixes = ["", "", "", "[]", "[0]", "[a][b]", "\\"]
    return [
        (name + suffixes[int(rng.integers(7))], VALUES[int(rng.integers(len(VALUES)))])
        for name in names
    ]


def _part(rng: np.random.Generator, name: str, value: bytes) -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"'
    if rng.random() < 0.1:  # a field that comes as a file
        disposition += '; filename="x"'
    charset = "\r\nContent-Type: text/plain; charset=bogus" if rng.random() < 0.05 else ""
    return f"{disposition}{charset}\r\n\r\n".encode() + value


def _file_part(rng: np.random.Generator) -> bytes:
    file_name = FILE_NAMES[int(rng.integers(len(FILE_NAMES)))]
    disposition = f'Content-Disposition: form-data; name="file"; filename="{file_name}"'
    if rng.random() < 0.05:
        disposition = 'Content-Disposition: form-data; name="file"'  # the recording as text
    elif rng.random() < 0.05:
        disposition += "; filename*=utf-8''%ff%00..%2f"
    data = audio_case(int(rng.integers(10**6)))[1] if rng.random() < 0.3 else short_wav()
    return f"{disposition}\r\nContent-Type: audio/wav\r\n\r\n".encode() + data


@cache
def short_wav() -> bytes:
    """A fifth of a second: a good recording that is transcribed at once."""
    return _written("WAV", "PCM_16", tone(0.2, 16_000), 16_000)


def _field(boundary: str, name: str, value: bytes) -> bytes:
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
    return head.encode() + value + b"\r\n"


@cache
def _bomb() -> bytes:
    """64 MiB in 64 KiB."""
    return gzip.compress(bytes(64 << 20))


def _broken_body(
    rng: np.random.Generator, headers: dict[str, str], body: bytes
) -> tuple[str, dict[str, str], bytes]:
    kind = headers["Content-Type"]
    boundary = kind.partition("boundary=")[2]
    broken = (
        ("cut off", {}, truncated(rng, body)),
        ("flipped", {}, flipped(rng, body)),
        ("shuffled", {}, shuffled(rng, body)),
        ("line feeds only", {}, body.replace(b"\r\n", b"\n")),
        ("no body", {}, b""),
        ("no boundary", {"Content-Type": "multipart/form-data"}, body),
        ("other boundary", {"Content-Type": "multipart/form-data; boundary=other"}, body),
        ("long boundary", {"Content-Type": kind + "x" * 300}, body),
        ("odd charset", {"Content-Type": kind + "; charset=no-such"}, body),
        (
            "slow charset",
            {"Content-Type": kind + "; charset=punycode"},
            _field(boundary, "x-" + "a" * 1_000_000, b"") + body,
        ),
        ("large field", {}, _field(boundary, "prompt", b"a" * 1_000_000) + body),
        (
            "many fields",
            {},
            b"".join(_field(boundary, f"x{n}", b"1") for n in range(300)) + body,
        ),
        ("gzip", {"Content-Encoding": "gzip"}, gzip.compress(body)),
        ("gzip bomb", {"Content-Encoding": "gzip"}, _bomb()),
        ("recording alone", {"Content-Type": "audio/wav"}, short_wav()),
        (
            "base64",
            {"Content-Type": "application/json"},
            json.dumps({"file": base64.b64encode(short_wav()).decode()}).encode(),
        ),
        (
            "urlencoded",
            {"Content-Type": "application/x-www-form-urlencoded"},
            b"file=%ff&model=a&" * 9,
        ),
        ("json", {"Content-Type": "application/json"}, b'{"file": "file:///etc/passwd"}'),
        ("no type", {"Content-Type": ""}, body),
        ("mixed", {"Content-Type": f"multipart/mixed; boundary={boundary}"}, body),
    )
    name, changed, body = broken[int(rng.integers(len(broken)))]
    return name, headers | changed, body


CHARSETS = (
    *("punycode", "idna", "utf-7", "utf-16", "hz", "rot13", "zip", "unicode_escape", "undefined"),
    *("raw_unicode_escape", "utf-8-sig", "latin-1", "x" * 5_000, "", "utf-8\\0", '"utf-8"'),
)


def _crowded(
    rng: np.random.Generator, headers: dict[str, str], body: bytes
) -> tuple[str, dict[str, str], bytes]:
    """More, larger or stranger fields than any client sends, before those of a form."""
    kind = headers["Content-Type"]
    dashes = b"--" + kind.partition("boundary=")[2].encode()
    charset = CHARSETS[int(rng.integers(len(CHARSETS)))]
    strange_name = b"x-" + b"\xc3\xa9" * int(rng.choice([9, 9_000, 400_000]))
    crowds = (
        (
            "many fields",
            kind,
            [(b"x%d" % i, b"1") for i in range(int(rng.choice([65, 1_001, 9_000])))],
        ),
        ("one name", kind, [(b"keywords[]", b"a")] * int(rng.choice([999, 20_000]))),
        ("large fields", kind, [(b"prompt", b"a" * (1 << 20))] * int(rng.choice([1, 8, 24]))),
        ("long name", kind, [(strange_name, b"1")]),
        ("charset", f"{kind}; charset={charset}", [(strange_name, b"\xff" * 9)]),
        (
            "charset of a part",
            kind,
            [
                (
                    b'p"\r\nContent-Type: text/plain; charset=' + charset.encode() + b'\r\nX: "',
                    b"\xc3",
                )
            ],
        ),
    )
    name, kind, fields = crowds[int(rng.integers(len(crowds)))]
    parts = (
        dashes
        + b'\r\nContent-Disposition: form-data; name="'
        + name
        + b'"\r\n\r\n'
        + value
        + b"\r\n"
        for name, value in fields
    )
    return name, headers | {"Content-Type": kind}, b"".join(parts) + body


def post(url: str, case: FormCase, *, timeout: float = HANG_S * 5) -> tuple[int, str, bytes]:
    """Status, content type and body."""
    address = urlsplit(url)
    assert address.hostname
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=timeout)
    try:
        connection.request("POST", case.route, case.body, case.headers)
        response = connection.getresponse()
        return response.status, response.headers.get("Content-Type", ""), response.read()
    finally:
        connection.close()


def ask(url: str, number: int, make: Callable[[int], FormCase] = form_case) -> Outcome:
    """One form to a server."""
    case, start = make(number), time.perf_counter()
    try:
        status, kind, body = post(url, case)
    except (OSError, http.client.HTTPException) as error:
        return Outcome(number, case.name, "none", f"no answer: {error!r}")
    broken = wrong(status, kind, body)
    answer = f"{status} {body[:300].decode(errors='replace')}"
    return Outcome(number, case.name, answer, broken, time.perf_counter() - start)


def wrong(status: int, kind: str, body: bytes) -> str:
    """Which law an answer breaks, or nothing."""
    if status >= 500:
        return f"status {status}"
    if status != 200:
        return "" if _is_error_object(body) else "a refusal that is not OpenAI's error object"
    if kind.startswith("application/json"):
        return "" if isinstance(json.loads(body), dict) else "no JSON object"
    if kind.startswith("text/event-stream"):
        return "" if body.endswith(b"data: [DONE]\n\n") else "a stream without an end"
    return "" if kind.startswith(("text/", "application/x-subrip")) else f"200 of type {kind}"


def _is_error_object(body: bytes) -> bool:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return {"message", "type", "param", "code"} <= set(error) and bool(error["message"])


def at_once(
    run: Callable[[str, int], Outcome], url: str, numbers: Iterable[int]
) -> Iterator[Outcome]:
    """Each case at a server that has several at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(partial(run, url), numbers)


def ask_aligner(url: str, number: int) -> Outcome:
    return ask(url, number, alignment_case)


# realtime sessions ------------------------------------------------------------------------------

EVENTS = ("session.update", "input_audio_buffer.append", "input_audio_buffer.commit")
EVENTS += ("input_audio_buffer.clear", "transcription_session.update", "response.create", "x", "")
JUNK: tuple[Any, ...] = (
    *(None, True, 0, -1, 2**63, 1e308, "", "a" * 10_000, "\0", "\ud800", "<|im_end|>", [], {}),
    *([[]], [None], {"": None}, {"a": {"b": []}}, "AAAA", "AAA", "====", "é", "file:///etc/passwd"),
)
PLACES = (
    *(("type",), ("event_id",), ("audio",), ("session",), ("model",), ("final",)),
    *(("session", "type"), ("session", "audio"), ("session", "audio", "input"), ("session", "x")),
    *(("session", "audio", "input", name) for name in ("format", "transcription", "x")),
    *(("session", "audio", "input", "turn_detection"), ("session", "include")),
    *(("session", "audio", "input", "format", name) for name in ("type", "rate")),
    *(("session", "audio", "input", "transcription", name) for name in ("model", "language")),
    *(("session", "audio", "input", "transcription", name) for name in ("prompt", "keywords")),
    *(("session", "audio", "input", "turn_detection", name) for name in ("type", "threshold")),
    *(("session", "audio", "input", "turn_detection", name) for name in ("eagerness", "x")),
    *(("session", "audio", "input", name) for name in ("noise_reduction", "turn_detection")),
    *(("session", "audio", "input", "transcription", name) for name in ("languages", "delay")),
    *(("session", name) for name in ("input_audio_format", "input_audio_transcription")),
    *(("session", name) for name in ("modalities", "turn_detection", "client_secret")),
)
FRAMES: tuple[str | bytes, ...] = (
    *("", "{", "null", "[]", "1", '"x"', "NaN", "[" * 50_000, '{"type": ' * 2_000, "\0", "{}"),
    *(
        b"",
        b"\xff\xfe",
        b'{"type": "session.update"}',
        b"\0" * 100_000,
        '{"type": "x"' + " " * 10**6,
        '{"type": "x", "session": [' + "[]," * 300_000 + "1]}",
        '{"type": "session.update", "session": {' + '"a":{},' * 200_000 + '"b":1}}',
    ),
)


def session_case(number: int) -> list[str | bytes]:
    """The frames of one session: events with wrong parts, and frames that are no events."""
    rng = np.random.default_rng([3, number])
    return [_frame(rng) for _ in range(int(rng.integers(1, 8)))]


def _frame(rng: np.random.Generator) -> str | bytes:
    if rng.random() < 0.2:
        return FRAMES[int(rng.integers(len(FRAMES)))]
    event: dict[str, Any] = {"type": EVENTS[int(rng.integers(len(EVENTS)))]}
    if event["type"] == "input_audio_buffer.append":
        size = int(rng.choice([0, 1, 3, 4_800, 96_001]))
        event["audio"] = base64.b64encode(rng.bytes(size)).decode()
    for _ in range(int(rng.integers(0, 3))):
        *path, last = PLACES[int(rng.integers(len(PLACES)))]
        place = event
        for name in path:
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place = place[name]
        place[last] = deepcopy(JUNK[int(rng.integers(len(JUNK)))])
    return json.dumps(event)


def deflated_frame(rng: np.random.Generator) -> bytes:
    """A compressed frame of 16 KiB, which are 16 MiB, though no compression was agreed on."""
    text = (b'{"type": "x"' + b" " * (1 << 24), b"[" * (1 << 24), b'{"audio": "' + b"A" * (1 << 24))
    packer = zlib.compressobj(9, wbits=-15)
    data = packer.compress(text[int(rng.integers(len(text)))]) + packer.flush(zlib.Z_SYNC_FLUSH)
    data = data.removesuffix(b"\0\0\xff\xff")
    final, compressed, is_text, masked = 0x80, 0x40, 0x01, 0x80
    head = bytes([final | compressed | is_text, masked | 126]) + struct.pack(">H", len(data))
    return head + bytes(4) + data


def deflate(url: str, number: int) -> Outcome:
    """A session that sends such frames: it must be ended at once, as RFC 6455 says."""
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    start, code = time.perf_counter(), 0
    frame = deflated_frame(np.random.default_rng([8, number]))
    try:
        with connect(f"ws{url.removeprefix('http')}/v1/realtime") as socket:
            socket.socket.sendall(frame * 16)
            while True:
                socket.recv(timeout=HANG_S)
    except ConnectionClosed as error:
        code = error.rcvd.code if error.rcvd else 1006
    except (OSError, TimeoutError) as error:
        return Outcome(number, "deflated", "none", f"lost: {error!r}")
    broken = "" if code in (1002, 1007, 1009) else "closed with another code"
    return Outcome(number, "deflated", f"{code}: closed", broken, time.perf_counter() - start)


def converse(url: str, number: int) -> Outcome:
    """One session; after all that it must still answer."""
    if np.random.default_rng([9, number]).random() < 0.05:
        return deflate(url, number)
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import connect

    start, answers = time.perf_counter(), []
    last = {"type": "no such type"}
    try:
        with connect(f"ws{url.removeprefix('http')}/v1/realtime", max_size=None) as socket:
            for frame in session_case(number):
                socket.send(frame)
            socket.send(json.dumps(last))
            while not answers or last["type"] not in str(answers[-1].get("error")):
                answers.append(json.loads(socket.recv(timeout=HANG_S * 5)))
    except (OSError, WebSocketException, TimeoutError) as error:
        return Outcome(number, "session", str(answers[-1:])[:300], f"lost: {error!r}")
    errors = [answer["error"] for answer in answers if answer["type"] == "error"]
    unsaid = [error for error in errors if not _has_words(error)]
    broken = f"an error without words: {unsaid[0]}" if unsaid else ""
    answer = f"{len(errors)}: errors of {len(answers)} events"
    return Outcome(number, "session", answer, broken, time.perf_counter() - start)


def _has_words(error: Any) -> bool:
    """Whether an error has words: as a string, in vLLM's dialect, or in OpenAI's object."""
    return bool(error if isinstance(error, str) else error.get("message") and error.get("type"))


# manifests --------------------------------------------------------------------------------------

NAMES: tuple[Any, ...] = (
    *(
        "a.wav",
        "../../a.wav",
        "/etc/passwd",
        "a/../../b",
        "..",
        ".",
        "",
        " ",
        "~root/a",
        "a\0b.wav",
    ),
    *("http://127.0.0.1:9/a.wav", "file:///etc/passwd", "ftp://x/y", "http://", "http://[::1/a"),
    *("-", "a" * 5_000, "\ud800", "\u202e.wav", "C:\\con", "**", "$(id)", "\n", None, 1, [], {}),
)
NUMBERS_OF_ROWS: tuple[Any, ...] = (
    *(None, 0, 1.5, -1, 1e308, float("nan"), float("inf"), "x", "1", True, [], {}, 10**400),
)
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")


def manifest_case(number: int) -> tuple[str, bytes]:
    """The suffix and the bytes of a manifest, some of whose rows are wrong."""
    rng = np.random.default_rng([4, number])
    suffix = SUFFIXES[int(rng.integers(len(SUFFIXES)))]
    rows = [_row(rng) for _ in range(int(rng.integers(1, 6)))]
    if suffix in (".csv", ".tsv"):
        lines = [["audio_filepath", "offset", "duration"], *(list(row.values()) for row in rows)]
        text = "\n".join(("," if suffix == ".csv" else "\t").join(map(str, x)) for x in lines)
    elif suffix == ".txt":
        text = "\n".join(str(next(iter(row.values()), "")) for row in rows)
    else:
        text = "\n".join(json.dumps(row) for row in rows)
    data = text.encode(errors="surrogatepass") + b"\n"
    wild = rng.random()
    if wild < 0.1:
        return suffix, flipped(rng, data)
    odd = (b"[" * 100_000, b"\xff\xfe\0", b"\0", b"null", b'"', b"{" * 9, b"x" * 200_000, b"1e999")
    return suffix, data + odd[int(rng.integers(len(odd)))] if wild < 0.4 else data


def _row(rng: np.random.Generator) -> dict[str, Any]:
    key = ("audio_filepath", "file_name", "audio", "path", "x")[int(rng.integers(5))]
    row: dict[str, Any] = {key: NAMES[int(rng.integers(len(NAMES)))]}
    for name in ("offset", "duration"):
        if rng.random() < 0.4:
            row[name] = NUMBERS_OF_ROWS[int(rng.integers(len(NUMBERS_OF_ROWS)))]
    return row


def read_manifest(folder: Path, number: int) -> Outcome:
    """One manifest: recordings that can be loaded or refused, and stay in their folder; or no."""
    suffix, data = manifest_case(number)
    path = folder / f"manifest{suffix}"
    path.write_bytes(data)
    return measure(number, suffix, lambda: _recordings_of(path))


def _recordings_of(manifest: Path) -> tuple[str, str]:
    """The answer, and what is wrong with it."""
    from qwen3_asr_vllm.corpus.outputs import OutputFolder
    from qwen3_asr_vllm.corpus.sources import find_recordings

    folder, broken = manifest.parent, ""
    try:
        recordings = find_recordings([str(manifest)])
        for recording in recordings:
            out = OutputFolder(folder / "out", {"txt": str})
            inside = [p.resolve().is_relative_to(folder) for p in out.paths(recording).values()]
            broken = broken or ("" if all(inside) else f"{recording.name} leaves the folder")
            if not recording.source.startswith("http") and recording.source != "-":
                _refuse_quietly(recording)
    except (ValueError, OSError) as error:
        is_named = str(manifest) in str(error) or "would be written" in str(error)
        return f"refused: {str(error)[:200]}", "" if is_named else "no name"
    except Exception as error:
        return repr(error)[:200], "another exception than ValueError or OSError"
    return f"read: {len(recordings)} recordings", broken


def _refuse_quietly(recording: Any) -> None:
    try:
        recording.load()
    except (ValueError, OSError):
        pass


# what others see --------------------------------------------------------------------------------

MAX_HEALTH_S = 20.0  # on a machine that has other work
MAX_SERVER_BYTES = 2 << 30


@contextmanager
def watching(url: str, pid: int | None) -> Iterator[dict[str, float]]:
    """The slowest answer of /health in the meantime, and the largest that the server was."""
    seen = {"health s": 0.0, "server MiB": 0.0}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            start = time.perf_counter()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=HANG_S * 5).close()
            except OSError:
                pass  # the cases say what is wrong
            seen["health s"] = max(seen["health s"], time.perf_counter() - start)
            if pid is not None:
                size = _memory("VmRSS", pid) / 2**20
                seen["server MiB"] = max(seen["server MiB"], size)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


# the report -------------------------------------------------------------------------------------


def report(kind: str, outcomes: list[Outcome]) -> dict[str, Any]:
    """Prints what broke the law; returns the figures."""
    broken = [outcome for outcome in outcomes if outcome.broken]
    for outcome in broken[:50]:
        print(
            f"BROKEN {kind}:{outcome.number} ({outcome.name}): {outcome.broken}\n  {outcome.answer}"
        )
    answers = Counter(re.split(r"[\s:]", outcome.answer)[0] for outcome in outcomes)
    return {
        "cases": len(outcomes),
        "broken": len(broken),
        "answers": dict(answers.most_common(8)),
        "slowest s": max((o.seconds for o in outcomes), default=0.0),
        "most MiB": max((o.growth for o in outcomes), default=0) / 2**20,
    }


CASES = {"audio": 5_000, "form": 2_000, "alignment": 2_000, "session": 500, "manifest": 3_000}
AT_A_SERVER = {"form": ask, "alignment": ask_aligner, "session": converse}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--count", type=int, help="of each; default: thousands")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--url", help="of a server, with --only what it serves; default: start it")
    parser.add_argument("--case", help="KIND:NUMBER: show it, and run it, at --url where it must")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        _work()
        return 0
    if args.case:
        kind, _, number = args.case.partition(":")
        if kind not in CASES or not number.isdecimal():
            parser.error(f"--case {args.case}: give one of {', '.join(CASES)}, and a number")
        return _show(kind, int(number), args.url)
    if args.url and "alignment" in args.only and len(args.only) > 1:
        parser.error("--url: an aligner serves nothing else; say which it is (--only)")
    return _run(args)


def _show(kind: str, number: int, url: str | None) -> int:
    if kind == "audio":
        name, data = audio_case(number)
        shown: list[Any] = [name, f"{len(data)} bytes", data[:64].hex(" "), *load_all([number])]
    elif kind == "manifest":
        shown = [*manifest_case(number), *_read_manifests([number])]
    elif kind == "session":
        shown = session_case(number)
    else:
        case = form_case(number) if kind == "form" else alignment_case(number)
        shown = [case.route, case.headers, case.body[:3000]]
    if url and kind in AT_A_SERVER:
        shown.append(AT_A_SERVER[kind](url, number))
    print(*shown, sep="\n")
    return 0


def _read_manifests(numbers: Iterable[int]) -> Iterator[Outcome]:
    with tempfile.TemporaryDirectory() as folder:
        yield from (read_manifest(Path(folder).resolve(), number) for number in numbers)


def _run(args: argparse.Namespace) -> int:
    from common import print_result, print_table, server
    from support.checkpoints import ALIGNER, CHECKPOINT

    rows = []
    for model, kinds in (
        (None, ("audio", "manifest")),
        (CHECKPOINT, ("form", "session")),
        (ALIGNER, ("alignment",)),
    ):
        wanted = [kind for kind in kinds if kind in args.only]
        with ExitStack() as stack:
            url, pid = args.url, None
            if wanted and model and not url:
                url, pid = stack.enter_context(server("ours", model, ["--enforce-eager"]))
            for kind in wanted:
                numbers = range(args.first, args.first + (args.count or CASES[kind]))
                seen: dict[str, float] = {}
                if kind in AT_A_SERVER:
                    with watching(url, pid) as seen:
                        outcomes = list(at_once(AT_A_SERVER[kind], url, numbers))
                else:
                    load = load_all if kind == "audio" else _read_manifests
                    outcomes = list(load(numbers))
                rows.append({"input": kind} | report(kind, outcomes) | seen)
    print_table(rows)
    print_result("fuzz", rows)
    return 1 if any(map(_is_broken, rows)) else 0


def _is_broken(row: dict[str, Any]) -> bool:
    is_slow = row.get("health s", 0) > MAX_HEALTH_S
    return bool(row["broken"] or is_slow or row.get("server MiB", 0) > MAX_SERVER_BYTES / 2**20)


if __name__ == "__main__":
    sys.exit(main())
