# SPDX-License-Identifier: Apache-2.0
"""Transcribe recordings on a server, over OpenAI's audio route, with the HTTP client of Python.

Files are sent unchanged, and the server decodes them. A recording that fails gives a result with an
error; a server that is unreachable, or busy for too long, ends the run.
"""

from __future__ import annotations

import base64
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
from ..options import SPEAKER_COUNTS, TranscribeOptions, merge_options
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
    import numpy as np

    from ..audio import AudioSource

NUM_CONNECTIONS = 32  # parallel requests: enough to keep the batch of a server full
CONNECT_S = 10  # seconds to connect
TIMEOUT_S = 3600  # seconds without a byte: a slow server may take that long for four hours of audio
RETRY_DELAYS_S = (0.5, 2, 8, 30)  # seconds before each retry after a failed connection
BUSY_DELAY_S = 5  # seconds before a retry if a busy server sends no Retry-After
MOST_BUSY_S = 2 * TIMEOUT_S  # seconds of nothing but busy responses before a run fails
REPORT_BUSY_S = 60  # seconds of nothing but busy responses before on_busy is called
MOST_RETRY_AFTER_S = 60  # upper bound of Retry-After, in seconds
VOICES = "known_speaker_references[]"  # form fields of the voices of known speakers
_BUSY = (429, 503)  # status codes of a busy server
_BROKEN = (0, 502, 504)  # status codes of a failed connection; 0: no response
_BLOCK_BYTES = 1 << 18  # bytes of a file that are read at once
_FILES = (str, os.PathLike, bytes, bytearray, memoryview)  # types of sources that are files


class NoServerError(ConnectionError):
    """The server is unreachable."""


class StatusError(ValueError):
    """The status of a response is not 200."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class _Response:
    status: int  # HTTP status; 0: no response, and the body is the reason
    body: bytes
    retry_after_s: float = BUSY_DELAY_S


class Client:
    """Client of a server at a URL such as ``http://localhost:8000``, with or without ``/v1``.

        from qwen3_asr_vllm import Client

        client = Client("http://localhost:8000")
        print(client.transcribe("talk.mp3", language="de").text)

    ``model`` is by default the first that the server lists. ``api_key`` is sent as OpenAI's
    clients do. ``num_connections`` recordings are sent at once. A busy server is retried; a
    run fails after ``most_busy_s`` seconds of nothing but busy responses. After a minute of them,
    ``on_busy`` is called with the message of the server, in the thread of an upload.

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
            raise ValueError(
                f"{url!r} is no URL of a server; use one such as http://localhost:8000."
            )
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
        """Return the body at a path. Raises StatusError, or OSError without a response."""
        response = self._exchange("GET", path)
        if response.status != 200:
            message = f"{self.url}{path} responds with {response.status}: {_message(response)}."
            raise StatusError(message, response.status)
        return response.body

    def _first_model(self) -> str:
        response = self._exchange("GET", "/v1/models")
        try:
            return str(json.loads(response.body)["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{self.url}/v1/models: {_message(response)}") from error

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
            response = self._send_with_retries(
                lambda: self._send(file, name, fields, uploads), uploads
            )
        if response.status != 200:
            raise ValueError(f"{_name(recording)}: {_message(response)}")
        transcript = read_verbose_json(json.loads(response.body))
        return replace(transcript, warnings=(*warnings, *transcript.warnings))

    def _send_with_retries(self, send: Callable[[], _Response], uploads: _Uploads) -> _Response:
        """Send a request, with retries while the server is busy or the connection fails."""
        sent_at = unreached_since = time.monotonic()
        delays = iter(RETRY_DELAYS_S)
        while True:
            try:
                response = send()
            except (http.client.HTTPException, ConnectionError) as error:
                response = _Response(0, str(error).encode())
            if response.status in _BUSY:
                silent_s = time.monotonic() - max(sent_at, uploads.responded_at)
                if silent_s > uploads.most_busy_s:
                    raise NoServerError(f"{self.url} is busy for too long: {_message(response)}")
                if silent_s > REPORT_BUSY_S:
                    uploads.report_busy(f"{self.url} is busy; retrying: {_message(response)}")
                unreached_since, delays = time.monotonic(), iter(RETRY_DELAYS_S)
                delay: float | None = response.retry_after_s
            elif response.status in _BROKEN:
                delay = next(delays, None)
            else:
                uploads.note_response()
                return response
            if delay is None and uploads.connected_at < unreached_since:
                raise NoServerError(_message(response))
            if delay is None or uploads.given_up.wait(delay):
                return response

    def _send(
        self, file: BinaryIO, name: str, fields: list[tuple[str, str]], uploads: _Uploads
    ) -> _Response:
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
    ) -> _Response:
        headers = self._headers | request.pop("headers", {})
        with closing(self._connection_type(self._netloc, timeout=CONNECT_S)) as connection:
            try:
                connection.connect()
            except OSError as error:
                raise ConnectionError(
                    f"the server at {self.url} is unreachable ({error})."
                ) from error
            connection.sock.settimeout(self._timeout_s)
            with (uploads or _Uploads()).tracking(connection):
                with suppress(BrokenPipeError, ConnectionResetError):
                    # a server that rejects an upload responds before it has read the whole body
                    connection.request(method, self._path + path, headers=headers, **request)
                received = connection.getresponse()
                after = received.headers["Retry-After"]
                return _Response(received.status, received.read(), _retry_after_s(after))


