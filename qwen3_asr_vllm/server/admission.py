# SPDX-License-Identifier: Apache-2.0
"""The load that a server accepts: recordings, their seconds of audio, and the bytes of uploads.

A recording of four hours is a waveform of 0.9 GB, however small its file was. So a full server
rejects a request before reading it, and drops a recording as soon as reading or decoding it exceeds
a limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

MAX_RECORDINGS = 1024  # from the first byte of an upload to the last byte of its response
MAX_AUDIO_S = 16 * 3600.0  # seconds: 3.7 GB, twice that while it is copied to the engine
MAX_UPLOADS_MB = 8192  # MiB of undecoded uploads, in memory and in TMPDIR
RETRY_AFTER_S = 5  # seconds; the Retry-After header of a 503


class Busy(Exception):
    """The server is full; the message names the load and what to do."""


class Admission:
    """Reservations of recordings, audio and upload bytes. Thread-safe."""

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
        self.audio_s = 0.0  # seconds held by all recordings
        self.num_bytes = 0  # bytes held by all uploads
        self._lock = Lock()

    @contextmanager
    def reserve(self, num_bytes: int = 0) -> Iterator[Reservation]:
        """Reserve room for one recording until the block ends.

        ``num_bytes`` is the size of its upload, 0 if unknown. It is checked here and held as the
        bytes arrive. Raises Busy if there are too many recordings, too much audio, or no room for
        the upload.
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
        """Add to the load. Raises Busy beyond a limit; then nothing has changed."""
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
    """The share that one recording holds of an ``Admission``."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._seconds, self._num_bytes = 0.0, 0
        self._is_released = False
        self._lock = Lock()

    def hold(self, seconds: float) -> None:
        """Set the seconds of audio that the recording holds.

        Raises Busy if all recordings would hold too many, and RuntimeError after ``release``: a
        thread may still decode a file whose client has disconnected.
        """
        with self._lock:
            self._check()
            self._admission.change(seconds=seconds - self._seconds)
            self._seconds = seconds

    def hold_bytes(self, num_bytes: int) -> None:
        """Set the bytes that its upload holds. Raises as ``hold`` does."""
        with self._lock:
            self._check()
            self._admission.change(num_bytes=num_bytes - self._num_bytes)
            self._num_bytes = num_bytes

    def release(self) -> None:
        """Release all seconds and bytes."""
        with self._lock:
            self._admission.change(seconds=-self._seconds, num_bytes=-self._num_bytes)
            self._is_released = True

    def _check(self) -> None:
        if self._is_released:
            raise RuntimeError("the reservation was released.")


def _busy_with(load: str) -> str:
    return f"the server is busy with {load}; try again in {RETRY_AFTER_S} s."
