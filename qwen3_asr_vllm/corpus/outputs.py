# SPDX-License-Identifier: Apache-2.0
"""Where the transcripts of a corpus go: DIR/NAME.txt and so on, and a JSONL manifest.

A file appears complete or not at all, and never outside of its folder, whatever a manifest calls
its recordings. What is there already is done, if it is of the same source: DIR/.qwen3-asr.jsonl
has the source of each file, and a line of the manifest names its own.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from ..languages import language_code
from ..recordings import Recording, row_key
from ..transcript import Transcript
from .locks import locked

INDEX = ".qwen3-asr.jsonl"  # in an output folder; the lock of a run is on it
MAX_NAME_BYTES = 255  # of Linux' file systems

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_PART = f".{'[0-9a-f]' * 32}.part"  # a file that is being written


class Output(Protocol):
    """Something that transcripts are written to."""

    def check_apart(self, recordings: Iterable[Recording]) -> None:
        """Raise ValueError where two would be written to one place."""

    def check(self, recording: Recording) -> None:
        """Raise ValueError where its transcript could not be written, as far as that shows."""

    def is_done(self, recording: Recording) -> bool: ...

    def write(self, recording: Recording, transcript: Transcript) -> None:
        """Raise ValueError where it cannot be written, OSError where no other can be either."""

    def finish(self, recordings: Iterable[Recording]) -> None:
        """Put in order what is written."""


class OutputFolder:
    """A folder with one file for each recording and format.

    ``formats``: what writes a transcript, by suffix: "srt", "verbose.json".
    """

    def __init__(
        self,
        folder: Path,
        formats: Mapping[str, Callable[[Transcript], str]],
        *,
        overwrite: bool = False,
    ) -> None:
        self.folder, self.formats, self._overwrite = folder, formats, overwrite
        self._index = folder / INDEX
        self._source_by_file = dict(self._read_index())
        self._problem_by_folder: dict[Path, str | None] = {}

    @staticmethod
    def lock(folder: Path) -> AbstractContextManager[None]:
        """Make the folder and keep other runs out of it. Raises OSError, OutputInUseError."""
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; transcripts are written to a folder")
        folder.mkdir(parents=True, exist_ok=True)
        return locked(folder / INDEX, folder)

    def _read_index(self) -> Iterator[tuple[str, str]]:
        """Each file and its source; of two lines, the later one holds."""
        if not self._index.is_file():
            return
        for line in self._index.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                yield from ((file, entry["source"]) for file in entry["files"])
            except (ValueError, KeyError, TypeError):  # torn by a power cut
                continue

    def paths(self, recording: Recording) -> dict[str, Path]:
        """Its file for each suffix."""
        return {suffix: self.folder / f"{recording.name}.{suffix}" for suffix in self.formats}

    def check_apart(self, recordings: Iterable[Recording]) -> None:
        """Raise ValueError where two would be written to one file, one by an earlier run or not."""
        recordings = list(recordings)
        check_apart(
            (str(path), recording)
            for recording in recordings
            for path in self.paths(recording).values()
        )
        for recording in [] if self._overwrite else recordings:
            for path in self.paths(recording).values():
                if not self._is_of(recording, path) and os.path.isfile(path):
                    raise ValueError(
                        f"{path} is the transcript of {self._source(path)}, not of "
                        f"{recording.identity}; write to another folder, or overwrite it. "
                        f"(If recordings have moved, remove {self._index}.)"
                    )

    def check(self, recording: Recording) -> None:
        """Raise ValueError where its files could not be written, as far as that shows."""
        for path in self.paths(recording).values():
            longest = max(os.fsencode(path).split(b"/"), key=len)
            if len(longest) > MAX_NAME_BYTES:
                raise ValueError(
                    f"{recording}: {os.fsdecode(longest[:40])}... is too long for the name of a "
                    f"file: {len(longest)} bytes of at most {MAX_NAME_BYTES}"
                )
            problem = f"{path} is a folder" if os.path.isdir(path) else self._problem(path.parent)
            if problem:
                raise ValueError(f"{recording}: {problem}")

    def _problem(self, folder: Path) -> str | None:
        """Why nothing can be written into a folder, which may not be there yet."""
        if folder not in self._problem_by_folder:
            self._problem_by_folder[folder] = folder_problem(folder) or self._way_out(folder)
        return self._problem_by_folder[folder]

    def _way_out(self, folder: Path) -> str | None:
        if folder.resolve().is_relative_to(self.folder.resolve()):
            return None
        return f"{folder} lies outside of {self.folder}, through a link."

    def is_done(self, recording: Recording) -> bool:
        return all(
            os.path.isfile(path)
            and self._is_of(recording, path)
            and self._problem(path.parent) is None
            for path in self.paths(recording).values()
        )

    def _is_of(self, recording: Recording, path: Path) -> bool:
        """Whether a file is of this recording, or it is not known of which."""
        return self._source(path) in (None, recording.identity)

    def _source(self, path: Path) -> str | None:
        return self._source_by_file.get(self._file(path))

    def _file(self, path: Path) -> str:
        """How the index calls it."""
        return path.relative_to(self.folder).as_posix()

    def write(self, recording: Recording, transcript: Transcript) -> None:
        """Raise ValueError where it cannot be written, OSError where no other can be either."""
        paths = self.paths(recording)
        for folder in {path.parent for path in paths.values()}:
            if problem := self._way_out(folder):
                raise ValueError(f"{recording}: {problem}")
        texts = {path: self.formats[suffix](transcript) for suffix, path in paths.items()}
        with _naming(recording):
            self._note_source(recording, list(map(self._file, paths.values())))
            for path, text in texts.items():
                write_whole(path, text)

    def _note_source(self, recording: Recording, files: list[str]) -> None:
        """Before the files are there, so that none is ever without."""
        if all(self._source_by_file.get(file) == recording.identity for file in files):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._index.open("a", encoding="utf-8") as index:
            index.write(json.dumps({"source": recording.identity, "files": files}) + "\n")
        self._source_by_file |= dict.fromkeys(files, recording.identity)

    def finish(self, recordings: Iterable[Recording]) -> None:
        """Remove what a run that was killed left of a file."""
        for folder in {path.parent for r in recordings for path in self.paths(r).values()}:
            for part in folder.glob(_PART):
                part.unlink(missing_ok=True)


@contextmanager
def _naming(recording: Recording) -> Iterator[None]:
    """What is wrong with one file as a ValueError that names the recording."""
    try:
        yield
    except OSError as error:
        if error.errno in _OF_THE_DISK:
            raise
        raise ValueError(f"{recording}: {error}") from error


@contextmanager
def _naming_file(path: Path) -> Iterator[None]:
    """What is wrong with a file as an OSError that names it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def check_apart(places: Iterable[tuple[Hashable, Recording]]) -> None:
    """Raise ValueError where two recordings have one place."""
    first_by_place: dict[Hashable, Recording] = {}
    for place, recording in places:
        if (first := first_by_place.setdefault(place, recording)) is not recording:
            where = place if isinstance(place, str) else "one line of the manifest"
            raise ValueError(
                f"{first} and {recording} would both be written to {where}; transcribe them apart."
            )