class _Uploads:
    """The connections of one run, to cancel them together, and when they last progressed."""

    def __init__(
        self, most_busy_s: float = MOST_BUSY_S, on_busy: Callable[[str], None] | None = None
    ) -> None:
        self._connections: set[http.client.HTTPConnection] = set()
        self.most_busy_s = most_busy_s
        self._on_busy = on_busy
        self._is_reported_busy = False
        self._lock = Lock()
        self.given_up = Event()
        self.connected_at = self.responded_at = time.monotonic()

    @contextmanager
    def tracking(self, connection: http.client.HTTPConnection) -> Iterator[None]:
        self._connections.add(connection)
        self.connected_at = time.monotonic()
        try:
            if self.given_up.is_set():
                raise ConnectionError("the run was cancelled.")
            yield
        finally:
            self._connections.discard(connection)

    def note_response(self) -> None:
        self.responded_at = time.monotonic()
        self._is_reported_busy = False

    def report_busy(self, message: str) -> None:
        """Call ``on_busy``, once until the next response that is not busy."""
        with self._lock:
            is_reported, self._is_reported_busy = self._is_reported_busy, True
        if self._on_busy and not is_reported:
            self._on_busy(message)

    def give_up(self) -> None:
        """Cancel pending requests, which may take an hour."""
        self.given_up.set()
        for connection in list(self._connections):
            with suppress(OSError, AttributeError):  # it has just been closed
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
    fields += _speaker_fields(options)
    if pauses := options.pauses:
        fields += [
            ("chunking_strategy[threshold]", f"{pauses.threshold}"),
            ("chunking_strategy[silence_duration_ms]", f"{round(1000 * pauses.silence_s)}"),
            ("chunking_strategy[prefix_padding_ms]", f"{round(1000 * pauses.padding_s)}"),
        ]
    if not options.skip_special_tokens:
        fields += [("skip_special_tokens", "false")]
    if options.audio_track is not None:
        fields += [("audio_track", str(options.audio_track))]
    for name in ("use_beam_search", "n", "length_penalty"):
        if (value := getattr(options, name)) is not None:
            fields += [(name, str(value).lower())]
    return [(name, value) for name, value in fields if value]


def _speaker_fields(options: TranscribeOptions) -> list[tuple[str, str]]:
    """Return the form fields of the speakers; a known voice is sent as wav in base64."""
    if not options.diarize:
        return []
    counts = [(name, getattr(options, name)) for name in SPEAKER_COUNTS]
    fields = [("diarize", "true"), *((name, str(count)) for name, count in counts if count)]
    for name, waveform in options.known_speakers.items():
        voice = base64.b64encode(_wav(waveform).getvalue()).decode()
        fields += [("known_speaker_names[]", json.dumps([name])), (VOICES, voice)]
    return fields


def _wav(waveform: np.ndarray) -> io.BytesIO:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, waveform, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    return file


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
    except Exception as error:  # an error of one recording is its result
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
        return _wav(load(recording, on_warning=on_warning))
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
    """Return a file name for the form, without quotes and control characters."""
    name = PurePosixPath(os.fspath(Path(_name(recording)))).name
    return "".join(char for char in name if char.isprintable() and char not in '"\\') or "audio"


def _name(recording: Any) -> str:
    if isinstance(recording, Recording):
        return str(recording)
    return os.fspath(recording) if isinstance(recording, str | os.PathLike) else "audio"


def _message(response: _Response) -> str:
    """Return the error message of a response."""
    try:
        document = json.loads(response.body)
        error = document.get("error", document)
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, AttributeError):
        text = response.body[:200].decode(errors="replace")
        return f"HTTP {response.status}: {text}" if response.status else text


def _retry_after_s(header: str | None) -> float:
    """Return ``Retry-After`` in seconds, at most a minute; a date counts as a missing header."""
    try:
        stated = float(header or 0)
    except ValueError:
        stated = 0
    return min(stated, MOST_RETRY_AFTER_S) if stated > 0 else BUSY_DELAY_S
