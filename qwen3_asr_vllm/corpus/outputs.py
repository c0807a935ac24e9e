# SPDX-License-Identifier: Apache-2.0
"""Outputs of a corpus: files such as DIR/NAME.txt, and a JSONL manifest.

A file appears complete or not at all, and never outside of its folder, for any name that a manifest
holds. A recording is finished if its outputs exist and come from the same source:
DIR/.qwen3-asr.jsonl holds the source of each file, and each line of the manifest names its own.
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

from ..recordings import Recording, row_key
from ..transcript import Transcript
from .locks import locked

INDEX = ".qwen3-asr.jsonl"  # file of an output folder that holds sources, and the lock of a run
MAX_NAME_BYTES = 255  # longest file name on Linux

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_PART = f".{'[0-9a-f]' * 32}.part"  # a file that is being written


class Output(Protocol):
    """A destination of transcripts."""

    def check_apart(self, recordings: Iterable[Recording]) -> None:
        """Raise ValueError if two recordings would have the same output."""

    def check(self, recording: Recording) -> None:
        """Raise ValueError for a problem that would prevent writing, as far as it shows."""

    def is_done(self, recording: Recording) -> bool: ...

    def write(self, recording: Recording, transcript: Transcript) -> None:
        """Write a transcript. Raises ValueError, or OSError if no other can be written either."""

    def finish(self, recordings: Iterable[Recording]) -> None:
        """Clean up and sort the output after a run."""


class OutputFolder:
    """A folder with one file for each recording and format.

    ``formats`` are functions that write a transcript, by suffix: "srt", "verbose.json".
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
        """Create the folder and lock it for this run. Raises OSError, OutputInUseError."""
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; transcripts are written to a folder")
        folder.mkdir(parents=True, exist_ok=True)
        return locked(folder / INDEX, folder)

    def _read_index(self) -> Iterator[tuple[str, str]]:
        """Yield each file with its source; a later line overrides an earlier one."""
        if not self._index.is_file():
            return
        for line in self._index.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                yield from ((file, entry["source"]) for file in entry["files"])
            except (ValueError, KeyError, TypeError):  # a line that a power cut truncated
                continue

    def paths(self, recording: Recording) -> dict[str, Path]:
        """Return the files of a recording by suffix."""
        return {suffix: self.folder / f"{recording.name}.{suffix}" for suffix in self.formats}

    def check_apart(self, recordings: Iterable[Recording]) -> None:
        """Raise ValueError if two recordings share a file, also with an earlier run."""
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
        """Raise ValueError for a problem that would prevent writing, as far as it shows."""
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
        """Return why a folder, which may not exist yet, is not writable; None if it is."""
        if folder not in self._problem_by_folder:
            self._problem_by_folder[folder] = folder_problem(folder) or self._way_out(folder)
        return self._problem_by_folder[folder]

    def _way_out(self, folder: Path) -> str | None:
        """Return an error for a folder that a link puts outside of the output folder."""
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
        """Return whether a file is of this recording, or of an unknown one."""
        return self._source(path) in (None, recording.identity)

    def _source(self, path: Path) -> str | None:
        return self._source_by_file.get(self._file(path))

    def _file(self, path: Path) -> str:
        """Return the name of a file in the index."""
        return path.relative_to(self.folder).as_posix()

    def write(self, recording: Recording, transcript: Transcript) -> None:
        """Write a transcript. Raises ValueError, or OSError if no other can be written either."""
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
        """Add files to the index, before they exist, so that no file lacks its source."""
        if all(self._source_by_file.get(file) == recording.identity for file in files):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._index.open("a", encoding="utf-8") as index:
            index.write(json.dumps({"source": recording.identity, "files": files}) + "\n")
        self._source_by_file |= dict.fromkeys(files, recording.identity)

    def finish(self, recordings: Iterable[Recording]) -> None:
        """Remove unfinished files of a killed run."""
        for folder in {path.parent for r in recordings for path in self.paths(r).values()}:
            for part in folder.glob(_PART):
                part.unlink(missing_ok=True)


@contextmanager
def _naming(recording: Recording) -> Iterator[None]:
    """Turn the OSError of one file into a ValueError that names the recording."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise
        raise ValueError(f"{recording}: {error}") from error


@contextmanager
def _naming_file(path: Path) -> Iterator[None]:
    """Add the name of a file to its OSError."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def check_apart(outputs: Iterable[tuple[Hashable, Recording]]) -> None:
    """Raise ValueError if two recordings have the same output: a file, or a line."""
    first_by_output: dict[Hashable, Recording] = {}
    for output, recording in outputs:
        if (first := first_by_output.setdefault(output, recording)) is not recording:
            where = output if isinstance(output, str) else "one line of the manifest"
            raise ValueError(
                f"{first} and {recording} would both be written to {where}; "
                "transcribe them in separate runs."
            )


def folder_problem(folder: Path) -> str | None:
    """Return why a folder, which may not exist yet, is not writable; None if it is."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        return f"{there} is not a folder"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written to"


def check_file(path: Path) -> None:
    """Raise OSError for a problem that would prevent writing a file, as far as it shows."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file")
    if not is_stream(path) and (problem := folder_problem(path.parent)):
        raise OSError(f"{path}: {problem}")


