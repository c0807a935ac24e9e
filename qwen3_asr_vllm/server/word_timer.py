# SPDX-License-Identifier: Apache-2.0
"""The words of realtime sessions with their times, from the aligner, after the text was sent."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from ..rounds import Steps
from ..units import AlignmentError

if TYPE_CHECKING:
    from ..live_words import LiveWords
    from ..streaming import Update
    from ..transcript import Word
    from .aligner_client import RemoteAligner
    from .connection import Client
    from .turns import Item

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints


class WordTimer:
    """Times the words of a session's items. Text never waits for them."""

    def __init__(
        self, client: Client, aligner: RemoteAligner | None, headers: Mapping[str, str]
    ) -> None:
        self._client = client
        self._aligner = aligner
        self._headers = headers
        self._behind: asyncio.Queue[Item] = asyncio.Queue()  # items with text to time
        self._is_working = False

    def push(self, item: Item, update: Update) -> None:
        """Time the words of the text that an update made final."""
        if item.words:
            end = item.start + item.num_samples - item.num_waiting
            item.words.extend(update.delta, update.tentative, end=end, language=update.language)
            self._behind.put_nowait(item)

    @property
    def is_pending(self) -> bool:
        """Return whether words are to come."""
        return self._is_working or not self._behind.empty()

    async def run(self) -> None:
        while True:
            self._is_working = False
            item = await self._behind.get()
            self._is_working = True
            if item.is_dropped or not item.words or not item.words.is_behind:
                continue  # it failed, or an earlier round took this text, too
            try:
                words = await self._time(item.words)
            except (AlignmentError, ImportError, ValueError) as error:
                item.words = None
                logger.warning("The words of item %s are not timed: %s", item.id, error)
                await self._client.send(self._client.dialect.words(item, [], error=str(error)))
                continue
            if words:
                await self._client.send(self._client.dialect.words(item, words))

    async def _time(self, words: LiveWords) -> list[Word]:
        assert self._aligner is not None  # checked when a session asks for words
        steps = await asyncio.to_thread(Steps, words.align())  # splitting a text takes a while
        while steps.requests:
            answers = (self._aligner.answer(each, self._headers) for each in steps.requests)
            steps.send(list(await asyncio.gather(*answers)))
        return steps.result
