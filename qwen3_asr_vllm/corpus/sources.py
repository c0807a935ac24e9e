# SPDX-License-Identifier: Apache-2.0
"""The recordings of a corpus: files, folders, globs, URLs, standard input, and manifests.

A manifest is JSONL as NeMo ("audio_filepath") or Hugging Face ("file_name") writes it, CSV or TSV
with such a column, or a plain list.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from ..recordings import Recording, is_url

MAX_SECONDS = 1e9  # of an offset: 30 years

# What a folder is searched for: recordings, and films for their sound.
AUDIO_SUFFIXES = frozenset(
    ".aac .ac3 .aif .aiff .amr .au .caf .flac .m4a .m4b .mka .mp2 .mp3 .oga .ogg .opus .spx .wav "
    ".webm .wma .3gp .avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .ts .wmv".split()
)
PATH_FIELDS = ("audio_filepath", "file_name", "audio", "path")  # of a manifest's row, in this order
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_MANIFEST_SUFFIXES = (".jsonl", ".json", *_DELIMITERS, ".txt", ".lst", ".list")


def find_recordings(sources: Iterable[str]) -> list[Recording]:
    """All recordings that are meant by files, folders, globs, URLs, manifests, and "-".

    Raises ValueError for a source that holds none and for a manifest that cannot be read.
    """
    return [recording for source in sources for recording in _find(source)]


def _find(source: str) -> Iterator[Recording]:
    path = Path(source)
    if source == "-":
        yield Recording("-", "stdin")
    elif is_url(source):
        yield Recording(source, mirrored_name(PurePosixPath(unquote(urlsplit(source).path)).name))
    elif os.path.isdir(path):  # unlike is_dir(), no error for a name that is too long
        yield from _below(path, source, sorted(_audio_files(path)))
    elif path.suffix.lower() in _MANIFEST_SUFFIXES and os.path.isfile(path):
        if not (recordings := list(read_manifest(path))):
            raise ValueError(f"{source}: no recordings found.")
        yield from recordings
    elif glob.has_magic(source) and not os.path.exists(path):
        found = sorted(map(Path, glob.glob(source, recursive=True)))
        yield from _below(_fixed_part(path), source, [file for file in found if file.is_file()])
    else:
        yield Recording(source, mirrored_name(path.name))


def _audio_files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        for name in names:  # those with a dot in front are hidden; macOS puts ._a.mp3 by a.mp3
            if Path(name).suffix.lower() in AUDIO_SUFFIXES and not name.startswith("."):
                yield Path(place, name)


def _fixed_part(pattern: Path) -> Path:
    """The folder that all matches of a glob are in."""
    parents = [parent for parent in pattern.parents if not glob.has_magic(str(parent))]
    return parents[0]


def _below(folder: Path, source: str, files: list[Path]) -> Iterator[Recording]:
    if not files:
        raise ValueError(f"{source}: no recordings found.")
    for file in files:
        yield Recording(str(file), mirrored_name(file.relative_to(folder)))


def mirrored_name(path: str | PurePosixPath | Path) -> str:
    """A path without suffix that stays below wherever it is put: no root and no "..".

    >>> mirrored_name("../data/talks/monday.v2.mp3")
    'data/talks/monday.v2'
    """
    pure = PurePosixPath(str(path).replace("\\", "/").replace("\0", ""))
    parts = [part for part in pure.parts if part not in ("/", "//", "..")]
    if not parts:
        return "recording"
    return str(PurePosixPath(*parts).with_suffix(""))


def read_manifest(path: Path) -> Iterator[Recording]:
    """The recordings of a manifest; relative paths are relative to it.

    Raises ValueError, with the line, for a row that names no audio or is not JSON.
    """
    for line, row in _rows(path):
        try:
            yield _of_row(path.parent, row)
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from error


def _of_row(folder: Path, row: Mapping[str, Any]) -> Recording:
    audio = next((row[name] for name in PATH_FIELDS if row.get(name)), None)
    if not isinstance(audio, str):
        raise ValueError(f"names no audio; one of {', '.join(PATH_FIELDS)} must be a path.")
    audio.encode()  # half a surrogate pair is no part of a name
    offset = _seconds(row, "offset")
    source = audio if is_url(audio) else str(folder / audio)
    name = audio
    if is_url(audio):
        parts = urlsplit(audio)
        name = unquote(parts.netloc + parts.path)
    name = mirrored_name(name)
    return Recording(
        source,
        name if offset is None else f"{name}_{offset:.3f}",
        row,
        offset_s=offset or 0.0,
        # NeMo states the duration of every row; without an offset it is that of the file.
        duration_s=None if offset is None else _seconds(row, "duration"),
    )


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}).") from error
    if delimiter := _DELIMITERS.get(path.suffix.lower()):
        yield from _table_rows(path, csv.DictReader(io.StringIO(text), delimiter=delimiter))
        return
    for line, content in enumerate(text.split("\n"), 1):  # str.splitlines() also cuts at U+2028
        if not content.strip():
            continue
        if path.suffix.lower() in (".jsonl", ".json"):
            try:
                row = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{line}: not JSON ({error}).") from error
            yield line, row if isinstance(row, dict) else {}
        else:
            yield line, {"audio_filepath": content.strip()}


def _table_rows(path: Path, reader: csv.DictReader[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        for row in reader:
            if None in row:
                raise ValueError(f"{path}:{reader.line_num}: more columns than the first line.")
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: no such table ({error}).") from error


def _seconds(row: Mapping[str, Any], name: str) -> float | None:
    if (given := row.get(name)) in (None, ""):
        return None
    try:
        if 0 <= (seconds := float(given)) < MAX_SECONDS:
            return seconds
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} is {str(given)[:100]!r}; it must be seconds, from 0.")
