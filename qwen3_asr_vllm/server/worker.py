# SPDX-License-Identifier: Apache-2.0
"""The worker of a realtime session: item by item through the engine, and the text to the client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.websockets import WebSocketDisconnect
from vllm.logger import init_logger

from ..geometry import SAMPLE_RATE
from .metrics import count_utterance

if TYPE_CHECKING:
    from ..streaming import StreamRequest, Update
    from .backlog import Backlog
    from .connection import Client
    from .realtime_serving import Realtime
    from .turns import Item
    from .word_timer import WordTimer

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints

DECODE_S = 600.0  # seconds for the engine to answer one request


class Worker:
    """Transcribes the items of a session, in the order of their audio."""

    def __init__(
        self,
        client: Client,
        shared: Realtime,
        backlog: Backlog,
        word_timer: WordTimer,
        headers: Mapping[str, str],
    ) -> None:
        self.items: asyncio.Queue[Item] = asyncio.Queue()
        self._client = client
        self._shared = shared
        self._backlog = backlog
        self._word_timer = word_timer
        self._headers = headers

    async def run(self) -> None:
        while True:
            item = await self.items.get()
            if item.is_dropped:
                continue
            item.task = asyncio.create_task(self._transcribe(item))
            try:
                await asyncio.wait({item.task})
            finally:
                item.task.cancel()  # if this task is being cancelled
                await asyncio.gather(item.task, return_exceptions=True)
                self._backlog.remove(item)
            if not item.task.cancelled():
                item.task.result()

    async def _transcribe(self, item: Item) -> None:
        client = self._client
        try:
            while request := await item.next_request():
                update = await self._decode(item, request)
                await self._send_delta(item, update)
        except WebSocketDisconnect:
            raise
        except Exception as error:  # an engine error; the session continues
            logger.exception("Item %s of a realtime session failed.", item.id)
            item.drop()
            await client.send(client.dialect.failed(item, str(error)))
            return
        if item.is_dropped:
            return
        await self._send_delta(item, item.stream.update())
        await client.send(client.dialect.completed(item, client.config))
        delay_s = time.perf_counter() - item.committed_at
        model = self._shared.models.model_name()
        count_utterance(
            item.num_samples / SAMPLE_RATE, delay_s=delay_s, model=model, item_id=item.id
        )

    async def _decode(self, item: Item, request: StreamRequest) -> Update:
        """Run one engine request; returns the text that it made final."""
        item.is_decoding = True
        decoding = self._shared.decode(request, item.model, self._headers)
        try:
            output = await asyncio.wait_for(decoding, DECODE_S)
        except asyncio.TimeoutError as error:
            raise TimeoutError(f"the engine did not answer within {DECODE_S:g} s.") from error
        item.is_decoding = False
        item.count(output)
        return item.accept(self._shared.read(request, output))

    async def _send_delta(self, item: Item, update: Update) -> None:
        if update.delta:
            self._word_timer.push(item, update)
            await self._client.send(self._client.dialect.delta(item, update, self._client.config))
