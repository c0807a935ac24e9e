# SPDX-License-Identifier: Apache-2.0
"""One source of audio: its location, its loading, and its result."""

from __future__ import annotations

import http.client
import logging
import os
import stat
import sys
import urllib.error
import urllib.request
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from .geometry import SAMPLE_RATE
from .transcript import Transcript

if TYPE_CHECKING:
    import numpy as np

MAX_DOWNLOAD_BYTES = 1 << 30
DOWNLOAD_TIMEOUT_S = 60  # seconds without a byte
MAX_WHOLES = 2  # decoded recordings kept for their parts; one of four hours takes 0.9 GB


_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Recording:
    """One recording of a corpus, or a part of one."""

    source: str  # a path, a URL, or "-"
    name: str  # name of its outputs: a relative path without suffix
    row: Mapping[str, Any] = field(default_factory=dict)  # row of the manifest
    offset_s: float = 0.0
    duration_s: float | None = None  # duration of the part from the offset; None: to the end

    def __str__(self) -> str:
        return f"{self.source} at {self.offset_s:g} s" if self.offset_s else self.source

    @property
    def is_part(self) -> bool:
        return self.offset_s > 0 or self.duration_s is not None

    @property
    def problem(self) -> str | None:
        """The reason why there is no file to load, as far as it shows without opening the file.

        A pipe is accepted from the command line, but not from a manifest.
        """
        if self.source == "-" or is_url(self.source):
            return None
        try:
            mode = os.stat(self.source).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return "no such file, folder or manifest"
        except (OSError, ValueError):  # opening it gives the reason
            return None
        if stat.S_ISREG(mode) or (stat.S_ISFIFO(mode) and not self.row):
            return None
        return "a folder, not a file" if stat.S_ISDIR(mode) else "a pipe, socket or device, no file"

    def check(self) -> None:
        """Raise FileNotFoundError if there is no file to load."""
        if problem := self.problem:
            raise FileNotFoundError(f"{self}: {problem}")

    @property
    def identity(self) -> str:
        """The source in any working directory: an absolute path, or a URL."""
        is_path = self.source != "-" and not is_url(self.source)
        return os.path.abspath(self.source) if is_path else self.source

    @property
    def key(self) -> tuple[str, float]:
        """Unique key of the recording, also in an output manifest."""
        return self.identity, self.offset_s

    @property
    def keys(self) -> tuple[tuple[str, float], ...]:
        """The key, and the key of a line that has only the path of the row, relative or not."""
        return self.key, (str(self.row.get("audio_filepath", self.source)), self.offset_s)

    def load(self, **options: Any) -> np.ndarray:
        """Return the waveform; ``options`` are those of ``load_audio``.

        Raises what ``load_audio`` and ``fetch`` raise.
        """
        waveform = self.load_whole(**options)
        return self.part_of(waveform) if self.is_part else waveform

    def load_whole(self, **options: Any) -> np.ndarray:
        """Return the waveform of the whole recording, for a part too."""
        from .audio import load_audio

        self.check()
        if self.source == "-":
            return load_audio(sys.stdin.buffer.read(), **options)
        if is_url(self.source):
            return _load_url(self.source, **options)
        return load_audio(self.source, **options)

    def part_of(self, waveform: np.ndarray) -> np.ndarray:
        """Return this part of the whole waveform. Raises ValueError if it starts after the end."""
        start = round(self.offset_s * SAMPLE_RATE)
        end = None if self.duration_s is None else start + round(self.duration_s * SAMPLE_RATE)
        if len(part := waveform[start:end]) == 0:
            seconds = len(waveform) / SAMPLE_RATE
            raise ValueError(f"{self.source} lasts {seconds:.1f} s; there is none at {self}.")
        return part.copy()  # frees the memory of a long recording


@dataclass(frozen=True)
class Result:
    """The result of one recording: a transcript or an error."""

    index: int  # index of the recording among the sources, from 0
    source: Any
    transcript: Transcript | None = None
    error: Exception | None = None


def only(results: Iterable[Result]) -> Transcript:
    """Return the transcript of the only result. Raises the error of a recording that failed."""
    (result,) = results
    if result.error is not None:
        raise result.error
    assert result.transcript is not None
    return result.transcript


@dataclass(frozen=True)
class Progress:
    """Progress of a run. Recordings that failed are done; their seconds do not count."""

    recordings_read: int
    recordings_done: int
    seconds_read: float
    seconds_done: float
    recordings: int | None = None  # total; None for a generator


