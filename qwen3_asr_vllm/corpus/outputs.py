# SPDX-License-Identifier: Apache-2.0
"""Where the transcripts of a corpus go: DIR/NAME.txt and so on, and a JSONL manifest.

A file appears complete or not at all, and never outside of its folder, whatever a manifest calls
its recordings. What is there already is done.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..languages import language_code
from ..recordings import Recording, row_key
from ..transcript import Transcript

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


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