def write_file(path: Path, text: str) -> None:
    """Write a whole file, or into a pipe or device. Raises OSError, which names the file."""
    if not is_stream(path):
        write_whole(real_path(path), text)
        return
    with _naming_file(path):
        path.write_text(text, encoding="utf-8")


def write_whole(path: Path, text: str) -> None:
    """Replace a file atomically, so that it is complete even after a power cut.

    Raises OSError, which names the file, for a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{uuid4().hex}.part")  # a name that no other run uses
    try:
        with _naming_file(path):
            with unfinished.open("x", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # otherwise the rename may reach the disk before the text
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


class OutputManifest:
    """A JSONL file with a line for each recording: its row with its transcript.

    Each line is appended when its recording finishes, so a killed run loses none; ``finish`` sorts
    the lines into the order of the corpus. A pipe or device, such as /dev/stdout, is only written.

    With ``overwrite``, the first line replaces the file.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.path = real_path(path)
        self._is_stream = is_stream(path)
        self._is_to_replace = overwrite and not self._is_stream
        rows = self._read() if self.path.is_file() and not overwrite else iter(())
        self._done = {row_key(row): None for row in rows if "pred_text" in row}

    @staticmethod
    def lock(path: Path) -> AbstractContextManager[None]:
        """Lock the file for this run. Raises OSError, OutputInUseError."""
        if is_stream(path):
            return nullcontext()
        check_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return locked(real_path(path), path)

    def _read(self) -> Iterator[dict[str, Any]]:
        """Yield the rows; a line that a killed run truncated is removed."""
        text = self.path.read_bytes()
        if text and not text.endswith(b"\n"):
            text = self._end_last_line(text)
        for number, line in enumerate(text.splitlines(), 1):
            if (row := _read_row(line)) is None:
                message = f"{self.path}:{number} is no line of an output manifest; remove the file."
                raise ValueError(message)
            yield row

    def _end_last_line(self, text: bytes) -> bytes:
        """Complete the last line, or remove it if a killed run truncated it."""
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
        """Return the key of each line."""
        return self._done

    def check_apart(self, recordings: Iterable[Recording]) -> None:
        """Raise ValueError if two recordings would share a line."""
        check_apart((recording.key, recording) for recording in recordings)

    def check(self, recording: Recording) -> None:
        """Raise ValueError for a name that is not UTF-8."""
        if not recording.source.isascii():
            output_line(recording, Transcript("", 0.0))

    def is_done(self, recording: Recording) -> bool:
        return any(key in self._done for key in recording.keys)

    def write(self, recording: Recording, transcript: Transcript) -> None:
        """Write a transcript. Raises ValueError, or OSError if no other can be written either."""
        line = output_line(recording, transcript)
        mode = "w" if self._is_to_replace else "a"
        with _naming_file(self.path), self.path.open(mode, encoding="utf-8", newline="") as file:
            file.write(line)
        self._is_to_replace = False
        self._done[recording.key] = None

    def finish(self, recordings: Iterable[Recording]) -> None:
        """Sort the lines into the order of the corpus, after those of other recordings."""
        if self._is_stream or self._is_to_replace or not self.path.exists():
            return
        order = {key: index for index, r in enumerate(recordings) for key in r.keys}
        row_by_key = {
            row_key(row): row for row in self._read()
        }  # a later line overrides an earlier one
        rows = sorted(row_by_key.items(), key=lambda item: order.get(item[0], -1))
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows)
        write_whole(self.path, "".join(lines))


def is_stream(path: Path) -> bool:
    """Return whether this is a pipe or device, which cannot be read back."""
    return path.exists() and not path.is_file() and not path.is_dir()


def real_path(path: Path) -> Path:
    """Return the target of a link, so that writing replaces the target and not the link."""
    return path.resolve() if path.is_file() else path


def _read_row(line: bytes) -> dict[str, Any] | None:
    """Return the row of a line; None for a line that is not from an output manifest."""
    try:
        row = json.loads(line)
        row_key(row)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return row


def output_row(recording: Recording, transcript: Transcript) -> dict[str, Any]:
    """Return the row of a recording with its transcript, in NeMo's ``pred_text``, and language.

    ``audio_source`` is added unless ``audio_filepath`` is valid in any working directory.
    """
    row = (
        {"audio_filepath": recording.source, "duration": round(transcript.duration, 3)}
        | dict(recording.row)
        | {"pred_text": transcript.text, "pred_lang": next(iter(transcript.codes), None)}
    )
    row.pop(
        "audio_source", None
    )  # from an earlier run whose output manifest is the source of this one
    is_plain = row["audio_filepath"] == recording.identity
    return row if is_plain else row | {"audio_source": recording.identity}


def output_line(recording: Recording, transcript: Transcript) -> str:
    """Return the row as a line of JSON. Raises ValueError for a name that is not UTF-8."""
    line = json.dumps(output_row(recording, transcript), ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{recording}: not UTF-8, as a manifest must be; rename it.") from error
    return line
