# SPDX-License-Identifier: Apache-2.0
"""Transcribe recordings on a server, over OpenAI's audio route, with the standard library alone.

Files are sent as they are and decoded there. As ``Qwen3ASR``, a server gives an iterator of
results, and what fails is a result with an error.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, BinaryIO, overload
from urllib.parse import urlsplit
from uuid import uuid4

from ..formats import read_verbose_json
from ..geometry import SAMPLE_RATE
from ..options import TranscribeOptions, merge_options
from ..recordings import (
    Loader,
    Progress,
    Recording,
    Result,
    SourceReader,
    fetch,
    is_one,
    is_url,
    only,
)
from ..transcript import Transcript

if TYPE_CHECKING:
    from ..audio import AudioSource

NUM_CONNECTIONS = 32  # recordings that are sent at once: enough to keep a server's batch full
CONNECT_S = 10
TIMEOUT_S = 3600  # without a byte: a slow server is silent while it hears four hours
RETRY_DELAYS_S = (0.5, 2, 8, 30)  # before each further attempt, where a connection fails
BUSY_DELAY_S = 5  # where a busy server does not say when to come again
MOST_BUSY_S = 2 * TIMEOUT_S  # without any answer: what fills a server may take TIMEOUT_S
TOLD_BUSY_S = 60  # of that, before whoever waits is told
MOST_RETRY_AFTER_S = 60  # more is asked for by mistake
_BUSY = (429, 503)
_BROKEN = (0, 502, 504)  # 0: not even an answer of a proxy
_BLOCK_BYTES = 1 << 18
_FILES = (str, os.PathLike, bytes, bytearray, memoryview)


class NoServerError(ConnectionError):
    """Nothing answers, so that no recording can be heard."""


class StatusError(ValueError):
    """A server answered with another status than 200."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class _Answer:
    status: int  # 0: there is none, and the body says why
    body: bytes
    retry_after_s: float = BUSY_DELAY_S


