# SPDX-License-Identifier: Apache-2.0
"""Finds the recordings of a file: one file may be several that were joined.

    ID3 | frames | Xing | frames | 0 0 0 | ID3 | frames        three mp3 files in one

Decoders stop at the end of the first, or take the second for damage. Each part is found by the
marks and lengths of its container, without decoding, and is then read as a file of its own.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from .chunks import read_chunks
from .containers import SIGNATURES
from .mpeg import find_frames, skip_id3
from .views import Patch, find, read_at, size_of, skip_zeros, trim_zeros

MAX_PARTS = 1_000
MAX_MARKS = 10_000  # pages that are damaged, boxes, and marks of no recording, in one part
_EBML = bytes.fromhex("1a45dfa3")
_SEGMENT = bytes.fromhex("18538067")
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_AMR = b"#!AMR"
_FLAC = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")


@dataclass(frozen=True)
class Part:
    """One recording of a file."""

    start: int
    end: int
    patches: tuple[Patch, ...] = ()
    is_whole: bool = True  # whether nothing in it is known to be damaged
    is_cut: bool = False  # whether the file ends inside of its last frame, page or block
    num_dropped: int = 0  # bytes after it, of a frame or page that is not complete
    num_samples: int = 0  # that its frames hold, where they state it
    warning: str = ""


def find_parts(file: BinaryIO) -> list[Part]:
    """Return the recordings of a file, in order, without the zeros around them."""
    size = size_of(file)
    parts: list[Part] = []
    start = _next_start(file, 0, size)
    while start < size and not (parts and skip_id3(file, start, size) == size):
        if len(parts) == MAX_PARTS:
            warning = f"the file has more than {MAX_PARTS:,} recordings; the rest was left out."
            parts.append(Part(start, size, warning=warning))
            break
        parts.append(part := _part(file, start, size))
        start = _next_start(file, max(part.end + part.num_dropped, start + 1), size)
    return parts or [Part(0, size)]


def _next_start(file: BinaryIO, position: int, end: int) -> int:
    """Return the end of the zeros that start here; MP4 and MPEG-PS own up to three of them."""
    first = skip_zeros(file, position, end)
    head = read_at(file, first, 5)
    num_own = 3 if head[1:] == b"ftyp" else 2 if head.startswith(b"\x01\xba") else 0
    return max(position, first - num_own)


def _part(file: BinaryIO, start: int, end: int) -> Part:
    if sound := read_chunks(file, start, end):
        return Part(start, sound.end, sound.patches, warning=sound.warning)
    head = read_at(file, skip_id3(file, start, end), 16)
    if head.startswith(b"OggS"):
        return _ogg_part(file, start, end)
    if head.startswith(b"fLaC"):
        return Part(start, _next(file, b"fLaC", _is_flac, start, end))
    if head.startswith(_EBML):
        return _matroska_part(file, start, end)
    if head.startswith(_ASF):
        end = _next(file, _ASF, _is_any, start, end)
        return Part(start, end, is_cut=_asf_size(file, start, end) > end - start)
    if head.startswith(_AMR):  # zeros would be frames, too
        return Part(start, trim_zeros(file, start, _next(file, _AMR, _is_any, start, end)))
    if head[4:8] == b"ftyp":
        return _mp4_part(file, start, end)
    if frames := find_frames(file, start, end):
        return Part(start, **vars(frames))
    is_ts = all(read_at(file, start + 188 * n, 1) == b"\x47" for n in range(3))
    return Part(start, end, is_cut=is_ts and read_at(file, end - 188, 1) != b"\x47")


def _next(
    file: BinaryIO, mark: bytes, is_start: Callable[[BinaryIO, int], bool], start: int, end: int
) -> int:
    """Return the start of the next recording of the same container, or ``end``."""
    position = start + 1
    for _ in range(MAX_MARKS):
        if (position := find(file, mark, position, end)) < 0:
            break
        if is_start(file, position):
            return position
        position += 1
    return end


def _is_any(file: BinaryIO, position: int) -> bool:
    return True


def _is_flac(file: BinaryIO, position: int) -> bool:
    return _FLAC.match(read_at(file, position, 8)) is not None


def _is_matroska(file: BinaryIO, position: int) -> bool:
    return any(name in read_at(file, position, 64) for name in (b"matroska", b"webm"))


# Ogg ----------------------------------------------------------------------------------------

_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class _Page(NamedTuple):
    stream: bytes
    number: int
    is_first: bool  # of its stream
    length: int
    is_whole: bool  # whether it has the checksum that it states


def _read_page(file: BinaryIO, position: int) -> _Page | None:
    """Read the page at a position; None for an incomplete page."""
    header = read_at(file, position, 27)
    table = file.read(header[26]) if len(header) == 27 else b""
    body = file.read(sum(table))
    if len(header) < 27 or len(table) < header[26] or len(body) < sum(table):
        return None
    page = header[:22] + bytes(4) + header[26:] + table + body
    is_whole = _ogg_checksum(page) == int.from_bytes(header[22:26], "little")
    number = int.from_bytes(header[18:22], "little")
    return _Page(header[14:18], number, bool(header[5] & 2), len(page), is_whole)


def _ogg_checksum(page: bytes) -> int:
    """Compute zlib's CRC-32 with the bits of all bytes mirrored, from 0."""
    mirrored = zlib.crc32(page.translate(_MIRRORED), 0xFFFF_FFFF) ^ 0xFFFF_FFFF
    return int(f"{mirrored:032b}"[::-1], 2)


