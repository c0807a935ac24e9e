# SPDX-License-Identifier: Apache-2.0
"""Headers of wav, aiff, caf, w64 and au files: compare the stated size of the audio with the file.

    RIFF | fmt  | data ........ | LIST |   -> where the sound begins, and where the file ends

A recorder that crashes leaves 0, or the size of its last flush; one that writes to a pipe leaves
the largest possible number. Decoders trust both. Here the sizes are compared with the file, and
corrected where they are wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal, NamedTuple

from .containers import SIGNATURES
from .views import Patch, find, read_at, skip_zeros

_MAX_CHUNKS = 1_000  # before and after the sound
_UNKNOWN = range(0x7FFF_EF00, 0x8000_0001)  # what sox and arecord state in a pipe
_W64_TAIL = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # of the GUIDs of its chunks
_W64_RIFF = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")


class Layout(NamedTuple):
    """The layout of a container's chunks."""

    first: int  # where the first chunk begins
    id_size: int
    size_bytes: int
    order: Literal["little", "big"]
    data_id: bytes
    alignment: int
    is_inclusive: bool = False  # whether a size counts the chunk's own header

    @property
    def header_size(self) -> int:
        return self.id_size + self.size_bytes


_WAV = Layout(12, 4, 4, "little", b"data", 2)
_LAYOUTS: dict[bytes, Layout] = {
    b"RIFF": _WAV,
    b"RF64": _WAV,
    b"RIFX": _WAV._replace(order="big"),
    b"FORM": _WAV._replace(order="big", data_id=b"SSND"),
    b"caff": Layout(8, 4, 8, "big", b"data", 1),
    _W64_RIFF: Layout(40, 16, 8, "little", b"data" + _W64_TAIL, 8, is_inclusive=True),
}
_FORMS = {b"RIFF": b"WAVE", b"RIFX": b"WAVE", b"RF64": b"WAVE", b"FORM": b"AIFF"}  # or AIFC
AU_MARK = b".snd"
_AU = Layout(24, 4, 4, "big", AU_MARK, 1)


@dataclass(frozen=True)
class Sound:
    """The end of a recording, and the corrections of its header."""

    end: int
    patches: tuple[Patch, ...] = ()
    warning: str = ""


class _Chunk(NamedTuple):
    id: bytes
    position: int  # of its size
    start: int  # of what it holds
    size: int  # in bytes, as it states


def read_chunks(file: BinaryIO, start: int, end: int) -> Sound | None:
    """Find the recording that starts at ``start``; None in any other container."""
    head = read_at(file, start, 16)
    if head.startswith(AU_MARK):
        return _read_au(file, start, end)
    if (layout := _layout_of(head)) is None:
        return None
    before: dict[bytes, _Chunk] = {}
    for chunk in _chunks(file, layout, start + layout.first, end):
        if chunk.id == layout.data_id:
            return _measure(file, layout, chunk, before, end)
        before[chunk.id] = chunk
    return Sound(end)  # no sound: the decoders say so


def _layout_of(head: bytes) -> Layout | None:
    for mark, layout in _LAYOUTS.items():
        if head.startswith(mark) and _FORMS.get(mark, head)[:3] in head:
            return layout
    return None


def _chunks(file: BinaryIO, layout: Layout, start: int, end: int) -> Iterator[_Chunk]:
    """Yield the chunks from ``start`` on, as long as they look like chunks."""
    for _ in range(_MAX_CHUNKS):
        head = read_at(file, start, layout.header_size)
        name = head[: layout.id_size]
        if len(head) < layout.header_size or not _is_name(name[:4]):
            return
        size = int.from_bytes(head[layout.id_size :], layout.order)
        size -= layout.header_size * layout.is_inclusive
        chunk = _Chunk(name, start + layout.id_size, start + layout.header_size, size)
        yield chunk
        start = chunk.start + size + -size % layout.alignment
        if not 0 <= size <= end - chunk.start:
            return