class Loader:
    """``load_recording`` for one run, which decodes a recording once for successive parts.

    Thread-safe; a thread that needs a part of a recording waits until it is decoded.
    ``audio_track`` is that of ``load_audio``.
    """

    def __init__(self, *, audio_track: int | None = None) -> None:
        self._audio_track = audio_track
        self._wholes: OrderedDict[str, Future[tuple[np.ndarray, list[str]]]] = OrderedDict()
        self._lock = Lock()

    def __call__(
        self, source: Any, *, on_warning: Callable[[str], object] = _logger.warning
    ) -> np.ndarray:
        """Return the waveform; ``on_warning`` takes the warnings of ``load_audio``.

        Each part of a recording has the warnings of the whole.
        """
        if not isinstance(source, Recording) or not source.is_part:
            return load_recording(source, on_warning=on_warning, audio_track=self._audio_track)
        whole, warnings = self._whole(source)
        part = source.part_of(whole)
        for warning in warnings:
            on_warning(warning)
        return part

    def _whole(self, part: Recording) -> tuple[np.ndarray, list[str]]:
        with self._lock:
            is_new = part.source not in self._wholes
            whole = self._wholes.setdefault(part.source, Future())
            self._wholes.move_to_end(part.source)
            if len(self._wholes) > MAX_WHOLES:
                self._wholes.popitem(last=False)
        if is_new:
            try:
                warnings: list[str] = []
                waveform = part.load_whole(
                    on_warning=warnings.append, audio_track=self._audio_track
                )
                whole.set_result((waveform, warnings))
            except BaseException as error:
                whole.set_exception(error)
                self._forget(part.source, whole)
        return whole.result()

    def _forget(self, source: str, failed: Future[Any]) -> None:
        """Let the next part try again, since the error may have come from the network."""
        with self._lock:
            if self._wholes.get(source) is failed:
                del self._wholes[source]


def load_recording(source: Any, **options: Any) -> np.ndarray:
    """Return the waveform of a ``Recording``, a URL, or a source of ``load_audio``.

    ``options`` are those of ``load_audio``.
    """
    if isinstance(source, Recording):
        return source.load(**options)
    if isinstance(source, str) and is_url(source):
        return _load_url(source, **options)
    from .audio import load_audio

    return load_audio(source, **options)


class SourceReader:
    """Reads sources in a thread, since an iterator may block for long.

    It may even wait for the results of earlier sources. ``size`` is the number of sources; None
    for a generator.
    """

    def __init__(self, sources: Iterable[Any]) -> None:
        self.size = len(sources) if isinstance(sources, Sized) else None
        self._sources = enumerate(sources)
        self._asked: SimpleQueue[Future[tuple[int, Any] | None]] = SimpleQueue()
        self._thread = Thread(target=self._read, name="read-sources", daemon=True)
        self.coming: deque[Future[tuple[int, Any] | None]] = deque()  # requested, not taken
        self.is_at_end = False

    def ask(self) -> None:
        """Request one more source."""
        if self._thread.ident is None:
            self._thread.start()
        self.coming.append(Future())
        self._asked.put(self.coming[-1])

    def take(self) -> Iterator[tuple[int, Any]]:
        """Yield the sources that were read, with their indices. Raises the iterator's error."""
        while self.coming and self.coming[0].done():
            if (item := self.coming.popleft().result()) is None:
                self.close()
            else:
                yield item

    def close(self) -> None:
        """Stop reading after the source that is being read."""
        self.is_at_end = True
        self.coming.clear()
        self._asked.put(Future())  # wakes the thread

    def _read(self) -> None:
        while not self.is_at_end:
            future = self._asked.get()
            try:
                future.set_result(None if self.is_at_end else next(self._sources, None))
            except BaseException as error:  # raised again by take()
                future.set_exception(error)


def is_one(audio: Any) -> bool:
    """Return whether this is one recording rather than many."""
    import numpy as np

    if isinstance(audio, tuple):
        return len(audio) == 2 and isinstance(audio[0], np.ndarray) and np.isscalar(audio[1])
    one = (str, bytes, bytearray, memoryview, os.PathLike, np.ndarray, Recording)
    return isinstance(audio, one) or hasattr(audio, "read")


def is_url(source: str) -> bool:
    """Return whether this is a URL. Raises ValueError for schemes other than http and https."""
    scheme, mark, _ = source.partition("://")
    if mark and scheme.isalnum() and scheme.lower() not in ("http", "https"):
        raise ValueError(f"{source}: cannot open {scheme} URLs; use http, https, or a path.")
    return bool(mark) and scheme.isalnum()


def fetch(url: str) -> bytes:
    """Return the body of a URL, at most 1 GiB. Raises OSError, ValueError, naming the URL."""
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
            num_missing = (
                response.length or 0
            )  # read() with a size does not raise for a truncated body
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url}: {error}") from error
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise ValueError(f"{url}: larger than 1 GiB. Download it and pass the path.")
    if num_missing:
        raise OSError(f"{url}: the connection was cut {num_missing} bytes before the end.")
    return data


def _load_url(url: str, **options: Any) -> np.ndarray:
    from .audio import load_audio

    data = fetch(url)
    try:
        return load_audio(data, **options)
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from error


def row_key(row: Mapping[str, Any]) -> tuple[str, float]:
    """Return the key of the recording that a line of an output manifest belongs to."""
    return str(row.get("audio_source") or row["audio_filepath"]), float(row.get("offset") or 0.0)