def _ogg_part(file: BinaryIO, start: int, end: int) -> Part:
    """Return the pages up to those of another stream; whole if none is missing or damaged."""
    position, is_whole, is_begin, num_bad = start, True, True, 0
    expected: dict[bytes, int] = {}  # the number of each stream's next page
    while (found := find(file, b"OggS", position, end)) >= 0:
        if num_bad > MAX_MARKS:
            return Part(start, end, is_whole=False)
        is_whole = is_whole and skip_zeros(file, position, found) == found
        position = found
        if (page := _read_page(file, position)) is None:
            if find(file, b"OggS", position + 4, end) < 0:
                num_dropped = end - position
                return Part(start, position, (), is_whole, is_cut=True, num_dropped=num_dropped)
            is_whole, num_bad = False, num_bad + 1
            position += 4
            continue
        if page.is_first and not is_begin and page.is_whole:
            return Part(start, position, is_whole=is_whole)
        num_bad += not page.is_whole
        is_begin = is_begin and page.is_first
        is_next = page.number == expected.get(page.stream, page.number)
        is_whole = is_whole and page.is_whole and is_next
        expected[page.stream] = page.number + 1
        position += page.length if page.is_whole else 4
    rest = skip_zeros(file, position, end)
    ends_well = rest == end or read_at(file, rest, 16).startswith(SIGNATURES)
    return Part(start, rest, is_whole=is_whole and ends_well)


# Matroska, ASF and MP4 ----------------------------------------------------------------------


def _matroska_part(file: BinaryIO, start: int, end: int) -> Part:
    end = _next(file, _EBML, _is_matroska, start, end)
    position, size = _element(file, start)
    segment, length = _element(file, position + size)
    is_segment = read_at(file, position + size, 4) == _SEGMENT
    return Part(start, end, is_cut=is_segment and length is not None and segment + length > end)


def _element(file: BinaryIO, position: int) -> tuple[int, int]:
    """Return the start and size of the content of an EBML element with an id of four bytes.

    An unknown size, of ones only, counts as 0.
    """
    head = read_at(file, position + 4, 8)
    num_bytes = 9 - head[0].bit_length() if head and head[0] else 8
    size = int.from_bytes(head[:num_bytes], "big") & (1 << 7 * num_bytes) - 1
    is_unknown = size == (1 << 7 * num_bytes) - 1
    return position + 4 + num_bytes, 0 if is_unknown else size


def _asf_size(file: BinaryIO, start: int, end: int) -> int:
    """Return the size in bytes that a wma or wmv file states, or 0."""
    properties = find(file, _ASF_PROPERTIES, start, min(end, start + (1 << 16)))
    if properties < 0:
        return 0
    return int.from_bytes(read_at(file, properties + 40, 8), "little")


def _mp4_part(file: BinaryIO, start: int, end: int) -> Part:
    """Return the boxes up to the next ``ftyp``; find an index that moved."""
    position, data, has_index = start, -1, False
    for _ in range(MAX_MARKS):
        if position >= end:
            break
        head = read_at(file, position, 16)
        name, size = head[4:8], _box_size(head, end - position)
        if (name == b"ftyp" and position > start) or head.startswith(bytes(16)):
            return Part(start, position)
        if size < 8 or size > end - position or not name.isalnum():
            break
        data = position if name == b"mdat" else data
        has_index = has_index or name == b"moov"
        position += size
    if position < end and not has_index:
        return _with_index(file, start, end, data if data >= 0 else position)
    following = find(file, b"ftyp", position, end)
    return Part(start, end if following < 0 else following - 4)


def _box_size(head: bytes, left: int) -> int:
    """Return the size of an MP4 box with its header; ``left`` bytes of it are in the file."""
    size = int.from_bytes(head[:4], "big")
    if size == 1:
        return int.from_bytes(head[8:16], "big")
    return size or left


def _with_index(file: BinaryIO, start: int, end: int, data: int) -> Part:
    """Find the index that moved because bytes were lost or inserted, and end the data there."""
    position = data + 8
    while (position := find(file, b"moov", position, end)) >= 0:
        size = int.from_bytes(read_at(file, position - 4, 4), "big")
        if read_at(file, position + 8, 4) == b"mvhd" and position - 4 + size <= end:
            length = position - 4 - data
            patch = Patch(data, length.to_bytes(4, "big") + b"mdat")
            is_short = length < 1 << 32
            return Part(start, end, (patch,) if is_short else (), is_whole=False)
        position += 4
    return Part(start, end, is_cut=True)
