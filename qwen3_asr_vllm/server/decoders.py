# SPDX-License-Identifier: Apache-2.0
"""Decoder processes: decode uploads so that no file can harm other requests.

    wav with plain PCM -> this thread
    anything else      -> a child of ``decode_worker.py``, with limits on memory and CPU time

A child that has decoded an undamaged file takes the next one, because starting and ending a process
is half of the cost of a file. If a reused child crashes, a new child tries the file again.

``Decoders.load_audio`` and ``load_channels`` take, return and raise what the functions of
``audio.py`` do. A file that exceeds a limit or crashes a library is a ValueError, too. No
library's pool fits: loky's and Python's own break when one worker is killed, pebble's has neither
progress nor descriptors; all of them send pickles.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import mmap
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from threading import Lock
from typing import Any, BinaryIO

import numpy as np

from . import decode_worker
from .admission import RETRY_AFTER_S, Busy
from .decode_worker import ERRORS, LOADERS, MAX_PACKET, Limits

logger = logging.getLogger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints

MAX_COPIED_BYTES = 1 << 20  # bytes; a larger upload lies on disk already
MAX_HEADER_BYTES = 1 << 16  # bytes besides the samples of a wav file that a thread decodes
PLAIN_CHUNKS = {b"fmt ", b"data", b"fact", b"LIST", b"PEAK", b"bext", b"JUNK"}
PLAIN_TAGS = {1: (8, 16, 24, 32), 3: (32, 64), 6: (8,), 7: (8,)}  # PCM, float, G.711: bits
EXTENSIBLE = 0xFFFE  # the tag is the first two bytes of the subformat


class DecodeError(ValueError):
    """A file exceeded a limit or crashed its decoder; the message says what to do."""


class CrashError(DecodeError):
    """A file crashed its decoder."""


class EndedError(Busy):
    """A child ended without a result, as all do when the template is killed."""

    def __init__(self) -> None:
        super().__init__(f"the decoders were started again; try again in {RETRY_AFTER_S} s.")


class Template:
    """The template process of this server: started when first needed, and again if it dies.

    It ends when the server's end of its socket is closed, at the latest when the server ends.
    ``idle`` are the sockets of children that wait for a file.
    """

    def __init__(self) -> None:
        self.idle: list[socket.socket] = []
        self._lock = Lock()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, dead: socket.socket | None = None) -> socket.socket:
        """Return its socket. Starts it unless it has a socket other than ``dead``."""
        with self._lock:
            if self._socket is None or self._socket is dead:
                if self._process is not None:
                    self._process.kill()
                    self._process.wait()
                self._socket, self._process = _start_template()
            return self._socket

    def fork(self) -> socket.socket:
        """Return the socket of a new child."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            control = self.start()
            try:
                socket.send_fds(control, [b"fork"], [theirs.fileno()])
            except OSError:
                logger.warning("The process that forks decoders was killed; starting it again.")
                socket.send_fds(self.start(dead=control), [b"fork"], [theirs.fileno()])
        return ours


def _start_template() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", decode_worker.__name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
    return ours, process


_TEMPLATE = Template()