def _is_name(name: bytes) -> bool:
    return all(32 <= letter < 127 for letter in name)


def _measure(
    file: BinaryIO, layout: Layout, data: _Chunk, before: dict[bytes, _Chunk], end: int
) -> Sound:
    """Compare the stated size with the data that follows, and patch a wrong one."""
    largest = (1 << 8 * layout.size_bytes) - 1
    position, num_bytes, stated = data.position, layout.size_bytes, data.size
    if stated == largest and (ds64 := before.get(b"ds64")):
        position, num_bytes = ds64.start + 8, 8
        stated = int.from_bytes(read_at(file, position, 8), "little")
        largest = (1 << 64) - 1
    if 0 <= stated <= end - data.start:
        for after in (data.start + stated, data.start + stated + stated % layout.alignment):
            if (finish := _end_of_chunks(file, layout, after, end)) is not None:
                return Sound(finish)
    end = _next_recording(file, layout, data.start, end)
    size = end - data.start
    stored = min(size + layout.header_size * layout.is_inclusive, largest)
    patch = Patch(position, stored.to_bytes(num_bytes, layout.order))
    is_unknown = stated in _UNKNOWN or stated >= largest - 255
    warning = "" if is_unknown else _wrong_size(max(stated, 0), size)
    return Sound(end, (patch, *_frames_patch(file, layout, size, before)), warning)


def _wrong_size(stated: int, size: int) -> str:
    if stated > size:
        return (
            f"the header states {stated:,} bytes of sound, and the file has {size:,}: "
            "it may be cut off."
        )
    return f"the header states {stated:,} bytes of sound; all {size:,} in the file were read."


def _frames_patch(
    file: BinaryIO, layout: Layout, size: int, before: dict[bytes, _Chunk]
) -> Iterator[Patch]:
    """Correct the number of samples that an aiff file states beside the size."""
    if layout.data_id == b"SSND" and (common := before.get(b"COMM")):
        head = read_at(file, common.start, 8)
        bytes_per_frame = int.from_bytes(head[:2], "big") * -(
            -int.from_bytes(head[6:8], "big") // 8
        )
        num_frames = max(size - 8, 0) // max(bytes_per_frame, 1)
        yield Patch(common.start + 2, min(num_frames, (1 << 32) - 1).to_bytes(4, "big"))


def _end_of_chunks(file: BinaryIO, layout: Layout, start: int, end: int) -> int | None:
    """Return the end of the chunks from ``start`` on; None where something else follows.

    They end with the file, or where another recording begins. Zeros between do not count, nor
    what follows the last chunk.
    """
    last = start
    for number in range(_MAX_CHUNKS):
        position = skip_zeros(file, last, end)
        head = read_at(file, position, 16)
        if not head or head.startswith(SIGNATURES):
            return last
        if head.startswith(b"TAG") and end - position == 128:  # ID3v1
            return end
        chunk = next(_chunks(file, layout, position, end), None)
        if chunk is None or not 0 <= chunk.size <= end - chunk.start:
            return end if number else None
        last = min(end, chunk.start + chunk.size + chunk.size % 2)
    return end


def _next_recording(file: BinaryIO, layout: Layout, start: int, end: int) -> int:
    """Return where another recording of this container starts in the sound, or ``end``."""
    for mark in (mark for mark, other in _LAYOUTS.items() if other is layout):
        position = start
        for _ in range(_MAX_CHUNKS):
            if (position := find(file, mark, position, end)) < 0:
                break
            if _layout_of(read_at(file, position, 16)):
                end = position
                break
            position += 1
    return end


def _read_au(file: BinaryIO, start: int, end: int) -> Sound:
    offset = int.from_bytes(read_at(file, start + 4, 4), "big")
    size = int.from_bytes(read_at(file, start + 8, 4), "big")
    data = _Chunk(AU_MARK, start + 8, min(start + offset, end), size)
    return _measure(file, _AU, data, {}, end)
