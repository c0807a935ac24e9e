# SPDX-License-Identifier: Apache-2.0
"""MP3 and AAC in frames that follow each other without a container.

    ID3v2 | Xing | frame | frame | ... | ID3v1

A header of 4 or 7 bytes says how long its frame is, so frames are scanned in a few hundred
nanoseconds each: whether they are a chain without a break, of one format, as many as the Xing
header says.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

from .containers import SIGNATURES
from .views import Patch, find, read_at, skip_zeros

_MAX_SEARCHED = 1 << 22  # bytes of damage; what follows more of it is left to FFmpeg
_MAX_TAGS = 100
_HEAD_BYTES = 48  # of a frame: its header, and the Xing header if there is one
_KBPS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)  # MPEG 1, layer III
_KBPS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # MPEG 2 and 2.5
_HERTZ = (44_100, 48_000, 32_000)


class Frame(NamedTuple):
    size: int  # in bytes
    num_samples: int
    format: Any  # the same for all frames that one decoder run can read


@dataclass(frozen=True)
class Frames:
    """A chain of frames: its end, and its damage."""

    end: int
    is_whole: bool
    is_cut: bool
    num_dropped: int  # bytes of the frame that is cut off
    num_samples: int
    patches: tuple[Patch, ...] = ()
    warning: str = ""


def mp3_frame(head: bytes) -> Frame | None:
    """Parse the header of an mp3 frame; None for anything else."""
    return _mp3_frame(head[:4])


@lru_cache(4096)
def _mp3_frame(head: bytes) -> Frame | None:
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:  # layer III
        return None
    version, rate, kbps = head[1] >> 3 & 3, head[2] >> 2 & 3, head[2] >> 4
    if version == 1 or rate == 3 or kbps in (0, 15):
        return None
    hertz = _HERTZ[rate] >> (0 if version == 3 else 1 if version == 2 else 2)
    bits = 144_000 * _KBPS_1[kbps] if version == 3 else 72_000 * _KBPS_2[kbps]
    size = bits // hertz + (head[2] >> 1 & 1)
    return Frame(size, 1152 if version == 3 else 576, (hertz, head[3] >> 6 == 3))


def adts_frame(head: bytes) -> Frame | None:
    """Parse the header of an AAC frame; None for anything else."""
    if len(head) < 7 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0 or head[2] >> 2 & 15 > 12:
        return None
    size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return Frame(size, 1024, (head[2] & 0xFD, head[3] >> 6)) if size >= 7 else None


def find_frames(file: BinaryIO, start: int, end: int) -> Frames | None:
    """Find the recording that starts at ``start``, up to the next one; None without frames."""
    first = skip_id3(file, start, end)
    for read in (mp3_frame, adts_frame):
        if _is_chain(file, first, end, read):
            return _Walk(file, end, read).walk(first)
    return None


def skip_id3(file: BinaryIO, position: int, end: int) -> int:
    """Return the end of the ID3v2 tags that start here, and of the zeros after them."""
    for _ in range(_MAX_TAGS):
        head = read_at(file, position, 10)
        if len(head) < 10 or not head.startswith(b"ID3"):
            break
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        position = skip_zeros(file, min(end, position + 10 + size), end)
    return position


def _is_chain(
    file: BinaryIO, position: int, end: int, read: Callable[[bytes], Frame | None]
) -> bool:
    """Return whether a frame starts here, and another of its format after it."""
    frame = read(read_at(file, position, _HEAD_BYTES))
    if frame is None or position + frame.size >= end:
        return frame is not None and position + frame.size == end
    after = read_at(file, position + frame.size, _HEAD_BYTES)
    following = read(after)
    if following is None:
        return after.startswith((*SIGNATURES, *_TAGS, bytes(8)))
    return following.format == frame.format


class _Walk:
    """A walk from frame to frame that records breaks of the chain."""

    def __init__(self, file: BinaryIO, end: int, read: Callable[[bytes], Frame | None]) -> None:
        self._file, self._end, self._read = file, end, read
        self._is_whole = True
        self._num_searched = 0  # bytes, for frames after damage
        self._num_frames = self._num_samples = 0
        self._xing: tuple[int, int] | None = None  # its position, and the frames that it states

    def walk(self, position: int) -> Frames:
        """Walk to the end, to a frame that is cut off, or to another recording."""
        kind = None
        while position < self._end:
            head = read_at(self._file, position, _HEAD_BYTES)
            if (frame := self._read(head)) is None:
                if (following := self._skip(position, head)) == position:
                    break
                position = following
                continue
            if position + frame.size > self._end:
                return self._frames(position, is_cut=True)
            if b"Xing" in head or b"Info" in head:
                if kind is not None:
                    break
                self._note_xing(position, head)
            else:
                self._num_frames += 1
                self._num_samples += frame.num_samples
            self._is_whole = self._is_whole and kind in (None, frame.format)
            kind = frame.format
            position += frame.size
        return self._frames(position, is_cut=False)

    def _skip(self, position: int, head: bytes) -> int:
        """Return the next frame; the same position where another recording starts."""
        rest = skip_zeros(self._file, position, self._end)
        if rest > position or head.startswith(SIGNATURES):
            return rest
        for mark, end_of_tag in _TAGS.items():
            if head.startswith(mark):
                return min(self._end, end_of_tag(self._file, position, self._end))
        self._is_whole = False
        return self._find_frames(position + 1)

    def _find_frames(self, start: int) -> int:
        """Return the next position where frames or a tag start, or the end."""
        while start < self._end and self._num_searched < _MAX_SEARCHED:
            block = read_at(self._file, start, min(1 << 16, self._end - start))
            for match in _MARK.finditer(block):
                position = start + match.start()
                if match[0][0] != 0xFF or _is_chain(self._file, position, self._end, self._read):
                    return position
            start += max(len(block) - 16, 1)
            self._num_searched += len(block)
        return self._end

    def _note_xing(self, position: int, head: bytes) -> None:
        place = max(head.find(b"Xing"), head.find(b"Info"))
        fields = head[place + 4 : place + 12]
        if len(fields) == 8 and fields[3] & 1:
            self._xing = position + place, int.from_bytes(fields[4:], "big")

    def _frames(self, end: int, *, is_cut: bool) -> Frames:
        """Hide a Xing header that states another number of frames."""
        patches: tuple[Patch, ...] = ()
        warning = ""
        num_frames = self._num_frames
        if self._xing and self._xing[1] not in (num_frames, num_frames + 1):
            position, stated = self._xing
            patches = (Patch(position, bytes(4)),)
            if stated > num_frames:
                share = num_frames / stated
                warning = f"the file has {share:.0%} of the sound that its header states."
        num_dropped = self._end - end if is_cut else 0
        return Frames(end, self._is_whole, is_cut, num_dropped, self._num_samples, patches, warning)


def _end_of_lyrics(file: BinaryIO, position: int, end: int) -> int:
    last = find(file, b"LYRICS200", position, end)
    return end if last < 0 else last + len(b"LYRICS200")


def _end_of_ape(file: BinaryIO, position: int, end: int) -> int:
    return position + 32 + int.from_bytes(read_at(file, position + 12, 4), "little")


_TAGS: dict[bytes, Callable[[BinaryIO, int, int], int]] = {
    b"TAG": lambda file, position, end: position + 128,  # ID3v1
    b"APETAGEX": _end_of_ape,
    b"LYRICSBEGIN": _end_of_lyrics,
}
_MARK = re.compile(rb"\xff[\xe0-\xff]|ID3|TAG|APETAGEX|LYRICSBEGIN")
