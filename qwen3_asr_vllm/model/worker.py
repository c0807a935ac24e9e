# SPDX-License-Identifier: Apache-2.0
"""vLLM's GPU worker for engines that share a GPU (``--engines-per-gpu``, halves of a GPU on Ray).

    engine 0: loads, measures, takes its KV cache, captures graphs --> serves
    engine 1: waits ................................................ loads, measures ... --> serves

An engine sizes its KV cache by what the whole GPU has allocated since the engine began. So engines
on one GPU start one after the other, unless ``kv_cache_memory_bytes`` gives the size.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from ..engine import NUM_GPUS

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import CompilationTimes


class SharedGpuWorker(Worker):
    """A worker on GPU ``rank % NUM_GPUS``, where vLLM would take GPU ``rank``."""

    def init_device(self) -> None:
        config = self.parallel_config
        rank = config.data_parallel_rank_local or 0
        config.data_parallel_rank_local = rank % int(os.environ.get(NUM_GPUS, "1"))
        self._turn = ExitStack()
        if not self.cache_config.kv_cache_memory_bytes:
            self._turn.enter_context(_turn(config.data_parallel_rank_local))
        super().init_device()

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Finish the start, and let the next engine of this GPU begin."""
        times = super().compile_or_warm_up_model()
        self._turn.close()
        return times


@contextmanager
def _turn(gpu: int) -> Iterator[None]:
    """Lock this machine's file of a GPU. Linux unlocks it when the process ends."""
    name = f"qwen3-asr-{os.getuid()}-gpu-{current_platform.device_id_to_physical_device_id(gpu)}"
    flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW  # other users write in this folder, too
    with os.fdopen(os.open(Path(tempfile.gettempdir()) / name, flags, 0o600), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        fcntl.flock(file, fcntl.LOCK_UN)  # closing it would leave it to forked children
