# SPDX-License-Identifier: Apache-2.0
"""Decoder processes: a template, and its children, which decode one file after the other.

    server -- socket --> template -- fork --> child
    server -- job, file, memory --> child -- progress, warnings, result --> server

The template imports the decoders once, so a child starts in milliseconds. A child decodes each
file within ``Limits`` of its own. It ends after a file that was refused or damaged, or left memory
behind, so no file affects another. The template ends when the server's end of its socket is
closed, however the server ends; its children end with it.

Messages are JSON, one in each packet of a Unix socket. They are never pickles: a file that takes
over its decoder must not run code in the server. Linux only.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from ..audio import load_audio, load_channels
from ..geometry import SAMPLE_RATE
from ..media.blocks import ChannelError
from ..media.containers import RawAudio
from ..media.ffmpeg import audio_decoders
from ..processes import kill_with_parent

LOADERS: dict[str, Callable[..., Any]] = {
    load.__name__: load for load in (load_audio, load_channels)
}
ERRORS = {error.__name__: error for error in (ChannelError, ValueError, ImportError)}
OUT_OF_MEMORY = os.strerror(errno.ENOMEM)  # text of FFmpeg's errors without memory
MAX_PACKET = 1 << 16  # bytes of a message
MAX_TEXT = 8_000  # characters of a warning or an error
READ_BYTES_PER_S = 64 << 20  # bytes of a file per second of CPU time
PROGRESS_S = 5.0  # seconds of audio between two progress reports
MAX_GROWTH = 8 << 20  # bytes by which the files before may have enlarged a child


@dataclass(frozen=True)
class Limits:
    """Limits of decoding one file. They grow with the audio that is already decoded.

    A table or a tag that expands into gigabytes does so before the first sample; a recording of
    four hours needs its memory step by step.
    """

    memory_bytes: int = 60 << 20  # beyond the memory of the process before it opens the file
    memory_bytes_per_s: int = 3 * 4 * SAMPLE_RATE  # blocks, joined waveform, and a reserve
    cpu_s: float = 2.0
    cpu_s_per_s: float = 0.1  # CPU seconds per second of audio
    stall_s: int = 60  # seconds of wall time between two progress reports

    def for_file(self, num_bytes: int) -> Limits:
        """Return the limits of a file of this size; its decoder may read it more than once."""
        return replace(self, cpu_s=self.cpu_s + num_bytes / READ_BYTES_PER_S)

    def memory(self, audio_s: float) -> int:
        """Return the bytes allowed after ``audio_s`` seconds of audio."""
        return int(self.memory_bytes + audio_s * self.memory_bytes_per_s)

    def cpu(self, audio_s: float) -> int:
        """Return the whole seconds of CPU time allowed after ``audio_s`` seconds of audio."""
        return int(self.cpu_s + audio_s * self.cpu_s_per_s)


def main() -> None:
    """Run the template on the socket whose descriptor is the first argument."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a stopping server completes its requests
    for package in ("soundfile", "soxr", "av"):
        with suppress(ImportError, OSError):  # reported when a file needs it
            import_module(package)
    with suppress(ImportError):
        audio_decoders()
    gc.freeze()  # children share these objects
    Template(socket.socket(fileno=int(sys.argv[1]))).run()