class Client:
    """Client of a server at a URL such as ``http://localhost:8000``, with or without ``/v1``.

        from qwen3_asr_vllm import Client

        client = Client("http://localhost:8000")
        print(client.transcribe("talk.mp3", language="de").text)

    ``model`` is by default the first that the server lists. ``api_key`` is sent as OpenAI's
    clients do. ``num_connections`` recordings are sent at once. A busy server is retried until it
    has sent no response at all for ``most_busy_s`` seconds; after a minute without one, ``on_busy``
    is called with its message, in the thread of an upload.

    Raises OSError for a server that is unreachable, ValueError for a URL that is not http(s) and
    for a server that lists no models.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        num_connections: int = NUM_CONNECTIONS,
        most_busy_s: float = MOST_BUSY_S,
        on_busy: Callable[[str], None] | None = None,
    ) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if not is_url(parts.geturl()) or not parts.hostname:
            raise ValueError(f"{url!r} is no address of a server, such as http://localhost:8000.")
        self.url = parts.geturl().rstrip("/").removesuffix("/v1")
        self._connection_type = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self._netloc = parts.netloc.rpartition("@")[2]
        self._path = urlsplit(self.url).path
        self._timeout_s, self._num_connections = timeout_s, num_connections
        self._most_busy_s, self._on_busy = most_busy_s, on_busy
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.model = model or self._first_model()

    def get(self, path: str) -> bytes:
        """What is at a path. Raises StatusError where that is an error; OSError for no answer."""
        answer = self._exchange("GET", path)
        if answer.status != 200:
            message = f"{self.url}{path} answers {answer.status}: {_message(answer)}."
            raise StatusError(message, answer.status)
        return answer.body

    def _first_model(self) -> str:
        answer = self._exchange("GET", "/v1/models")
        try:
            return str(json.loads(answer.body)["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{self.url}/v1/models: {_message(answer)}") from error

    @overload
    def transcribe(  # type: ignore[overload-overlap]  # a path and bytes are iterables too
        self,
        audio: AudioSource | Recording,
        options: TranscribeOptions | None = None,
        *,
        in_order: bool = True,
        progress: Callable[[Progress], None] | None = None,
        **fields: Any,
    ) -> Transcript: ...

    @overload
    def transcribe(
        self,
        audio: Iterable[AudioSource | Recording],
        options: TranscribeOptions | None = None,
        *,
        in_order: bool = True,
        progress: Callable[[Progress], None] | None = None,
        **fields: Any,
    ) -> Iterator[Result]: ...

    def transcribe(
        self,
        audio: Any,
        options: TranscribeOptions | None = None,
        *,
        in_order: bool = True,
        progress: Callable[[Progress], None] | None = None,
        **fields: Any,
    ) -> Transcript | Iterator[Result]:
        """Transcribe one recording or many, with the arguments of ``Qwen3ASR.transcribe``.

        One gives its transcript, many give an iterator of results. ``progress`` is called after
        each recording. Tokens are not sent, and segments always have their confidences.

        Raises at once TypeError for an unknown option, ValueError for ``max_clip_s``, which the
        server sets. Raises NoServerError, a ConnectionError, for a server that is unreachable or
        busy for too long; for one recording also its ValueError or OSError.
        """
        options = merge_options(options, fields)
        results = self._results(
            [audio] if is_one(audio) else audio,
            _form_fields(options),
            Loader(audio_track=options.audio_track),
            in_order=in_order,
            progress=progress,
        )
        return only(results) if is_one(audio) else results

    def _results(
        self,
        recordings: Iterable[Any],
        fields: list[tuple[str, str]],
        load: Loader,
        *,
        in_order: bool,
        progress: Callable[[Progress], None] | None,
    ) -> Iterator[Result]:
        """Yield the result of each recording; closing the iterator cancels the others."""
        reader, uploads = SourceReader(recordings), _Uploads(self._most_busy_s, self._on_busy)
        running: dict[Future[Transcript], tuple[int, Any]] = {}
        finished: dict[int, Result] = {}
        next_index = num_done = 0
        seconds = 0.0
        pool = ThreadPoolExecutor(self._num_connections, thread_name_prefix="transcribe")
        try:
            while True:
                num_here = len(running) + len(finished) + len(reader.coming)
                for _ in range(0 if reader.is_at_end else 2 * self._num_connections - num_here):
                    reader.ask()
                for item in reader.take():
                    running[pool.submit(self._transcribe, item[1], fields, uploads, load)] = item
                pending: list[Future[Any]] = [*reader.coming, *running]
                if not pending:
                    return
                wait(pending, return_when=FIRST_COMPLETED)
                for future in [future for future in running if future.done()]:
                    result = _result(*running.pop(future), future)
                    finished[result.index] = result
                    num_done += 1
                    seconds += result.transcript.duration if result.transcript else 0.0
                    if progress:
                        progress(Progress(num_done, num_done, seconds, seconds, reader.size))
                for index in [] if in_order else sorted(finished):
                    yield finished.pop(index)
                while next_index in finished:
                    yield finished.pop(next_index)
                    next_index += 1
        finally:
            reader.close()
            uploads.give_up()
            pool.shutdown(wait=False, cancel_futures=True)

    def _transcribe(
        self, recording: Any, fields: list[tuple[str, str]], uploads: _Uploads, load: Loader
    ) -> Transcript:
        warnings: list[str] = []
        if _is_decoded_here(recording):  # from the chosen track
            fields = [field for field in fields if field[0] != "audio_track"]
        with _open(recording, load, warnings.append) as file:
            name = _filename(recording)
            answer = self._ask(lambda: self._send(file, name, fields, uploads), uploads)
        if answer.status != 200:
            raise ValueError(f"{_name(recording)}: {_message(answer)}")
        transcript = read_verbose_json(json.loads(answer.body))
        return replace(transcript, warnings=(*warnings, *transcript.warnings))

    def _ask(self, send: Callable[[], _Answer], uploads: _Uploads) -> _Answer:
        """Send, and again where the server is busy, as it says, or where the connection fails."""
        asked_at = unreached_since = time.monotonic()
        delays = iter(RETRY_DELAYS_S)
        while True:
            try:
                answer = send()
            except (http.client.HTTPException, ConnectionError) as error:
                answer = _Answer(0, str(error).encode())
            if answer.status in _BUSY:
                silent_s = time.monotonic() - max(asked_at, uploads.answered_at)
                if silent_s > uploads.most_busy_s:
                    raise NoServerError(f"{self.url} only says: {_message(answer)}")
                if silent_s > TOLD_BUSY_S:
                    uploads.tell_busy(f"{self.url} is busy, and is asked again: {_message(answer)}")
                unreached_since, delays = time.monotonic(), iter(RETRY_DELAYS_S)
                delay: float | None = answer.retry_after_s
            elif answer.status in _BROKEN:
                delay = next(delays, None)
            else:
                uploads.note_answer()
                return answer
            if delay is None and uploads.connected_at < unreached_since:
                raise NoServerError(_message(answer))
            if delay is None or uploads.given_up.wait(delay):
                return answer

    def _send(
        self, file: BinaryIO, name: str, fields: list[tuple[str, str]], uploads: _Uploads
    ) -> _Answer:
        boundary = uuid4().hex
        fields = [("model", self.model), ("response_format", "verbose_json"), *fields]
        head = "".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields
        )
        head += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; '
            f'filename="{name}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        )
        tail = f"\r\n--{boundary}--\r\n".encode()
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        headers = {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(len(head.encode()) + size + len(tail)),
        }
        request = {"body": _blocks(head.encode(), file, tail), "headers": headers}
        return self._exchange("POST", "/v1/audio/transcriptions", uploads, **request)

    def _exchange(
        self, method: str, path: str, uploads: _Uploads | None = None, **request: Any
    ) -> _Answer:
        headers = self._headers | request.pop("headers", {})
        with closing(self._connection_type(self._netloc, timeout=CONNECT_S)) as connection:
            try:
                connection.connect()
            except OSError as error:
                raise ConnectionError(f"no server answers at {self.url} ({error}).") from error
            connection.sock.settimeout(self._timeout_s)
            with (uploads or _Uploads()).over(connection):
                with suppress(BrokenPipeError, ConnectionResetError):
                    # a server that refuses an upload answers before it has read it all
                    connection.request(method, self._path + path, headers=headers, **request)
                response = connection.getresponse()
                after = response.headers["Retry-After"]
                return _Answer(response.status, response.read(), _retry_after_s(after))


class _Uploads:
    """The connections of one run, which can be ended together, and when they last got on."""

    def __init__(
        self, most_busy_s: float = MOST_BUSY_S, on_busy: Callable[[str], None] | None = None
    ) -> None:
        self._connections: set[http.client.HTTPConnection] = set()
        self.most_busy_s = most_busy_s
        self._on_busy = on_busy
        self._is_told_busy = False
        self._lock = Lock()
        self.given_up = Event()
        self.connected_at = self.answered_at = time.monotonic()

    @contextmanager
    def over(self, connection: http.client.HTTPConnection) -> Iterator[None]:
        self._connections.add(connection)
        self.connected_at = time.monotonic()
        try:
            if self.given_up.is_set():
                raise ConnectionError("nobody waits for the answer.")
            yield
        finally:
            self._connections.discard(connection)

    def note_answer(self) -> None:
        self.answered_at = time.monotonic()
        self._is_told_busy = False

    def tell_busy(self, message: str) -> None:
        """Once, until there is an answer."""
        with self._lock:
            is_told, self._is_told_busy = self._is_told_busy, True
        if self._on_busy and not is_told:
            self._on_busy(message)

    def give_up(self) -> None:
        """End what still waits for the server, which may hear a recording for an hour."""
        self.given_up.set()
        for connection in list(self._connections):
            with suppress(OSError, AttributeError):  # it has just ended
                connection.sock.shutdown(socket.SHUT_RDWR)


def _form_fields(options: TranscribeOptions) -> list[tuple[str, str]]:
    """Return the form fields of the options. Raises ValueError for ``max_clip_s``."""
    if options.max_clip_s is not None:
        raise ValueError("max_clip_s: the server cuts clips; set QWEN3_ASR_MAX_CLIP_S there.")
    fields = [("language", options.language), ("prompt", options.context)]
    fields += [("languages[]", name) for name in options.languages]
    fields += [("keywords[]", keyword) for keyword in options.keywords]
    if options.word_timestamps:
        fields += [("timestamp_granularities[]", name) for name in ("segment", "word")]
    if pauses := options.pauses:
        fields += [
            ("chunking_strategy[threshold]", f"{pauses.threshold}"),
            ("chunking_strategy[silence_duration_ms]", f"{round(1000 * pauses.silence_s)}"),
            ("chunking_strategy[prefix_padding_ms]", f"{round(1000 * pauses.padding_s)}"),
        ]
    if options.audio_track is not None:
        fields += [("audio_track", str(options.audio_track))]
    return [(name, value) for name, value in fields if value]


def _blocks(head: bytes, file: BinaryIO, tail: bytes) -> Iterator[bytes]:
    yield head
    while block := file.read(_BLOCK_BYTES):
        yield block
    yield tail


def _result(index: int, source: Any, future: Future[Transcript]) -> Result:
    try:
        return Result(index, source, transcript=future.result())
    except NoServerError:
        raise
    except Exception as error:  # whatever is wrong with one recording is its result
        return Result(index, source, error=error)


def _is_decoded_here(recording: Any) -> bool:
    """Return whether samples are sent: those of a waveform, or of a part of a recording."""
    if isinstance(recording, Recording):
        return recording.is_part
    is_file = isinstance(recording, _FILES) or hasattr(recording, "read")
    return not is_file


def _open(recording: Any, load: Loader, on_warning: Callable[[str], object]) -> BinaryIO:
    """Return the bytes to send: the file itself, or samples as wav."""
    if _is_decoded_here(recording):
        import soundfile

        file = io.BytesIO()
        waveform = load(recording, on_warning=on_warning)
        soundfile.write(file, waveform, SAMPLE_RATE, format="WAV", subtype="FLOAT")
        return file
    if isinstance(recording, Recording):
        recording.check()
    source = recording.source if isinstance(recording, Recording) else recording
    if source == "-":
        return io.BytesIO(sys.stdin.buffer.read())
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if hasattr(source, "read"):
        return io.BytesIO(source.read())
    if isinstance(source, str) and is_url(source):
        return io.BytesIO(fetch(source))
    return open(source, "rb")


def _filename(recording: Any) -> str:
    """A name for the form, which takes no quotes and line breaks."""
    name = PurePosixPath(os.fspath(Path(_name(recording)))).name
    return "".join(char for char in name if char.isprintable() and char not in '"\\') or "audio"


def _name(recording: Any) -> str:
    if isinstance(recording, Recording):
        return str(recording)
    return os.fspath(recording) if isinstance(recording, str | os.PathLike) else "audio"


def _message(answer: _Answer) -> str:
    """What a server says is wrong."""
    try:
        document = json.loads(answer.body)
        error = document.get("error", document)
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, AttributeError):
        text = answer.body[:200].decode(errors="replace")
        return f"HTTP {answer.status}: {text}" if answer.status else text


def _retry_after_s(header: str | None) -> float:
    """Seconds, at most a minute; a date, which HTTP allows too, counts as nothing said."""
    try:
        stated = float(header or 0)
    except ValueError:
        stated = 0
    return min(stated, MOST_RETRY_AFTER_S) if stated > 0 else BUSY_DELAY_S
