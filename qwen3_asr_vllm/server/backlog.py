# SPDX-License-Identifier: Apache-2.0
"""The audio of a session that waits for the engine, and the back-pressure that it causes."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from ..geometry import SAMPLE_RATE
from .admission import Busy, Reservation
from .session_config import EventError
from .turns import Item

# Seconds of audio that wait for the engine before back-pressure starts: 19 MB. The limit is high
# because a client under back-pressure cannot answer pings and counts as dead after about 20 s.
MAX_BACKLOG_S = 300
FREE_BACKLOG_S = 10  # seconds of backlog without a reservation: more than the longest step
ROOM_POLL_S = 1.0  # seconds between two checks for room
MAX_ROOM_S = 600.0  # seconds without room for one more second of audio: the session ends


class SessionEnd(EventError):
    """The reason for which the server ends a session."""


class Backlog:
    """The items without a transcript, and their audio that waits for the engine."""

    def __init__(self, reservation: Reservation) -> None:
        self.items: list[Item] = []
        self._reservation = reservation
        self._room = asyncio.Event()

    @property
    def is_text_pending(self) -> bool:
        return any(item.is_committed or item.is_decoding for item in self.items)

    def remove(self, item: Item) -> None:
        if item in self.items:
            self.items.remove(item)
        self.make_room()

    def make_room(self) -> None:
        self._has_room()  # lowers the reservation
        self._room.set()

    async def wait_for_room(self) -> None:
        """Apply back-pressure: return once little enough audio waits for the engine.

        Raises SessionEnd if the engine takes no audio for too long.
        """
        end = time.monotonic() + MAX_ROOM_S
        while not self._has_room():
            if time.monotonic() > end:
                text = f"the server took no audio for {MAX_ROOM_S:g} s; the session ends."
                raise SessionEnd(text, code="busy")
            self._room.clear()
            with suppress(asyncio.TimeoutError):  # other sessions and recordings make room, too
                await asyncio.wait_for(self._room.wait(), ROOM_POLL_S)

    def _has_room(self) -> bool:
        """Return whether the backlog fits the limits of the session and of the server."""
        waiting_s = sum(item.num_waiting for item in self.items) / SAMPLE_RATE
        try:
            self._reservation.hold(max(0.0, waiting_s - FREE_BACKLOG_S))
        except Busy:
            return False
        return waiting_s <= MAX_BACKLOG_S