class Template:
    """Forks a child for each request of the server, and reports how it ended."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._links: dict[int, socket.socket] = {}  # sockets by the child's process id
        self._woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a byte arrives at _woken

    def run(self) -> None:
        """Fork until the server closes the socket."""
        while True:
            control = self._control.fileno()
            ready, _, _ = select.select([control, self._woken], [], [])
            if self._woken in ready:
                os.read(self._woken, 4096)
                self._reap()
            if control in ready and not self._start():
                return

    def _start(self) -> bool:
        packet, (*links,), _, _ = socket.recv_fds(self._control, MAX_PACKET, 1)
        if not packet:
            return False
        template, server = os.getpid(), socket.socket(fileno=links[0])
        with suppress(OSError):  # fork failed: the server sees its socket closed
            if (child := os.fork()) == 0:
                for inherited in (self._control, *self._links.values()):
                    inherited.close()  # a child sees no other child's files
                run_child(template, server)
            self._links[child] = server
        return True

    def _reap(self) -> None:
        while self._links:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                return
            with self._links.pop(child) as server, suppress(OSError):  # the server has the result
                server.setblocking(False)
                _send(server, exit_code=os.waitstatus_to_exitcode(status))


def run_child(template: int, server: socket.socket) -> None:
    """Decode the files that the server sends, and end the process."""
    try:
        kill_with_parent(template)
        signal.set_wakeup_fd(-1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries print contents of files
        most_bytes = _address_space() + MAX_GROWTH
        while _decode_next(server) and _address_space() <= most_bytes:
            pass
    except OSError:
        pass  # the server has closed its end
    finally:
        os._exit(0)


def _decode_next(server: socket.socket) -> bool:
    """Decode one file; return whether it left nothing behind."""
    packet, descriptors, _, _ = socket.recv_fds(server, MAX_PACKET, 2)
    if not packet:
        return False
    job = json.loads(packet)
    return Decoding(server, Limits(**job.pop("limits"))).run(*descriptors, **job)


class Decoding:
    """Decodes one file within limits that grow with the audio decoded."""

    def __init__(self, server: socket.socket, limits: Limits) -> None:
        self._server, self._limits = server, limits
        self._idle_bytes, self._idle_s = _address_space(), time.process_time()
        self._audio_s = 0.0
        self._report_s = 0.0  # seconds of audio at which the next report is due
        self._is_clean = True

    def run(self, file: int, output: int, *, loader: str, options: dict[str, Any]) -> bool:
        """Write the waveform of each channel to ``output``, and send their lengths.

        Returns whether the file is undamaged.
        """
        options |= {"on_progress": self._on_progress, "on_warning": self._on_warning}
        if options.get("raw"):
            options["raw"] = RawAudio(**options["raw"])
        self._grant()
        try:
            with open(file, "rb") as recording:
                loaded = LOADERS[loader](recording, **options)
        except Exception as error:
            self._lift()
            self._send(error=_described(error))
            return False
        self._lift()
        channels = loaded if isinstance(loaded, list) else [loaded]
        with open(output, "wb") as memory:
            for waveform in channels:
                memory.write(waveform.data)
        self._send(progress=self._audio_s)
        self._send(lengths=[len(waveform) for waveform in channels])
        return self._is_clean

    def _on_warning(self, warning: str) -> None:
        self._is_clean = False
        self._send(warning=warning[:MAX_TEXT])

    def _on_progress(self, audio_s: float) -> None:
        self._audio_s = audio_s
        if audio_s >= self._report_s:
            self._report_s = audio_s + PROGRESS_S
            self._send(progress=audio_s)
            self._grant()

    def _grant(self) -> None:
        """Raise the limits to what the audio decoded so far allows."""
        _limit_memory(self._idle_bytes + self._limits.memory(self._audio_s))
        used_s = time.process_time() - self._idle_s
        # Unhandled, the signals of both timers end the process. RLIMIT_CPU has whole seconds.
        left_s = max(self._limits.cpu(self._audio_s) - used_s, 1e-3)
        signal.setitimer(signal.ITIMER_PROF, left_s)
        signal.alarm(self._limits.stall_s)

    def _lift(self) -> None:
        """Lift the limits: the rest of the work does not depend on the file."""
        _limit_memory(resource.RLIM_INFINITY)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)

    def _send(self, **message: Any) -> None:
        _send(self._server, **message)


def _described(error: Exception) -> tuple[str, str]:
    """Return the name of the error's type, as the server knows it, and its text."""
    if _is_out_of_memory(error):
        return MemoryError.__name__, ""
    for kind in type(error).__mro__:
        if kind.__name__ in ERRORS:
            return kind.__name__, str(error)[:MAX_TEXT]
    return "", "".join(traceback.format_exception(error))[-MAX_TEXT:]


def _send(server: socket.socket, **message: Any) -> None:
    """Send one message: its kind and its value."""
    server.send(json.dumps(message).encode())


def _limit_memory(soft: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits, default=resource.RLIM_INFINITY), hard))


def _address_space() -> int:
    """Return the bytes of this process's address space."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether a failed allocation is the cause of ``error``."""
    while error is not None:
        if isinstance(error, MemoryError) or OUT_OF_MEMORY in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    main()
