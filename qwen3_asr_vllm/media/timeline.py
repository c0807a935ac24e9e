# SPDX-License-Identifier: Apache-2.0
"""The timeline of a container: gaps become silence, and losses are counted.

    picture  |----------------------------------|
    sound       |--------|      |---------------|      start and gap become silence

A timestamp ahead of the samples so far means silence between them. After one that goes back, the
next samples continue at the current position.
"""

from __future__ import annotations

from dataclasses import dataclass, field

JITTER_S = 0.1
MAX_GAP_S = 600.0  # a longer gap is a wrong timestamp
_BACKWARDS_S = 1.0  # by which a timestamp goes back where another recording begins


class Timeline:
    """Follows the frames of one track.

    Timestamps that are up to ``jitter_s`` ahead are no gap. ``end_s`` is the duration that the
    container states, None where it states none.
    """

    def __init__(self, *, jitter_s: float = JITTER_S, end_s: float | None = None) -> None:
        self.position_s = 0.0  # of the next sample in the waveform
        self._jitter_s = jitter_s
        self._end_s = end_s
        self._shift_s = 0.0  # from timestamps to positions
        self._expected_s = 0.0  # the timestamp of the next frame

    @property
    def time_s(self) -> float:
        """The timestamp at the position."""
        return self.position_s - self._shift_s

    def place(
        self, time_s: float | None, duration_s: float, *, next_s: float | None = None
    ) -> tuple[float, bool]:
        """Put the next frame; return the seconds of silence before it, and whether its timestamp
        is too far ahead to be true.

        ``time_s`` is its timestamp from the container's start, ``next_s`` that of the frame after
        it; None where they have none. One that is not confirmed by the next does not count.
        """
        silence_s, is_wrong = 0.0, False
        if time_s is not None and next_s is not None and next_s < time_s - _BACKWARDS_S:
            time_s = None
        if time_s is not None:
            jump_s = time_s - self._expected_s
            ahead_s = time_s + self._shift_s - self.position_s
            is_wrong = jump_s > MAX_GAP_S or (jump_s > JITTER_S and self._is_late(time_s))
            if is_wrong or jump_s < -_BACKWARDS_S:
                self._shift_s -= ahead_s
            elif ahead_s > self._jitter_s:
                silence_s = ahead_s
        self.position_s += silence_s + duration_s
        self._expected_s = (self._expected_s if time_s is None else time_s) + duration_s
        return silence_s, is_wrong

    def _is_late(self, time_s: float) -> bool:
        return self._end_s is not None and time_s > self._end_s + 1


@dataclass
class Losses:
    """The unreadable parts of a recording, and their times."""

    num_packets: int = 0
    seconds: float = 0.0
    first_s: float | None = None
    last_s: float = 0.0
    others: list[str] = field(default_factory=list)  # of another kind, as sentences

    def add(self, start_s: float, seconds: float, *, num_packets: int = 0) -> None:
        self.num_packets += num_packets
        self.seconds += seconds
        self.first_s = start_s if self.first_s is None else self.first_s
        self.last_s = start_s

    def warnings(self, start_s: float = 0.0) -> list[str]:
        """Return sentences for the user, for a recording that starts at ``start_s``.

        >>> losses = Losses()
        >>> losses.add(4.2, 0.3, num_packets=2)
        >>> losses.warnings()
        ['2 damaged packets at 0:04, about 0.3 s, could not be read.']
        """
        if self.first_s is None:
            return self.others
        first, last = clock(start_s + self.first_s), clock(start_s + self.last_s)
        where = f"at {first}" if first == last else f"from {first} to {last}"
        length = f"about {max(self.seconds, 0.1):.1f} s"
        plural = "s" if self.num_packets > 1 else ""
        packets = f"{self.num_packets} damaged packet{plural} {where}, {length},"
        what = packets if self.num_packets else f"{length} {where}"
        return [f"{what} could not be read.", *self.others]


def clock(seconds: float) -> str:
    """Format a time for users.

    >>> clock(64.6), clock(3725)
    ('1:04', '1:02:05')
    """
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
