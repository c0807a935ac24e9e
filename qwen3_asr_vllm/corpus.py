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
import http.client
import io
import json
import os
import sys
import urllib.error
import urllib.request
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from .geometry import SAMPLE_RATE
from .languages import language_code
from .transcript import Transcript

if TYPE_CHECKING:
    import numpy as np

MAX_DOWNLOAD_BYTES = 1 << 30
MAX_SECONDS = 1e9  # of an offset: 30 years
DOWNLOAD_TIMEOUT_S = 60  # without a byte
MAX_WHOLES = 2  # recordings that are kept for their parts; 0.9 GB for one of four hours

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)

# What a folder is searched for: recordings, and films for their sound.
AUDIO_SUFFIXES = frozenset(
    ".aac .ac3 .aif .aiff .amr .au .caf .flac .m4a .m4b .mka .mp2 .mp3 .oga .ogg .opus .spx .wav "
    ".webm .wma .3gp .avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .ts .wmv".split()
)
PATH_FIELDS = ("audio_filepath", "file_name", "audio", "path")  # of a manifest's row, in this order
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_MANIFEST_SUFFIXES = (".jsonl", ".json", *_DELIMITERS, ".txt", ".lst", ".list")


@dataclass(frozen=True, eq=False)
class Recording:
    """One recording of a corpus, or a part of one."""

    source: str  # a path, a URL, or "-"
    name: str  # of what is written for it: a relative path without suffix
    row: Mapping[str, Any] = field(default_factory=dict)  # its line of a manifest
    offset_s: float = 0.0
    duration_s: float | None = None  # of the part that begins at the offset; None: to the end

    def __str__(self) -> str:
        return f"{self.source} at {self.offset_s:g} s" if self.offset_s else self.source

    @property
    def is_part(self) -> bool:
        return self.offset_s > 0 or self.duration_s is not None

    @property
    def is_missing(self) -> bool:
        if self.source == "-" or is_url(self.source):
            return False
        try:
            return not Path(self.source).exists()
        except OSError:  # whoever opens it is told why
            return False

    @property
    def key(self) -> tuple[str, float]:
        """What tells it from the others of its manifest, also in the one that is written."""
        return _key({"audio_filepath": self.source} | dict(self.row))

    def load(self) -> np.ndarray:
        """Its waveform. Raises what ``load_audio`` and ``fetch`` raise."""
        waveform = self.load_whole()
        return self.part_of(waveform) if self.is_part else waveform

    def load_whole(self) -> np.ndarray:
        """The waveform of all that it is a part of."""
        from .audio import load_audio

        if self.source == "-":
            return load_audio(sys.stdin.buffer.read())
        return _load_url(self.source) if is_url(self.source) else load_audio(self.source)

    def part_of(self, waveform: np.ndarray) -> np.ndarray:
        start = round(self.offset_s * SAMPLE_RATE)
        end = None if self.duration_s is None else start + round(self.duration_s * SAMPLE_RATE)
        if len(part := waveform[start:end]) == 0:
            seconds = len(waveform) / SAMPLE_RATE
            raise ValueError(f"{self.source} lasts {seconds:.1f} s; there is none at {self}.")
        return part.copy()  # so that the rest of a long recording can be forgotten


@dataclass(frozen=True)
class Result:
    """What became of one recording: a transcript, or the error that stands in its place."""

    index: int  # of the recording among the sources, from 0
    source: Any
    transcript: Transcript | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Progress:
    """How far a run is. Recordings that failed are done; their seconds do not count."""

    recordings_read: int
    recordings_done: int
    seconds_read: float
    seconds_done: float
    recordings: int | None = None  # in all; None where a generator brings them


class Loader:
    """``load_recording`` for one run: parts that follow each other decode their recording once.

    Threads may share it; those that want parts of what is being decoded wait for it.
    """

    def __init__(self) -> None:
        self._wholes: OrderedDict[str, Future[np.ndarray]] = OrderedDict()  # by source
        self._lock = Lock()

    def __call__(self, source: Any) -> np.ndarray:
        if isinstance(source, Recording) and source.is_part:
            return source.part_of(self._whole(source))
        return load_recording(source)

    def _whole(self, part: Recording) -> np.ndarray:
        with self._lock:
            is_new = part.source not in self._wholes
            whole = self._wholes.setdefault(part.source, Future())
            self._wholes.move_to_end(part.source)
            if len(self._wholes) > MAX_WHOLES:
                self._wholes.popitem(last=False)
        if is_new:
            try:
                whole.set_result(part.load_whole())
            except BaseException as error:
                whole.set_exception(error)
                self._forget(part.source, whole)
        return whole.result()

    def _forget(self, source: str, failed: Future[np.ndarray]) -> None:
        """So that the next part tries again: it may have been the network."""
        with self._lock:
            if self._wholes.get(source) is failed:
                del self._wholes[source]