class Decoders:
    """Decoder processes of one server. Thread-safe; a thread decodes one file at a time."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()

    def warm(self) -> None:
        """Start the template, which imports the decoders in the background."""
        if sys.platform == "linux":
            _TEMPLATE.start()

    def load_audio(self, file: BinaryIO, **options: Any) -> np.ndarray:
        """Return the waveform of a file. ``options`` are those of ``audio.load_audio``.

        Also raises DecodeError, and Busy if the decoders have to be restarted.
        """
        return self._load("load_audio", file, options)[0]

    def load_channels(self, file: BinaryIO, num_channels: int, **options: Any) -> list[np.ndarray]:
        """Return the waveform of each channel. ``options``: those of ``audio.load_channels``."""
        return self._load("load_channels", file, options | {"num_channels": num_channels})

    def _load(self, loader: str, file: BinaryIO, options: dict[str, Any]) -> list[np.ndarray]:
        if sys.platform != "linux" or is_plain_pcm(file):
            loaded = LOADERS[loader](file, **options)
            return loaded if isinstance(loaded, list) else [loaded]
        on_progress = options.pop("on_progress", None) or _ignore
        on_warning = options.pop("on_warning", None) or logger.warning
        limits = self._limits.for_file(file.seek(0, os.SEEK_END))
        job = {"loader": loader, "options": options, "limits": limits}

        def decode(child: socket.socket) -> list[np.ndarray]:
            with _closing_on_error(child), _memory() as output:
                _send(child, job, file, output)
                lengths, warnings = _follow(child, limits, on_progress)
                waveforms = _waveforms(output, lengths)
            _TEMPLATE.idle.append(child)
            for warning in warnings:
                on_warning(warning)
            return waveforms

        with suppress(IndexError, CrashError, EndedError):
            return decode(_TEMPLATE.idle.pop())
        return decode(_TEMPLATE.fork())


@contextmanager
def _closing_on_error(child: socket.socket) -> Iterator[None]:
    """Close the socket, and so end the child, unless the block succeeds."""
    try:
        yield
    except BaseException:
        child.close()
        raise


def _send(child: socket.socket, job: dict[str, Any], file: BinaryIO, output: int) -> None:
    """Send a job to a child. Raises EndedError."""
    packet = json.dumps(job, default=asdict).encode()
    with _descriptor(file) as recording:
        try:
            socket.send_fds(child, [packet], [recording, output])
        except OSError as error:
            raise EndedError from error


def _follow(
    child: socket.socket, limits: Limits, on_progress: Callable[[float], object]
) -> tuple[list[int], list[str]]:
    """Return the lengths of the waveforms, and the warnings about the file.

    Raises the error or the exit of the child.
    """
    audio_s = 0.0
    warnings = []
    while packet := _receive(child):
        match json.loads(packet):
            case {"progress": float(audio_s)}:
                on_progress(audio_s)
            case {"warning": str(warning)}:
                warnings.append(warning)
            case {"lengths": [*lengths]}:
                return lengths, warnings
            case {"error": [name, text]}:
                raise _error(name, text, limits, audio_s)
            case {"exit_code": int(exit_code)}:
                raise _ended(exit_code, limits, audio_s)
    raise EndedError


def _receive(child: socket.socket) -> bytes:
    """Return the next message of a child; empty if it has ended."""
    with suppress(ConnectionError):
        return child.recv(MAX_PACKET)
    return b""


def _error(name: str, text: str, limits: Limits, audio_s: float) -> Exception:
    """Return the error that a child reported."""
    if name in ERRORS:
        return ERRORS[name](text)
    if name == MemoryError.__name__:
        return _too_much(f"{limits.memory(audio_s) >> 20} MiB of memory", audio_s)
    logger.error("A decoder failed:\n%s", text)
    return CrashError(f"the decoder failed after {audio_s:.0f} s of audio. {_ADVICE}")


def _ended(exit_code: int, limits: Limits, audio_s: float) -> Exception:
    """Return the error of a child that exited; a negative code is the signal that ended it."""
    if exit_code == -signal.SIGPROF:
        return _too_much(f"{limits.cpu(audio_s)} s of CPU time", audio_s)
    if exit_code == -signal.SIGALRM:
        return _too_much(f"{limits.stall_s} s", audio_s)
    reason = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
    return CrashError(f"the decoder crashed ({reason}) after {audio_s:.0f} s of audio. {_ADVICE}")


_ADVICE = "Convert the file to wav or flac, without tags and covers, and send that."


def _too_much(limit: str, audio_s: float) -> DecodeError:
    return DecodeError(
        f"decoding the file takes more than {limit}, the limit after {audio_s:.0f} s of audio. "
        f"{_ADVICE}"
    )


def _ignore(_: float) -> None:
    pass


@contextmanager
def _memory() -> Iterator[int]:
    """Yield a descriptor of shared memory. /dev/shm is too small: 64 MB in a container."""
    descriptor = os.memfd_create("waveform", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _descriptor(file: BinaryIO) -> Iterator[int]:
    """Yield a descriptor of the file, or of a copy if the file may be in memory."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size > MAX_COPIED_BYTES:
        with suppress(io.UnsupportedOperation):
            yield file.fileno()
            return
    with _memory() as copy:
        with open(copy, "wb", closefd=False) as output:
            shutil.copyfileobj(file, output)
        yield copy


def _waveforms(memory: int, lengths: list[int]) -> list[np.ndarray]:
    """Return the waveforms that a child has written, mapped rather than copied."""
    # Reading a page that is cut off would raise SIGBUS.
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    samples = np.frombuffer(mmap.mmap(memory, 0, access=mmap.ACCESS_COPY), np.float32)
    return np.split(samples, np.cumsum(lengths)[:-1])


def is_plain_pcm(file: BinaryIO) -> bool:
    """Return whether a file is wav with PCM, float or G.711 samples, which need no decoder.

    Each of its chunks is known, occurs once and lies within the file.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not re.fullmatch(b"RIFF.{4}WAVE", file.read(12), re.DOTALL):
        return False
    sizes: dict[bytes, int] = {}
    layout = b""
    while (offset := file.tell()) < end:
        name, size = file.read(4), int.from_bytes(file.read(4), "little")
        if name not in PLAIN_CHUNKS or name in sizes or offset + 8 + size > end:
            return False
        sizes[name] = size
        if name == b"fmt ":
            layout = file.read(min(size, MAX_HEADER_BYTES))
        file.seek(offset + 8 + size + size % 2)
    header_bytes = sum(sizes.values()) - sizes.get(b"data", 0)
    return b"data" in sizes and header_bytes <= MAX_HEADER_BYTES and _is_plain(layout)


def _is_plain(layout: bytes) -> bool:
    """Return whether the "fmt " chunk of a wav file states samples that need no decoder."""
    if len(layout) < 16:
        return False
    tag, *_, bits = struct.unpack("<HHIIHH", layout[:16])
    if tag == EXTENSIBLE:
        tag = int.from_bytes(layout[24:26], "little")
    return bits in PLAIN_TAGS.get(tag, ())
