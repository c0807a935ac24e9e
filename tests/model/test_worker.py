# SPDX-License-Identifier: Apache-2.0
"""The worker of engines that share a GPU: where it runs and when it starts, without a GPU."""

from __future__ import annotations

import tempfile
from threading import Thread
from types import SimpleNamespace

import pytest
from vllm.v1.worker.gpu_worker import Worker

from qwen3_asr_vllm.engine import NUM_GPUS, SHARED_GPU_WORKER
from qwen3_asr_vllm.model.worker import SharedGpuWorker


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The GPUs of the workers that began to load, in order."""
    gpus = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv(NUM_GPUS, "2")

    def init_device(worker):
        gpus.append(worker.parallel_config.data_parallel_rank_local)

    monkeypatch.setattr(Worker, "init_device", init_device)
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda worker: "seconds")
    return gpus


def worker(rank, *, kv_cache_bytes=None):
    made = object.__new__(SharedGpuWorker)
    made.parallel_config = SimpleNamespace(data_parallel_rank_local=rank)
    made.cache_config = SimpleNamespace(kv_cache_memory_bytes=kv_cache_bytes)
    return made


def test_vllm_finds_the_worker_by_its_name():
    module, _, name = SHARED_GPU_WORKER.rpartition(".")
    assert (SharedGpuWorker.__module__, SharedGpuWorker.__qualname__) == (module, name)


def test_ranks_are_spread_over_the_gpus(started):
    for rank in (0, 1, 2, 3, None):  # None: an engine of its own
        each = worker(rank)
        each.init_device()
        each.compile_or_warm_up_model()
    assert started == [0, 1, 0, 1, 0]


def test_engines_of_a_gpu_start_in_turn(started):
    first, neighbour, second = worker(0), worker(1), worker(2)
    first.init_device()
    neighbour.init_device()
    waiting = Thread(target=second.init_device)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and started == [0, 1]
    assert first.compile_or_warm_up_model() == "seconds"
    waiting.join(30)
    assert started == [0, 1, 0]


def test_a_given_cache_size_needs_no_turn(started):
    first = worker(0)
    first.init_device()
    worker(2, kv_cache_bytes=1 << 30).init_device()
    assert started == [0, 0]
    first.compile_or_warm_up_model()


def test_a_failed_engine_passes_its_turn_on(started):
    failing = worker(0)
    failing.init_device()
    failing._turn.close()  # as the kernel does when its process ends
    worker(2).init_device()
    assert started == [0, 0]
