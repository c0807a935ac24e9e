# SPDX-License-Identifier: Apache-2.0
"""Real vLLM engines on the CPU, without a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def engine(
    model: Path, *, start: Any = None, in_process: bool = False, **options: Any
) -> Iterator[Any]:
    """Start a real vLLM engine in float32, in processes of its own; shut it down with the block.

    ``start`` makes it from the options: ``vllm.LLM`` (the default) or ``Qwen3ASR``. With
    ``in_process`` it runs in this process, which saves the start of others.
    """
    from vllm import LLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # ranks outnumber memory nodes
        if in_process:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            options = {"kv_cache_memory_bytes": 32 << 20} | options
        defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}
        made = (start or LLM)(str(model), **defaults | {"max_num_seqs": 16} | options)
    try:
        yield made
    finally:
        engines = [made] if start is None else [made, getattr(made, "aligner", None)]
        for owner in filter(None, engines):  # at once, as vLLM's server does
            getattr(owner, "llm", owner).llm_engine.engine_core.shutdown(timeout=0)
