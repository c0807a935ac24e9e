# SPDX-License-Identifier: Apache-2.0
"""A corpus on disk: which recordings it has, what is done, and where results are written.

    files, folders, globs, URLs, "-", manifests -> recordings -> DIR/name.txt, manifest.jsonl

A manifest is JSONL as NeMo ("audio_filepath") or Hugging Face ("file_name") writes it, CSV or TSV
with such a column, or a plain list. What is written appears whole or not at all, and never outside
of its folder, whatever a manifest calls its recordings. What is there already is done.
"""

from __future__ import annotations

import csv
import errno
import glob
import io
import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from ..languages import language_code
from ..recordings import Recording, is_url, row_key
from ..transcript import Transcript

if TYPE_CHECKING:
    pass

MAX_SECONDS = 1e9  # of an offset: 30 years

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)

# What a folder is searched for: recordings, and films for their sound.
AUDIO_SUFFIXES = frozenset(
    ".aac .ac3 .aif .aiff .amr .au .caf .flac .m4a .m4b .mka .mp2 .mp3 .oga .ogg .opus .spx .wav "
    ".webm .wma .3gp .avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .ts .wmv".split()
)
PATH_FIELDS = ("audio_filepath", "file_name", "audio", "path")  # of a manifest's row, in this order
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_MANIFEST_SUFFIXES = (".jsonl", ".json", *_DELIMITERS, ".txt", ".lst", ".list")


# where it comes from ------------------------------------------------------------------------


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


# where it goes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputFolder:
    """A folder with one file for each recording and format."""

    folder: Path
    formats: Mapping[str, Callable[[Transcript], str]]  # by suffix: "srt", "verbose.json"

    def paths(self, recording: Recording) -> dict[str, Path]:
        """Raises ValueError where a link leads out of the folder."""
        paths = {suffix: self.folder / f"{recording.name}.{suffix}" for suffix in self.formats}
        for path in paths.values():
            if not path.parent.resolve().is_relative_to(self.folder.resolve()):
                raise ValueError(f"{path} lies outside of {self.folder}, through a link.")
        return paths

    def check_apart(self, recordings: Iterable[Recording]) -> None:
        """Raises ValueError where two would be written to one file."""
        check_apart(
            (f"{self.folder / recording.name}.{suffix}", recording)
            for recording in recordings
            for suffix in self.formats
        )

    def is_done(self, recording: Recording) -> bool:
        return all(os.path.isfile(path) for path in self.paths(recording).values())

    def write(self, recording: Recording, transcript: Transcript) -> None:
        """Raises ValueError where it cannot be written, OSError where no other can be either."""
        for suffix, path in self.paths(recording).items():
            try:
                write_whole(path, self.formats[suffix](transcript))
            except OSError as error:
                if error.errno in _OF_THE_DISK:
                    raise
                raise ValueError(f"{recording}: {error}") from error

    def finish(self, recordings: Iterable[Recording]) -> None:
        """Each file is finished already."""


def check_apart(places: Iterable[tuple[Hashable, Recording]]) -> None:
    """Raises ValueError where two recordings have one place."""
    first_by_place: dict[Hashable, Recording] = {}
    for place, recording in places:
        if (first := first_by_place.setdefault(place, recording)) is not recording:
            where = place if isinstance(place, str) else "one line of the manifest"
            raise ValueError(
                f"{first} and {recording} would both be written to {where}; transcribe them apart."
            )


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all, in place of any before, come a power cut.

    Raises OSError, which names it, where the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")  # a later run overwrites what a kill left
    unfinished.unlink(missing_ok=True)  # it may be a link
    try:
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else the name may reach the disk before the text
        unfinished.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


class OutputManifest:
    """A JSONL file with a line for each recording: its row, and what was heard.

    Lines are appended as recordings are done, so a run that is killed loses none; ``finish`` puts
    them into the order of the corpus.

    ``overwrite``: the first line that is written takes the place of what is there.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.path = path
        self._is_to_go = overwrite
        is_read = path.exists() and not overwrite
        self._done = {row_key(row): None for row in self._read()} if is_read else {}

    def _read(self) -> Iterator[dict[str, Any]]:
        """The rows; what a killed run left of a line is cut off."""
        text = self.path.read_bytes()
        if len(whole := text[: text.rfind(b"\n") + 1]) < len(text):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                row_key(row)
            except (ValueError, KeyError, TypeError) as error:
                message = f"{self.path}:{number} is no line of such a manifest; remove the file."
                raise ValueError(message) from error
            yield row

    def keys(self) -> Iterable[tuple[str, float]]:
        """The ``key`` of each recording that is done."""
        return self._done

    def check_apart(self, recordings: Iterable[Recording]) -> None:
        """Raises ValueError where two would be one line."""
        check_apart((recording.key, recording) for recording in recordings)

    def is_done(self, recording: Recording) -> bool:
        return recording.key in self._done

    def write(self, recording: Recording, transcript: Transcript) -> None:
        """Raises ValueError where it cannot be written, OSError where no other can be either."""
        line = output_line(recording, transcript)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w" if self._is_to_go else "a", encoding="utf-8", newline="") as file:
            file.write(line)
        self._is_to_go = False
        self._done[recording.key] = None

    def finish(self, recordings: Iterable[Recording]) -> None:
        """Put the lines into the order of the corpus, those of other recordings first."""
        if self._is_to_go or not self.path.exists():
            return
        order = {recording.key: place for place, recording in enumerate(recordings)}
        row_by_key = {row_key(row): row for row in self._read()}  # of two, the later one
        rows = sorted(row_by_key.items(), key=lambda item: order.get(item[0], -1))
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows)
        write_whole(self.path, "".join(lines))


def output_row(recording: Recording, transcript: Transcript) -> dict[str, Any]:
    """A manifest's row with what was heard: pred_text as NeMo calls it, and its language."""
    language = transcript.language
    return (
        {"audio_filepath": recording.source, "duration": round(transcript.duration, 3)}
        | dict(recording.row)
        | {"pred_text": transcript.text, "pred_lang": language and language_code(language)}
    )


def output_line(recording: Recording, transcript: Transcript) -> str:
    """That row as a line of JSON. Raises ValueError for a name that is not UTF-8."""
    line = json.dumps(output_row(recording, transcript), ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{recording}: not UTF-8, as a manifest must be; rename it.") from error
    return line
