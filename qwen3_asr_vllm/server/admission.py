# SPDX-License-Identifier: Apache-2.0
"""The load that a server accepts: recordings, their seconds of audio, and the bytes of uploads.

A recording of four hours is a waveform of 0.9 GB, however small its file was. So a full server
refuses a request before reading it; and a recording that exceeds what is left is dropped while it
is read or decoded, not after.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

MAX_RECORDINGS = 1024  # between the first byte of an upload and the last of its response
MAX_AUDIO_S = 16 * 3600.0  # seconds: 3.7 GB, and as much again while it passes to the engine
MAX_UPLOADS_MB = 8192  # MiB of uploads, in memory and in TMPDIR, until they are decoded
RETRY_AFTER_S = 5


class Busy(Exception):
    """The server is full; the message says of what, and what to do."""


class Admission:
    """Places for recordings. Threads may share it."""

    def __init__(
        self,
        *,
        max_recordings: int = MAX_RECORDINGS,
        max_audio_s: float = MAX_AUDIO_S,
        max_bytes: int = MAX_UPLOADS_MB << 20,
    ) -> None:
        self.max_recordings, self.max_audio_s = max_recordings, max_audio_s
        self.max_bytes = max_bytes
        self.num_recordings = 0
        self.audio_s = 0.0  # held by all of them
        self.num_bytes = 0  # of all uploads
        self._lock = Lock()

    @contextmanager
    def reserve(self, num_bytes: int = 0) -> Iterator[Reservation]:
        """A place for one recording of ``num_bytes``, if that is known, until the block ends.

        Raises Busy where there is none, where the audio of the others is the most already, or
        where so many bytes would be too much; they are held only as they arrive.
        """
        with self._lock:
            if self.num_recordings >= self.max_recordings:
                raise Busy(_busy_with(f"{self.num_recordings} recordings"))
            if self.audio_s >= self.max_audio_s:
                raise Busy(_busy_with(f"{self.audio_s:.0f} s of audio"))
            self._check_bytes(num_bytes)
            self.num_recordings += 1
        reservation = Reservation(self)
        try:
            yield reservation
        finally:
            reservation.release()
            with self._lock:
                self.num_recordings -= 1

    def change(self, *, seconds: float = 0, num_bytes: int = 0) -> None:
        """Raises Busy where it would be too much; then nothing has changed."""
        with self._lock:
            if seconds > 0 and self.audio_s + seconds > self.max_audio_s:
                raise Busy(_busy_with(f"{self.audio_s:.0f} s of audio"))
            self._check_bytes(num_bytes)
            self.audio_s += seconds
            self.num_bytes += num_bytes

    def _check_bytes(self, num_bytes: int) -> None:
        if num_bytes > 0 and self.num_bytes + num_bytes > self.max_bytes:
            raise Busy(_busy_with(f"{self.num_bytes / 2**20:.0f} MiB of uploads"))


class Reservation:
    """What one recording holds of an ``Admission``."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._seconds, self._num_bytes = 0.0, 0
        self._is_released = False
        self._lock = Lock()

    def hold(self, seconds: float) -> None:
        """It holds so many seconds of audio now.

        Raises Busy where all hold too many then, and RuntimeError once the place is given back:
        a thread may still decode what its client has left.
        """
        with self._lock:
            self._check()
            self._admission.change(seconds=seconds - self._seconds)
            self._seconds = seconds

    def hold_bytes(self, num_bytes: int) -> None:
        """Its upload holds so many bytes now. Raises as ``hold`` does."""
        with self._lock:
            self._check()
            self._admission.change(num_bytes=num_bytes - self._num_bytes)
            self._num_bytes = num_bytes

    def release(self) -> None:
        with self._lock:
            self._admission.change(seconds=-self._seconds, num_bytes=-self._num_bytes)
            self._is_released = True

    def _check(self) -> None:
        if self._is_released:
            raise RuntimeError("the recording was given up.")


def _busy_with(load: str) -> str:
    return f"the server is busy with {load}; try again in {RETRY_AFTER_S} s."
