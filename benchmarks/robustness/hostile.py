# SPDX-License-Identifier: Apache-2.0
"""What does a file cost that makes its decoder work for nothing?

    python benchmarks/robustness/hostile.py                every kind, within a server's limits
    python benchmarks/robustness/hostile.py --unlimited    what the decoders would take otherwise

Each kind is a small file with tables, tags, covers or chunks that decoders expand before the first
sample. ``hostile`` makes them; ``fuzz.py`` and the tests have them in their corpus. Each is decoded
as a server does it, in a child process. ``MiB`` is the peak of its memory beyond what an ordinary
m4a takes.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import socket
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # common
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))  # support

import numpy as np
from common import print_result, print_table

from qwen3_asr_vllm.audio import load_audio
from qwen3_asr_vllm.server.decode_worker import Limits, run_child

RATE = 48_000
NUM = 30_000  # tags, chunks and the like, unless a kind needs fewer


@cache
def speech(container: str, codec: str) -> bytes:
    """A good recording of 0.6 s in a format of FFmpeg's."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=RATE, layout="mono")
        stream.bit_rate = 128_000
        frame = av.AudioFrame.from_ndarray(tone()[None], "fltp", "mono")
        frame.sample_rate = RATE
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def tone() -> np.ndarray:
    """0.6 s of 220 Hz, (samples,) float32."""
    return np.sin(2 * np.pi * 220 * np.arange(RATE * 6 // 10, dtype=np.float32) / RATE) / 4


def pcm(byte_order: str = "<") -> bytes:
    return (tone() * 32_767).astype(f"{byte_order}i2").tobytes()


# mp4 -------------------------------------------------------------------------------------------


def box(name: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + name + body


def full_box(name: bytes, flags: int, *parts: bytes) -> bytes:
    return box(name, struct.pack(">I", flags), *parts)


UNITY = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
MEDIA = box(b"ftyp", b"M4A \0\0\0\0M4A mp42isom") + box(b"mdat", bytes(600))


def movie(*parts: bytes) -> bytes:
    header = struct.pack(">IIIIIH", 0, 0, 1000, 1000, 0x10000, 0x100) + bytes(10)
    return MEDIA + box(
        b"moov", full_box(b"mvhd", 0, header, UNITY, bytes(24), struct.pack(">I", 2)), *parts
    )


def track(num_samples: int, number: int = 1) -> bytes:
    """A track of AAC whose tables state so many samples, in a few bytes."""
    config = bytes.fromhex("0380808022000200048080801440150000000001f4000001f400")
    config += bytes.fromhex("05808080021190068080800102")
    entry = bytes(6) + struct.pack(">H", 1) + bytes(8)
    entry += struct.pack(">HHHHI", 2, 16, 0, 0, RATE << 16) + full_box(b"esds", 0, config)
    tables = box(
        b"stbl",
        full_box(b"stsd", 0, struct.pack(">I", 1), box(b"mp4a", entry)),
        full_box(b"stts", 0, struct.pack(">III", 1, num_samples, 1024)),
        full_box(b"stsc", 0, struct.pack(">IIII", 1, 1, num_samples, 1)),
        full_box(b"stsz", 0, struct.pack(">II", 1, num_samples)),
        full_box(b"stco", 0, struct.pack(">II", 1, 40)),
    )
    links = box(b"dinf", full_box(b"dref", 0, struct.pack(">I", 1), full_box(b"url ", 1)))
    media = box(
        b"mdia",
        full_box(b"mdhd", 0, struct.pack(">IIIIHH", 0, 0, RATE, RATE, 0x55C4, 0)),
        full_box(b"hdlr", 0, bytes(4) + b"soun" + bytes(13)),
        box(b"minf", full_box(b"smhd", 0, bytes(4)), links, tables),
    )
    header = struct.pack(">IIIII", 0, 0, number, 0, 1000) + bytes(8)
    header += struct.pack(">HHHH", 0, 0, 0x100, 0) + UNITY + bytes(8)
    return box(b"trak", full_box(b"tkhd", 7, header), media)


def index(num_samples: int, tracks: int = 1) -> bytes:
    return movie(*(track(num_samples, number + 1) for number in range(tracks)))


def fragments(num_samples: int, runs: int) -> bytes:
    """Runs of samples that all have the default size and duration."""
    defaults = full_box(b"trex", 0, struct.pack(">IIIII", 1, 1, 1024, 1, 0))
    run = full_box(b"trun", 0, struct.pack(">I", num_samples))
    header = full_box(b"tfhd", 0x20000, struct.pack(">I", 1))
    fragment = box(
        b"moof",
        full_box(b"mfhd", 0, struct.pack(">I", 1)),
        box(b"traf", header, *[run] * runs),
    )
    return movie(track(0), box(b"mvex", defaults)) + fragment + MEDIA


def m4a_with(*items: bytes) -> bytes:
    """A good recording with these items in its list of tags."""
    data = speech("ipod", "aac")
    start = data.rfind(b"moov") - 4
    size = struct.unpack(">I", data[start : start + 4])[0]
    inside = data[start + 8 : start + size]
    inside = inside[: inside.find(b"udta") - 4]
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    tags = box(b"udta", box(b"meta", bytes(4), handler, box(b"ilst", *items)))
    return data[:start] + box(b"moov", inside, tags)


def m4a_tags(count: int) -> bytes:
    value = box(b"data", struct.pack(">II", 1, 0), b"v")
    return m4a_with(
        *(
            box(b"----", full_box(b"mean", 0, b"com.x"), full_box(b"name", 0, b"k%d" % i), value)
            for i in range(count)
        )
    )


def m4a_covers(count: int) -> bytes:
    picture = box(b"data", struct.pack(">II", 14, 0), cover())
    return m4a_with(box(b"covr", *[picture] * count))


# covers and tags ---------------------------------------------------------------------------------


@cache
def cover(side: int = 4_000) -> bytes:
    """A PNG of 120 KB that takes 128 MB when it is decoded: 16 bits for each of four colours."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checked = name + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    rows = zlib.compress(bytes(side * (1 + 8 * side)), 9)
    header = struct.pack(">IIBBBBB", side, side, 16, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b""))
    )


def picture() -> bytes:
    """A cover as flac and ogg have it."""
    sizes = struct.pack(">IIIIII", 0, 0, 0, 0, 0, len(cover()))
    return struct.pack(">II", 3, 9) + b"image/png" + sizes + cover()


def id3(name: bytes, bodies: Iterator[bytes]) -> bytes:
    frames = b"".join(name + synchsafe(len(body)) + b"\0\0" + body for body in bodies)
    return b"ID3\4\0\0" + synchsafe(len(frames)) + frames


def synchsafe(number: int) -> bytes:
    return bytes(number >> shift & 127 for shift in (21, 14, 7, 0))


def txxx(count: int) -> bytes:
    return id3(b"TXXX", (b"\3k%d\0v" % i for i in range(count)))


def apic(count: int) -> bytes:
    return id3(b"APIC", (b"\3image/png\0\3%d\0" % i + cover() for i in range(count)))


def ape(count: int) -> bytes:
    items = b"".join(struct.pack("<II", 1, 0) + b"k%d\0v" % i for i in range(count))
    return items + b"APETAGEX" + struct.pack("<IIII", 2000, len(items) + 32, count, 0) + bytes(8)


def comments(count: int, *more: bytes) -> bytes:
    """A block of Vorbis comments."""
    items = [*(b"k%d=v" % i for i in range(count)), *more]
    lengths = b"".join(struct.pack("<I", len(item)) + item for item in items)
    return struct.pack("<I", 1) + b"x" + struct.pack("<I", len(items)) + lengths


def flac_with(kind: int, *blocks: bytes) -> bytes:
    data = speech("flac", "flac")
    return b"".join(
        (
            data[:4] + b"\0" + data[5:42],
            *(bytes([kind]) + len(block).to_bytes(3, "big") + block for block in blocks),
            bytes([0x81]) + bytes(3),  # padding, the last block
            data[_flac_frames(data) :],
        )
    )


def _flac_frames(data: bytes) -> int:
    place, last = 4, 0
    while not last:
        last = data[place] & 0x80
        place += 4 + int.from_bytes(data[place + 1 : place + 4], "big")
    return place


# ogg -------------------------------------------------------------------------------------------


def opus_with(tags: bytes) -> bytes:
    pages = list(_pages(speech("ogg", "libopus")))
    packet = b"OpusTags" + tags
    lacing = [255] * (len(packet) // 255) + [len(packet) % 255]
    made, place = [pages[0]], 0
    for start in range(0, len(lacing), 255):
        part = lacing[start : start + 255]
        body = packet[place : place + sum(part)]
        made.append(_page(pages[1], len(made), part, body, is_continued=start > 0))
        place += len(body)
    for page in pages[2:]:
        made.append(_page(page, len(made), list(page[27 : 27 + page[26]]), page[27 + page[26] :]))
    return b"".join(made)


def _pages(data: bytes) -> Iterator[bytes]:
    while data:
        size = 27 + data[26] + sum(data[27 : 27 + data[26]])
        yield data[:size]
        data = data[size:]


def _page(
    like: bytes, number: int, lacing: list[int], body: bytes, *, is_continued: bool = False
) -> bytes:
    flags = 1 if is_continued else like[5]
    head = like[:5] + bytes([flags]) + like[6:18] + struct.pack("<II", number, 0)
    head += bytes([len(lacing), *lacing])
    return head[:22] + struct.pack("<I", _checksum(head + body)) + head[26:] + body


@cache
def _checksum_table() -> list[int]:
    table = []
    for value in range(256):
        value <<= 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value & 1 << 31 else 0)) & 0xFFFFFFFF
        table.append(value)
    return table


def _checksum(data: bytes) -> int:
    checksum, table = 0, _checksum_table()
    for byte in data:
        checksum = (checksum << 8 & 0xFFFFFFFF) ^ table[checksum >> 24 ^ byte]
    return checksum


def ogg_streams(count: int) -> bytes:
    """Streams that begin and have nothing."""
    first, *rest = _pages(speech("ogg", "libopus"))
    lacing, body = list(first[27 : 27 + first[26]]), first[27 + first[26] :]
    begun = (
        _page(first[:14] + struct.pack("<I", serial) + first[18:], 0, lacing, body)
        for serial in range(count)
    )
    return b"".join([*begun, *rest])


# chunks ----------------------------------------------------------------------------------------

Chunk = tuple[bytes, bytes]


def names(count: int) -> Iterator[bytes]:
    return (b"%04x" % (i % 65_536) for i in range(count))


def riff(*chunks: Chunk) -> bytes:
    layout = struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)
    body = b"".join(
        name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
        for name, data in ((b"fmt ", layout), *chunks, (b"data", pcm()))
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def cues(count: int) -> tuple[Chunk, Chunk]:
    """Cue points of a wav file, each with a name."""
    points = (struct.pack("<IIIIII", i, i, 0x61746164, 0, 0, i) for i in range(count))
    labels = (b"labl" + struct.pack("<II", 6, i) + b"a\0" for i in range(count))
    return (b"cue ", struct.pack("<I", count) + b"".join(points)), (
        b"LIST",
        b"adtl" + b"".join(labels),
    )


def info(count: int) -> Chunk:
    return b"LIST", b"INFO" + b"".join(
        b"I%03d" % (i % 1000) + struct.pack("<I", 2) + b"v\0" for i in range(count)
    )


def aiff(*chunks: Chunk) -> bytes:
    rate = struct.pack(">H", 0x400E) + struct.pack(">Q", RATE << 48)  # an 80-bit float
    layout = struct.pack(">hIh", 1, len(pcm()) // 2, 16) + rate
    body = b"".join(
        name + struct.pack(">I", len(data)) + data
        for name, data in ((b"COMM", layout), *chunks, (b"SSND", bytes(8) + pcm(">")))
    )
    return b"FORM" + struct.pack(">I", 4 + len(body)) + b"AIFF" + body


def caf(*chunks: Chunk) -> bytes:
    layout = struct.pack(">d4sIIIII", RATE, b"lpcm", 2, 2, 1, 1, 16)
    return b"caff\0\1\0\0" + b"".join(
        name + struct.pack(">q", len(data)) + data
        for name, data in ((b"desc", layout), *chunks, (b"data", bytes(4) + pcm()))
    )


def caf_info(count: int) -> Chunk:
    return b"info", struct.pack(">I", count) + b"".join(b"k%d\0v\0" % i for i in range(count))


# matroska, asf -----------------------------------------------------------------------------------


def element(name: str, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return bytes.fromhex(name) + struct.pack(">Q", len(body) | 1 << 56) + body


def mkv_with(*elements: bytes) -> bytes:
    data = speech("matroska", "aac")
    start = data.find(bytes.fromhex("18538067")) + 4  # the segment, whose size becomes unknown
    return data[:start] + b"\x01" + b"\xff" * 7 + b"".join(elements) + data[start + 8 :]


def mkv_tag(number: int) -> bytes:
    return element("67c8", element("45a3", b"k%d" % number), element("4487", b"v"))


def mkv_attachment(number: int) -> bytes:
    return element(
        "61a7",
        element("466e", b"cover.png"),
        element("4660", b"image/png"),
        element("465c", cover()),
        element("46ae", struct.pack(">Q", number + 1)),
    )


def mkv_chapter(number: int) -> bytes:
    start = element("91", struct.pack(">Q", number * 1000))
    title = element("80", element("85", b"c"))
    return element("b6", element("73c4", struct.pack(">Q", number + 1)), start, title)


def mkv_track(number: int) -> bytes:
    identity = element("d7", struct.pack(">Q", number + 2))
    identity += element("73c5", struct.pack(">Q", number + 2))
    rate = element("e1", element("b5", struct.pack(">d", RATE)))
    return element("ae", identity, element("83", b"\2"), element("86", b"A_PCM/INT/LIT"), rate)


def asf_tags(count: int) -> bytes:
    data = speech("asf", "wmav2")
    tags = b""
    for number in range(count):
        name = f"k{number}\0".encode("utf-16le")
        tags += struct.pack("<H", len(name)) + name + struct.pack("<HH", 0, 4) + b"v\0\0\0"
    body = struct.pack("<H", count) + tags
    made = bytes.fromhex("40a4d0d207e3d21197f000a0c95ea850")
    made += struct.pack("<Q", 24 + len(body)) + body
    size, num_objects = struct.unpack("<QI", data[16:28])
    return (
        data[:16]
        + struct.pack("<QI", size + len(made), num_objects + 1)
        + data[28:30]
        + made
        + data[30:]
    )


# kind: a function of how many. The second number is a size that shows the kind.
KINDS: dict[str, tuple[Callable[[int], bytes], int]] = {
    "table m4a": (index, 50_000_000),
    "tables m4a": (partial(index, tracks=40), 2_000_000),
    "tracks m4a": (lambda n: index(1, n), 2_000),
    "fragments m4a": (partial(fragments, runs=100), 1_000_000),
    "tags m4a": (m4a_tags, NUM),
    "covers m4a": (m4a_covers, 8),
    "tags mp3": (lambda n: txxx(n) + speech("mp3", "libmp3lame"), 4 * NUM),
    "covers mp3": (lambda n: apic(n) + speech("mp3", "libmp3lame"), 8),
    "tags aac": (lambda n: txxx(n) + speech("adts", "aac"), NUM),
    "covers aac": (lambda n: apic(n) + speech("adts", "aac"), 8),
    "ape aac": (lambda n: speech("adts", "aac") + ape(n), NUM),
    "tags flac": (lambda n: flac_with(4, comments(n)), NUM),
    "covers flac": (lambda n: flac_with(6, *[picture()] * n), 8),
    "padding flac": (lambda n: flac_with(1, *[b"ab"] * n), 4 * NUM),
    "seek points flac": (lambda n: flac_with(3, bytes(18 * n)), 4 * NUM),
    "tags opus": (lambda n: opus_with(comments(n)), NUM),
    "covers opus": (
        lambda n: opus_with(
            comments(0, *[b"METADATA_BLOCK_PICTURE=" + base64.b64encode(picture())] * n)
        ),
        2,
    ),
    "streams ogg": (ogg_streams, 2_000),
    "tags mkv": (
        lambda n: mkv_with(element("1254c367", element("7373", *map(mkv_tag, range(n))))),
        NUM,
    ),
    "tag lists mkv": (
        lambda n: mkv_with(element("1254c367", *(element("7373", mkv_tag(i)) for i in range(n)))),
        NUM // 2,
    ),
    "covers mkv": (lambda n: mkv_with(element("1941a469", *map(mkv_attachment, range(n)))), 8),
    "chapters mkv": (
        lambda n: mkv_with(element("1043a770", element("45b9", *map(mkv_chapter, range(n))))),
        NUM,
    ),
    "tracks mkv": (lambda n: mkv_with(element("1654ae6b", *map(mkv_track, range(n)))), 2_000),
    "tags wma": (asf_tags, NUM),
    "chunks wav": (lambda n: riff(*((name, b"ab") for name in names(n))), 4 * NUM),
    "tags wav": (lambda n: riff(info(n)), NUM),
    "lists wav": (lambda n: riff(*[info(1)] * n), NUM),
    "cues wav": (lambda n: riff(*cues(n)), 3 * NUM),
    "chunks aiff": (lambda n: aiff(*((name, b"ab") for name in names(n))), 4 * NUM),
    "tags aiff": (lambda n: aiff(*[(b"ANNO", b"ab")] * n), 4 * NUM),
    "chunks caf": (lambda n: caf(*((name, b"ab") for name in names(n))), 4 * NUM),
    "tags caf": (lambda n: caf(caf_info(n)), NUM),
}


def hostile(kind: str, share: float = 1.0) -> bytes:
    """A file of this kind, at a share of the size that shows it."""
    make, count = KINDS[kind]
    return make(max(1, int(count * share)))


# what it costs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """The outcome of a file in a decoder process of its own."""

    error: str  # its type and text, where there is one
    waveform: np.ndarray  # (samples,) float32; empty where there is none
    exit_code: int  # or minus the signal that ended the process
    cpu_s: float
    peak_bytes: int  # of resident memory, without what the process inherited


def decode(data: bytes, *, limits: Limits | None = None, **options: Any) -> Cost:
    """Decode a file as a server does. ``options`` are those of ``load_audio``.

    The process is a fork of this one, which should be small and have one thread.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    limits = (limits or Limits()).for_file(len(data))
    job = {"loader": "load_audio", "options": options, "limits": asdict(limits)}
    file, output, parent = os.memfd_create("file"), os.memfd_create("waveform"), os.getpid()
    os.write(file, data)
    os.lseek(file, 0, os.SEEK_SET)
    inherited_bytes = _anonymous_bytes()  # the file, too
    if (child := os.fork()) == 0:
        ours.close()
        run_child(parent, theirs)
    theirs.close()
    with ours:
        socket.send_fds(ours, [json.dumps(job).encode()], [file, output])
        ours.shutdown(socket.SHUT_WR)  # no other file follows
        error = _error(ours)
    _, status, usage = os.wait4(child, 0)
    with open(output, "rb") as memory:
        memory.seek(0)
        waveform = np.frombuffer(memory.read(), np.float32)
    os.close(file)
    cpu_s, exit_code = usage.ru_utime + usage.ru_stime, os.waitstatus_to_exitcode(status)
    peak_bytes = (usage.ru_maxrss << 10) - inherited_bytes
    return Cost(error, waveform, exit_code, cpu_s, peak_bytes)


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def _error(child: socket.socket) -> str:
    """The error that a child reports, once it has ended."""
    error = ""
    while packet := child.recv(1 << 16):
        ((kind, value),) = json.loads(packet).items()
        if kind == "error":
            error = f"{value[0] or 'crash'}: {value[1]}"
    return error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS), metavar="KIND")
    parser.add_argument("--unlimited", action="store_true", help="a minute, 100 GB")
    parser.add_argument("--cpu-s", type=float, default=Limits.cpu_s)
    args = parser.parse_args()
    limits = (
        Limits(cpu_s=60, memory_bytes=100 << 30) if args.unlimited else Limits(cpu_s=args.cpu_s)
    )
    ordinary = speech("ipod", "aac")
    load_audio(ordinary)  # imports
    ordinary_bytes = decode(ordinary).peak_bytes
    rows = []
    for kind in args.kinds:
        data = hostile(kind)
        cost = decode(data, limits=limits)
        row = {"kind": kind, "KiB": len(data) / 1024, "CPU s": cost.cpu_s}
        row |= {"MiB": (cost.peak_bytes - ordinary_bytes) / 2**20, "exit code": cost.exit_code}
        rows.append(row | {"samples": len(cost.waveform), "error": cost.error[:60]})
    print_table(rows)
    print_result("hostile", rows)


if __name__ == "__main__":
    main()
