# SPDX-License-Identifier: Apache-2.0
"""How much a server takes on at once: recordings, and the seconds of audio that they hold.

A recording of four hours is a waveform of 0.9 GB, however small its file was. So who comes when
the server is full is told to come again, before anything is read; and a recording that would fill
it is dropped while it is decoded, not after.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

MAX_RECORDINGS = 1024  # between the first byte of an upload and the last of its answer
MAX_AUDIO_S = 16 * 3600.0  # seconds: 3.7 GB, and as much again while it passes to the engine
RETRY_AFTER_S = 5


class Busy(Exception):
    """The server is full; the message says of what, and what to do."""


class Admission:
    """Places for recordings. Threads may share it."""

    def __init__(
        self, *, max_recordings: int = MAX_RECORDINGS, max_audio_s: float = MAX_AUDIO_S
    ) -> None:
        self.max_recordings, self.max_audio_s = max_recordings, max_audio_s
        self.num_recordings = 0
        self.audio_s = 0.0  # held by all of them
        self._lock = Lock()

    @contextmanager
    def place(self) -> Iterator[Place]:
        """A place for one recording, free again at the end of the block.

        Raises Busy where there is none, or where the audio of the others is the most already.
        """
        with self._lock:
            if self.num_recordings >= self.max_recordings:
                raise Busy(_told(f"{self.num_recordings} recordings"))
            if self.audio_s >= self.max_audio_s:
                raise Busy(_told(f"{self.audio_s:.0f} s of audio"))
            self.num_recordings += 1
        place = Place(self)
        try:
            yield place
        finally:
            place.give_back()
            with self._lock:
                self.num_recordings -= 1

    def change(self, seconds: float) -> None:
        """Raises Busy where it would be too much; then nothing has changed."""
        with self._lock:
            if seconds > 0 and self.audio_s + seconds > self.max_audio_s:
                raise Busy(_told(f"{self.audio_s:.0f} s of audio"))
            self.audio_s += seconds


class Place:
    """What one recording holds of an ``Admission``."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._seconds = 0.0
        self._is_given_back = False
        self._lock = Lock()

    def hold(self, seconds: float) -> None:
        """It holds so many seconds of audio now.

        Raises Busy where all hold too many then, and RuntimeError once the place is given back:
        a thread may still decode what its client has left.
        """
        with self._lock:
            if self._is_given_back:
                raise RuntimeError("the recording was given up.")
            self._admission.change(seconds - self._seconds)
            self._seconds = seconds

    def give_back(self) -> None:
        with self._lock:
            self._admission.change(-self._seconds)
            self._is_given_back = True


def _told(load: str) -> str:
    return f"the server is busy with {load}; try again in {RETRY_AFTER_S} s."