def folder_problem(folder: Path) -> str | None:
    """Why no file can be made in a folder, which may not be there yet itself."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        return f"{there} is not a folder"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written to"


def check_file(path: Path) -> None:
    """Raise OSError where a file cannot be written, as far as that shows."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file")
    if not is_stream(path) and (problem := folder_problem(path.parent)):
        raise OSError(f"{path}: {problem}")


def write_file(path: Path, text: str) -> None:
    """Write a whole file, or straight into a pipe or device. Raises OSError, which names it."""
    if not is_stream(path):
        write_whole(real_path(path), text)
        return
    with _naming_file(path):
        path.write_text(text, encoding="utf-8")


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all, in place of any before, come a power cut.

    Raises OSError, which names it, where the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{uuid4().hex}.part")  # of this run alone
    try:
        with _naming_file(path):
            with unfinished.open("x", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # else the name may reach the disk before the text
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


class OutputManifest:
    """A JSONL file with a line for each recording: its row, and its transcript.

    Lines are appended as recordings are done, so a run that is killed loses none; ``finish`` puts
    them into the order of the corpus. Into a pipe or device, such as /dev/stdout, lines are only
    written.

    ``overwrite``: the first line that is written takes the place of what is there.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.path = real_path(path)
        self._is_stream = is_stream(path)
        self._is_to_go = overwrite and not self._is_stream
        rows = self._read() if self.path.is_file() and not overwrite else iter(())
        self._done = {row_key(row): None for row in rows if "pred_text" in row}

    @staticmethod
    def lock(path: Path) -> AbstractContextManager[None]:
        """Keep other runs from writing there. Raises OSError, OutputInUseError."""
        if is_stream(path):
            return nullcontext()
        check_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return locked(real_path(path), path)

    def _read(self) -> Iterator[dict[str, Any]]:
        """The rows; what a killed run left of a line is cut off."""
        text = self.path.read_bytes()
        if text and not text.endswith(b"\n"):
            text = self._end_last_line(text)
        for number, line in enumerate(text.splitlines(), 1):
            if (row := _read_row(line)) is None:
                message = f"{self.path}:{number} is no line of such a manifest; remove the file."
                raise ValueError(message)
            yield row

    def _end_last_line(self, text: bytes) -> bytes:
        """Complete it, or cut off what a killed run left of it."""
        whole = text[: text.rfind(b"\n") + 1]
        if _read_row(text[len(whole) :]) is not None:
            whole = text + b"\n"
        with self.path.open("r+b") as file:
            file.truncate(len(whole))
            if len(whole) > len(text):
                file.seek(len(text))
                file.write(b"\n")
        return whole

    def keys(self) -> Iterable[tuple[str, float]]:
        """The key of each line."""
        return self._done

    def check_apart(self, recordings: Iterable[Recording]) -> None:
        """Raise ValueError where two would be one line."""
        check_apart((recording.key, recording) for recording in recordings)

    def check(self, recording: Recording) -> None:
        """Raise ValueError for a name that is not UTF-8."""
        if not recording.source.isascii():
            output_line(recording, Transcript("", 0.0))

    def is_done(self, recording: Recording) -> bool:
        return any(key in self._done for key in recording.keys)

    def write(self, recording: Recording, transcript: Transcript) -> None:
        """Raise ValueError where it cannot be written, OSError where no other can be either."""
        line = output_line(recording, transcript)
        mode = "w" if self._is_to_go else "a"
        with _naming_file(self.path), self.path.open(mode, encoding="utf-8", newline="") as file:
            file.write(line)
        self._is_to_go = False
        self._done[recording.key] = None

    def finish(self, recordings: Iterable[Recording]) -> None:
        """Put the lines into the order of the corpus, those of other recordings first."""
        if self._is_stream or self._is_to_go or not self.path.exists():
            return
        order = {key: place for place, r in enumerate(recordings) for key in r.keys}
        row_by_key = {row_key(row): row for row in self._read()}  # of two, the later one
        rows = sorted(row_by_key.items(), key=lambda item: order.get(item[0], -1))
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows)
        write_whole(self.path, "".join(lines))


def is_stream(path: Path) -> bool:
    """Whether it is a pipe or device, which cannot be read back."""
    return path.exists() and not path.is_file() and not path.is_dir()


def real_path(path: Path) -> Path:
    """The file that a link names, so that it is replaced and not the link."""
    return path.resolve() if path.is_file() else path


def _read_row(line: bytes) -> dict[str, Any] | None:
    """The row of a line; None where it is none that was written here."""
    try:
        row = json.loads(line)
        row_key(row)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return row


def output_row(recording: Recording, transcript: Transcript) -> dict[str, Any]:
    """A manifest's row with its transcript: pred_text as NeMo calls it, and its language.

    ``audio_source`` is where the recording is, unless audio_filepath says so from everywhere.
    """
    language = transcript.language
    row = (
        {"audio_filepath": recording.source, "duration": round(transcript.duration, 3)}
        | dict(recording.row)
        | {"pred_text": transcript.text, "pred_lang": language and language_code(language)}
    )
    row.pop("audio_source", None)  # of an earlier run, where its manifest is read again
    is_plain = row["audio_filepath"] == recording.identity
    return row if is_plain else row | {"audio_source": recording.identity}


def output_line(recording: Recording, transcript: Transcript) -> str:
    """That row as a line of JSON. Raises ValueError for a name that is not UTF-8."""
    line = json.dumps(output_row(recording, transcript), ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{recording}: not UTF-8, as a manifest must be; rename it.") from error
    return line
