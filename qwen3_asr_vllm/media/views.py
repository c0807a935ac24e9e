# SPDX-License-Identifier: Apache-2.0
"""Views of a binary file: a stretch of it as a file, with some bytes replaced.

So a recording that is joined to others is read alone, and a header that its recorder left
unfinished is read as it should be. Nothing is copied.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class Patch:
    """Bytes that replace those of the file at a position."""

    position: int
    data: bytes


class View(io.RawIOBase):
    """A file from ``start`` to ``end``, with ``patches`` at positions of the whole file."""

    def __init__(
        self, file: BinaryIO, start: int, end: int, patches: tuple[Patch, ...] = ()
    ) -> None:
        self._file, self._start, self._end = file, start, end
        self._patches = patches
        self._position = start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position - self._start

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origins = {
            os.SEEK_SET: self._start,
            os.SEEK_CUR: self._position,
            os.SEEK_END: self._end,
        }
        self._position = max(self._start, origins[whence] + offset)
        return self.tell()

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._end - self._position)
        self._file.seek(self._position)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        begin = self._position
        self._position += len(data)
        for patch in self._patches:
            data = _patched(data, patch, begin)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _patched(data: bytes, patch: Patch, begin: int) -> bytes:
    first = max(patch.position, begin)
    last = min(patch.position + len(patch.data), begin + len(data))
    if first >= last:
        return data
    new = patch.data[first - patch.position : last - patch.position]
    return data[: first - begin] + new + data[last - begin :]


def size_of(file: BinaryIO) -> int:
    return file.seek(0, os.SEEK_END)


def read_at(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


def find(file: BinaryIO, mark: bytes, start: int, end: int) -> int:
    """Return the position of the first ``mark`` in a stretch, or -1."""
    for position, block in _blocks(file, start, end, overlap=len(mark) - 1):
        if (place := block.find(mark)) >= 0:
            return position + place
    return -1


def skip_zeros(file: BinaryIO, start: int, end: int) -> int:
    """Return the position of the first byte that is not 0, or ``end``."""
    for position, block in _blocks(file, start, end):
        if rest := block.lstrip(b"\0"):
            return position + len(block) - len(rest)
    return end


def trim_zeros(file: BinaryIO, start: int, end: int) -> int:
    """Return the end of a stretch without its trailing zeros, if they are 16 or more."""
    position = end
    while position > start:
        block = read_at(file, max(start, position - _BLOCK), min(_BLOCK, position - start))
        kept = len(block.rstrip(b"\0"))
        position -= len(block) - kept
        if kept:
            break
    return position if end - position >= 16 else end


def _blocks(
    file: BinaryIO, start: int, end: int, *, overlap: int = 0
) -> Iterator[tuple[int, bytes]]:
    size = 1 << 12  # most of what is looked for is near
    while start < end and (block := read_at(file, start, min(size + overlap, end - start))):
        yield start, block
        start += max(len(block) - overlap, 1)
        size = _BLOCK