def load_recording(source: Any) -> np.ndarray:
    """The waveform of whatever ``load_audio`` takes, of a URL, or of a ``Recording``."""
    if isinstance(source, Recording):
        return source.load()
    if isinstance(source, str) and is_url(source):
        return _load_url(source)
    from .audio import load_audio

    return load_audio(source)


class SourceReader:
    """Reads sources in a thread of its own, so that nobody but it waits for the next one.

    A source may take long, or wait for the results of those before it. ``size`` is how many there
    are; None of a generator.
    """

    def __init__(self, sources: Iterable[Any]) -> None:
        self.size = len(sources) if isinstance(sources, Sized) else None
        self._sources = enumerate(sources)
        self._asked: SimpleQueue[Future[tuple[int, Any] | None]] = SimpleQueue()
        self._thread = Thread(target=self._read, name="read-sources", daemon=True)
        self.coming: deque[Future[tuple[int, Any] | None]] = deque()  # asked for, not taken
        self.is_at_end = False

    def ask(self) -> None:
        """Read one more."""
        if self._thread.ident is None:
            self._thread.start()
        self.coming.append(Future())
        self._asked.put(self.coming[-1])

    def take(self) -> Iterator[tuple[int, Any]]:
        """Those that were read, with their index. Raises what a source raised."""
        while self.coming and self.coming[0].done():
            if (item := self.coming.popleft().result()) is None:
                self.close()
            else:
                yield item

    def close(self) -> None:
        """Read no more than what is being read."""
        self.is_at_end = True
        self.coming.clear()
        self._asked.put(Future())  # wakes the thread

    def _read(self) -> None:
        while not self.is_at_end:
            future = self._asked.get()
            try:
                future.set_result(None if self.is_at_end else next(self._sources, None))
            except BaseException as error:  # who takes it is told
                future.set_exception(error)


# where it comes from ------------------------------------------------------------------------


def is_url(source: str) -> bool:
    """Raises ValueError for a scheme other than http and https."""
    scheme, mark, _ = source.partition("://")
    if mark and scheme.isalnum() and scheme.lower() not in ("http", "https"):
        raise ValueError(f"{source}: cannot open {scheme} URLs; use http, https, or a path.")
    return bool(mark) and scheme.isalnum()


def fetch(url: str) -> bytes:
    """All that a URL holds, at most 1 GiB. Raises OSError or ValueError, naming the URL."""
    is_url(url)
    opener = urllib.request.OpenerDirector()  # without the handlers for file and ftp
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    try:
        with opener.open(url, timeout=DOWNLOAD_TIMEOUT_S) as response:
            data: bytes = response.read(MAX_DOWNLOAD_BYTES + 1)
            num_missing = response.length or 0  # read() with a size takes a cut for the end
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url}: {error}") from error
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise ValueError(f"{url}: larger than 1 GiB. Download it and pass the path.")
    if num_missing:
        raise OSError(f"{url}: the connection was cut {num_missing} bytes before the end.")
    return data


def _load_url(url: str) -> np.ndarray:
    from .audio import load_audio

    data = fetch(url)
    try:
        return load_audio(data)
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from error


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
        self._done = {_key(row): None for row in self._read()} if is_read else {}

    def _read(self) -> Iterator[dict[str, Any]]:
        """The rows; what a killed run left of a line is cut off."""
        text = self.path.read_bytes()
        if len(whole := text[: text.rfind(b"\n") + 1]) < len(text):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                _key(row)
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
        row_by_key = {_key(row): row for row in self._read()}  # of two, the later one
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


def _key(row: Mapping[str, Any]) -> tuple[str, float]:
    return str(row["audio_filepath"]), float(row.get("offset") or 0.0)
